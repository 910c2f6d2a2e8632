"""Every registered objective once more, written by hand into a training step in plain torch.

Nothing of the package is used: softmax and logarithms are spelt out, teachers are deep copies that
are updated in a loop, memory per sample is keyed by an index that the dataset hands out. A new
entry of the registry needs its reference here; without one the suite fails and says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.contract.models import CLASSES, Classifier


class Reference:
    """One term by hand: what happens before training, in a step, and after an optimizer step."""

    def begin(self, module: Classifier) -> None: ...

    def before(self, module: Classifier, steps: int, total: int) -> None: ...

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        return logits.new_zeros(())

    def stepped(self, module: Classifier) -> None: ...


class HandWritten(Classifier):
    """The classifier with one term in its own training step.

    Args:
        reference: The term.
        weight: Its factor, or a function of the optimizer steps taken and their total.
        window: Samples of a full accumulation window: a smaller batch counts for its share.
    """

    def __init__(
        self,
        reference: Reference,
        weight: float | Callable[[int, int], float] = 1.0,
        window: int | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.reference = reference
        self.weight = weight
        self.window = window
        self.stepped = 0

    def on_train_start(self) -> None:
        self.reference.begin(self)

    def total_loss(self, batch: Any) -> Tensor:
        x, y, _ = batch
        steps, total = self.trainer.global_step, self.trainer.estimated_stepping_batches
        self.reference.before(self, steps, int(total))
        logits = self(x)
        weight = self.weight(steps, int(total)) if callable(self.weight) else self.weight
        loss = F.cross_entropy(logits, y) + weight * self.reference.term(self, batch, logits)
        return loss if self.window is None else loss * len(x) / self.window

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step > self.stepped:
            self.stepped = self.trainer.global_step
            self.reference.stepped(self)


def log_softmax(logits: Tensor) -> Tensor:
    shifted = logits - logits.max(1, keepdim=True).values
    return shifted - shifted.exp().sum(1, keepdim=True).log()


def relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) per example."""
    return (log_p.exp() * (log_p - log_q)).sum(1)


class Taught(Reference):
    """A term with a frozen (`decay=None`) or averaged copy of the model."""

    def __init__(self, decay: float | None, warmup: bool = False) -> None:
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.teacher = nn.Sequential()

    def begin(self, module: Classifier) -> None:
        self.teacher = nn.Sequential(deepcopy(module.encoder), deepcopy(module.head))
        self.teacher.eval().requires_grad_(False)

    def stepped(self, module: Classifier) -> None:
        if self.decay is None:
            return
        decay, n = self.decay, self.updates
        if self.warmup:
            decay = min(decay, (1 + n) / (10 + n))
        student = nn.Sequential(module.encoder, module.head)
        for average, value in zip(self.teacher.parameters(), student.parameters(), strict=True):
            average.copy_(decay * average + (1 - decay) * value.detach())
        for own, live in zip(self.teacher.buffers(), student.buffers(), strict=True):
            own.copy_(live)
        self.updates += 1


class OutputAnchor(Taught):
    """T²·KL(student ‖ teacher) − entropy·H(student), with T = 2 and entropy = 0.1."""

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        log_q, log_p = log_softmax(logits / 2), log_softmax(self.teacher(batch[0]) / 2)
        plain = log_softmax(logits)
        entropy = -(plain.exp() * plain).sum(1).mean()
        return 4 * relative_entropy(log_q, log_p).mean() - 0.1 * entropy


class WeightAnchor(Taught):
    """Σ ‖θ − φ‖²."""

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        student = [*module.encoder.parameters(), *module.head.parameters()]
        pairs = zip(student, self.teacher.parameters(), strict=True)
        return torch.stack([((theta - phi) ** 2).sum() for theta, phi in pairs]).sum()


class Distilled(Taught):
    """T²·KL(teacher ‖ student), T = 2."""

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        log_p, log_q = log_softmax(self.teacher(batch[0]) / 2), log_softmax(logits / 2)
        return 4 * relative_entropy(log_p, log_q).mean()


class DistilledWhereRight(Taught):
    """Jensen-Shannon divergence on the examples that the teacher gets right, over all of them."""

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        x, y, _ = batch
        taught = self.teacher(x)
        log_p, log_q = log_softmax(taught), log_softmax(logits)
        log_m = ((log_p.exp() + log_q.exp()) / 2).log()
        each = (relative_entropy(log_p, log_m) + relative_entropy(log_q, log_m)) / 2
        return (each * (taught.argmax(1) == y)).sum() / len(x)


