"""C9: every argument of every class is reachable from YAML; mistakes fail before training."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union

import lightning as L
import pytest
import yaml

import lightning_aux
from lightning_aux import Objective, Schedule, Taps
from lightning_aux.cli import main
from lightning_aux.cli.trainer_cli import AuxCLI
from lightning_aux.engine import Attached
from lightning_aux.objective import ObjectiveOptions
from tests.contract.models import FEATURES

CLASSES = {
    name: value
    for name in lightning_aux.__all__
    if inspect.isclass(value := getattr(lightning_aux, name))
    and issubclass(value, Attached)
    and value is not Objective
}
ARGUMENTS = [
    (name, argument) for name, cls in CLASSES.items() for argument in cls.init_parameters()
]
every_class = pytest.mark.parametrize("cls", CLASSES)
every_argument = pytest.mark.parametrize(("cls", "argument"), ARGUMENTS)

# What a class cannot be made without, and what an argument makes no sense without. Values are
# found from annotations; one that its class would refuse is given here.
REQUIRED: dict[str, dict[str, Any]] = {
    "AttributeSchedule": {"values": {"optimizer.lr": 0.1}},
    "Phases": {"phases": "warmup: 10%, main: rest"},
    "StochasticDepthSchedule": {"p": 0.1, "blocks": "encoder.1"},
    "StoredTeacher": {"path": "runs/teacher"},
    "DropoutSchedule": {"p": 0.1, "until": "50%"},
    "DualHeadDistillation": {"classifier": "head"},
    "KnowledgeDistillation": {"teacher": "frozen"},
    "ModelSoup": {"monitor": "loss"},
    "MultiTeacherDistillation": {"teachers": ["ema"], "on": "encoder"},
    "MultiSampleDropout": {"dropout": "encoder.2"},
    "WiSEFT": {"monitor": "loss"},
}
ANOTHER = {
    "class_path": "torch.nn.Linear",
    "init_args": {"in_features": FEATURES, "out_features": 4},
}
TOGETHER: dict[tuple[str, str], dict[str, Any]] = {
    ("AttributeSchedule", "values"): {"values": {"model.temperature": "linear(1, 2)"}},
    ("Phases", "phases"): {"phases": {"first": "3 steps", "second": "rest"}},
    ("MultiSampleDropout", "loss"): {"loss": "torch.nn.functional.cross_entropy"},
    ("MultiSampleDropout", "dropout"): {"dropout": "encoder"},
    ("DropoutSchedule", "p"): {"p": "late(0.1, start=50%)", "until": None},
    ("DropoutSchedule", "profile"): {"profile": "linear"},
    ("StochasticDepthSchedule", "until"): {"mode": "early", "until": "40%"},
    ("StochasticDepthSchedule", "start"): {"mode": "late", "start": "40%"},
    ("StochasticDepthSchedule", "mode"): {"mode": "late", "start": "40%"},
    ("StochasticDepthSchedule", "shape"): {"mode": "early", "until": "40%", "shape": "cosine"},
    ("DropoutSchedule", "until"): {"until": "40%"},
    ("DropoutSchedule", "start"): {"mode": "late", "start": "40%", "until": None},
    ("DropoutSchedule", "mode"): {"mode": "late", "start": "40%", "until": None},
    ("EarlyLearningRegularization", "storage"): {"storage": "top-5"},
    ("EMAAnchor", "space"): {"space": "weight"},
    ("FrozenTeacher", "module"): {"module": ANOTHER},
    ("FrozenTeacher", "forward"): {
        "module": ANOTHER,
        "forward": "tests.contract.models.run_parts",
    },
    ("StoredTeacher", "path"): {"path": "runs/other"},
    ("SelectiveClassification", "coverages"): {"coverages": [0.5, 0.9]},
    ("SelectiveClassification", "risks"): {"risks": [0.01]},
    ("InstabilityMonitor", "queries"): {"queries": "encoder.0", "keys": "head"},
    ("InstabilityMonitor", "keys"): {"queries": "encoder.0", "keys": "head"},
    ("Taps", "forward"): {"forward": "tests.contract.models.run_parts"},
    ("KnowledgeDistillation", "teacher"): {"teacher": "other"},
    ("KnowledgeDistillation", "module"): {"module": ANOTHER, "teacher": None},
    ("KnowledgeDistillation", "checkpoint"): {"checkpoint": "x.ckpt", "teacher": None},
    ("KnowledgeDistillation", "logits"): {"logits": "runs/logits", "teacher": None},
    ("KnowledgeDistillation", "on"): {"on": "encoder", "divergence": "mse"},
    ("KnowledgeDistillation", "teacher_on"): {
        "on": "encoder",
        "teacher_on": "head",
        "divergence": "mse",
    },
    ("KnowledgeDistillation", "divergence"): {"divergence": "js"},
    ("MultiTeacherDistillation", "teachers"): {"teachers": ["one", "two"]},
    ("MultiTeacherDistillation", "on"): {"on": ["encoder", "head"]},
    ("MultiTeacherDistillation", "teacher_on"): {"teacher_on": "head"},
    ("MultiTeacherDistillation", "widths"): {"widths": {"encoder": 3}},
    ("ProgressiveSelfDistillation", "storage"): {"storage": "top-5"},
    ("SelfDistillation", "on"): {"on": "encoder", "divergence": "mse"},
    ("SelfDistillation", "divergence"): {"divergence": "js"},
    ("ConfidenceLimit", "samples"): {"samples": 4},
    ("VotedTeacher", "snapshots"): {"snapshots": 2},
    ("ParameterAnchor", "sigma"): {"form": "variational", "sigma": 0.1},
    ("ParameterAnchor", "parameters"): {"parameters": "encoder.*"},
    ("ParameterAnchor", "new"): {"new": ["head.*"]},
    ("ParameterAnchor", "new_weight"): {"new_weight": 0.5},
    ("ModelSoup", "checkpoints"): {"checkpoints": ["runs/*.ckpt"]},
    ("WiSEFT", "coefficients"): {"coefficients": [0.0, 0.5]},
}


def config_of(cls: str, argument: str | None = None) -> dict[str, Any]:
    """Init arguments of a class with one of them away from its default."""
    arguments = dict(REQUIRED.get(cls, {}))
    if argument is not None:
        value = TOGETHER.get((cls, argument)) or {argument: another_value(cls, argument)}
        arguments |= value
    return {"class_path": cls, "init_args": arguments}


def another_value(cls: str, argument: str) -> Any:
    """A value of the annotated type that is not the default."""
    hints = typing.get_type_hints(ObjectiveOptions) | typing.get_type_hints(CLASSES[cls].__init__)
    hint, default = hints[argument], CLASSES[cls].init_parameters()[argument].default
    options = list(typing.get_args(hint)) if is_union(hint) else [hint]
    if Schedule in options:
        return "linear(0, 1, until=30%)"
    for option in options:
        if typing.get_origin(option) is Literal:
            return next(value for value in typing.get_args(option) if value != default)
        if option is bool:
            return not default
        if option is int:
            return 3
        if option is float:
            return 0.25
        if option is str:
            return "something"
        if option is Taps:
            return {"class_path": "Taps", "init_args": {"logits": "head"}}
    return pytest.fail(
        f"{cls}.{argument}: no value for {hint}; give one in TOGETHER in this file, so that it is "
        f"shown to be reachable from YAML"
    )


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def whole_config(callbacks: list[dict[str, Any]]) -> dict[str, Any]:
    trainer = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": callbacks,
    }
    return {
        "seed_everything": 1,
        "trainer": trainer,
        "model": {"class_path": "tests.contract.models.Classifier", "init_args": {"dropout": 0.1}},
        "data": {"class_path": "tests.contract.models.SamplesModule"},
    }


def write(config: Mapping[str, Any], path: Path) -> str:
    path.write_text(yaml.safe_dump(dict(config)))
    return str(path)


def instantiated(path: str) -> list[Attached]:
    """Our callbacks as the command makes them from a config file."""
    made = AuxCLI(args=["--config", path], run=False).trainer.callbacks
    return [each for each in made if isinstance(each, Attached)]


@pytest.fixture(scope="module")
def from_yaml(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Attached]:
    """One config that names every class once per argument."""
    config = whole_config([config_of(*each) for each in ARGUMENTS])
    path = write(config, tmp_path_factory.mktemp("config") / "all.yaml")
    return dict(zip(ARGUMENTS, instantiated(path), strict=True))


@every_argument
def test_every_argument_is_reachable_from_yaml(
    from_yaml: dict[tuple[str, str], Attached], cls: str, argument: str
) -> None:
    callback = from_yaml[cls, argument]
    assert type(callback) is CLASSES[cls]
    given = config_of(cls, argument)["init_args"][argument]
    found = callback.hyperparameters[argument]
    assert found != CLASSES[cls].init_parameters()[argument].default
    if given is ANOTHER:
        given = ANOTHER["class_path"]
    elif isinstance(given, dict) and "class_path" in given:
        given = repr(CLASSES[given["class_path"]](**given["init_args"]))
    assert found == given or (isinstance(given, str) and given.endswith(f".{found}"))


def kept(value: Any) -> Any:
    """What a callback has made of its arguments, down to the callbacks that it brings along."""
    if isinstance(value, Attached):
        return {name: kept(entry) for name, entry in vars(value).items() if name != "_arguments"}
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


@every_argument
def test_no_argument_is_lost_on_the_way(
    from_yaml: dict[tuple[str, str], Attached], cls: str, argument: str
) -> None:
    """Beside a note for the logger, each argument leaves its mark on the callback."""
    plain = CLASSES[cls](**REQUIRED.get(cls, {}))
    assert kept(from_yaml[cls, argument]) != kept(plain)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails when training begins."""
    begun: list[Any] = []
    monkeypatch.setattr(L.Trainer, "fit", lambda *_, **__: begun.append(1))
    yield
    assert not begun


