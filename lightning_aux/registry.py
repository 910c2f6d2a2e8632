"""Everything that can be attached, with an example of each for the contract suite.

A new objective is imported here, named in ``__all__``, and given an entry; the package exports
it, the contract suite trains it, and the command line finds it under its short name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.nn import functional

from lightning_aux.attribute_schedules.attribute import AttributeSchedule
from lightning_aux.attribute_schedules.dropout import DropoutSchedule, DropoutScheduleMixin
from lightning_aux.attribute_schedules.stochastic_depth import StochasticDepthSchedule
from lightning_aux.averages import EMAWeights, ModelSoup, WiSEFT
from lightning_aux.diagnostics.gradient_direction import GradientDirection
from lightning_aux.diagnostics.instability_monitor import InstabilityMonitor
from lightning_aux.diagnostics.risk_coverage import RiskCoverage
from lightning_aux.diagnostics.selective_classification import SelectiveClassification
from lightning_aux.engine import Attached
from lightning_aux.objective import Objective, ObjectiveOptions
from lightning_aux.objectives.early_learning import EarlyLearningRegularization
from lightning_aux.objectives.ema_anchor import EMAAnchor, EMAAnchorMixin
from lightning_aux.objectives.multi_sample_dropout import MultiSampleDropout
from lightning_aux.objectives.parameter_anchor import ParameterAnchor
from lightning_aux.objectives.self_distillation import SelfDistillation, SelfDistillationMixin
from lightning_aux.phases import Phases
from lightning_aux.taps import Taps
from lightning_aux.teachers import (
    EMATeacher,
    FrozenTeacher,
    RandomTeacher,
    SnapshotTeacher,
    SWATeacher,
    VotedTeacher,
)

__all__ = [
    "AttributeSchedule",
    "DropoutSchedule",
    "DropoutScheduleMixin",
    "EMAAnchor",
    "EMAAnchorMixin",
    "EMATeacher",
    "EMAWeights",
    "EarlyLearningRegularization",
    "FrozenTeacher",
    "GradientDirection",
    "InstabilityMonitor",
    "ModelSoup",
    "MultiSampleDropout",
    "Objective",
    "ObjectiveOptions",
    "ParameterAnchor",
    "Phases",
    "RandomTeacher",
    "RiskCoverage",
    "SWATeacher",
    "SelectiveClassification",
    "SelfDistillation",
    "SelfDistillationMixin",
    "SnapshotTeacher",
    "StochasticDepthSchedule",
    "Taps",
    "VotedTeacher",
    "WiSEFT",
]


@dataclass(frozen=True)
class Entry:
    """One way to attach something, as the contract suite does it.

    Attributes:
        make: returns the callbacks; ``weight`` is that of the objective among them.
        objective: name of the objective, ``None`` for a teacher or a schedule alone.
        begins: optimizer steps before the objective has something to learn from.
        inert: whether training with these callbacks is bit-identical to training without, at
            weight 0 (C1). True for everything but what changes the model's own behaviour.
    """

    make: Callable[[float | str], list[Attached]]
    objective: str | None = None
    inert: bool = True
    begins: int = 0


ENTRIES: dict[str, Entry] = {
    "ema_teacher": Entry(lambda weight: [EMATeacher(decay=0.9)]),
    "frozen_teacher": Entry(lambda weight: [FrozenTeacher()]),
    "ema_weights": Entry(lambda weight: [EMAWeights(decay=0.9)]),
    "swa_teacher": Entry(lambda weight: [SWATeacher(start=3, every=2)]),
    "snapshot_distillation": Entry(
        lambda weight: [
            SnapshotTeacher(every=2, window=2),
            SelfDistillation("snapshot", weight=weight),
        ],
        "self_distillation",
    ),
    "voted_distillation": Entry(
        lambda weight: [
            VotedTeacher(every=2, snapshots=2),
            SelfDistillation("voted", weight=weight),
        ],
        "self_distillation",
    ),
    "random_distillation": Entry(
        lambda weight: [
            RandomTeacher(init="shuffle"),
            SelfDistillation("random", weight=weight),
        ],
        "self_distillation",
    ),
    "generations": Entry(
        lambda weight: [
            SnapshotTeacher("generation", every=4, restart=True),
            SelfDistillation("generation", weight=weight),
        ],
        "self_distillation",
        inert=False,
        begins=4,
    ),
    "dropout_schedule": Entry(
        lambda weight: [DropoutSchedule(p=0.3, mode="early", until="50%", shape="linear")],
        inert=False,
    ),
    "stochastic_depth_schedule": Entry(
        lambda weight: [StochasticDepthSchedule(1.0, "encoder.1", mode="early", until="50%")],
        inert=False,
    ),
    "attribute_schedule": Entry(
        lambda weight: [AttributeSchedule({"optimizer.lr": "linear(0.2, 0.05)"})], inert=False
    ),
    "selective_classification": Entry(lambda weight: [SelectiveClassification(ece=True)]),
    "instability_monitor": Entry(lambda weight: [InstabilityMonitor()]),
    "phases": Entry(lambda weight: [Phases("warmup: 3 steps, main: rest")]),
    "ema_anchor_output": Entry(
        lambda weight: [EMAAnchor(weight=weight, entropy=0.1, temperature=2.0, decay=0.9)],
        "ema_anchor",
    ),
    "ema_anchor_weight": Entry(
        lambda weight: [EMAAnchor(space="weight", weight=weight, decay=0.9)], "ema_anchor"
    ),
    "self_distillation_kl": Entry(
        lambda weight: [EMATeacher(decay=0.9), SelfDistillation(weight=weight, temperature=2.0)],
        "self_distillation",
    ),
    "self_distillation_js_correct": Entry(
        lambda weight: [
            FrozenTeacher(),
            SelfDistillation("frozen", divergence="js", only_correct=True, weight=weight),
        ],
        "self_distillation",
    ),
    "self_distillation_features": Entry(
        lambda weight: [
            EMATeacher(decay=0.9, warmup=True),
            SelfDistillation(on="encoder", divergence="mse", weight=weight),
        ],
        "self_distillation",
    ),
    "parameter_anchor_l2": Entry(
        lambda weight: [ParameterAnchor(weight=weight, new="head.*", new_weight=0.5)],
        "parameter_anchor",
    ),
    "multi_sample_dropout": Entry(
        lambda weight: [
            DropoutSchedule(p=0.5, mode="standard"),
            MultiSampleDropout("encoder", 3, functional.cross_entropy, weight=weight),
        ],
        "multi_sample_dropout",
        inert=False,
    ),
    "early_learning_regularization": Entry(
        lambda weight: [EarlyLearningRegularization(weight=weight)],
        "early_learning_regularization",
    ),
}