class DistilledFeatures(Taught):
    """Mean squared distance of the encoders' outputs."""

    def begin(self, module: Classifier) -> None:
        super().begin(module)
        module.encoder.register_forward_hook(self.remember)

    def remember(self, encoder: nn.Module, inputs: Any, features: Tensor) -> None:
        self.features = features

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        return ((self.features - self.teacher[0](batch[0])) ** 2).mean()


class DistilledSnapshots(Taught):
    """KL(teacher ‖ student), the teacher made of copies taken at the start and every two steps."""

    def begin(self, module: Classifier) -> None:
        super().begin(module)
        self.copies, self.steps = [deepcopy(self.teacher)], 0

    def stepped(self, module: Classifier) -> None:
        self.steps += 1
        if self.steps % 2 == 0:
            newest = nn.Sequential(deepcopy(module.encoder), deepcopy(module.head))
            self.copies = [self.copies[-1], newest.eval().requires_grad_(False)]

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        return relative_entropy(self.taught(batch[0]), log_softmax(logits)).mean()

    def taught(self, x: Tensor) -> Tensor:
        """Logarithms of the probabilities under the mean of the copies' weights."""
        mean = deepcopy(self.copies[-1])
        for name, value in mean.state_dict().items():
            if value.is_floating_point():
                value.copy_(sum(copy.state_dict()[name] for copy in self.copies) / len(self.copies))
        return log_softmax(mean(x))


class DistilledVotes(DistilledSnapshots):
    """The same with the mean of the copies' probabilities."""

    def taught(self, x: Tensor) -> Tensor:
        votes = [log_softmax(copy(x)).exp() for copy in self.copies]
        return (sum(votes) / len(votes)).log()


class DistilledNoise(Taught):
    """KL(teacher ‖ student) for a teacher of the initial values in a random order."""

    def begin(self, module: Classifier) -> None:
        super().begin(module)
        random = torch.Generator().manual_seed(0)
        for value in self.teacher.parameters():
            value.copy_(
                value.flatten()[torch.randperm(value.numel(), generator=random)].view_as(value)
            )

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        return relative_entropy(log_softmax(self.teacher(batch[0])), log_softmax(logits)).mean()


class Generations(Reference):
    """KL(previous generation ‖ student); every four steps the student begins again."""

    def begin(self, module: Classifier) -> None:
        self.initial, self.teacher = deepcopy(module.state_dict()), None
        self.steps, self.due = 0, False

    def stepped(self, module: Classifier) -> None:
        self.steps += 1
        self.due = self.steps % 4 == 0

    def before(self, module: Classifier, steps: int, total: int) -> None:
        if self.due:
            self.due = False
            self.teacher = nn.Sequential(deepcopy(module.encoder), deepcopy(module.head))
            self.teacher.eval().requires_grad_(False)
            module.load_state_dict(self.initial)
            for optimizer in module.trainer.optimizers:
                optimizer.state.clear()

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        if self.teacher is None:
            return super().term(module, batch, logits)
        return relative_entropy(log_softmax(self.teacher(batch[0])), log_softmax(logits)).mean()


class AnchoredParameters(Taught):
    """½ ‖θ − θ_0‖² over the encoder and ¼ ‖θ‖² over the head, which is new."""

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        pairs = zip(module.encoder.parameters(), self.teacher[0].parameters(), strict=True)
        old = torch.stack([((theta - phi) ** 2).sum() for theta, phi in pairs]).sum()
        new = torch.stack([(theta**2).sum() for theta in module.head.parameters()]).sum()
        return old / 2 + new / 4


class EarlyLearning(Reference):
    """mean log(1 − ⟨p, t⟩) with t ← 0.7·t + 0.3·p, one row of t per sample of the dataset."""

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}
        self.pending: dict[int, Tensor] = {}

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        p = log_softmax(logits).exp().clamp(1e-4, 1 - 1e-4)
        inner = []
        for row, sample in enumerate(batch[2].tolist()):
            before = self.rows.get(sample, torch.zeros(CLASSES))
            target = 0.7 * before + 0.3 * (p[row] / p[row].sum()).detach()
            self.pending[sample] = target
            inner.append((p[row] * target).sum())
        return (1 - torch.stack(inner)).log().mean()

    def stepped(self, module: Classifier) -> None:
        self.rows |= self.pending
        self.pending = {}