@every_class
@pytest.mark.usefixtures("untrained")
def test_an_unknown_key_fails_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cls: str
) -> None:
    callback = config_of(cls)
    callback["init_args"]["no_such_argument"] = 1
    path = write(whole_config([callback]), tmp_path / "config.yaml")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", path])
    assert stopped.value.code != 0
    assert "no_such_argument" in capsys.readouterr().err


@every_argument
@pytest.mark.usefixtures("untrained")
def test_a_wrong_type_fails_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cls: str, argument: str
) -> None:
    callback = config_of(cls)
    callback["init_args"][argument] = [{"not": "this"}]
    path = write(whole_config([callback]), tmp_path / "config.yaml")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", path])
    assert stopped.value.code != 0
    assert argument in capsys.readouterr().err


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        ({"class_path": "EMATeachr"}, "EMATeachr"),
        ({"class_path": "EMATeacher", "init_args": {"decay": 2.0}}, "decay=2.0 must lie in"),
        ({"class_path": "SelfDistillation", "init_args": {"weight": "linear(0, 1"}}, "linear(0, 1"),
        ({"class_path": "DropoutSchedule", "init_args": {"until": "50%"}}, "p"),
        ({"class_path": "DropoutSchedule", "init_args": {"p": 0.1}}, "until"),
    ],
)
@pytest.mark.usefixtures("untrained")
def test_a_value_that_a_class_refuses_fails_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], callback: dict[str, Any], reason: str
) -> None:
    path = write(whole_config([callback]), tmp_path / "config.yaml")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", path])
    assert stopped.value.code != 0
    assert reason in capsys.readouterr().err


