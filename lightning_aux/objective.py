"""``Objective``: one extra term of the training loss, weighted by a schedule."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, TypedDict

from torch import Tensor, nn

from lightning_aux.engine import Attached, AuxiliaryError, Engine, Locations, Step, TeacherLike
from lightning_aux.schedule import Schedule
from lightning_aux.taps import Taps

__all__ = ["Objective", "ObjectiveOptions"]


class ObjectiveOptions(TypedDict, total=False):
    """What every objective can be told besides its own arguments, as ``**common``.

    Attributes:
        name: unique name for logs (``aux/<name>``) and checkpoints.
        taps: where logits, target, features and input are, for this objective alone.
        nonfinite: what a NaN or infinite term does: ``"raise"``, or ``"skip"`` the step's term.
        optimizer: with several optimizers, the index of the one that the term belongs to.
        backward: which call of ``manual_backward`` the term joins in manual optimisation.
    """

    name: str | None
    taps: Taps | None
    nonfinite: Literal["raise", "skip"]
    optimizer: int
    backward: int | None


class Objective(Attached):
    """A term that is added to the user's training loss: ``total = loss + Σ weight · term``.

    Subclasses write `loss` and nothing else. The term is computed inside the user's
    ``training_step``, so precision, gradient scaling, accumulation, clipping and the strategy's
    gradient synchronisation treat it like the user's own loss.

    Args:
        weight: factor of the term: a float, a schedule string such as
            ``"linear(0, 1, until=30%)"``, or a `Schedule`. While it is 0
            the term is not computed at all.
        name: unique name for logs (``aux/<name>``) and checkpoints. Default: the class name in
            snake case. Two callbacks of one class need two names.
        taps: where this objective finds logits, target, features and input, before any
            `Taps` of the Trainer.
        reads: module paths or globs that `loss` passes to ``step.features`` or
            ``step.input``; checked before training starts.
        nonfinite: what to do when the term is NaN or infinite: ``"raise"``, or ``"skip"``: leave
            the term out of this step and count it (``aux/<name>/skipped``). On a CUDA device
            ``"raise"`` is noticed up to 16 steps later, because asking at once would wait for the
            device in every step; ``"skip"`` has to wait. All processes act alike, whichever of
            them it happens on.
        optimizer: with several optimizers (manual optimisation), the index of the one that the
            term belongs to: the weight's schedule, what the objective remembers and its teacher
            count that one's steps, and it trains the head.
        backward: in manual optimisation, which call of ``manual_backward`` in the step the term
            joins, counted from 0. Default: the first call; with several optimizers the first while
            the objective's optimizer is toggled (``self.toggle_optimizer``).

    Raises:
        AuxiliaryError: for whatever does not fit, before training where it can be known then.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """What has to be prepared before training: ``"index"`` for ``step.index``."""

    handed_on = ("weight", *ObjectiveOptions.__annotations__)

    observes: ClassVar[bool] = False
    """Whether `loss` is called also while the weight is 0, because it keeps a memory."""

    head: nn.Module
    """What `build_head` returned."""

    def __init__(
        self,
        weight: float | str | Schedule = 1.0,
        name: str | None = None,
        *,
        taps: Taps | None = None,
        reads: str | Iterable[str] = (),
        nonfinite: Literal["raise", "skip"] = "raise",
        optimizer: int = 0,
        backward: int | None = None,
    ) -> None:
        super().__init__(name or _snake_case(type(self).__name__))
        if nonfinite not in ("raise", "skip"):
            raise AuxiliaryError(
                f"{self.name}: nonfinite={nonfinite!r} is unknown. Choose 'raise' or 'skip'."
            )
        if backward is not None and backward < 0:
            raise AuxiliaryError(
                f"{self.name}: backward={backward} counts calls of manual_backward from 0."
            )
        if taps is not None and taps.locations.forward is not None:
            raise AuxiliaryError(
                f"{self.name}: one model call serves all objectives. Give forward= to the Taps "
                f"among the Trainer's callbacks instead."
            )
        self.weight = Schedule.parse(weight)
        self.locations = taps.locations if taps is not None else Locations()
        self.reads = (reads,) if isinstance(reads, str) else tuple(reads)
        self.nonfinite = nonfinite
        self.optimizer = optimizer
        self.backward = backward
        self._weight_at: Callable[[int], float] | None = None
        self._taught_by: list[TeacherLike] = []
        self._skipped = 0

    def loss(self, step: Step) -> Tensor:
        """The term for this training step.

        Args:
            step: batch, logits, target, features, teachers and progress of the step.

        Returns:
            A scalar tensor. Means are over the examples of the batch, so that accumulation and
            several processes give the gradient of one large batch.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss(self, step)")

    def learn_from(
        self,
        teacher: str,
        engine: Engine,
        reads: Iterable[str] = (),
        weights: bool = False,
    ) -> None:
        """Say in `check` that the term needs this teacher; its weight is 0 until that is ready.

        Args:
            teacher: its name.
            engine: from `check`.
            reads: module paths or globs that `loss` asks the teacher's pass for, which are those
                of the module that the teacher runs: its own, if it has one.
            weights: whether `loss` asks for ``step.weights``.

        Raises:
            AuxiliaryError: no such teacher is attached, it counts another optimizer's steps, or
                it has no such module.
        """
        found = engine.teacher(teacher, self.name)
        if weights and not found.follows:
            raise AuxiliaryError(
                f"{self.name}: the teacher {teacher!r} is another model, or its logits, and has no "
                f"weights for the student's parameters. Name one that has, such as EMATeacher()."
            )
        found.serve(self.optimizer, self.name)
        found.reads(reads, self.name)
        self._taught_by.append(found)

    # ------------------------------------------------------------------------------- membership
    def attach(self, engine: Engine) -> None:
        self._taught_by.clear()
        engine.contribute(self)
        unknown = set(self.needs) - {"index"}
        if unknown:
            raise AuxiliaryError(f"{self.name}: needs={unknown} is unknown. Known: 'index'.")
        if "index" in self.needs:
            engine.indices.wanted = True

    def check(self, engine: Engine) -> None:
        engine.capture.add([*self.locations.module_paths(), *self.reads], self.name)
        if self.backward and engine.module.automatic_optimization:
            raise AuxiliaryError(
                f"{self.name}: backward={self.backward} needs manual optimisation, but "
                f"{type(engine.module).__name__}.automatic_optimization is True. Leave it out."
            )

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        self._weight_at = engine.bind(self.weight, f"{self.name}: weight={str(self.weight)!r}")
        if "index" in self.needs:
            engine.indices.check(self.name)
        self._skipped = int((state or {}).get("skipped", 0))

    def stop(self) -> None:
        self._weight_at = None

    def state(self) -> dict[str, Any]:
        return {"skipped": self._skipped} if self._skipped else {}

    def logged(self) -> dict[str, Any]:
        return {"skipped": float(self._skipped)} if self.nonfinite == "skip" else {}

    # -------------------------------------------------------------------------- for the engine
    def weight_at(self, steps: int) -> float:
        """The weight after ``steps`` optimizer steps."""
        assert self._weight_at is not None, "the schedule is bound when training starts"
        ready = all(teacher.ready for teacher in self._taught_by)
        return self._weight_at(steps) if ready else 0.0

    def skip(self) -> None:
        """Count a step whose term is left out."""
        self._skipped += 1

    def term(self, step: Step) -> Tensor:
        """`loss`, checked to be a scalar."""
        try:
            term = self.loss(step)
        except ValueError as error:  # a formula refuses its input, but does not know whose it is
            raise AuxiliaryError(f"{self.name}: {error}") from error
        if not isinstance(term, Tensor) or term.numel() != 1 or not term.is_floating_point():
            got = f"shape {tuple(term.shape)}" if isinstance(term, Tensor) else repr(term)
            raise AuxiliaryError(
                f"{self.name}: loss(step) must return a scalar floating-point tensor, got {got}. "
                f"Reduce it, for example with .mean()."
            )
        return term.reshape(())


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
