"""Forward hooks that record what the tapped modules take in and give out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from lightning_aux.engine.errors import AuxiliaryError
from lightning_aux.engine.patches import Patches
from lightning_aux.engine.random_states import RandomStates
from lightning_aux.engine.step import Call, Record
from lightning_aux.engine.taps import is_glob, modules_at

__all__ = ["Capture", "apart", "has_compiled_parts", "is_as_returned", "versions"]

Given: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


class Capture:
    """Records calls of chosen submodules into the current `Record`, if there is one.

    Args:
        root: the module that paths begin at.
        declaring: how a path is declared, in a message; ``{}`` is where the path goes.
    """

    def __init__(
        self,
        root: nn.Module,
        declaring: str = "where the objective is made: super().__init__(..., reads=({},))",
    ) -> None:
        self._root = root
        self._declaring = declaring
        self._hooks: dict[str, _Hook] = {}
        self._globs: dict[str, list[str]] = {}
        self.record: Record | None = None
        self.draws_on: torch.device | None = None
        """The model's device, if the random streams are noted."""

    def random_states(self) -> RandomStates | None:
        """Where the random streams stand, if they are noted and it can be known."""
        if self.draws_on is None or torch.compiler.is_compiling():
            return None
        return RandomStates.now(self.draws_on)

    def note_random(self, paths: Iterable[str], when: Literal["entered", "left"]) -> None:
        """Note where the random streams stand at every call of these hooked modules."""
        for path in paths:
            self._hooks[path].notes_random.add(when)

    def add(self, paths: Iterable[str], asked_by: str) -> None:
        """Hook the modules at ``paths`` (globs allowed).

        Raises:
            AuxiliaryError: a path matches nothing.
        """
        for path in paths:
            found = modules_at(self._root, path, asked_by)
            if is_glob(path):
                self._globs[path] = list(found)
            for name, module in found.items():
                if name not in self._hooks:
                    self._hooks[name] = _Hook(self, name, module)

    def wrap_forward(self, patches: Patches) -> None:
        """Record the calls of the root's own ``forward``, whoever makes them."""
        forward = self._root.forward

        def recorded_forward(*args: Any, **kwargs: Any) -> Any:
            if self.record is None:
                return forward(*args, **kwargs)
            given, named = apart((args, kwargs))
            before = versions((given, named))
            random = self.random_states()
            returned = forward(*args, **kwargs)
            call = Call(given, named, apart(returned), versions((given, named)) != before)
            call.entered = random
            self.record.add("", call)
            return returned

        patches.wrap(self._root, "forward", recorded_forward)

    @contextmanager
    def recording(self, record: Record | None) -> Iterator[None]:
        """A block whose calls go into ``record``, and into none with ``None``."""
        before, self.record = self.record, record
        try:
            yield
        finally:
            self.record = before

    def settle(self, record: Record) -> None:
        """The model has run: what it has not overwritten is kept as it is, not as a copy."""
        hooks: set[_Hook] = set()
        for calls in record.calls.values():
            for call in calls:
                if isinstance(call, _Captured) and call.hook is not None:
                    call.settle(call.hook)
                    hooks.add(call.hook)
                    call.hook = None
        for hook in hooks:
            hook.settled()

    def drop(self, paths: Iterable[str]) -> None:
        """Remove the hooks at ``paths``."""
        for path in paths:
            self._hooks[path].remove()
            del self._hooks[path]

    def paths(self, path: str, asked_by: str) -> list[str]:
        """The hooked module paths that ``path`` stands for.

        Raises:
            AuxiliaryError: nobody declared ``path`` before training.
        """
        if path in self._hooks:
            return [path]
        if path in self._globs:
            return self._globs[path]
        modules_at(self._root, path, asked_by)  # a path that does not exist has its own message
        raise AuxiliaryError(
            f"{asked_by}: {path!r} exists but was not declared, so it is not captured. Declare it "
            f"{self._declaring.format(repr(path))}."
        )

    def note_on_compilation(self) -> str:
        """A hint for modules that torch.compile may have compiled before they had a hook."""
        if not has_compiled_parts(self._root):
            return ""
        return (
            " Part of the model is compiled: if it was called before training, its graph has no "
            "capture in it; call torch._dynamo.reset() before Trainer.fit."
        )

    def clear(self) -> None:
        """Remove every hook."""
        self.drop(list(self._hooks))
        self._globs.clear()
        self.record = self.draws_on = None

    def __contains__(self, path: str) -> bool:
        return path in self._hooks


