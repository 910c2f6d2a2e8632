"""``Attached``: the callback base of everything that the engine drives."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_aux.engine.errors import AuxiliaryError
from lightning_aux.engine.step import Progress, Step
from lightning_aux.engine.taps import Locations
from lightning_aux.schedule import Schedule

if TYPE_CHECKING:
    from lightning_aux.engine.engine import Engine

__all__ = ["Attached"]


class Attached(Callback):
    """A callback that does nothing by itself: Lightning's hooks reach one engine per module.

    Whichever of our callbacks Lightning calls first starts, saves or removes the engine for all
    of them, so the order of callbacks in the Trainer does not matter. Subclasses override the
    methods in the second half, never Lightning's hooks.

    Args:
        name: unique among everything attached; used in logs, checkpoints and messages.
    """

    lookahead: int = 0
    """How many virtual steps of its optimizer are taken, and undone, before every real one."""

    optimizer: int = 0
    """Index of the optimizer whose steps this one counts (several in manual optimisation)."""

    locations: Locations = Locations()
    """Where this one finds logits and the like, before any `Taps` of the Trainer."""

    turn: ClassVar[int] = 0
    """Whose `before_step` comes first: lower numbers, and names among equals."""

    handed_on: ClassVar[tuple[str, ...]] = ()
    """Init arguments that a subclass may take as ``**keywords`` and hand on to this class."""

    _arguments: dict[str, Any]
    _engine: Engine | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Attached:
        self: Attached = super().__new__(cls)
        self._arguments = {}
        try:
            given = inspect.signature(cls).bind_partial(*args, **kwargs).arguments
        except TypeError:  # __init__ is about to say the same with its own traceback
            return self
        for name, parameter in inspect.signature(cls).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        for name, parameter in cls.init_parameters().items():
            value = given.get(name, parameter.default)
            if value is not parameter.empty:
                self._arguments[name] = value
        return self

    @classmethod
    def init_parameters(cls) -> dict[str, inspect.Parameter]:
        """Every init argument by its name, those that ``**keywords`` hand on included."""
        found: dict[str, inspect.Parameter] = {}
        for base in cls.__mro__:
            if "__init__" not in base.__dict__:
                continue
            _, *own = inspect.signature(base.__dict__["__init__"]).parameters.values()
            named = [
                each for each in own if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
            ]
            hands_on = bool(found)
            for each in named:
                if not hands_on or each.name in cls.handed_on:
                    found.setdefault(each.name, each)
            if all(each.kind is not each.VAR_KEYWORD for each in own):
                break
        return found

    def __init__(self, name: str) -> None:
        if not name or "/" in name:
            raise AuxiliaryError(
                f"{type(self).__name__}: the name {name!r} cannot be used in log keys. Give a "
                f"name that is not empty and has no slash."
            )
        if name in ("main", "total"):
            raise AuxiliaryError(
                f"{type(self).__name__}: aux/{name} is where the losses are logged. Give another "
                f"name."
            )
        self.name = name

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Every init argument as a plain value, for the logger's configuration."""
        return {key: _plain(value) for key, value in self._arguments.items()}

    def __repr__(self) -> str:
        given = ", ".join(f"{key}={value!r}" for key, value in self.hyperparameters.items())
        return f"{type(self).__name__}({given})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None}  # a copy starts unattached

    # ------------------------------------------------------------------------ Lightning's hooks
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            if "name" not in self.__dict__:
                raise AuxiliaryError(
                    f"{type(self).__name__}.__init__ does not call super().__init__(...), which "
                    f"gives it its name and weight. Call it first."
                )
            from lightning_aux.engine.engine import Engine

            before, self._engine = self._engine, Engine.of(trainer, pl_module)
            self._engine.add(self)
            if before is not None:
                self._engine.continue_from(before)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.engine.check()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.engine.start()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._engine is not None:
            self._engine.save(checkpoint)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._engine is not None:
            self._engine.load(checkpoint)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._leave()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._engine is not None:
            self._engine.detach()
        self.end()

    @property
    def engine(self) -> Engine:
        """The engine of the current or latest fit."""
        if self._engine is None:
            raise AuxiliaryError(
                f"{self.name} is not attached: it is a callback for Trainer.fit. If you override "
                f"setup() in a subclass, call super().setup(...)."
            )
        return self._engine

    # ------------------------------------------------------------------- what subclasses override
    def companions(self) -> list[Attached]:
        """Further members that this one brings along (an anchor brings its own teacher)."""
        return []

    def attach(self, engine: Engine) -> None:
        """Declare needs; called once per fit, before the model is complete."""

    def build_head(self, module: nn.Module) -> nn.Module | None:
        """Trainable parameters of this member, made once the user's model is complete.

        They train with the user's optimizer (its first parameter group; with several optimizers
        the one that ``optimizer`` names), are synchronised or sharded by the strategy, saved in our
        part of the checkpoint, and are ``self.head`` from then on.
        """
        return None

    def check(self, engine: Engine) -> None:
        """Raise what can be known to be wrong before training; the model is complete."""

    def move_model(self, engine: Engine, state: dict[str, Any] | None) -> None:
        """Change the weights that training begins with, before any member looks at them."""

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        """Begin; ``state`` is what `state` returned when the checkpoint was saved."""

    def before_step(self, now: Progress) -> None:
        """Called before the user's ``training_step`` of every micro-batch."""

    def observe(self, step: Step) -> None:
        """Look at a step that Lightning logs, and at the first, without a gradient.

        Called once the model has run, before any term is computed, and before `logged`.
        """

    def before_backward(self, loss: Tensor, terms: Mapping[str, Tensor | None]) -> None:
        """Look at the user's loss and the weighted terms of its optimizer that are added to it.

        Called in every step, before `logged`; in manual optimisation for every ``manual_backward``
        that such a term joins. Gradients may be taken, with ``retain_graph=True``. All processes
        are given the same names; a term that failed on this one is None.
        """

    def after_restart(self) -> None:
        """Called when a generation has begun again: weights and optimizer are as at first."""

    def after_optimizer_step(self, now: Progress) -> None:
        """Called after every real step of its optimizer."""

    def after_virtual_step(self, now: Progress) -> None:
        """Called after each of the ``lookahead`` virtual steps, before they are undone."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs: tensors and plain values only."""
        return {}

    def logged(self) -> dict[str, Any]:
        """Values to log under ``aux/<name>/<key>`` on steps where Lightning logs."""
        return {}

    def stop(self) -> None:
        """Put everything of the user's back as it was; called when training ends."""

    def end(self) -> None:
        """Put back what hooks of its own have changed, in an evaluation outside of ``fit`` too.

        Called when the Trainer is done or raises, after `stop` if it was training.
        """


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Schedule):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    if isinstance(value, nn.Module):
        return type(value).__name__
    return getattr(value, "__qualname__", None) or repr(value)
