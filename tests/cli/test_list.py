"""`lightning-aux list`: everything registered has a line that is true, filters, and its card."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import lightning_aux
from lightning_aux.cli import catalogue as module
from lightning_aux.cli import main
from lightning_aux.cli.catalogue import COSTS, KINDS, NEEDS, catalogue, method
from lightning_aux.engine import Attached, Pass, Step
from lightning_aux.objective import Objective
from lightning_aux.registry import ENTRIES
from tests.contract.models import Classifier
from tests.contract.training import fit, seeded
from tests.docs.test_package import ROOT, tomllib

METHODS = {each.name: each for each in catalogue()}
PUBLIC = {
    name
    for name in lightning_aux.__all__
    if inspect.isclass(found := getattr(lightning_aux, name)) and issubclass(found, Attached)
} - {"Objective", "Taps"}


def listed(capsys: Any, *arguments: str) -> Any:
    assert main(["list", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------------------------- what is said
@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_class_has_its_line(name: str) -> None:
    line = METHODS[name]
    assert line.kind in KINDS.values()
    assert line.summary.endswith(".")
    assert "\n" not in line.summary
    assert set(line.needs) <= set(NEEDS)
    assert line.cost
    assert set(line.cost) <= set(COSTS)
    kind = getattr(lightning_aux, name)
    assert issubclass(kind, Objective) == (line.kind == "objectives")


def test_nothing_else_is_listed_and_every_word_is_used() -> None:
    assert set(METHODS) == PUBLIC
    assert {word for each in METHODS.values() for word in each.needs} == set(NEEDS)
    assert {word for each in METHODS.values() for word in each.cost} == set(COSTS)


def test_papers_are_those_of_the_source_section() -> None:
    assert METHODS["ZLoss"].papers == ("2204.02311", "2309.14322")
    assert METHODS["Phases"].papers == ()


FIRST: dict[str, str] = {}
for _entry in ENTRIES:
    for _each in ENTRIES[_entry].make(0.5):
        if isinstance(_each, Objective):
            FIRST.setdefault(type(_each).__name__, _entry)
# What its example makes use of and it can do without: a loss of its own, an offset for each class.
OPTIONS = {"MultiSampleDropout": {"logits", "labels"}, "SpectralDecoupling": {"labels"}}
OBJECTIVES = sorted(each.name for each in METHODS.values() if each.kind == "objectives")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_needs_what_it_asks_a_step_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first of its examples in the registry: what is asked for there is in its card."""
    asked: set[str] = set()

    def spied(kind: type, attribute: str, word: str) -> None:
        found = inspect.getattr_static(kind, attribute)
        function = found.fget if isinstance(found, property) else found

        def note(step: Any, *arguments: Any) -> Any:
            if step._asked_by == spy:
                asked.add(word)
            return function(step, *arguments)

        monkeypatch.setattr(kind, attribute, property(note) if function is not found else note)

    added = ENTRIES[FIRST[name]].make(0.5)
    (member,) = (each for each in added if type(each).__name__ == name)
    spy, own = member.name, {each.name for each in member.companions()}
    for kind, attribute, word in [
        (Pass, "logits", "logits"),
        (Pass, "target", "labels"),
        (Step, "index", "index"),
        (Step, "teacher", "teacher"),
    ]:
        spied(kind, attribute, word)
    fit(seeded(Classifier, dropout=0.1), added, max_epochs=1)
    if own and "teacher" not in METHODS[name].needs:
        asked.discard("teacher")  # it makes one itself
    asked -= OPTIONS.get(name, set())
    assert asked == set(METHODS[name].needs) & {"logits", "labels", "index", "teacher"}
    arguments = type(member).init_parameters()
    needed = {key for key, each in arguments.items() if each.default is each.empty}
    assert ("path" in METHODS[name].needs) == bool(needed & {"classifier", "dropout", "on"})


# ---------------------------------------------------------------------------------- the command
def test_the_table_names_everything_with_its_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for each in METHODS.values():
        (line,) = (line for line in text.splitlines() if line.startswith(f"  {each.name} "))
        assert not each.papers or each.papers[0] in line


def test_filters_say_what_the_model_has_and_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    labels = {each["name"] for each in listed(capsys, "--needs", "labels")}
    assert "LabelSmoothing" in labels
    assert "ZLoss" not in labels
    assert {each["name"] for each in listed(capsys, "--needs", "labels,index")} == {
        "ProgressiveSelfDistillation"
    }
    poor = {each["name"] for each in listed(capsys, "--without", "labels", "--without", "teacher")}
    assert {"ZLoss", "EMAAnchor", "EMATeacher"} <= poor
    assert not poor & {"LabelSmoothing", "SelfDistillation"}


def test_json_has_the_whole_line(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = (each for each in listed(capsys) if each["name"] == "ZLoss")
    assert line == {
        "name": "ZLoss",
        "kind": "objectives",
        "summary": METHODS["ZLoss"].summary,
        "needs": ["logits"],
        "cost": ["logits"],
        "papers": ["2204.02311", "2309.14322"],
    }


@pytest.mark.parametrize("name", ["ZLoss", "z_loss", "zloss"])
def test_show_prints_the_card_with_the_arguments(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", "--show", name]) == 0
    text = capsys.readouterr().out
    assert "Cost per step" in text
    assert "weight" in text
    assert ":::" not in text
    assert "needs:" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--needs", "label"], r"list: --needs label: Near matches: 'labels'"),
        (["--without", "teachers"], r"list: --without teachers: Near matches: 'teacher'"),
        (["--show", "ZLos"], r"list: no method is called 'ZLos'. Near matches: 'ZLoss'"),
    ],
)
def test_mistakes_name_near_matches(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["list", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------- the installed cards
def test_cards_are_found_within_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the wheel is told to put them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    ((source, place),) = wheel.items()
    (tmp_path / place).parent.mkdir()
    (tmp_path / place).symlink_to(ROOT / source)
    monkeypatch.setattr(lightning_aux, "__file__", str(tmp_path / "lightning_aux" / "__init__.py"))
    assert module._folder() == tmp_path / place
    assert (module._folder() / "z_loss.md").is_file()
    assert method("ZLoss").name == "ZLoss"
