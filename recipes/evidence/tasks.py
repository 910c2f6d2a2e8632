"""Which comparisons are on the page of evidence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_aux.cli.compare_file import read_comparison
from lightning_aux.comparison import Comparison
from recipes.evidence.notes import Values, rate_sensitivity, recovered_gap


@dataclass(frozen=True)
class Task:
    """A comparison on the page.

    Attributes:
        name: Name of its files.
        label: What it is called in tables.
        recipe: The compare file.
        settings: What `--set` changes in it.
        before: What it needs: a command of `lightning-aux` for each file that may be missing.
        apart: What the names of variants begin with that are no methods but ceilings and the like:
            they are shown with the task alone.
        note: What its runs say beyond the paired differences, from their metrics.
    """

    name: str
    label: str
    recipe: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, Sequence[str]] = field(default_factory=dict)
    apart: tuple[str, ...] = ()
    note: Callable[[Values], str] | None = None

    @property
    def arguments(self) -> list[str]:
        """What `lightning-aux` is given, but for where to write."""
        changes = [f"{key}={value}" for key, value in self.settings.items()]
        return [
            *("compare", "--config", self.recipe),
            *(part for change in changes for part in ("--set", change)),
        ]

    def comparison(self) -> Comparison:
        return read_comparison(Path(self.recipe), overrides=self.settings)


def _noise(data: str, percent: int) -> Task:
    folder = data.lower().replace("-", "")
    return Task(
        f"{folder}_label_noise_{percent}",
        f"{data}, {percent} % wrong labels",
        f"recipes/{folder}/label_noise.yaml",
        {"data.init_args.label_noise": percent / 100},
    )


def _teacher(name: str, *arguments: str) -> dict[str, Sequence[str]]:
    fit = ("fit", "--config", "recipes/mnist1d/teacher.yaml", *arguments)
    return {f"runs/mnist1d/teacher/{name}.ckpt": fit}


def _half(name: str, classes: list[int]) -> dict[str, Sequence[str]]:
    named = f"--trainer.callbacks.init_args.filename={name}"
    return _teacher(name, f"--data.init_args.classes={classes}", named)


def _quantized(bits: int) -> Task:
    named = "2 bits" if bits == 2 else "1 bit"
    callbacks = [{"class_path": "QuantizedWeights", "init_args": {"bits": bits}}]
    return Task(
        f"digits_quantized_{bits}",
        f"digits, weights of {named}",
        "recipes/digits/quantized_distillation.yaml",
        {} if bits == 2 else {"trainer.callbacks": callbacks},
        before={
            "runs/digits/teacher/wide.ckpt": ("fit", "--config", "recipes/digits/teacher.yaml")
        },
        apart=("full_precision",),
    )


# These have methods in common, and are compared at a glance.
SHARED = (
    *(_noise("MNIST-1D", percent) for percent in (20, 40, 60)),
    *(_noise("digits", percent) for percent in (20, 40, 60)),
    Task("digits_few_labels", "digits, 100 labels", "recipes/digits/few_labels.yaml"),
    Task("mnist1d_calibration", "MNIST-1D, calibration", "recipes/mnist1d/calibration.yaml"),
)
TASKS = (
    *SHARED,
    Task(
        "mnist1d_distillation",
        "MNIST-1D, small student",
        "recipes/mnist1d/distillation.yaml",
        before=_teacher("all") | _half("low", [0, 1, 2, 3, 4]) | _half("high", [5, 6, 7, 8, 9]),
        apart=("wide",),
    ),
    *(_quantized(bits) for bits in (2, 1)),
    Task(
        "digits_weak_supervisor",
        "digits, weak supervisor",
        "recipes/digits/weak_supervisor.yaml",
        apart=("true_labels",),
        note=recovered_gap,
    ),
    Task(
        "digits_spurious_mark",
        "digits, spurious mark",
        "recipes/digits/spurious_mark.yaml",
        apart=("weight_decay",),
    ),
    Task(
        "digits_learning_rates",
        "digits, learning rates",
        "recipes/digits/learning_rates.yaml",
        apart=("lr_",),
        note=rate_sensitivity,
    ),
)