@every_class
def test_print_config_round_trips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cls: str
) -> None:
    """What is printed can be used as the config, and prints the same again."""
    several = [config_of(cls, argument) for name, argument in ARGUMENTS if name == cls]
    first = write(whole_config(several), tmp_path / "first.yaml")

    printed = []
    for path in (first, str(tmp_path / "second.yaml")):
        with pytest.raises(SystemExit) as stopped:
            main(["fit", "--config", path, "--print_config"])
        assert stopped.value.code == 0
        printed.append(capsys.readouterr().out)
        (tmp_path / "second.yaml").write_text(printed[0])
    assert printed[0] == printed[1]

    for _, argument in (each for each in ARGUMENTS if each[0] == cls):
        assert re.search(rf"\b{argument}'?:", printed[0])
    again = write(whole_config(yaml.safe_load(printed[0])["trainer"]["callbacks"]), tmp_path / "c")
    for one, other in zip(instantiated(first), instantiated(again), strict=True):
        assert one.hyperparameters == other.hyperparameters


def test_the_argument_on_needs_no_quotes(tmp_path: Path) -> None:
    """In YAML 1.1 a bare `on` is the boolean true; as a key of a config it is the argument."""
    quoted = config_of("SelfDistillation", "on")
    text = yaml.safe_dump(whole_config([quoted]))
    assert "'on'" in text
    (tmp_path / "config.yaml").write_text(text.replace("'on'", "on"))
    assert instantiated(str(tmp_path / "config.yaml"))[0].hyperparameters["on"] == "encoder"


def test_a_config_trains_through_the_command(tmp_path: Path) -> None:
    callbacks = [
        config_of("EMATeacher"),
        config_of("SelfDistillation", "weight"),
        config_of("DropoutSchedule"),
    ]
    config = whole_config(callbacks)
    config["trainer"]["default_root_dir"] = str(tmp_path)
    assert main(["fit", "--config", write(config, tmp_path / "config.yaml")]) == 0
