"""What is noted of a training for later comparison, as plain values and tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._pytree import tree_map

from lightning_aux.engine import Attached
from lightning_aux.functional.shards import gathered, local
from lightning_aux.teachers.teacher import Teacher

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class Rows(DummyLogger):
    """Keeps what this process hands to its logger."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []
        self.steps: list[int | None] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # Lightning's class answers for this too, and does nothing

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))
        self.steps.append(step)


class Watch(L.Callback):
    """Notes states while a step uses them, whole gradients, and the sizes of parts.

    BatchNorm statistics of ranks differ between an optimizer step and the next forward, where ddp
    makes them equal; in between nobody looks at a teacher.
    """

    def __init__(self, members: Sequence[Any], states: bool, gradients: bool) -> None:
        self.members = with_companions(members)
        self.keeps_states, self.keeps_gradients = states, gradients
        self.states: list[dict[str, Any]] = []
        self.steps: list[int] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.parts: dict[str, Any] = {}

    def on_before_backward(self, trainer: L.Trainer, module: Any, loss: Any) -> None:
        if self.keeps_states:
            self.states.append(deepcopy({each.name: each.state() for each in self.members}))
            self.steps.append(trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if self.keeps_gradients:
            self.gradients.append(
                {name: gathered(each.grad) for name, each in module.named_parameters()}
            )

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        for each in self.members:
            if holds_weights(each):
                live, values = getattr(each, "ring", [each])[-1].pairs()
                self.parts[each.name] = {
                    "live": [local(value).numel() for value in live],
                    "teacher": [local(value).numel() for value in values],
                    "whole": [value.numel() for value in live],
                }


class Collectives(L.Callback):
    """Counts what teachers communicate when they move, and that counting works."""

    def __init__(self, members: Sequence[Any]) -> None:
        self.members = [each for each in with_companions(members) if isinstance(each, Teacher)]
        self.moves = self.issued = self.seen = 0

    def on_train_start(self, *_: Any) -> None:
        # Before our members look up their own methods, which they do on the instance.
        for each in self.members:
            for method in ("after_optimizer_step", "before_step"):
                setattr(each, method, self._counted(getattr(each, method)))
        with CommDebugMode() as counter:
            torch.distributed.all_reduce(torch.zeros(1))
        self.seen = counter.get_total_counts()

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> None:
            with CommDebugMode() as counter:
                method(*args)
            self.moves += 1
            self.issued += counter.get_total_counts()

        return counted


def holds_weights(member: Any) -> bool:
    """Whether it is a teacher with weights of the student's module, not another module."""
    return isinstance(member, Teacher) and getattr(member, "module", None) is None


def with_companions(members: Sequence[Any]) -> list[Attached]:
    """The members and the teachers that they bring along."""
    ours = [each for each in members if isinstance(each, Attached)]
    return [*ours, *(companion for each in ours for companion in each.companions())]


def heads(members: Sequence[Any]) -> list[Tensor]:
    """The whole parameters of every head."""
    found = [each.head for each in members if hasattr(each, "head")]
    return [gathered(value).clone() for head in found for value in head.parameters()]


def parts_of(nested: Any) -> Any:
    """The nest with every sharded tensor replaced by what this process holds of it."""
    return tree_map(lambda each: local(each) if isinstance(each, Tensor) else each, nested)


def optimizer_parts(trainer: L.Trainer) -> list[Any]:
    """What this process holds of the states of all optimizers, in the order of parameters."""
    return [
        [parts_of(each.state.get(parameter)) for parameter in group["params"]]
        for each in trainer.optimizers
        for group in each.param_groups
    ]


def trace(module: nn.Module, trainer: L.Trainer) -> dict[str, Any]:
    """What a callback could leave behind: attributes, hooks, wrapped methods, rates, modes."""
    found: dict[str, Any] = {
        "strategy": sorted(trainer.strategy.__dict__),
        "trainer": sorted(trainer.__dict__),
        "state_dict": list(module.state_dict()),
        "optimizers": [
            [len(group["params"]) for group in each.param_groups] for each in trainer.optimizers
        ],
        "states": [len(each.state) for each in trainer.optimizers],
        "optimizer hooks": [
            len(hooks)
            for each in trainer.optimizers
            for name, hooks in sorted(vars(each).items())
            if name.endswith("_hooks")
        ],
    }
    for path, each in module.named_modules():
        # Lightning leaves the class's own forward there after a training step under ddp.
        own = getattr(vars(each).get("forward"), "__func__", None) is type(each).forward
        found[f"{path} attributes"] = sorted(each.__dict__.keys() - ({"forward"} if own else set()))
        found[f"{path} submodules"] = list(each._modules)
        found[f"{path} hooks"] = {
            kind: [getattr(hook, "__qualname__", type(hook).__name__) for hook in held.values()]
            for kind in HOOKS
            if (held := getattr(each, kind))
        }
        found[f"{path} rate"] = getattr(each, "p", None)
        found[f"{path} mode"] = each.training
    return found


@contextmanager
def said(into: dict[str, Any]) -> Iterator[None]:
    """Notes the exception that ends the block, and goes on."""
    try:
        yield
    except Exception as error:
        into["raised"] = [type(error).__name__, str(error)]
