"""``DropoutSchedule``: dropout and stochastic-depth rates as a function of training progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_aux.engine import Attached, AuxiliaryError, Engine, Progress
from lightning_aux.engine.errors import near_matches
from lightning_aux.engine.taps import plain_path
from lightning_aux.mixin import AuxiliaryMixin
from lightning_aux.schedule import Constant, Duration, Early, Late, Schedule, Steps

__all__ = ["DropoutSchedule", "DropoutScheduleMixin"]


class DropoutSchedule(Attached):
    """Sets the rate of the model's dropout by a schedule: standard, early or late.

    Liu, Xu, Jin, Shen & Darrell 2023, "Dropout Reduces Underfitting", arXiv:2303.01500: early
    dropout is on only in the first part of training (constant, or falling linearly to 0 as their
    code has it), late dropout only after it. Rates change between optimizer steps, never within an
    accumulation window, and the user's values are put back after training.

    Driven are ``nn.Dropout*`` and ``nn.AlphaDropout`` variants, stochastic depth (any module with
    a ``drop_prob``, such as timm's ``DropPath``, and torchvision's ``StochasticDepth``),
    ``nn.MultiheadAttention`` and ``nn.RNN`` / ``nn.LSTM`` / ``nn.GRU`` with several layers.

    Args:
        p: the rate while dropout is on, in [0, 1].
        mode: ``"early"`` (on before ``until``), ``"late"`` (on from ``start``) or ``"standard"``
            (on between ``start`` and ``until``, by default always).
        until: when dropout ends: ``"500 steps"``, ``"10ep"``, ``"30%"`` or optimizer steps.
        start: when dropout begins, likewise.
        shape: ``"constant"``, or ``"linear"`` (early: from ``p`` down to 0 at ``until``; late: from
            0 at ``start`` up to ``p`` at the end of training).
        modules: glob of module paths that are driven.
        name: unique name for logs and checkpoints.
        optimizer: with several optimizers, the index of the one whose steps are counted.

    Raises:
        AuxiliaryError: a rate outside [0, 1], an unknown mode, a missing ``until`` or ``start``;
            before training, when nothing in the model has a dropout rate to drive.

    Note:
        A model without dropout modules gets none: make them with rate 0 and drive them from here.
        Calls such as ``F.dropout(x, 0.1)`` in user code are not modules and are not reached.
    """

    def __init__(
        self,
        p: float,
        mode: Literal["standard", "early", "late"] = "early",
        until: str | int | None = None,
        start: str | int | None = None,
        shape: Literal["constant", "linear"] = "constant",
        modules: str = "*",
        name: str = "dropout_schedule",
        optimizer: int = 0,
    ) -> None:
        super().__init__(name)
        self.optimizer = optimizer
        if not 0.0 <= p <= 1.0:
            raise AuxiliaryError(f"{name}: p={p} is not a rate. Give a number in [0, 1].")
        self.modules = modules
        self.schedule = _schedule(name, p, mode, until, start, shape)
        self._rate_at: Callable[[int], float] | None = None
        self._rate: float | None = None
        self._driven: list[tuple[nn.Module, str, Any]] = []

    def check(self, engine: Engine) -> None:
        found = _with_rate(engine.module)
        chosen = {path: at for path, at in found.items() if fnmatchcase(path, self.modules)}
        if not chosen:
            known = near_matches(self.modules, found) if found else "The model has none of these."
            raise AuxiliaryError(
                f"{self.name}: no module matching {self.modules!r} has a dropout rate. Looked for "
                f"nn.Dropout* and nn.AlphaDropout (p), stochastic depth (drop_prob, or p of "
                f"StochasticDepth), nn.MultiheadAttention (dropout) and nn.RNN/LSTM/GRU with "
                f"several layers (dropout). {known} Add nn.Dropout(0.0) where it should act."
            )
        self._driven = [
            (module, attribute, getattr(module, attribute)) for module, attribute in chosen.values()
        ]
        rank_zero_info(f"lightning_aux: {self.name} drives {', '.join(chosen)}")

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        self._rate_at = engine.bind(self.schedule, self.name)
        self._rate = None

    def before_step(self, now: Progress) -> None:
        assert self._rate_at is not None
        rate = self._rate_at(now.steps)
        if rate != self._rate:
            self._rate = rate
            for module, attribute, _ in self._driven:
                setattr(module, attribute, rate)

    def logged(self) -> dict[str, Any]:
        return {} if self._rate is None else {"p": self._rate}

    def stop(self) -> None:
        for module, attribute, value in self._driven:
            setattr(module, attribute, value)
        self._driven, self._rate_at = [], None


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


def _schedule(
    name: str,
    p: float,
    mode: str,
    until: str | int | None,
    start: str | int | None,
    shape: Literal["constant", "linear"],
) -> Schedule:
    wants = {"standard": (), "early": ("until",), "late": ("start",)}
    if mode not in wants:
        raise AuxiliaryError(
            f"{name}: mode={mode!r} is unknown. Choose one of {', '.join(map(repr, wants))}."
        )
    given = {key for key, value in (("until", until), ("start", start)) if value is not None}
    if mode != "standard" and given != set(wants[mode]):
        raise AuxiliaryError(
            f"{name}: mode={mode!r} takes {wants[mode][0]}= and only that, for example "
            f"{wants[mode][0]}='50%'; a window with both ends is mode='standard'."
        )
    if mode == "standard" and shape != "constant":
        raise AuxiliaryError(f"{name}: shape={shape!r} needs mode='early' or 'late'.")
    try:
        end = None if until is None else Duration.parse(until)
        begin = None if start is None else Duration.parse(start)
        if begin is not None and end is not None:
            return Steps((0.0, p, 0.0), (begin, end))
        if end is not None:
            return Early(p, end, shape)
        return Constant(p) if begin is None else Late(p, begin, shape)
    except ValueError as error:
        raise AuxiliaryError(f"{name}: {error}") from error


def _with_rate(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Module path to the module and the name of its rate."""
    found = {}
    for path, module in model.named_modules():
        if module is model:  # its attributes are the user's hyperparameters
            continue
        attribute = _rate_attribute(module)
        if attribute is not None:
            found[plain_path(path)] = (module, attribute)
    return found


def _rate_attribute(module: nn.Module) -> str | None:
    if isinstance(module, _DropoutNd):
        return "p"
    if isinstance(module, nn.MultiheadAttention):
        return "dropout"
    if isinstance(module, nn.RNNBase):
        return "dropout" if module.num_layers > 1 else None
    if hasattr(module, "drop_prob"):
        return "drop_prob"
    return "p" if type(module).__name__ == "StochasticDepth" else None
