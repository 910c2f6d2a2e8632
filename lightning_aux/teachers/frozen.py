"""``FrozenTeacher``: weights that never move, of the user's module or of another one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from lightning_aux.engine import (
    AnotherModel,
    AuxiliaryError,
    Engine,
    Locations,
    Pass,
    Record,
    Step,
)
from lightning_aux.engine.taps import plain_path
from lightning_aux.teachers.teacher import Teacher
from lightning_aux.weights.store import WeightStore

__all__ = ["FrozenTeacher"]


class FrozenTeacher(Teacher):
    """A teacher whose weights are fixed: the student's at first, a file's, or another module's.

    Args:
        name: what objectives call it by.
        checkpoint: path of a Lightning checkpoint or a plain ``state_dict`` of the same model, or
            of ``module`` (or of a model that it was a part of); read with ``weights_only=True``,
            so that nothing in it can run. It is not copied into the checkpoints of this run:
            resuming reads it again, and wants the same file. Default: the student's weights when
            training starts, kept through resumed runs; or ``module`` with the weights it has.
        module: another model, of any architecture. It is called on what the student is called on
            and its logits are found in what it returns, as the student's are; `Taps` of logits,
            features and input are the student's and not applied to it. Paths that objectives read
            of this teacher are its own. It is moved to the student's device for the time of
            training, stays whole on each process, and is registered nowhere. Its weights are never
            saved: a resumed run uses the module that it is given.
        forward: ``(module, batch) -> output``, for a ``module`` that takes the batch in another
            way, or whose logits are not found.

    Raises:
        AuxiliaryError: ``forward`` without a module, a module that defines no ``forward``; before
            training, when the file does not exist, cannot be read, holds the weights of another
            model, or is not the one of the run that is resumed; when ``module`` has parameters of
            the student; or, without a module, when the strategy shards parameters in another way
            than FSDP2.
    """

    def __init__(
        self,
        name: str = "frozen",
        checkpoint: str | Path | None = None,
        module: nn.Module | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        super().__init__(name)
        if forward is not None and module is None:
            raise AuxiliaryError(
                f"{name}: forward= says how another module runs. Give module=, or "
                f"Taps(forward=...) for the student's own."
            )
        if module is not None and forward is None and not _defines_forward(module):
            raise AuxiliaryError(
                f"{name}: {type(module).__name__} defines no forward, so it cannot be called on "
                f"what the student is called on. Give the part of it that can, or say how it runs: "
                f"forward=lambda module, batch: ...."
            )
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.module = module
        self.forward = forward
        self._other: AnotherModel | None = None  # during a fit
        self._prepared: WeightStore | None = None  # from the check until training starts
        self._fingerprint: int | None = None
        self._digest: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_other": None, "_prepared": None}

    def attach(self, engine: Engine) -> None:
        super().attach(engine)
        if self.module is not None:
            whose, teacher = f"the teacher {self.name!r}", type(self).__name__
            self._other = AnotherModel(self.module, whose, self.forward, teacher)

    def check(self, engine: Engine) -> None:
        if self.module is None:
            super().check(engine)
            if self.checkpoint is not None:
                self._prepared = self.new_store(engine.module)
                self._prepared.load_state_dict(self._read(), self.name)
            return
        students = {id(each) for each in engine.module.parameters()}
        shared = [name for name, p in self.module.named_parameters() if id(p) in students]
        if shared:
            raise AuxiliaryError(
                f"{self.name}: {shared[0]!r} of the teacher is a parameter of the student, and "
                f"would move with it. Give a copy: module=copy.deepcopy(...)."
            )
        if self.checkpoint is not None:
            self._load(self.module, self._read())

    def begin(self, module: nn.Module) -> None:
        if self._other is not None:
            self._other.move_to(self.engine.trainer.strategy.root_device)
            return
        self.store, self._prepared = self._prepared or self.new_store(module), None

    def start(self, engine: Engine, state: dict[str, Any] | None) -> None:
        saved = state or {}
        if state is not None and saved.get("module") != self._architecture:
            had = saved.get("module") or "the student's own architecture"
            raise AuxiliaryError(
                f"{self.name}: the run that is resumed had {had} as this teacher. Give "
                f"{type(self).__name__} the same module=, or another name."
            )
        file = saved.get("file")
        if self.checkpoint is None and file is not None:
            raise AuxiliaryError(
                f"{self.name}: the run that is resumed read its teacher from a file, and stored no "
                f"second copy. Give {type(self).__name__}(checkpoint=...) again."
            )
        if file not in (None, self._digest):
            raise AuxiliaryError(
                f"{self.name}: {str(self.checkpoint)!r} is not the file that the run which is "
                f"resumed read its teacher from. Give that one, or the teacher another name."
            )
        self._fingerprint = None
        if self.module is not None and self.checkpoint is None:
            self._fingerprint = fingerprint_of(self.module)
            if saved.get("fingerprint", self._fingerprint) != self._fingerprint:
                raise AuxiliaryError(
                    f"{self.name}: the module= has other weights than that of the run which is "
                    f"resumed. Give it those, for example with checkpoint=, or the teacher another "
                    f"name."
                )
        elsewhere = self.checkpoint is not None or self.module is not None
        super().start(engine, None if elsewhere else state)

    def state(self) -> dict[str, Any]:
        # What is in a file already, or in a module that is given again, is not stored in every
        # checkpoint as well.
        named = {
            "module": self._architecture,
            "file": self._digest if self.checkpoint else None,
            "fingerprint": self._fingerprint,
        }
        given = {key: value for key, value in named.items() if value is not None}
        return given or super().state()

    @property
    def follows(self) -> bool:
        return self.module is None

    @property
    def _architecture(self) -> str | None:
        if self.module is None:
            return None
        return type(getattr(self.module, "_orig_mod", self.module)).__qualname__

    # ------------------------------------------------------------------------ with another module
    def reads(self, paths: Iterable[str], asked_by: str) -> None:
        if self._other is None:
            super().reads(paths, asked_by)
        else:
            self._other.capture.add(paths, f"{asked_by}, teacher {self.name!r}")

    def run(self, step: Step) -> list[Record]:
        return super().run(step) if self._other is None else [self._other.run(step)]

    def show(self, taught: list[Record], locations: Locations, asked_by: str) -> Pass:
        if self._other is None:
            return super().show(taught, locations, asked_by)
        return Pass(self._other, taught[0], Locations(target=locations.target), asked_by)

    def pairs(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        if self._other is not None:
            raise AuxiliaryError(
                f"{self.name}: the weights of another module, {self._architecture}, are not those "
                f"of the student moved; an objective in weight space needs a teacher without "
                f"module=."
            )
        return super().pairs()

    def stop(self) -> None:
        super().stop()
        if self._other is not None:
            self._other.stop()

    # ---------------------------------------------------------------------------------- the file
    def _load(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        """Put the weights of the file into the other module, all of them."""
        where = f"{self.name}: {str(self.checkpoint)!r}"
        names = {plain_path(name): name for name in module.state_dict()}
        found = _under_one_prefix({plain_path(key): each for key, each in weights.items()}, names)
        lacking = [name for name in names if name not in found]
        unknown = [name for name in found if name not in names]
        if lacking or unknown:
            parts = [("lacks", lacking), ("has, beyond it,", unknown)]
            said = [f"{verb} {', '.join(map(repr, few[:3]))}" for verb, few in parts if few]
            more = " and more" if max(len(lacking), len(unknown)) > 3 else ""
            raise AuxiliaryError(
                f"{where} does not hold the weights of the {self._architecture} that was given: it "
                f"{'; it '.join(said)}{more}. Give the module that it was saved from, with the "
                f"same arguments."
            )
        try:
            module.load_state_dict({names[name]: each for name, each in found.items()})
        except RuntimeError as error:  # shapes
            raise AuxiliaryError(f"{where}: {' '.join(str(error).split())}") from error

    def _read(self) -> dict[str, Tensor]:
        assert self.checkpoint is not None
        if not self.checkpoint.is_file():
            raise AuxiliaryError(
                f"{self.name}: checkpoint={str(self.checkpoint)!r} is not a file (looked in "
                f"{Path.cwd()}). Give the path of a checkpoint of the same model."
            )
        self._digest = digest_of(self.checkpoint)
        try:
            saved: Any = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            raise AuxiliaryError(
                f"{self.name}: {str(self.checkpoint)!r} cannot be read with weights_only=True: "
                f"{error}. Save the weights alone with torch.save(model.state_dict(), path)."
            ) from error
        weights = saved.get("state_dict", saved) if isinstance(saved, dict) else saved
        if not isinstance(weights, dict):
            raise AuxiliaryError(f"{self.name}: {str(self.checkpoint)!r} holds no state_dict.")
        return weights


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _under_one_prefix(weights: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The weights by the names of the module, also where it was a part of what was saved."""
    names = list(names)
    if not names or any(name in weights for name in names):
        return weights
    begins = {key.removesuffix(names[0]) for key in weights if key.endswith(f".{names[0]}")}
    fitting = [each for each in begins if all(each + name in weights for name in names)]
    if len(fitting) != 1:
        return weights
    return {name: weights[fitting[0] + name] for name in names}


def fingerprint_of(module: nn.Module) -> int:
    """A checksum of the parameters and buffers of a module."""
    checksum = 0
    for each in module.state_dict().values():
        if isinstance(each, Tensor):
            flat = each.detach().cpu().contiguous().reshape(-1)
            checksum = crc32(flat.view(torch.uint8).numpy().tobytes(), checksum)
    return checksum


def _defines_forward(module: nn.Module) -> bool:
    forward = getattr(type(getattr(module, "_orig_mod", module)), "forward", None)
    # By name: Lightning goes by two.
    undefined = ("_forward_unimplemented", "LightningModule.forward")
    return getattr(forward, "__qualname__", "") not in undefined
