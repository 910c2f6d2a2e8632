"""Everything that can be attached, with an example of each for the contract suite.

A new objective is imported here, named in ``__all__``, and given an entry; the package exports
it, the contract suite trains it, and the command line finds it under its short name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.nn import functional

from lightning_aux.attribute_schedules.attribute import AttributeSchedule
from lightning_aux.attribute_schedules.dropout import DropoutSchedule, DropoutScheduleMixin
from lightning_aux.attribute_schedules.stochastic_depth import StochasticDepthSchedule
from lightning_aux.averages import EMAWeights, ModelSoup, WiSEFT
from lightning_aux.diagnostics.gradient_direction import GradientDirection
from lightning_aux.diagnostics.gradient_monitor import GradientMonitor
from lightning_aux.diagnostics.instability_monitor import InstabilityMonitor
from lightning_aux.diagnostics.risk_coverage import RiskCoverage
from lightning_aux.diagnostics.selective_classification import SelectiveClassification
from lightning_aux.engine import Attached
from lightning_aux.objective import Objective, ObjectiveOptions
from lightning_aux.objectives.confidence_limit import ConfidenceLimit
from lightning_aux.objectives.confidence_penalty import ConfidencePenalty
from lightning_aux.objectives.dual_head_distillation import DualHeadDistillation
from lightning_aux.objectives.early_learning import EarlyLearningRegularization
from lightning_aux.objectives.ema_anchor import EMAAnchor, EMAAnchorMixin
from lightning_aux.objectives.knowledge_distillation import KnowledgeDistillation
from lightning_aux.objectives.label_smoothing import LabelSmoothing
from lightning_aux.objectives.max_sup import MaxSup
from lightning_aux.objectives.multi_sample_dropout import MultiSampleDropout
from lightning_aux.objectives.multi_teacher_distillation import MultiTeacherDistillation
from lightning_aux.objectives.parameter_anchor import ParameterAnchor
from lightning_aux.objectives.progressive_self_distillation import ProgressiveSelfDistillation
from lightning_aux.objectives.self_distillation import SelfDistillation, SelfDistillationMixin
from lightning_aux.objectives.spectral_decoupling import SpectralDecoupling
from lightning_aux.objectives.weak_to_strong import WeakToStrongConfidence
from lightning_aux.objectives.z_loss import ZLoss
from lightning_aux.phases import Phases
from lightning_aux.quantized_weights import QuantizedWeights
from lightning_aux.taps import Taps
from lightning_aux.teachers import (
    EMATeacher,
    FrozenTeacher,
    RandomTeacher,
    SnapshotTeacher,
    StoredTeacher,
    SWATeacher,
    VotedTeacher,
)
from lightning_aux.teachers.storage import LogitsWriter

__all__ = [
    "AttributeSchedule",
    "ConfidenceLimit",
    "ConfidencePenalty",
    "DropoutSchedule",
    "DropoutScheduleMixin",
    "DualHeadDistillation",
    "EMAAnchor",
    "EMAAnchorMixin",
    "EMATeacher",
    "EMAWeights",
    "EarlyLearningRegularization",
    "FrozenTeacher",
    "GradientDirection",
    "GradientMonitor",
    "InstabilityMonitor",
    "KnowledgeDistillation",
    "LabelSmoothing",
    "MaxSup",
    "ModelSoup",
    "MultiSampleDropout",
    "MultiTeacherDistillation",
    "Objective",
    "ObjectiveOptions",
    "ParameterAnchor",
    "Phases",
    "ProgressiveSelfDistillation",
    "QuantizedWeights",
    "RandomTeacher",
    "RiskCoverage",
    "SWATeacher",
    "SelectiveClassification",
    "SelfDistillation",
    "SelfDistillationMixin",
    "SnapshotTeacher",
    "SpectralDecoupling",
    "StochasticDepthSchedule",
    "StoredTeacher",
    "Taps",
    "VotedTeacher",
    "WeakToStrongConfidence",
    "WiSEFT",
    "ZLoss",
]


@dataclass(frozen=True)
class Entry:
    """One way to attach something, as the contract suite does it.

    Attributes:
        make: returns the callbacks; ``weight`` is that of the objective among them.
        objective: name of the objective, ``None`` for a teacher or a schedule alone.
        begins: optimizer steps before the objective has something to learn from.
        per_sample: whether the term of a batch is the mean of those of its parts; not so for what
            is measured or drawn for the batch as a whole.
        inert: whether training with these callbacks is bit-identical to training without, at
            weight 0 (C1). True for everything but what changes the model's own behaviour.
        sharded: whether it works where parameters are sharded; else a named error says so.
    """

    make: Callable[[float | str], list[Attached]]
    objective: str | None = None
    inert: bool = True
    begins: int = 0
    per_sample: bool = True
    sharded: bool = True


def _wider_model() -> nn.Module:
    """A model of another architecture, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


