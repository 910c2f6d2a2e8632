"""``DropoutSchedule``: dropout and stochastic-depth rates as a function of training progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from lightning_aux.attribute_schedules.driver import Driven, Driver
from lightning_aux.attribute_schedules.rates import Rate, layer_of, rates_in
from lightning_aux.engine import Attached, AuxiliaryError, Engine
from lightning_aux.engine.capture import has_compiled_parts
from lightning_aux.engine.errors import near_matches
from lightning_aux.engine.patches import Patches
from lightning_aux.mixin import AuxiliaryMixin
from lightning_aux.schedule import (
    Constant,
    Early,
    Late,
    Schedule,
    Steps,
    Sum,
    parse_moment,
)

__all__ = ["DropoutSchedule", "DropoutScheduleMixin", "Mode", "Profile", "rate_schedule"]

Mode: TypeAlias = Literal["standard", "early", "late", "both"]
Profile: TypeAlias = Literal["constant", "linear"]
# A compiled graph may be made again for as many new rates as this.
_RECOMPILED = 2


class DropoutSchedule(Driver):
    """Sets the rate of the model's dropout by a schedule: standard, early, late, or any other.

    Liu, Xu, Jin, Shen & Darrell 2023, "Dropout Reduces Underfitting", arXiv:2303.01500: early
    dropout is on only in the first part of training (constant, or falling linearly to 0 as their
    code has it), late dropout only after it. Rates change between optimizer steps, never within an
    accumulation window, and the user's values are put back after training. What is driven is
    said as a table when training starts.

    Driven are ``nn.Dropout*`` and ``nn.AlphaDropout`` variants, stochastic depth (any module with
    a ``drop_prob``, such as timm's ``DropPath``, and torchvision's ``StochasticDepth``),
    ``nn.MultiheadAttention`` and ``nn.RNN`` / ``nn.LSTM`` / ``nn.GRU`` with several layers; with
    ``attribute`` named, whatever module has a number of that name, for code that calls
    ``F.dropout(x, self.p)``. Several of these callbacks drive several parts of a model.

    Args:
        p: the rate while dropout is on, in [0, 1]; or all of it as a schedule, such as
            ``"step(0.1, 0, 0.2, at=[10ep, 50ep])"``, without the arguments up to ``shape``.
        mode: ``"early"`` (on before ``until``), ``"late"`` (on from ``start``), ``"both"`` (off
            between ``until`` and ``start``) or ``"standard"`` (on between ``start`` and
            ``until``, by default always).
        until: when dropout ends: ``"500 steps"``, ``"10ep"``, ``"30%"``, optimizer steps, or the
            border of a phase (``"warmup.end"``).
        start: when dropout begins, likewise.
        shape: ``"constant"``, or ``"linear"`` or ``"cosine"`` (early: from ``p`` down to 0 at
            ``until``; late: from 0 at ``start`` up to ``p`` at the end of training).
        modules: glob of module paths that are driven, or a list of them.
        profile: ``"linear"`` lets the rate rise with depth, from 0 in the first layer to the full
            rate in the last, as stochastic depth wants it (Huang et al. 2016, arXiv:1603.09382,
            section 3; in the form ``linspace(0, p, layers)`` of timm and of the first paper's
            code). A layer is what the last number in the path before the module's own name counts
            (``blocks.3.mlp.drop`` is of ``blocks.3``).
        attribute: the name under which the user's modules keep a rate.
        name: unique name for logs and checkpoints.
        optimizer: with several optimizers, the index of the one whose steps are counted.

    Raises:
        AuxiliaryError: a rate outside [0, 1], an unknown mode, a missing ``until`` or ``start``;
            before training, when nothing in the model has a dropout rate to drive, or another
            callback drives it too.

    Note:
        A model without dropout modules gets none: make them with rate 0 and drive them from here,
        or drop whole residual blocks with `StochasticDepthSchedule`. Calls such as
        ``F.dropout(x, 0.1)`` with a number in user code are not reached.

        In a compiled model a schedule of more than three rates does not recompile: torch's dropout
        modules then read the rate from a tensor, with the random numbers of compiled code; modules
        of other kinds hold it as a tensor on the CPU, which breaks the graph where they ask for it.
    """

    drives_rates = True

    def __init__(
        self,
        p: float | str | Schedule,
        mode: Mode = "early",
        until: str | int | None = None,
        start: str | int | None = None,
        shape: Literal["constant", "linear", "cosine"] = "constant",
        modules: str | list[str] = "*",
        name: str = "dropout_schedule",
        optimizer: int = 0,
        profile: Profile = "constant",
        attribute: str | None = None,
    ) -> None:
        super().__init__(name, optimizer)
        self.modules = [modules] if isinstance(modules, str) else list(modules)
        self.schedule = rate_schedule(name, p, mode, until, start, shape)
        if profile not in ("constant", "linear"):
            raise AuxiliaryError(f"{name}: profile={profile!r} is neither 'constant' nor 'linear'.")
        self.profile = profile
        self.attribute = attribute
        self._patches = Patches()

    def find(self, engine: Engine) -> list[Driven]:
        found = rates_in(engine.module, self.attribute)
        chosen = {
            path: rate
            for path, rate in found.items()
            if any(fnmatchcase(path, glob) for glob in self.modules)
        }
        if not chosen:
            raise AuxiliaryError(self._nothing(found))
        factors = depth_factors(list(chosen), self.profile)
        return [
            Driven(rate, self.schedule, factors[path], f"{type(rate.owner).__name__}.{rate.key}")
            for path, rate in chosen.items()
        ]

    def _nothing(self, found: dict[str, Rate]) -> str:
        globs = " or ".join(map(repr, self.modules))
        known = near_matches(self.modules[0], found) if found else "The model has none of these."
        if self.attribute is not None:
            return (
                f"{self.name}: no module matching {globs} has a number called {self.attribute!r}. "
                f"{known} Name the attribute that F.dropout is given."
            )
        return (
            f"{self.name}: no module matching {globs} has a dropout rate. Looked for nn.Dropout* "
            f"and nn.AlphaDropout (p), stochastic depth (drop_prob, or p of StochasticDepth), "
            f"nn.MultiheadAttention (dropout) and nn.RNN/LSTM/GRU with several layers (dropout). "
            f"{known} Add nn.Dropout(0.0) where it should act, name attribute= where it is called "
            f"as a function, or see StochasticDepthSchedule."
        )

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        super().start(engine, state)
        value_at = engine.bind(self.schedule, self.name)
        check_rates(self.name, self.schedule, value_at, engine)
        if rates_taken(value_at, engine) > 1 + _RECOMPILED:
            compiled = has_compiled_parts(engine.module)
            for each in self.driven:
                if isinstance(each.place, Rate):
                    device = engine.trainer.strategy.root_device
                    each.place.hold_as_tensor(self._patches, device, compiled)

    def logged(self) -> dict[str, Any]:
        return {} if not self._now or self._now[0] is None else {"p": self._now[0]}

    def stop(self) -> None:
        self._patches.undo()
        super().stop()

    def state(self) -> dict[str, Any]:
        return {}  # rates are no part of a checkpoint's weights: the user's are there in any run


class DropoutScheduleMixin(AuxiliaryMixin):
    """For a LightningModule that brings its `DropoutSchedule` along.

    Attributes:
        dropout_schedule: arguments of the `DropoutSchedule`; ``p`` has no default.

    Raises:
        AuxiliaryError: before training, when the attribute or its ``p`` is missing.
    """

    dropout_schedule: Mapping[str, Any] = MappingProxyType({})

    def auxiliary_callbacks(self) -> list[Attached]:
        if "p" not in self.dropout_schedule:
            raise AuxiliaryError(
                f"{type(self).__name__}: DropoutScheduleMixin needs a rate. Write in the class, "
                f"for example, dropout_schedule = {{'p': 0.1, 'mode': 'early', 'until': '50%'}}"
            )
        own = DropoutSchedule(**self.dropout_schedule)
        return [*super().auxiliary_callbacks(), own]


def rate_schedule(
    name: str,
    p: float | str | Schedule,
    mode: str,
    until: str | int | None,
    start: str | int | None,
    shape: Literal["constant", "linear", "cosine"],
) -> Schedule:
    """The rate over training, from the arguments of a schedule of dropout."""
    wants = {
        "standard": (),
        "early": ("until",),
        "late": ("start",),
        "both": ("until", "start"),
    }
    if mode not in wants:
        raise AuxiliaryError(
            f"{name}: mode={mode!r} is unknown. Choose one of {', '.join(map(repr, wants))}."
        )
    given = {key for key, value in (("until", until), ("start", start)) if value is not None}
    try:
        if isinstance(p, str | Schedule):
            schedule = Schedule.parse(p)
            if not isinstance(schedule, Constant):
                if given or mode not in ("early", "standard") or shape != "constant":
                    raise AuxiliaryError(
                        f"{name}: p={str(p)!r} is the whole schedule; leave out mode, until, start "
                        f"and shape."
                    )
                return schedule
            p = schedule.value
        if not 0.0 <= p <= 1.0:
            raise AuxiliaryError(f"{name}: p={p} is not a rate. Give a number in [0, 1].")
        if mode != "standard" and given != set(wants[mode]):
            only = " and ".join(f"{each}=" for each in wants[mode])
            raise AuxiliaryError(
                f"{name}: mode={mode!r} takes {only} and only that, for example "
                f"{wants[mode][0]}='50%'; a window with both ends is mode='standard'."
            )
        if mode == "standard" and shape != "constant":
            raise AuxiliaryError(f"{name}: shape={shape!r} needs mode='early', 'late' or 'both'.")
        end = None if until is None else parse_moment(until)
        begin = None if start is None else parse_moment(start)
        if end is not None and begin is not None:
            if mode == "both":
                return Sum((Early(p, end, shape), Late(p, begin, shape)))
            return Steps((0.0, p, 0.0), (begin, end))
        if end is not None:
            return Early(p, end, shape)
        return Constant(p) if begin is None else Late(p, begin, shape)
    except AuxiliaryError:
        raise
    except ValueError as error:
        raise AuxiliaryError(f"{name}: {error}") from error


def depth_factors(paths: list[str], profile: Profile) -> dict[str, float]:
    """What the rate of each module is multiplied by."""
    layers = list(dict.fromkeys(map(layer_of, paths)))
    if profile == "constant" or len(layers) == 1:
        return dict.fromkeys(paths, 1.0)
    return {path: layers.index(layer_of(path)) / (len(layers) - 1) for path in paths}


def rates_taken(value_at: Callable[[int], float], engine: Engine) -> int:
    """How many different rates there are in training, as far as it matters here."""
    return len(set(_sampled(value_at, engine)))


def check_rates(
    name: str, schedule: Schedule, value_at: Callable[[int], float], engine: Engine
) -> None:
    """Refuse a schedule that is not one of rates.

    Raises:
        AuxiliaryError: a value is outside [0, 1].
    """
    wrong = next((value for value in _sampled(value_at, engine) if not 0.0 <= value <= 1.0), None)
    if wrong is not None:
        raise AuxiliaryError(
            f"{name}: {str(schedule)!r} takes the value {wrong:g}, and a rate lies in [0, 1]."
        )


def _sampled(value_at: Callable[[int], float], engine: Engine) -> list[float]:
    total = engine.horizon.total if engine.horizon is not None else None
    steps = 10_000 if total is None else total
    return [value_at(step) for step in range(0, steps, max(1, steps // 4096))]
