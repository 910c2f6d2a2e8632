"""Variants of a compare file by recipe, by grid, and by name on the command line."""

from pathlib import Path

import pytest
import yaml

from lightning_aux.cli.compare_file import read_comparison
from lightning_aux.cli.variants import drafts
from lightning_aux.comparison import ComparisonError, read_comparison_of
from tests.cli.comparing import BASE, toy


@pytest.fixture
def variants(place):
    """Reads a compare file with these variants; nothing is trained."""

    def read(written, **settings):
        place.write(variants=written)
        return read_comparison(place.path / "compare.yaml", **settings).variants

    return read


@pytest.fixture
def recipe(place):
    def write(**content):
        (place.path / "recipe.yaml").write_text(yaml.safe_dump(content))

    return write


def callbacks(variant):
    return [
        (entry["class_path"].rpartition(".")[2], entry.get("init_args", {}))
        for entry in variant.config["trainer"]["callbacks"]
    ]


def test_a_recipe_adds_its_callbacks_and_lays_its_values_over_the_base(place, variants, recipe):
    base = {**BASE, "trainer": {**BASE["trainer"], "callbacks": [toy("Draws")]}}
    place.write_base({**base, "model": {**BASE["model"], "init_args": {"lr": 0.3, "wait": 0.2}}})
    recipe(
        seed_everything=7,
        model={"class_path": "tests.cli.toy.ToyModel", "init_args": {"lr": 0.01}},
        trainer={
            "gradient_clip_val": 0.5,
            "logger": [{"class_path": "CSVLogger", "init_args": {"save_dir": "elsewhere"}}],
            "callbacks": [toy("Draws"), toy("Sleeps", seconds=0.1), "RichProgressBar"],
        },
    )
    own = {"recipe": "recipe.yaml", "callbacks": ["EMATeacher"]}
    found = variants({"a": own, "b": {**own, "set": {"model.init_args.lr": 0.02}}})
    a = found["a"].resolved
    assert a["model"]["init_args"] == {"lr": 0.01, "wait": 0.2, "sleeps": 0.0}
    assert a["trainer"]["gradient_clip_val"] == 0.5
    assert a["trainer"]["max_epochs"] == BASE["trainer"]["max_epochs"]
    assert a["trainer"]["logger"] is False
    assert "seed_everything" not in a
    assert callbacks(found["a"]) == [
        ("Draws", {}),
        ("Sleeps", {"seconds": 0.1}),
        ("EMATeacher", {}),
    ]
    assert found["b"].resolved["model"]["init_args"]["lr"] == 0.02
    assert callbacks(found["baseline"]) == [("Draws", {})]


def test_an_object_of_another_class_replaces_that_of_the_base(place, variants, recipe):
    place.write_base({**BASE, "optimizer": toy_optimizer("SGD", momentum=0.9)})
    recipe(optimizer=toy_optimizer("AdamW", lr=0.1))
    optimizer = variants({"a": {"recipe": "recipe.yaml"}})["a"].config["optimizer"]
    assert optimizer == toy_optimizer("AdamW", lr=0.1)


def toy_optimizer(name, **init_args):
    return {"class_path": f"torch.optim.{name}", "init_args": {"lr": 0.1, **init_args}}


def test_what_is_set_for_all_lies_over_a_recipe(variants, recipe):
    recipe(trainer={"max_epochs": 50})
    assert variants({"a": {"recipe": "recipe.yaml"}})["a"].resolved["trainer"]["max_epochs"] == 50
    found = variants({"a": {"recipe": "recipe.yaml"}}, epochs=2)
    assert found["a"].resolved["trainer"]["max_epochs"] == 2