@cache
def _folder() -> TemporaryDirectory[str]:
    """Of this process, until it ends."""
    return TemporaryDirectory(prefix="lightning_aux")


def _logits_in_a_folder() -> Path:
    """Logits of the first samples of any dataset, the same each time."""
    path = Path(_folder().name) / "logits"
    if not path.exists():
        logits = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
        writer = LogitsWriter(path, len(logits), "float32")
        writer.add(logits)
        writer.finish()
    return path


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
    "quantized_weights": Entry(
        lambda weight: [QuantizedWeights(bits=3, bucket=16)], inert=False, sharded=False
    ),
    "selective_classification": Entry(lambda weight: [SelectiveClassification(ece=True)]),
    "instability_monitor": Entry(lambda weight: [InstabilityMonitor()]),
    "gradient_monitor": Entry(lambda weight: [GradientMonitor(every=1)], sharded=False),
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
    "another_module": Entry(
        lambda weight: [
            FrozenTeacher(module=_wider_model()),
            SelfDistillation("frozen", weight=weight),
        ],
        "self_distillation",
    ),
    "stored_logits": Entry(
        lambda weight: [
            StoredTeacher(_logits_in_a_folder(), check=False),
            SelfDistillation("stored", weight=weight),
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
        per_sample=False,
    ),
    "early_learning_regularization": Entry(
        lambda weight: [EarlyLearningRegularization(weight=weight)],
        "early_learning_regularization",
    ),
    "label_smoothing": Entry(lambda weight: [LabelSmoothing(weight)], "label_smoothing"),
    "max_sup": Entry(lambda weight: [MaxSup(weight)], "max_sup"),
    "confidence_penalty": Entry(
        lambda weight: [ConfidencePenalty(weight, threshold=1.38)], "confidence_penalty"
    ),
    "confidence_limit": Entry(
        lambda weight: [ConfidenceLimit(samples=4, weight=weight)], "confidence_limit"
    ),
    "spectral_decoupling": Entry(
        lambda weight: [SpectralDecoupling(weight, offset=(0.1, 0.2, 0.3, 0.4))],
        "spectral_decoupling",
    ),
    "z_loss": Entry(lambda weight: [ZLoss(weight)], "z_loss"),
    "weak_to_strong_confidence": Entry(
        lambda weight: [WeakToStrongConfidence(weight)],
        "weak_to_strong_confidence",
        per_sample=False,
    ),
    "progressive_self_distillation": Entry(
        lambda weight: [ProgressiveSelfDistillation(weight)], "progressive_self_distillation"
    ),
    "knowledge_distillation": Entry(
        lambda weight: [KnowledgeDistillation(module=_wider_model(), weight=weight, blend=True)],
        "knowledge_distillation",
    ),
    "dual_head_distillation": Entry(
        lambda weight: [FrozenTeacher(), DualHeadDistillation("head", weight=weight)],
        "dual_head_distillation",
    ),
    "multi_teacher_distillation": Entry(
        lambda weight: [
            FrozenTeacher("wide", module=_wider_model()),
            EMATeacher(decay=0.9),
            MultiTeacherDistillation(
                ["wide", "ema"],
                ["encoder", "head"],
                {"wide": "1", "ema": "encoder"},
                widths={"wide": 16},
                hidden=4,
                momentum=0.3,
                weight=weight,
            ),
        ],
        "multi_teacher_distillation",
        per_sample=False,
    ),
}