class EarlyDropout(Reference):
    """No term: the rate falls along `numpy.linspace(0.3, 0, half)` and is 0 from then on."""

    def before(self, module: Classifier, steps: int, total: int) -> None:
        half = total // 2
        rates = torch.linspace(0.3, 0, half, dtype=torch.float64).tolist()
        dropout = module.encoder[-1]
        assert isinstance(dropout, nn.Dropout)
        dropout.p = rates[steps] if steps < half else 0.0


class LeftOut(Reference):
    """A block that is computed, and passes its input on in the first half of training."""

    def begin(self, module: Classifier) -> None:
        self.multiplied = 0.0
        module.encoder[1].register_forward_hook(
            lambda block, inputs, output: (
                inputs[0] + self.multiplied * (output - inputs[0])
                if self.multiplied != 1.0
                else output
            )
        )

    def before(self, module: Classifier, steps: int, total: int) -> None:
        self.multiplied = 0.0 if steps < math.floor(total / 2 + 0.5) else 1.0


class FallingRate(Reference):
    """The learning rate on a straight line."""

    def before(self, module: Classifier, steps: int, total: int) -> None:
        for group in module.optimizers().param_groups:
            group["lr"] = 0.2 + (0.05 - 0.2) * steps / total


class Rounded(Reference):
    """Weights are rounded to eight values in each sixteen while gradients are computed."""

    def begin(self, module: Classifier) -> None:
        self.own: dict[Tensor, Tensor] = {}
        for name, each in module.named_parameters():
            if name.endswith(".weight"):
                self.own[each] = each.detach().clone()
                each.register_post_accumulate_grad_hook(self.give_back)

    def give_back(self, weight: Tensor) -> None:
        weight.data.copy_(self.own[weight])

    def before(self, module: Classifier, steps: int, total: int) -> None:
        for weight in self.own:
            self.own[weight] = weight.detach().clone()
            pieces = weight.detach().float().flatten().split(16)
            rounded = [self.eight_values(piece) for piece in pieces]
            weight.data.copy_(torch.cat(rounded).view_as(weight))

    def eight_values(self, piece: Tensor) -> Tensor:
        low, high = piece.min(), piece.max()
        span = high - low if high - low >= 1e-10 else torch.ones(())
        return ((piece - low) / span * 7).round() / 7 * span + low


class ManyMasks(Reference):
    """Three masks; those after the first are drawn where the docstrings say they are."""

    def begin(self, module: Classifier) -> None:
        self.batches = 0

    def before(self, module: Classifier, steps: int, total: int) -> None:
        module.encoder[-1].p = 0.5

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        x, y = batch[:2]
        first = F.cross_entropy(logits, y)
        losses = [first]
        for number in (1, 2):
            buffers = [each.clone() for each in module.buffers()]
            with torch.random.fork_rng(devices=[]):
                place = ("multi_sample_dropout", self.batches, number, 0)
                seed = torch.initial_seed() + crc32(repr(place).encode())
                torch.manual_seed(seed % 2**63)
                losses.append(F.cross_entropy(module.head(module.encoder(x)), y))
            for each, value in zip(module.buffers(), buffers, strict=True):
                each.data.copy_(value)
        self.batches += 1
        return sum(losses) / 3 - first


REFERENCES: dict[str, Callable[[], Reference]] = {
    "dropout_schedule": EarlyDropout,
    "multi_sample_dropout": ManyMasks,
    "stochastic_depth_schedule": LeftOut,
    "quantized_weights": Rounded,
    "attribute_schedule": FallingRate,
    "ema_anchor_output": lambda: OutputAnchor(decay=0.9),
    "ema_anchor_weight": lambda: WeightAnchor(decay=0.9),
    "self_distillation_kl": lambda: Distilled(decay=0.9),
    "self_distillation_js_correct": lambda: DistilledWhereRight(decay=None),
    "self_distillation_features": lambda: DistilledFeatures(decay=0.9, warmup=True),
    "snapshot_distillation": lambda: DistilledSnapshots(decay=None),
    "voted_distillation": lambda: DistilledVotes(decay=None),
    "random_distillation": lambda: DistilledNoise(decay=None),
    "generations": Generations,
    "parameter_anchor_l2": lambda: AnchoredParameters(decay=None),
    "early_learning_regularization": EarlyLearning,
}


def reference(entry: str) -> Reference:
    """The hand-written form of a registry entry."""
    if entry not in REFERENCES:
        pytest.fail(
            f"{entry!r} is in lightning_aux/registry.py and changes training, but nothing says "
            f"independently what it should do: write its reference in tests/contract/references.py"
        )
    return REFERENCES[entry]()
