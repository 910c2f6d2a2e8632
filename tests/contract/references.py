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

from tests.contract.models import CLASSES, FEATURES, HIDDEN, Classifier


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


class DistilledOther(Reference):
    """KL(teacher ‖ student) for a teacher of three layers that the student does not have."""

    def begin(self, module: Classifier) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(FEATURES, 16), nn.Linear(16, CLASSES)

    @torch.no_grad()
    def taught(self, batch: Any) -> Tensor:
        return self.second(torch.tanh(self.first(batch[0].float())))

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        return relative_entropy(log_softmax(self.taught(batch)), log_softmax(logits)).mean()


class DistilledRows(DistilledOther):
    """The same for a table with a row of logits for each sample of the dataset."""

    def begin(self, module: Classifier) -> None:
        self.table = torch.randn(512, CLASSES, generator=torch.Generator().manual_seed(0))

    def taught(self, batch: Any) -> Tensor:
        return self.table[batch[2]]


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


class Smoothed(Reference):
    """What the cross entropy with smoothed targets has more than that with the labels, over ε."""

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        y, epsilon = F.one_hot(batch[1], CLASSES), 0.1
        smoothed = (1 - epsilon) * y + epsilon / CLASSES
        return ((y - smoothed) * log_softmax(logits)).sum(1).mean() / epsilon


class MaxSuppressed(Reference):
    """Cross entropy of the uniform distribution less that of the predicted class."""

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        predicted = F.one_hot(logits.argmax(1), CLASSES)
        return ((predicted - 1 / CLASSES) * log_softmax(logits)).sum(1).mean()


class Uncertain(Reference):
    """max(0, 1.38 − H(q))."""

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        log_q = log_softmax(logits)
        return torch.relu(1.38 + (log_q.exp() * log_q).sum(1)).mean()


class Covered(Reference):
    """−log(1 − (1 − p)⁴) + log p."""

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        p = log_softmax(logits).exp()[torch.arange(len(logits)), batch[1]]
        return (p.log() - (1 - (1 - p) ** 4).log()).mean()


class Decoupled(Reference):
    """½ ‖z − γ_y‖² with one γ for each class."""

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        gamma = torch.tensor([0.1, 0.2, 0.3, 0.4])[batch[1]]
        return ((logits - gamma[:, None]) ** 2).sum() / 2 / len(logits)


class Normalised(Reference):
    """(log Z)²."""

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        return (logits.exp().sum(1).log() ** 2).mean()


class OwnLabels(Reference):
    """Cross entropy with the model's own labels, weighted to the shares of the given ones."""

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        log_q, y = log_softmax(logits), batch[1]
        q = log_q.detach().exp()
        own = (q * torch.bincount(y, minlength=CLASSES) / q.sum(0)).argmax(1)
        rows = torch.arange(len(y))
        return (log_q[rows, y] - log_q[rows, own]).mean()


class SoftLabels(Reference):
    """Cross entropy with the last prediction of each sample less that with its label."""

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}
        self.pending: dict[int, Tensor] = {}

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        log_q, total = log_softmax(logits), logits.new_zeros(())
        for row, sample in enumerate(batch[2].tolist()):
            self.pending[sample] = log_q[row].detach().exp()
            if sample in self.rows:
                total = total + log_q[row, batch[1][row]] - (self.rows[sample] * log_q[row]).sum()
        return total / len(logits)

    def stepped(self, module: Classifier) -> None:
        self.rows |= self.pending
        self.pending = {}


class Blended(DistilledOther):
    """4·KL(teacher ‖ student) at temperature 2, less the user's own loss."""

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        log_p, log_q = log_softmax(self.taught(batch) / 2), log_softmax(logits / 2)
        return 4 * relative_entropy(log_p, log_q).mean() - F.cross_entropy(logits, batch[1])


