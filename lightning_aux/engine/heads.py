"""Heads: parameters that belong to an objective and train with the user's optimizer.

A head is part of the module only while the strategy wraps it, so that the strategy moves, casts
and synchronises it like the rest. Afterwards the module is the user's again: ``state_dict``,
``named_parameters`` and checkpoints never show a head. Its parameters stand at the end of the
first parameter group of the user's optimizer and so follow every scheduler, clipping and scaler.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_aux.engine.errors import AuxiliaryError
from lightning_aux.engine.patches import Patches

__all__ = ["Heads"]

ATTRIBUTE = "_lightning_aux_heads"


class Heads:
    """All heads of one engine, by the name of their objective."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._heads = nn.ModuleDict()
        # Loading the user's checkpoint strictly must not miss heads, which are never in it.
        self._heads.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            _fill_in_current_values
        )
        self._optimizer: Optimizer | None = None
        self._joined: list[nn.Parameter] = []
        self._waiting: tuple[list[dict[str, Any]], dict[str, Any] | None] | None = None

    def __bool__(self) -> bool:
        return len(self._heads) > 0

    @property
    def names(self) -> list[str]:
        """The objectives that have a head."""
        return sorted(self._heads)

    def add(self, name: str, head: nn.Module) -> None:
        """Give the module a head for the time until its optimizers are configured."""
        if ATTRIBUTE not in self._module._modules:
            self._module.add_module(ATTRIBUTE, self._heads)
        self._heads[name] = head

    def hide(self) -> None:
        """Take the heads out of the module."""
        self._module._modules.pop(ATTRIBUTE, None)

    def zero_term(self) -> Tensor | float:
        """A zero that depends on every head parameter.

        DDP waits for a gradient of each parameter; a head whose objective is silent in this step
        gives it one of exactly zero.
        """
        if not self._joined:
            return 0.0
        return torch.stack([parameter.flatten()[0] for parameter in self._joined]).sum() * 0.0

    # --------------------------------------------------------------------- the user's optimizer
    def join_on_configure(self, module: Any, patches: Patches) -> None:
        """Wrap ``configure_optimizers``: the user sees their own parameters, then heads join."""
        configure: Callable[..., Any] = module.configure_optimizers

        def configure_optimizers(*args: Any, **kwargs: Any) -> Any:
            self.hide()
            configured = configure(*args, **kwargs)
            optimizer = _first_optimizer(configured)
            if optimizer is None:
                raise AuxiliaryError(
                    f"{type(module).__name__}.configure_optimizers returned no optimizer, but "
                    f"{', '.join(self.names)} has a head to train. Return an optimizer."
                )
            self._join(optimizer)
            return configured

        patches.wrap(module, "configure_optimizers", configure_optimizers)

    def _join(self, optimizer: Optimizer) -> None:
        # Noted once: toggle_optimizer switches requires_grad on and off during training.
        parameters = self._joined = [
            parameter
            for name in self.names
            for parameter in self._heads[name].parameters()
            if parameter.requires_grad
        ]
        # Some optimizers (Adagrad) make their state when they are built: a sibling makes it.
        if optimizer.state:
            sibling = type(optimizer)(parameters, **optimizer.defaults)
            optimizer.state.update(sibling.state)
        optimizer.param_groups[0]["params"].extend(parameters)
        self._optimizer = optimizer
        if self._waiting is not None:
            self._give_to(*self._waiting)
            self._waiting = None

    # ------------------------------------------------------------------------------ checkpoints
    def take_from(self, optimizer_states: list[dict[str, Any]]) -> dict[str, Any]:
        """Remove the heads from saved optimizer states and return what was removed.

        The states that stay are those of an optimizer that has never seen a head.
        """
        first, count = self._span()
        state = optimizer_states[0]
        groups = [copy(group) for group in state["param_groups"]]
        groups[0]["params"] = groups[0]["params"][:first]
        last = first + count
        entries = state["state"]
        taken = {index - first: entries[index] for index in range(first, last) if index in entries}
        kept = {index: entry for index, entry in entries.items() if index < first}
        kept |= {index - count: entry for index, entry in entries.items() if index >= last}
        for group in groups[1:]:
            group["params"] = [index - count for index in group["params"]]
        optimizer_states[0] = {**state, "state": kept, "param_groups": groups}
        return {"optimizer": taken}

    def state(self) -> dict[str, Any]:
        """The weights of the heads."""
        return {"weights": self._heads.state_dict()}

    def restore(self, optimizer_states: list[dict[str, Any]], saved: dict[str, Any] | None) -> None:
        """Put the heads back into saved optimizer states (without moments if none were saved).

        Lightning reads most checkpoints before there is an optimizer and its states after; the
        heads are put back in between, as soon as their place in the optimizer is known.
        """
        if self._optimizer is None:
            self._waiting = optimizer_states, saved
        else:
            self._give_to(optimizer_states, saved)

    def _give_to(
        self, optimizer_states: list[dict[str, Any]], saved: dict[str, Any] | None
    ) -> None:
        first, count = self._span()
        state = optimizer_states[0]
        if len(state["param_groups"][0]["params"]) != first:
            return  # not the states of this optimizer: its own loading gives the better message
        groups = [copy(group) for group in state["param_groups"]]
        groups[0]["params"] = [*range(first), *range(first, first + count)]
        entries = {index: entry for index, entry in state["state"].items() if index < first}
        later = {index: entry for index, entry in state["state"].items() if index >= first}
        entries |= {index + count: entry for index, entry in later.items()}
        if saved is not None:
            entries |= {index + first: entry for index, entry in saved.get("optimizer", {}).items()}
        for group in groups[1:]:
            group["params"] = [index + count for index in group["params"]]
        optimizer_states[0] = {**state, "state": entries, "param_groups": groups}

    def load(self, saved: dict[str, Any]) -> None:
        """Restore the weights of the heads.

        Raises:
            AuxiliaryError: the heads have changed since the checkpoint was written.
        """
        try:
            self._heads.load_state_dict(saved["weights"])
        except RuntimeError as error:
            raise AuxiliaryError(
                f"the heads in the checkpoint are not those of this run: {error}"
            ) from error

    def _span(self) -> tuple[int, int]:
        count = len(self._joined)
        assert self._optimizer is not None
        return len(self._optimizer.param_groups[0]["params"]) - count, count


def _fill_in_current_values(
    heads: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    for name, value in heads.state_dict().items():
        state_dict.setdefault(prefix + name, value)


def _first_optimizer(configured: Any) -> Optimizer | None:
    """The first optimizer in whatever ``configure_optimizers`` may return."""
    if isinstance(configured, Optimizer):
        return configured
    if isinstance(configured, dict):
        return _first_optimizer(configured.get("optimizer"))
    if isinstance(configured, list | tuple):
        return next((found for each in configured if (found := _first_optimizer(each))), None)
    return None
