"""What the checks train: one model with everything attached, and the same as a loop in plain torch.

The loop uses nothing of the package. Model and data are those of the contract, on any device.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_aux as aux
from tests.contract.models import CLASSES, HIDDEN, Classifier, Samples

SAMPLES, BATCH, EPOCHS = 40, 8, 4
STEPS = SAMPLES // BATCH * EPOCHS
OVERFLOWS = (0, 3)
SCALE = 2.0**10
DECAY = 0.9

logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


def optimizer_for(parameters: Any, fused: bool) -> torch.optim.Optimizer:
    """Fused, it is Adam: torch's fused SGD makes its momentum of what lay in memory on an overflow.

    Otherwise SGD: Adam's steps have one size also where a gradient is nought but for rounding, as
    that of a bias before a BatchNorm is.
    """
    if fused:
        return torch.optim.Adam(parameters, lr=0.01, fused=True)
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class Net(Classifier):
    """The contract's classifier; its loss is infinite in the batches `overflows`."""

    def __init__(self, fused: bool = False, overflows: Sequence[int] = (), **model: Any) -> None:
        super().__init__(**model)
        self.fused, self.overflows, self.batches = fused, overflows, 0

    def total_loss(self, batch: Any) -> Tensor:
        loss = super().total_loss(batch)
        if not self.overflows:  # a counter would be compiled anew in every step
            return loss
        self.batches += 1
        return loss * float("inf") if self.batches - 1 in self.overflows else loss

    def configure_optimizers(self) -> Any:
        return optimizer_for(self.parameters(), self.fused)


class Sorted(aux.Objective):
    """A head on features; its first weights are kept for the loop by hand."""

    def __init__(self) -> None:
        super().__init__(0.5, reads=("encoder",))

    def build_head(self, module: nn.Module) -> nn.Module:
        head = nn.Linear(HIDDEN, CLASSES)
        self.first = deepcopy(head)
        return head

    def loss(self, step: aux.Step) -> Tensor:
        return F.cross_entropy(self.head(step.features("encoder")).float(), step.target)


class Shrink(aux.Objective):
    """The mean square of the logits: neither head nor teacher."""

    def loss(self, step: aux.Step) -> Tensor:
        return step.logits.float().square().mean()


def everything() -> list[Any]:
    """A teacher, a term on its answer, one on its weights, a memory and a head."""
    return [
        aux.EMATeacher(decay=DECAY),
        aux.SelfDistillation(weight="linear(0.2, 1, until=10 steps)", temperature=2.0),
        aux.EMAAnchor(space="weight", weight=0.05, teacher="ema"),
        aux.EarlyLearningRegularization(weight=0.5),
        Sorted(),
    ]


def new(**model: Any) -> Net:
    """A net whose first weights are those of every other."""
    torch.manual_seed(2)
    return Net(**model)


def loader(indexed: bool = False, samples: int = SAMPLES) -> DataLoader[Any]:
    return DataLoader(Samples(samples, indexed), batch_size=BATCH)


def trainer(device: str, added: Sequence[L.Callback] = (), **arguments: Any) -> L.Trainer:
    """One device, nothing printed, logged or saved."""
    precision = arguments.pop("precision", "32-true")
    if precision == "16-mixed":  # Lightning refuses the string on a CPU
        scaler = torch.amp.GradScaler(device, init_scale=SCALE)
        arguments["plugins"] = [MixedPrecision("16-mixed", device=device, scaler=scaler)]
    else:
        arguments["precision"] = precision
    quiet: dict[str, Any] = {
        "accelerator": "gpu" if device == "cuda" else "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": list(added),
    }
    return L.Trainer(**(quiet | arguments))


def fit(module: Any, device: str, added: Sequence[L.Callback] = (), **arguments: Any) -> L.Trainer:
    """Train from a fixed random state."""
    data = arguments.pop("data", None)
    ckpt_path = arguments.pop("ckpt_path", None)
    fitted = trainer(device, added, **arguments)
    torch.manual_seed(1)
    fitted.fit(module, data or loader(), ckpt_path=ckpt_path)
    return fitted


