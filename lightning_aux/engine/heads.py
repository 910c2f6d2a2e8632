"""Heads: parameters that belong to an objective and train with the user's optimizer.

A head is part of the module only while the strategy wraps it, so that the strategy moves, casts
and synchronises it like the rest. Afterwards the module is the user's again: ``state_dict``,
``named_parameters`` and checkpoints never show a head. Its parameters stand at the end of the
first parameter group of the user's optimizer and so follow every scheduler, clipping and scaler;
while optimizer states are saved or loaded they step aside.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_aux.engine.distributed import shard, shards_parameters
from lightning_aux.engine.errors import AuxiliaryError
from lightning_aux.engine.patches import Patches
from lightning_aux.functional.shards import is_sharded, like, local, part_of, saved

__all__ = ["Heads"]

ATTRIBUTE = "_lightning_aux_heads"
# Optimizers that would train no head, or keep it where it cannot be taken out.
_REFUSED = {
    "ZeroRedundancyOptimizer": "has divided its parameters among the processes when it was made",
    "LBFGS": "remembers one flat vector of all its parameters",
}
# What of a strategy reads or writes the states of optimizers.
_STATES = ("optimizer_state", "load_optimizer_state_dict", "load_checkpoint")


class Heads:
    """All heads of one engine, by the name of their objective."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._heads = nn.ModuleDict()
        # Loading the user's checkpoint strictly must not miss heads, which are never in it.
        self._heads.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            _fill_in_current_values
        )
        self._places: dict[str, int] = {}  # which optimizer trains the head
        self._trained: dict[str, list[nn.Parameter]] = {}
        self._optimizers: list[Optimizer] = []
        self._left: list[dict[Tensor, Any]] | None = None  # states, once out of the optimizers
        self._hooks: list[Any] = []

    def __bool__(self) -> bool:
        return len(self._heads) > 0

    @property
    def names(self) -> list[str]:
        """The objectives that have a head."""
        return sorted(self._heads)

    def add(self, name: str, head: nn.Module, optimizer: int) -> None:
        """Give the module a head for the time until its optimizers are configured.

        Args:
            name: whose head it is.
            head: the trainable parameters.
            optimizer: index of the optimizer that trains it.
        """
        if ATTRIBUTE not in self._module._modules:
            self._module.add_module(ATTRIBUTE, self._heads)
        self._heads[name] = head
        self._places[name] = optimizer

    def shard(self, strategy: Any) -> None:
        """Shard every head where the strategy has the model sharded."""
        if shards_parameters(strategy):
            for name, head in self._heads.items():
                shard(head, strategy, name)

    def hide(self) -> None:
        """Take the heads out of the module."""
        self._module._modules.pop(ATTRIBUTE, None)

    def zero_term(self, optimizer: int | None) -> Tensor | float:
        """A zero that depends on every parameter of the heads that an optimizer trains.

        DDP waits in every backward for a gradient of each parameter; a head whose objective is
        silent in it gives it one of exactly zero.

        Args:
            optimizer: the one that is toggled; heads of the others wait for nothing then.
        """
        if self._left is not None:  # a state that could not be loaded, and the user went on
            self._return()
        parameters = [
            each
            for name in self.names
            if optimizer is None or self._places[name] == optimizer
            for each in self._trained[name]
        ]
        if not parameters:
            return 0.0
        # Of a sharded parameter this process may hold no element at all.
        parts = [each.to_local() if is_sharded(each) else each for each in parameters]
        return torch.cat([part.flatten()[:1] for part in parts]).sum() * 0.0

    # --------------------------------------------------------------------- the user's optimizer
    def join_on_configure(self, module: Any, strategy: Any, patches: Patches) -> None:
        """Wrap ``configure_optimizers``: the user sees their own parameters, then heads join."""
        configure: Callable[..., Any] = module.configure_optimizers

        def configure_optimizers(*args: Any, **kwargs: Any) -> Any:
            self.hide()
            configured = configure(*args, **kwargs)
            self._join(_optimizers(configured), type(module).__name__)
            return configured

        patches.wrap(module, "configure_optimizers", configure_optimizers)
        for name in _STATES:
            patches.wrap(strategy, name, self._aside_during(getattr(strategy, name)))

    def _join(self, optimizers: list[Optimizer], module: str) -> None:
        for name, place in self._places.items():
            if place >= len(optimizers):
                raise AuxiliaryError(
                    f"{module}.configure_optimizers returned {len(optimizers) or 'no'} "
                    f"optimizer(s), but the head of {name} is to be trained by number {place} "
                    f"(counted from 0). Return an optimizer for it, or set optimizer=...."
                )
        # Noted once: toggle_optimizer switches requires_grad on and off during training.
        self._trained = {
            name: [each for each in self._heads[name].parameters() if each.requires_grad]
            for name in self.names
        }
        self._optimizers, self._left = optimizers, None
        for optimizer, parameters in self._joined():
            self._check_joins(optimizer)
            self._step_aside_for_states(optimizer)
            # Some optimizers (Adagrad) make their state when they are built: a sibling makes it.
            if optimizer.state:
                sibling = type(optimizer)(parameters, **optimizer.defaults)
                optimizer.state.update(sibling.state)
            optimizer.param_groups[0]["params"].extend(parameters)

    def _check_joins(self, optimizer: Optimizer) -> None:
        """Refuse optimizers that keep their parameters elsewhere than in their groups."""
        for base in type(optimizer).__mro__:
            if base.__name__ in _REFUSED:
                raise AuxiliaryError(
                    f"{', '.join(self.names)}: {type(optimizer).__name__} {_REFUSED[base.__name__]}"
                    f", so a head cannot join it. Use another optimizer, or an objective without "
                    f"a head."
                )

    def _step_aside_for_states(self, optimizer: Optimizer) -> None:
        """What the user's own code saves of an optimizer, or loads, has no heads in it either."""
        ours: list[bool] = []

        def leave(*_: Any) -> None:
            ours.append(self._left is None)
            if ours[-1]:
                self.leave()

        def come_back(*_: Any) -> None:
            if ours and ours.pop() and self._left is not None:
                self._return()

        # By hooks, which Lightning's wrapper of the optimizer follows too.
        self._hooks += [
            optimizer.register_state_dict_pre_hook(leave),
            optimizer.register_state_dict_post_hook(come_back),
            optimizer.register_load_state_dict_pre_hook(leave),
            optimizer.register_load_state_dict_post_hook(come_back),
        ]

    def _joined(self) -> list[tuple[Optimizer, list[nn.Parameter]]]:
        """Each optimizer that trains heads, and their parameters, in the order of names."""
        parameters: defaultdict[int, list[nn.Parameter]] = defaultdict(list)
        for name, trained in self._trained.items():
            parameters[self._places[name]] += trained
        return [(self._optimizers[place], each) for place, each in sorted(parameters.items())]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The user's optimizers as they are without heads, for the time of a ``with`` block."""
        if self._left is not None:
            yield
            return
        self.leave()
        try:
            yield
        finally:
            self._return()

    def _aside_during(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called_without_heads(*args: Any, **kwargs: Any) -> Any:
            with self.aside():
                return function(*args, **kwargs)

        return called_without_heads

    def leave(self) -> None:
        """Take the heads out of the optimizers; what these remember of them is kept here.

        To be called again if Ctrl-C interrupts it.
        """
        joined = self._joined()
        if self._left is None:
            self._left = [
                {each: optimizer.state[each] for each in parameters if each in optimizer.state}
                for optimizer, parameters in joined
            ]
        for optimizer, parameters in joined:
            ours = set(map(id, parameters))
            group = optimizer.param_groups[0]["params"]
            group[:] = [each for each in group if id(each) not in ours]
            for each in parameters:
                optimizer.state.pop(each, None)

    def part(self) -> None:
        """Leave for good; to be called again if Ctrl-C interrupts it."""
        self.leave()
        while self._hooks:
            self._hooks[-1].remove()
            self._hooks.pop()

    def _return(self) -> None:
        assert self._left is not None
        for (optimizer, parameters), states in zip(self._joined(), self._left, strict=True):
            optimizer.state.update(states)
            optimizer.param_groups[0]["params"].extend(parameters)
        self._left = None

    # ------------------------------------------------------------------------------ checkpoints
    def state(self, with_optimizer: bool) -> dict[str, Any]:
        """The weights of the heads and, on request, what the optimizers remember of them.

        Sharded tensors are gathered: all processes have to call this together.
        """
        weights = {name: _saved(value) for name, value in self._heads.state_dict().items()}
        if not with_optimizer:
            return {"weights": weights}
        with self.aside():
            assert self._left is not None
            states = [
                states.get(parameter)
                for (_, parameters), states in zip(self._joined(), self._left, strict=True)
                for parameter in parameters
            ]
        moments = {
            index: {key: _saved(value) for key, value in state.items()}
            for index, state in enumerate(states)
            if state is not None
        }
        return {"weights": weights, "optimizer": moments}

    def load(self, saved: dict[str, Any]) -> None:
        """Restore the weights of the heads and what the optimizers remember of them.

        Raises:
            AuxiliaryError: the heads have changed since the checkpoint was written.
        """
        weights, current = saved["weights"], self._heads.state_dict()
        try:
            fitting = {
                name: _placed_like(current[name], value) if name in current else value
                for name, value in weights.items()
            }
            self._heads.load_state_dict(fitting)
        except RuntimeError as error:
            raise AuxiliaryError(
                f"the heads in the checkpoint are not those of this run: {error}"
            ) from error
        first = 0
        for optimizer, parameters in self._joined():
            states = saved.get("optimizer", {})
            here = {place: states.get(first + place) for place in range(len(parameters))}
            _load_states(optimizer, parameters, {p: s for p, s in here.items() if s is not None})
            first += len(parameters)


def _load_states(
    optimizer: Optimizer, parameters: list[nn.Parameter], states: dict[int, dict[str, Any]]
) -> None:
    """Give ``optimizer`` saved states of some of its parameters, cast as it casts its own."""
    if not states:
        return
    alone = copy(optimizer)  # torch copies no hooks, and takes lists and states over by reference
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    alone.state = defaultdict(dict)
    alone.param_groups = [{**group, "params": parameters}]
    placed = {
        place: {key: _placed_like(parameters[place], value) for key, value in state.items()}
        for place, state in states.items()
    }
    numbered = {**group, "params": list(range(len(parameters)))}
    alone.load_state_dict({"state": placed, "param_groups": [numbered]})
    optimizer.state.update(alone.state)


def _saved(value: Any) -> Any:
    """Sharded tensors whole and on the CPU, everything else as it is."""
    return saved(value) if isinstance(value, Tensor) else value


def _placed_like(tensor: Tensor, value: Any) -> Any:
    """``value``, sharded like ``tensor`` where that is sharded and of the same shape."""
    if not isinstance(value, Tensor) or not is_sharded(tensor) or value.shape != tensor.shape:
        return value
    return like(part_of(value, tensor).to(local(tensor).device), tensor)


def _fill_in_current_values(
    heads: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    for name, value in heads.state_dict().items():
        state_dict.setdefault(prefix + name, value)


def _optimizers(configured: Any) -> list[Optimizer]:
    """The optimizers in whatever ``configure_optimizers`` may return, in Lightning's order."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, dict):
        return _optimizers(configured.get("optimizer"))
    if isinstance(configured, list | tuple):
        return [found for each in configured for found in _optimizers(each)]
    return []
