"""``RandomTeacher``: weights that were drawn at random and never move."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from lightning_aux.engine import AuxiliaryError, Engine
from lightning_aux.functional.shards import gathered, is_sharded, local, part_of
from lightning_aux.teachers.teacher import Teacher
from lightning_aux.weights import WeightStore

__all__ = ["RandomTeacher"]


class RandomTeacher(Teacher):
    """A frozen teacher with random weights, from random numbers of its own.

    Sarnthein et al. 2023, "Random Teachers are Good Teachers", arXiv:2302.12091: a student that is
    distilled from it alone ends with better features than the teacher has, most of all when it
    starts nearby.

    Args:
        name: what objectives call it by.
        seed: of its weights; the run's own random stream is not used.
        init: ``"reset"`` draws new weights as the layers do (``reset_parameters``), ``"shuffle"``
            puts the values of every tensor of the student's initial weights in a random order:
            the same distribution, for any module and any initialisation.
        student_distance: how far from the teacher the student starts, in [0, 1]: 0 is the teacher,
            1 the student's own initial weights, between them
            ``((1 − α)·θ_T + α·θ_0) / √(α² + (1 − α)²)`` (section 3). Default: the student's
            weights are left as they are. A resumed run goes on from its checkpoint.
        optimizer: see `EMATeacher`.

    Raises:
        AuxiliaryError: an unknown ``init``, a distance outside [0, 1]; before training, with
            ``init="reset"`` a parameter that no ``reset_parameters`` reaches, or sharded ones.
    """

    def __init__(
        self,
        name: str = "random",
        seed: int = 0,
        init: Literal["reset", "shuffle"] = "reset",
        student_distance: float | None = None,
        optimizer: int | None = None,
    ) -> None:
        super().__init__(name, "copy", optimizer)
        if init not in ("reset", "shuffle"):
            raise AuxiliaryError(f"{name}: init={init!r} is unknown. Choose 'reset' or 'shuffle'.")
        if student_distance is not None and not 0.0 <= student_distance <= 1.0:
            raise AuxiliaryError(f"{name}: student_distance={student_distance} is not in [0, 1].")
        self.seed = seed
        self.init = init
        self.student_distance = student_distance
        self._drawn: WeightStore | None = None  # from `move_model` until training starts

    def check(self, engine: Engine) -> None:
        super().check(engine)
        if self.init == "shuffle":
            return
        module = engine.module
        if any(is_sharded(each) for each in module.parameters()):
            raise AuxiliaryError(
                f"{self.name}: init='reset' cannot draw weights of which each process has a part. "
                f"Use init='shuffle'."
            )
        reached = {id(own) for each in _resettable(module) for own in each.parameters()}
        missed = [name for name, each in module.named_parameters() if id(each) not in reached]
        if missed:
            raise AuxiliaryError(
                f"{self.name}: init='reset' calls reset_parameters() of every module, and none "
                f"reaches {', '.join(map(repr, missed[:5]))}{' and more' if missed[5:] else ''}. "
                f"Use init='shuffle', or give the module that holds them a reset_parameters()."
            )

    def move_model(self, engine: Engine, state: dict[str, Any] | None) -> None:
        if state is not None:
            return
        self._drawn = self.new_store(engine.module)
        module = engine.module
        cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            torch.manual_seed(self.seed)
            if self.init == "reset":
                _reset(module, self._drawn)
            else:
                _shuffle(self._drawn)
            if self.student_distance is not None:
                self._place_student(module, self._drawn, self.student_distance)

    def _place_student(self, module: nn.Module, drawn: WeightStore, distance: float) -> None:
        near = self.new_store(module)
        norm = math.hypot(distance, 1 - distance)
        for own, random in zip(near.parts(), drawn.parts(), strict=True):
            own.mul_(distance / norm).add_(random, alpha=(1 - distance) / norm)
        near.give()
        near.close()

    def begin(self, module: nn.Module) -> None:
        self.store, self._drawn = self._drawn or self.new_store(module), None


def _resettable(module: nn.Module) -> list[nn.Module]:
    return [each for each in module.modules() if _method(each) is not None]


def _method(module: nn.Module) -> Any:
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def _reset(module: nn.Module, store: WeightStore) -> None:
    with store.in_place():
        for each in reversed(_resettable(module)):  # a module after those that it is made of
            _method(each)()
        drawn = [parameter.data for parameter in module.parameters()]
    torch._foreach_copy_(store.parts(), drawn)  # in half precision these were copies


def _shuffle(store: WeightStore) -> None:
    for value in store.values():
        whole = gathered(value)
        order = torch.randperm(whole.numel()).to(whole.device)  # on the CPU: the same on any device
        mixed = whole.flatten()[order].view(whole.shape)
        local(value).copy_(part_of(mixed, value))