class ByBatch(L.Callback):
    """Calls `look` after every batch and keeps a copy of what it returns."""

    def __init__(self, look: Callable[[], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(deepcopy(self.look()))


# ------------------------------------------------------------------------------ the loop by hand
class Rounded(nn.Module):
    """A part of the teacher: float32 values, with which it computes rounded to `dtype`."""

    def __init__(self, part: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.part, self.dtype = part.float(), dtype

    def forward(self, x: Tensor) -> Tensor:
        return deepcopy(self.part).to(self.dtype)(x.to(self.dtype)).float()


def batches() -> Iterator[Any]:
    for _ in range(EPOCHS):
        yield from loader(indexed=True)


def by_hand(
    device: str,
    head: nn.Module | None,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
    **model: Any,
) -> dict[str, Tensor]:
    """What `everything` does, as a loop; without a head only the user's own loss is trained."""
    module = new(**model).to(device, dtype)
    parameters = [*module.parameters()]
    if head is not None:
        head = head.to(device, dtype)
        parameters += head.parameters()
    optimizer = optimizer_for(parameters, module.fused)
    scales = autocast is torch.float16
    scaler = torch.amp.GradScaler(device, init_scale=SCALE, enabled=scales)
    parts = [Rounded(deepcopy(part), dtype) for part in (module.encoder, module.head)]
    teacher = nn.Sequential(*parts).eval().requires_grad_(False)
    memory = torch.zeros(SAMPLES, CLASSES, device=device)
    torch.manual_seed(1)
    steps = 0
    for place, (x, y, index) in enumerate(batches()):
        x, y, index = x.to(device, dtype), y.to(device), index.to(device)
        with torch.autocast(device, autocast, enabled=autocast is not None, cache_enabled=False):
            features = module.encoder(x)
            logits = module.head(features)
            loss = F.cross_entropy(logits, y)
            if place in module.overflows:
                loss = loss * float("inf")
            if head is not None:
                z = logits.float()
                log_p = (teacher(x) / 2).log_softmax(1)
                divergence = (log_p.exp() * (log_p - (z / 2).log_softmax(1))).sum(1).mean()
                weight = min(1.0, 0.2 + 0.8 * steps / 10)
                student = [*module.encoder.parameters(), *module.head.parameters()]
                pairs = zip(student, teacher.parameters(), strict=True)
                apart = torch.stack([((own - its) ** 2).sum() for own, its in pairs]).sum()
                p = z.softmax(1).clamp(1e-4, 1 - 1e-4)
                target = 0.7 * memory[index] + 0.3 * (p / p.sum(1, keepdim=True)).detach()
                kept = (1 - (p * target).sum(1)).log().mean()
                aside = F.cross_entropy(head(features).float(), y)
                loss = loss + weight * 4 * divergence + 0.05 * apart + 0.5 * kept + 0.5 * aside
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if place in module.overflows:
            continue
        steps += 1
        with torch.no_grad():
            pairs = zip(teacher.parameters(), module.parameters(), strict=True)
            for average, value in pairs:
                average.copy_(DECAY * average + (1 - DECAY) * value.float())
            for own, live in zip(teacher.buffers(), module.buffers(), strict=True):
                own.copy_(live)
            if head is not None:
                memory[index] = target
    found = weights(module)
    if head is not None:
        found |= {f"head of ours {name}": value for name, value in weights(head).items()}
        found["memory"] = memory.cpu()
        teaching = weights(teacher)
        found |= {f"teacher {i}": value for i, value in enumerate(teaching.values())}
    return found


def attached(device: str, precision: str, **model: Any) -> tuple[dict[str, Tensor], Sorted]:
    """The weights after training with `everything`, by the names of `by_hand`, and the head."""
    added = everything()
    module = new(**model)
    fit(module, device, added, precision=precision)
    teacher, _, _, elr, head = added
    found = weights(module)
    found |= {f"head of ours {name}": value for name, value in weights(head.head).items()}
    found["memory"] = elr.memory.rows.cpu()
    average = teacher.state()["weights"]
    ordered = [average[name].cpu() for name in module.state_dict()]
    return found | {f"teacher {i}": value for i, value in enumerate(ordered)}, head


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy on the CPU, by name."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest absolute difference over the names that both have."""
    shared = one.keys() & other.keys()
    assert shared
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in shared)