@dataclass
class _Captured(Call):
    """A call whose tensors may be copies, beside the originals and how often these were written."""

    hook: _Hook | None = None
    given: Given = ((), {})
    given_versions: list[int] = field(default_factory=list)
    original: Any = None
    original_versions: list[int] = field(default_factory=list)

    def settle(self, hook: _Hook) -> None:
        """Once the model has run: the originals, where it has not overwritten them.

        A copy is no part of the graph that leads on to the loss.
        """
        if versions(self.given) == self.given_versions:
            self.arguments, self.keywords = self.given
        else:
            self.lost += () if hook.copies_input else ("input",)
            hook.overwrites_input = True
        if versions(self.original) == self.original_versions:
            self.returned = self.original
        else:
            self.lost += () if hook.copies_output else ("features",)
            hook.overwrites_output = True


class _Hook:
    """The two forward hooks of one module.

    An in-place operation, in the module or after it, would change what was captured. Where that
    happens is a property of the model: copies are made in the first step, and after it where
    the originals turned out to be overwritten.
    """

    def __init__(self, capture: Capture, path: str, module: nn.Module) -> None:
        self._capture = capture
        self._path = path
        self.notes_random: set[str] = set()
        self._random: RandomStates | None = None
        self.copies_input = self.copies_output = True
        self.overwrites_input = self.overwrites_output = False
        self._entered: tuple[Given, list[int]] = ((), {}), []
        self._clones: Given = (), {}
        self._handles = (
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, with_kwargs=True),
        )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def settled(self) -> None:
        """The first step is over: copy what the model overwrites."""
        self.copies_input, self.copies_output = self.overwrites_input, self.overwrites_output

    def _enter(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        if self._capture.record is None or torch.compiler.is_compiling():
            return
        given: Given = apart((arguments, keywords))
        self._clones = tree_map_only(Tensor, Tensor.clone, given) if self.copies_input else given
        self._entered = given, versions(given)
        if "entered" in self.notes_random:
            self._random = self._capture.random_states()

    def _leave(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], returned: Any
    ) -> None:
        record = self._capture.record
        if record is None:
            return
        if torch.compiler.is_compiling():
            # A compiled graph rewrites in-place operations, and has no version counters to read.
            kept = returned.clone() if isinstance(returned, Tensor) else returned
            record.add(self._path, Call(arguments, keywords, kept))
            return
        (given, before), self._entered = self._entered, (((), {}), [])
        own = apart(returned)  # the user may append to a list that the module returned
        kept = tree_map_only(Tensor, _clone, own) if self.copies_output else own
        clones, self._clones = self._clones, ((), {})
        call = _Captured(*clones, kept, hook=self)
        call.given, call.given_versions = given, before
        call.original, call.original_versions = own, versions(own)
        call.entered, self._random = self._random, None
        if "left" in self.notes_random:
            call.left = self._capture.random_states()
        record.add(self._path, call)


def is_as_returned(call: Call) -> bool:
    """Whether what was captured is what the module returned, and the model has not touched it."""
    return isinstance(call, _Captured) and call.returned is call.original


def _clone(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_inference() else tensor.clone()


def has_compiled_parts(module: nn.Module) -> bool:
    """Whether ``torch.compile`` has to do with the module or one inside it, as far as it shows."""
    return getattr(module, "_compiler_ctx", None) is not None or any(
        isinstance(each, OptimizedModule) or each._compiled_call_impl is not None
        for each in module.modules()
    )


def apart(nested: Any) -> Any:
    """The same tensors in containers of their own.

    A model may replace the entries of a dictionary, or the attributes of an object, that it is
    called on. Whoever calls it again, or reads what it was given, needs them as they were.
    """
    return nested if torch.compiler.is_compiling() else _apart(nested)


def _apart(nested: Any) -> Any:
    # In every step: what nearly every call consists of needs no pytree, which takes its time.
    kind = type(nested)
    if kind is tuple:
        return tuple([_apart(each) for each in nested])
    if kind is list:
        return [_apart(each) for each in nested]
    if kind is dict:
        return {key: _apart(each) for key, each in nested.items()}
    return nested if isinstance(nested, _AS_THEY_ARE) else tree_map(_copy_of_leaf, nested)


_AS_THEY_ARE = (Tensor, nn.Module, str, int, float, type(None))


def _copy_of_leaf(leaf: Any) -> Any:
    if isinstance(leaf, _AS_THEY_ARE):
        return leaf
    try:
        return copy(leaf)
    except Exception:  # it does not want to be copied: nothing can be said of it
        return leaf


def versions(nested: Any) -> list[int]:
    """How often each tensor in a nest has been written to."""
    if torch.compiler.is_compiling():  # a compiled graph has no version counters
        return []
    return [each._version for each in _tensors(nested) if not each.is_inference()]


def _tensors(nested: Any) -> list[Tensor]:
    kind = type(nested)
    if kind in (tuple, list, dict):
        inside = nested.values() if kind is dict else nested
        return [tensor for each in inside for tensor in _tensors(each)]
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, _AS_THEY_ARE):
        return []
    return [each for each in tree_leaves(nested) if isinstance(each, Tensor)]
