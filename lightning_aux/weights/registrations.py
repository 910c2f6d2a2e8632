"""``Registrations``: whether a parameter or a module has been registered anywhere since."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.nn.modules import module as torch_module

__all__ = ["Registrations"]


class Registrations:
    """Counts registrations while somebody watches, for all modules of this process together.

    A list of parameters that is cached has to be made again when adapters are added or a layer is
    replaced. Asking every module in every step costs as much as moving all the parameters; torch
    says by itself when something is registered.
    """

    count = 0
    _watchers: ClassVar[set[int]] = set()
    _handles: ClassVar[list[Any]] = []

    @classmethod
    def watch(cls, who: int) -> None:
        """Begin, for a watcher of that identity."""
        cls._watchers.add(who)
        if not cls._handles:
            for register in (
                torch_module.register_module_parameter_registration_hook,
                torch_module.register_module_module_registration_hook,
            ):
                cls._handles.append(register(cls._registered))

    @classmethod
    def watched_by(cls, who: int) -> bool:
        """Whether that watcher has not left."""
        return who in cls._watchers

    @classmethod
    def leave(cls, who: int) -> None:
        """End; the last to leave takes the hooks away. May be called again."""
        cls._watchers.discard(who)
        while cls._handles and not cls._watchers:
            cls._handles[-1].remove()
            cls._handles.pop()

    @classmethod
    def _registered(cls, *what: Any) -> None:
        cls.count += 1