def trained_beside(module: Classifier, name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Layers whose values are those of a head of this name, in the module's optimizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((torch.initial_seed() + crc32(name.encode())) % 2**63)
        made = make()
    optimizer: Any = module.optimizers()
    optimizer.param_groups[0]["params"].extend(made.parameters())
    return made


class Watched(Taught):
    """What comes out of the user's encoder and head in the current step."""

    def begin(self, module: Classifier) -> None:
        super().begin(module)
        self.seen: dict[str, Tensor] = {}
        for path in ("encoder", "head"):
            part = module.get_submodule(path)
            part.register_forward_hook(lambda _, __, output, p=path: self.seen.update({p: output}))


class SecondHead(Watched):
    """4 · Σ_c KL(½ ‖ σ((s − t)/2)) between a second classifier and the first weights."""

    def begin(self, module: Classifier) -> None:
        super().begin(module)
        self.head = trained_beside(
            module, "dual_head_distillation", lambda: nn.Linear(HIDDEN, CLASSES)
        )

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        away = (self.head(self.seen["encoder"].float()) - self.teacher(batch[0])) / 2
        sigma = torch.sigmoid(away)
        each = (0.25 / (sigma * (1 - sigma))).log() / 2
        return 4 * each.sum(1).mean()


class TwoTeachers(Watched):
    """½ (1 − cos) + ½ smooth-L1 to two teachers through projectors; the better learnt may rest."""

    def begin(self, module: Classifier) -> None:
        super().begin(module)
        other = DistilledOther()
        other.begin(module)
        self.other = nn.Sequential(other.first, nn.Tanh())

        def projector(inner: int, outer: int) -> nn.Module:
            layers = nn.Sequential(nn.Linear(inner, 4), nn.GELU(), nn.Linear(4, outer))
            for each in (layers[0], layers[2]):
                nn.init.trunc_normal_(each.weight, std=0.02)
                nn.init.zeros_(each.bias)
            return layers

        self.projectors = trained_beside(
            module,
            "multi_teacher_distillation",
            lambda: nn.ModuleList(
                projector(inner, outer) for outer in (16, HIDDEN) for inner in (HIDDEN, CLASSES)
            ),
        )
        self.scales: list[tuple[Tensor, Tensor] | None] = [None, None]
        self.batches = 0

    def term(self, module: Classifier, batch: Any, logits: Tensor) -> Tensor:
        rungs = [self.seen["encoder"].float(), self.seen["head"].float()]
        self.taught = [self.other(batch[0].float()).detach(), self.teacher[0](batch[0])]
        losses = []
        for number, taught in enumerate(self.taught):
            first, second = self.projectors[2 * number : 2 * number + 2]
            student, scale = first(rungs[0]) + second(rungs[1]), self.scales[number]
            if scale is not None:
                taught = (taught - scale[0]) / (scale[1] + 1e-6)
            cosine = (student * taught).sum(1) / student.norm(dim=1) / taught.norm(dim=1)
            huber = F.huber_loss(student, taught, reduction="none").mean(1)
            losses.append((1 - cosine) / 2 + huber / 2)
        seed = torch.initial_seed() + crc32(
            repr(("multi_teacher_distillation", self.batches)).encode()
        )
        draws = torch.rand(len(logits), 2, generator=torch.Generator().manual_seed(seed % 2**63))
        self.batches += 1
        total = logits.new_zeros(())
        for row in range(len(logits)):
            each = [loss[row] for loss in losses]
            worst = int(torch.stack(each).argmax())
            kept = [x for n, x in enumerate(each) if n == worst or draws[row, n] >= 0.5]
            total = total + sum(kept) / len(kept)
        return total / len(logits)

    def stepped(self, module: Classifier) -> None:
        super().stepped(module)
        share = 0.3
        for number, taught in enumerate(self.taught):
            mean = taught.mean(0)
            deviation = taught.std(0) if len(taught) > 1 else torch.ones_like(mean)
            if (scale := self.scales[number]) is not None:
                mean = scale[0] + share * (mean - scale[0])
                deviation = scale[1] + share * (deviation - scale[1])
            self.scales[number] = (mean, deviation)


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
    "another_module": DistilledOther,
    "stored_logits": DistilledRows,
    "snapshot_distillation": lambda: DistilledSnapshots(decay=None),
    "voted_distillation": lambda: DistilledVotes(decay=None),
    "random_distillation": lambda: DistilledNoise(decay=None),
    "generations": Generations,
    "parameter_anchor_l2": lambda: AnchoredParameters(decay=None),
    "early_learning_regularization": EarlyLearning,
    "label_smoothing": Smoothed,
    "max_sup": MaxSuppressed,
    "confidence_penalty": Uncertain,
    "confidence_limit": Covered,
    "spectral_decoupling": Decoupled,
    "z_loss": Normalised,
    "weak_to_strong_confidence": OwnLabels,
    "progressive_self_distillation": SoftLabels,
    "knowledge_distillation": Blended,
    "dual_head_distillation": lambda: SecondHead(decay=None),
    "multi_teacher_distillation": lambda: TwoTeachers(decay=0.9),
}


def reference(entry: str) -> Reference:
    """The hand-written form of a registry entry."""
    if entry not in REFERENCES:
        pytest.fail(
            f"{entry!r} is in lightning_aux/registry.py and changes training, but nothing says "
            f"independently what it should do: write its reference in tests/contract/references.py"
        )
    return REFERENCES[entry]()