def test_a_grid_is_every_combination_of_keys_and_arguments_of_callbacks(variants):
    found = variants(
        {
            "kd": {
                "callbacks": [
                    {"class_path": "EMATeacher"},
                    {"class_path": "SelfDistillation", "init_args": {"temperature": 2.0}},
                ],
                "set": {"model.init_args.wait": 0.0},
                "grid": {
                    "SelfDistillation.weight": [0.5, "linear(0, 1, until=30%)"],
                    "model.init_args.lr": [0.1, 0.01],
                },
            }
        }
    )
    assert list(found) == [
        "baseline",
        "kd-weight=0.5-lr=0.1",
        "kd-weight=0.5-lr=0.01",
        "kd-weight=linear_0_1_until=30-lr=0.1",
        "kd-weight=linear_0_1_until=30-lr=0.01",
    ]
    last = found["kd-weight=linear_0_1_until=30-lr=0.01"]
    assert last.resolved["model"]["init_args"]["lr"] == 0.01
    distilled = {"temperature": 2.0, "weight": "linear(0, 1, until=30%)"}
    assert callbacks(last)[1] == ("SelfDistillation", distilled)
    assert last.changes["grid"] == {
        "SelfDistillation.weight": "linear(0, 1, until=30%)",
        "model.init_args.lr": 0.01,
    }
    assert len({variant.fingerprint(0) for variant in found.values()}) == 5


def test_a_grid_reaches_callbacks_of_base_and_recipe_alone(place, variants, recipe):
    sleeps = {"callbacks": [toy("Sleeps", seconds=0.1)]}
    place.write_base({**BASE, "trainer": {**BASE["trainer"], **sleeps}})
    recipe(trainer={"callbacks": [toy("Allocates", megabytes=1)]})
    grid = {"Sleeps.seconds": [0.2], "Allocates.megabytes": [2]}
    found = variants({"a": {"recipe": "recipe.yaml", "grid": grid}})
    changed = [("Sleeps", {"seconds": 0.2}), ("Allocates", {"megabytes": 2})]
    assert callbacks(found["a-seconds=0.2-megabytes=2"]) == changed
    assert callbacks(found["baseline"]) == [("Sleeps", {"seconds": 0.1})]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([True, None, -1.5], ["a-lr=true", "a-lr=null", "a-lr=-1.5"]),
        ([[1, 2], {"class_path": "x.Y"}], ["a-lr=1_2", "a-lr=Y"]),
        (["a/b", "a b", "../c"], ["a-lr=a_b.1", "a-lr=a_b.2", "a-lr=.._c"]),
        (["SGD", "sgd"], ["a-lr=SGD.1", "a-lr=sgd.2"]),
    ],
)
def test_names_are_good_for_folders_and_tell_values_apart(values, names):
    found = drafts({"a": {"grid": {"model.init_args.lr": values}}}, Path("compare.yaml"))
    assert [draft.name for draft in found[1:]] == names


def test_keys_that_end_alike_are_told_apart():
    grid = {"model.init_args.lr": [0.1], "optimizer.init_args.lr": [0.2], "Sleeps.seconds": [1]}
    (_, draft) = drafts({"a": {"grid": grid}}, Path("compare.yaml"))
    assert draft.name == "a-model.lr=0.1-optimizer.lr=0.2-seconds=1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "recip.yaml"}, "Did you mean 'recipe.yaml'?"),
        ({"recipe": "continued.yaml"}, "remove 'ckpt_path'"),
        ({"recipe": ["recipe.yaml"]}, "'recipe' is a str"),
        ({"grid": [1]}, "'grid' is a dict"),
        ({"grid": {"model.init_args.lr": 0.1}}, "'model.init_args.lr' is a list of values"),
        ({"grid": {"model.init_args.lr": []}}, "'model.init_args.lr' is a list of values"),
        ({"grid": {"model.init_args.lrr": [0.1]}}, "lrr"),
        ({"grid": {f"key{n}": ["x" * 60] for n in range(5)}}, "a folder cannot be named"),
        ({"grid": {"model.init_args.lr": ["fast"]}}, "variant 'a-lr=fast'"),
        ({"grid": {"Sleep.seconds": [1]}}, "of the class 'Sleep'. Did you mean 'Sleeps'?"),
        ({"grid": {"Sleeps": [1]}}, "an argument too"),
        ({"grid": {"Sleeps.secs": [1]}}, "secs"),
        ({"set": {"Sleeps.seconds": "long"}}, "seconds"),
        ({"set": {"Draws.x": 1}}, "2 callbacks are of the class 'Draws'"),
        ({"set": {"Refuses.value": 2}}, "no callback is of the class 'Refuses'"),
        ({"set": {"EMATeacher.decay": 2.0}}, "EMATeacher: "),
    ],
)
def test_a_wrong_variant_says_what_and_where(place, variants, recipe, changes, message):
    recipe(trainer={})
    (place.path / "continued.yaml").write_text("ckpt_path: last.ckpt\n")
    added = [toy("Sleeps"), toy("Draws"), toy("Draws"), "EMATeacher"]
    with pytest.raises(ComparisonError) as error:
        variants({"a": {"callbacks": added, **changes}})
    assert message in str(error.value)
    assert "variant 'a" in str(error.value) or "continued.yaml" in str(error.value)


