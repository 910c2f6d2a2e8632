"""The command: help, LightningCLI with our classes, configs that fail before training."""

from pathlib import Path

import pytest
import yaml

import lightning_aux
from lightning_aux.cli import main
from lightning_aux.cli.compare_file import read_comparison

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
FITS = [path for path in RECIPES if "base" not in yaml.safe_load(path.read_text())]
COMPARISONS = [path for path in RECIPES if path not in FITS]


def name(path):
    return f"{path.parent.name}-{path.stem}"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def printed(capsys):
    """The config that `--print_config` shows for some arguments of fit."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["fit", *map(str, arguments), "--print_config"])
        output = capsys.readouterr()
        assert stop.value.code == 0, output.err
        return yaml.safe_load(output.out)

    return run


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "compare"):
        assert f"\n  {command} " in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-aux {lightning_aux.__version__}\n"


def test_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["comprae"])
    assert stop.value.code == 2
    assert "Did you mean 'compare'?" in capsys.readouterr().err


@pytest.mark.parametrize("path", FITS, ids=name)
def test_printed_config_round_trips(path, printed, tmp_path):
    first = printed("--config", path)
    again = tmp_path / "printed.yaml"
    again.write_text(yaml.safe_dump(first))
    assert printed("--config", again) == first
    written = yaml.safe_load(path.read_text())
    assert first["trainer"]["max_epochs"] == written["trainer"]["max_epochs"]
    callbacks = [each["trainer"].get("callbacks") or [] for each in (written, first)]
    callbacks = [
        [each] if isinstance(each, dict) else each for each in callbacks
    ]  # one, or several
    for given, shown in zip(*callbacks, strict=True):
        assert shown["class_path"].endswith(given["class_path"])
        assert given["init_args"].items() <= shown["init_args"].items()


@pytest.mark.parametrize("path", COMPARISONS, ids=name)
def test_compare_recipe_parses(path):
    comparison = read_comparison(path)
    assert len(comparison.variants) > 1


@pytest.fixture
def loggers_of_fit(monkeypatch, tmp_path):
    """The loggers that the Trainer gets for some arguments of fit, which does not train."""
    monkeypatch.chdir(tmp_path)  # WandbLogger makes its folder at once

    def run(*arguments):
        seen = []
        monkeypatch.setattr(
            "lightning.pytorch.Trainer.fit", lambda self, **_: seen.extend(self.loggers)
        )
        assert main(["fit", *map(str, arguments)]) == 0
        return {type(logger).__name__: logger for logger in seen}

    return run


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_one_flag_decides_where_wandb_writes(mode, loggers_of_fit):
    loggers = loggers_of_fit("--config", ROOT / "recipes/mnist1d/baseline.yaml", "--wandb", mode)
    assert list(loggers) == ["CSVLogger", "WandbLogger"]
    assert loggers["WandbLogger"]._offline is (mode == "offline")
    assert loggers["WandbLogger"].name == "lightning-aux", "the recipe's own arguments stay"


def test_one_flag_leaves_wandb_out(loggers_of_fit):
    recipe = ROOT / "recipes/mnist1d/baseline.yaml"
    assert list(loggers_of_fit("--config", recipe, "--wandb", "off")) == ["CSVLogger"]


def test_recipes_write_wandb_to_disk_by_default(loggers_of_fit):
    loggers = loggers_of_fit("--config", ROOT / "recipes/mnist1d/baseline.yaml")
    assert loggers["WandbLogger"]._offline is True


def test_wandb_is_added_where_the_config_has_none(loggers_of_fit):
    toy = "--model=tests.cli.toy.ToyModel"
    assert list(loggers_of_fit("--wandb=offline", toy, "--trainer.logger=false")) == ["WandbLogger"]


TOY = ["--model=tests.cli.toy.ToyModel", "--data=tests.cli.toy.ToyData", "--wandb=off"]


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        ({"class_path": "EMATeacher", "init_args": {"dekay": 0.9}}, "dekay"),
        ({"class_path": "EMATeacher", "init_args": {"decay": "slow"}}, "decay"),
        ({"class_path": "EMATeachr"}, "EMATeachr"),
        ({"class_path": "EMAAnchor", "init_args": {"weight": "lineer(0, 1)"}}, "lineer"),
        ({"class_path": "Objective"}, "lightning_aux.Objective has no term"),
        ({"class_path": "tests.cli.toy.Termless"}, "tests.cli.toy.Termless has no term"),
    ],
)
def test_a_wrong_callback_in_a_config_ends_before_training(callback, message, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    trainer = {"callbacks": [callback], "default_root_dir": str(tmp_path / "logs"), "max_epochs": 1}
    config.write_text(yaml.safe_dump({"trainer": trainer}))

    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={config}", *TOY])

    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            {"class_path": "SelfDistillation", "init_args": {"teacher": "emma"}},
            "self_distillation: no teacher is called 'emma'.",
        ),
        (
            {"class_path": "EMAAnchor", "init_args": {"taps": {"logits": "nte"}}},
            "ema_anchor: ",
        ),
        (
            {"class_path": "DropoutSchedule", "init_args": {"p": 0.1, "until": 4}},
            "dropout_schedule",
        ),
        ({"class_path": "tests.cli.toy.Wraps"}, "the cause, for the user"),
    ],
)
def test_what_does_not_fit_the_model_is_one_message_without_a_traceback(
    callback, message, tmp_path, capsys
):
    config = tmp_path / "config.yaml"
    trainer = {"callbacks": [callback], "logger": False, "enable_checkpointing": False}
    trainer |= {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": str(tmp_path)}
    config.write_text(yaml.safe_dump({"trainer": trainer}))

    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={config}", *TOY[:2]])

    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert f"\nlightning-aux: error: {message}" in "\n" + shown
    assert "Traceback" not in shown


def test_an_error_that_is_not_ours_keeps_its_traceback(tmp_path):
    trainer = {"callbacks": "tests.cli.toy.Fails", "logger": "false", "default_root_dir": tmp_path}
    arguments = [f"--trainer.{key}={value}" for key, value in trainer.items()]
    with pytest.raises(RuntimeError, match="this variant cannot train"):
        main(["fit", *TOY[:2], *arguments])


def test_fit_saves_its_config_beside_the_logs_again_and_again(tmp_path):
    logger = {
        "class_path": "CSVLogger",
        "init_args": {"save_dir": str(tmp_path), "version": "here"},
    }
    config = tmp_path / "config.yaml"
    trainer = {
        "logger": [logger],
        "max_epochs": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "callbacks": [
            {
                "class_path": "EMAAnchor",
                "init_args": {"space": "weight", "weight": "linear(0, 1, until=50%)"},
            }
        ],
    }
    config.write_text(yaml.safe_dump({"trainer": trainer, "seed_everything": 3}))
    for _ in range(2):
        assert main(["fit", f"--config={config}", *TOY[:2]]) == 0
    (saved,) = tmp_path.rglob("here/config.yaml")
    content = yaml.safe_load(saved.read_text())
    assert content["seed_everything"] == 3
    assert content["trainer"]["callbacks"][0]["init_args"]["weight"] == "linear(0, 1, until=50%)"
