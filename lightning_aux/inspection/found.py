"""What an inspection has found, as plain values; how it is shown is elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Binding", "Inspection", "Leaf", "Member", "ModuleFound", "Shape"]


@dataclass(frozen=True)
class Shape:
    """The shape and the dtype of a tensor.

    Attributes:
        sizes: of its dimensions.
        dtype: as torch writes it, without ``torch.``.
    """

    sizes: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{' × '.join(map(str, self.sizes)) or 'scalar'} {self.dtype}"


@dataclass(frozen=True)
class ModuleFound:
    """One module of the tree.

    Attributes:
        path: as `Taps` takes it; empty for the LightningModule itself.
        type: its class.
        output: the tensor that its first call returned, or the first tensor in what it returned.
        parameters: how many numbers it has to train or keep frozen, everything inside included.
        calls: how often the step called it; what was not called cannot be tapped.
        kinds: what it is: ``"dropout"``, ``"residual block"``, ``"norm"``, ``"classifier"``,
            ``"encoder"``.
        rate: of a dropout module, as it is now.
    """

    path: str
    type: str
    output: Shape | None
    parameters: int
    calls: int
    kinds: tuple[str, ...] = ()
    rate: float | None = None


@dataclass(frozen=True)
class Leaf:
    """One value in the batch.

    Attributes:
        path: the key path, as ``Taps(target=...)`` takes it; empty if the batch is one tensor.
        type: its class.
        shape: of a tensor.
        roles: what it serves as: ``"target"``, ``"mask"``, ``"input of the model"``.
    """

    path: str
    type: str
    shape: Shape | None
    roles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Binding:
    """Where something that objectives ask for is.

    Attributes:
        what: ``"model"``, ``"logits"``, ``"target"``, ``"features"``, ``"input"``, ``"mask"``,
            ``"classifier"`` or ``"encoder"``.
        where: in words; of the last two the module path.
        shape: of the tensor there.
        why: how it was found; of the last two it is a belief.
        error: why there is none; objectives that ask for it would raise it.
    """

    what: str
    where: str
    shape: Shape | None = None
    why: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Member:
    """One of our callbacks.

    Attributes:
        name: as it logs.
        type: its class.
        binds: what it is bound to, a phrase each.
        parameters: of its head.
        bytes: of the tensors that it holds, its head with gradients and optimizer state included.
        term: value of the objective's term in the first step.
        seconds: what it adds to a step; ``None`` where that was not measured.
        spread: half the range of ``seconds`` between rounds.
        notes: what the engine warned of, and what could not be looked at.
        error: why it would fail.
    """

    name: str
    type: str
    binds: tuple[str, ...] = ()
    parameters: int = 0
    bytes: int = 0
    term: float | None = None
    seconds: float | None = None
    spread: float = 0.0
    notes: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Inspection:
    """A module, one batch, and what of ours is attached; printed, it is a table.

    Attributes:
        name: class of the LightningModule.
        device: where the batch was run.
        seconds: of one step without callbacks; ``None`` where that was not measured.
        modules: the tree, in the order of ``named_modules``.
        batch: its leaves.
        bindings: what objectives find by default, or by the `Taps` among the callbacks.
        members: one for each of our callbacks.
        together: why they fail in one training, though each by itself does not.
        others: classes of the other callbacks, which were left out.
        notes: what was assumed.
        error: what the module's own step raised, and where.
    """

    name: str
    device: str
    seconds: float | None = None
    modules: tuple[ModuleFound, ...] = ()
    batch: tuple[Leaf, ...] = ()
    bindings: tuple[Binding, ...] = ()
    members: tuple[Member, ...] = ()
    together: str | None = None
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error: str | None = None

    @property
    def fails(self) -> bool:
        """Whether training with these callbacks would fail, as far as a few steps show it."""
        return bool(self.error or self.together or any(each.error for each in self.members))

    def module(self, path: str) -> ModuleFound:
        """The module at ``path``.

        Raises:
            KeyError: there is none.
        """
        return {each.path: each for each in self.modules}[path]

    def binding(self, what: str) -> Binding:
        """Where ``what`` is.

        Raises:
            KeyError: it was not looked for.
        """
        return {each.what: each for each in self.bindings}[what]

    def member(self, name: str) -> Member:
        """The callback of that name.

        Raises:
            KeyError: there is none.
        """
        return {each.name: each for each in self.members}[name]

    def __str__(self) -> str:
        from lightning_aux.inspection.sections import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from lightning_aux.inspection.page import fragment

        return fragment(self)

    def html(self) -> str:
        """A page that needs no other file and no network."""
        from lightning_aux.inspection.page import page

        return page(self)
