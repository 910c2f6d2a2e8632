"""``Stepping``: which optimizer has really stepped, and what waits for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lightning_aux.engine.errors import AuxiliaryError
from lightning_aux.engine.patches import Patches
from lightning_aux.engine.rehearsal import Rehearsal

if TYPE_CHECKING:
    from lightning_aux.engine.engine import Engine

__all__ = ["Stepping"]


class Stepping:
    """Counts the real steps of each optimizer and moves its members after them.

    Attributes:
        optimizers: of the user, in the order of ``configure_optimizers``.
        toggled: position of the one that ``toggle_optimizer`` has chosen, in manual optimisation.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.optimizers: list[Any] = list(engine.trainer.optimizers)
        self.toggled: int | None = None
        self._movers = engine.overriding("after_optimizer_step")
        self._deferred: list[list[Callable[[], None]]] = [[] for _ in self.optimizers]
        self._depths = [0 for _ in self.optimizers]
        self._saving = self._virtual = self._virtually = False
        self._looking = [each for each in engine.members.values() if each.lookahead]
        self._rehearsal = Rehearsal(engine)
        self._hooks: list[Any] = []

    def defer(self, place: int, acts: list[Callable[[], None]]) -> None:
        """Have ``acts`` called once the optimizer at ``place`` has really stepped."""
        self._deferred[place] += acts

    def wrap(self, patches: Patches) -> None:
        """Follow the optimizers and the strategy's and the module's dealings with them."""
        # Fires for real steps only: not for micro-batches, nor when a gradient scaler skips one.
        for place, optimizer in enumerate(self.optimizers):
            self._hooks.append(optimizer.register_step_pre_hook(partial(self._stepping, place)))
            self._hooks.append(optimizer.register_step_post_hook(partial(self._stepped, place)))

        strategy, module = self._engine.trainer.strategy, self._engine.module
        optimizer_step, optimizer_state = strategy.optimizer_step, strategy.optimizer_state

        def step_that_may_be_skipped(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            place = self._place(optimizer)
            if place is not None:  # a step that raised has not reached its end
                self._depths[place] = 0
                self._look_ahead(place, lambda: optimizer_step(optimizer, *args, **kwargs))
            self._check_closure(args, kwargs)
            with self._engine.own_weights():
                returned = optimizer_step(optimizer, *args, **kwargs)
            if place is not None:  # what waited for a step that a gradient scaler has skipped
                self._deferred[place].clear()
            return returned

        def state_without_steps(*args: Any, **kwargs: Any) -> Any:
            # For an optimizer without state yet torch makes one, for sharded parameters, by a step
            # with zero gradients and a rate of zero.
            self._saving = True
            try:
                return optimizer_state(*args, **kwargs)
            finally:
                self._saving = False

        patches.wrap(strategy, "optimizer_step", step_that_may_be_skipped)
        patches.wrap(strategy, "optimizer_state", state_without_steps)

        if not module.automatic_optimization:
            toggle, untoggle = module.toggle_optimizer, module.untoggle_optimizer

            def noted_toggle(optimizer: Any) -> None:
                toggle(optimizer)
                self.toggled = self._place(optimizer)

            def noted_untoggle(optimizer: Any) -> None:
                untoggle(optimizer)
                self.toggled = None

            patches.wrap(module, "toggle_optimizer", noted_toggle)
            patches.wrap(module, "untoggle_optimizer", noted_untoggle)

    def _check_closure(self, args: Any, kwargs: Any) -> None:
        closure = kwargs.get("closure", args[0] if args else None)
        # Lightning's own, in place of none.
        if getattr(closure, "__name__", "") != "do_nothing_closure":
            self._refuse("a closure would be called with the full-precision weights")

    def _refuse(self, why: str) -> None:
        """In manual optimisation, what other weights in the module cannot follow."""
        for each in self._engine.stand_ins:
            if each.in_place:
                raise AuxiliaryError(
                    f"{each.whose} has other weights in the module during training_step, and {why}."
                    f" Call self.manual_backward(loss), then step() of self.optimizers()."
                )

    def _look_ahead(self, place: int, step: Callable[[], Any]) -> None:
        """Take virtual steps for the members that want to see where they lead."""
        looking = [each for each in self._looking if each.optimizer == place]
        if not looking:
            return
        now = self._engine.progress(place)
        with self._rehearsal.of(self.optimizers[place]):
            self._virtual = True
            try:
                for number in range(max(each.lookahead for each in looking)):
                    self._virtually = False
                    step()
                    for member in looking:
                        if self._virtually and number < member.lookahead:
                            member.after_virtual_step(now)
            finally:
                self._virtual = False
                self._deferred[place].clear()

    def stop(self) -> None:
        """Let go of the optimizers."""
        self._rehearsal.stop()
        while self._hooks:
            self._hooks[-1].remove()
            self._hooks.pop()

    def _place(self, optimizer: Any) -> int | None:
        """The position of an optimizer, or of Lightning's wrapper around it."""
        # The user's own may have an attribute of that name too.
        for own in (optimizer, getattr(optimizer, "optimizer", None)):
            for place, each in enumerate(self.optimizers):
                if each is own:
                    return place
        return None

    def _stepping(self, place: int, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._depths[place] += 1
        self._refuse("an optimizer that is stepped past Lightning would move those")

    def _stepped(self, place: int, optimizer: Any, args: Any, kwargs: Any) -> None:
        """A real optimizer step: its teachers, memories and schedules move, once."""
        # torch wraps ``step`` in each class of an optimizer, so the hooks of one whose ``step``
        # calls ``super().step()`` fire once for every class.
        self._depths[place] -= 1
        if self._depths[place] > 0 or self._saving:
            return
        found_inf = getattr(optimizer, "found_inf", None)
        # A fused optimizer is called but does nothing on overflow.
        steps = found_inf is None or not bool(found_inf.item())
        if self._virtual:
            self._virtually = steps
            return
        deferred = self._deferred[place].copy()
        self._deferred[place].clear()
        if not steps:
            return
        self._engine.clocks[place] += 1
        with torch.no_grad():
            for act in deferred:
                act()
            now = self._engine.progress(place)
            for member in self._movers:
                if member.optimizer == place:
                    member.after_optimizer_step(now)