def test_a_key_of_a_callback_that_is_not_everywhere_is_refused_for_all(variants):
    with pytest.raises(ComparisonError, match=r"variant 'baseline': 'Sleeps.seconds': no callback"):
        variants({"a": {"callbacks": [toy("Sleeps")]}}, overrides={"Sleeps.seconds": 1})


def test_only_some_variants_and_the_one_that_is_compared_with(place, variants):
    written = {"a": {"grid": {"model.init_args.lr": [0.1, 0.2]}}, "b": {}, "c": {}}
    assert list(variants(written, only=["b"])) == ["baseline", "b"]
    assert list(variants(written, only=["a"])) == ["baseline", "a-lr=0.1", "a-lr=0.2"]
    assert list(variants(written, only=["*0.2", "c"])) == ["baseline", "a-lr=0.2", "c"]
    place.content["baseline"] = "b"
    assert list(variants(written, only=["c"])) == ["b", "c"]
    with pytest.raises(ComparisonError, match=r"named 'd'.*Variants: baseline, a-lr=0.1"):
        variants(written, only=["d"])


def test_what_is_not_selected_stays_in_the_tables_where_it_was_finished(place):
    def compare(*flags, rate=0.2):
        written = {"a": {}, "b": {"set": {"model.init_args.lr": rate}}, "c": {}}
        assert place.compare(*flags, variants=written) == 0
        shown = {(row["variant"], int(row["seed"])) for row in place.rows("results.csv")}
        page = read_comparison_of(place.output)
        names = {name for name, _ in shown}
        assert list(page.variants) == [name for name in ("baseline", "a", "b") if name in names]
        assert page.seeds == tuple(sorted({seed for _, seed in shown}))
        return shown - {("baseline", 0)}

    assert compare("--seeds=0", "--only=b") == {("b", 0)}
    assert compare("--seeds=0", "--only=a") == {("a", 0), ("b", 0)}
    before = (place.run_directory("b", 0) / "result.json").stat().st_mtime_ns
    expected = {("a", 0), ("b", 0), ("a", 1), ("baseline", 1)}
    assert compare("--seeds=1", "--only=a", "--fresh") == expected
    assert (place.run_directory("b", 0) / "result.json").stat().st_mtime_ns == before
    assert compare("--seeds=0", "--only=a", rate=0.3) == expected - {("b", 0)}


def test_a_selection_stands_alone_where_another_variant_is_wrong(place, capsys):
    written = {"a": {}, "b": {"set": {"model.init_args.lr": "fast"}}}
    assert place.compare("--seeds=0", "--only=a", variants=written) == 0
    assert "nothing but what is selected: " in capsys.readouterr().out
    assert [row["variant"] for row in place.rows("results.csv")] == ["baseline", "a"]
