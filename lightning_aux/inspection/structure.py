"""``Structure``: what a module is made of, seen while one batch goes through it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from lightning_aux.attribute_schedules.rates import rates_in
from lightning_aux.engine.taps import plain_path
from lightning_aux.inspection.found import Binding, ModuleFound, Shape

__all__ = ["Structure", "shape_of"]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
# What may follow the sum of a residual block before its output: activations, norms, views, casts.
_AFTER_THE_SUM = (
    *("Relu", "Gelu", "Silu", "NativeLayerNorm", "NativeBatchNorm", "CudnnBatchNorm"),
    *("NativeGroupNorm", "FusedRmsNorm", "View", "UnsafeView", "Reshape", "Permute", "Transpose"),
    *("ToCopy", "Alias", "Clone"),
)


class Structure:
    """Hooks on every module, for one training step of a copy that is thrown away.

    Args:
        root: the copy.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._modules = {plain_path(path): each for path, each in root.named_modules()}
        self._calls: dict[str, int] = {}
        self._returned: dict[str, Tensor] = {}  # by path, in the order of returning
        self._shapes: dict[str, Shape] = {}
        self._residual: set[str] = set()
        self._rates = {path: float(rate.plain()) for path, rate in rates_in(root).items()}
        self._counts = {path: _numbers(each) for path, each in self._modules.items()}
        self.running: list[str] = []
        """The modules that are running, the innermost last: where an error is, if there is one."""
        self._hooks: list[Any] = []
        for path, module in self._modules.items():
            if path:
                self._watch(path, module)

    def _watch(self, path: str, module: nn.Module) -> None:
        nodes: list[Any] = []

        def enter(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self.running.append(path)
            given = next((each for each in (*arguments, *keywords.values())), None)
            nodes.append((_node(given), getattr(given, "shape", None)))

        def leave(
            module: nn.Module, arguments: tuple[Any, ...], keywords: Any, returned: Any
        ) -> None:
            if path in self.running:
                del self.running[self.running.index(path) :]
            node, shape = nodes.pop() if nodes else (None, None)
            calls = self._calls[path] = self._calls.get(path, 0) + 1
            first = _first_tensor(returned)
            if first is None:
                return
            # A step may run the model under no_grad first: the call with a gradient counts.
            if calls > 1 and (self._returned[path].requires_grad or not first.requires_grad):
                return
            self._returned.pop(path, None)
            self._returned[path] = first
            self._shapes[path] = shape_of(first)
            # What hands on the output of a block inside it is none itself.
            inside = [each for each in self._residual if each.startswith(f"{path}.")]
            own = all(self._returned[each] is not first for each in inside)
            if own and node and first.shape == shape and _adds(node, first.grad_fn):
                self._residual.add(path)

        self._hooks += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        ]

    def finish(self, logits: Tensor | None) -> list[Binding]:
        """Let go of the tensors of the step.

        Args:
            logits: of the step, where they were found.

        Returns:
            What is believed to be the classifier, and the encoder.
        """
        for hook in self._hooks:
            hook.remove()
        classifier = self._classifier(logits)
        encoder = self._encoder(classifier.where)
        self._returned.clear()
        self._hooks.clear()
        return [classifier, encoder]

    def _classifier(self, logits: Tensor | None) -> Binding:
        own = [path for path in self._returned if _weighs(self._modules[path])]
        if logits is not None:
            same = [path for path in own if self._returned[path] is logits]
            if same:
                return self._believed("classifier", same[0], "its output is the logits")
            nodes = {_node(self._returned[path]): path for path in own}
            for node in _back_from(logits.grad_fn):
                if node in nodes:
                    return self._believed(
                        "classifier", nodes[node], "the logits are made of its output"
                    )
        if not own:
            return Binding("classifier", "", error="no module with weights was called")
        return self._believed("classifier", own[-1], "the last module with weights that ran")

    def _encoder(self, classifier: str) -> Binding:
        order = list(self._returned)
        before = order[: order.index(classifier)] if classifier in order else order
        found = [
            path
            for path in before
            if not f"{classifier}.".startswith(f"{path}.")
            and not path.startswith(f"{classifier}.")
            and self._counts[path]
        ]
        if not classifier or not found:
            return Binding("encoder", "", error="nothing with parameters runs beside a classifier")
        # Of equal ones the one that returned last, which is the outermost.
        most = max(reversed(found), key=lambda path: self._counts[path])
        return self._believed("encoder", most, "the most parameters before the classifier")

    def _believed(self, what: str, path: str, why: str) -> Binding:
        return Binding(what, path, self._shapes.get(path), why)

    def found(self, beliefs: list[Binding]) -> tuple[ModuleFound, ...]:
        """The tree; ``beliefs`` are from `finish`."""
        blocks = {path for path in self._residual if self._is_block(path)}
        named = {each.where: each.what for each in beliefs if each.where}
        return tuple(
            ModuleFound(
                path,
                type(module).__name__,
                self._shapes.get(path),
                self._counts[path],
                self._calls.get(path, 0),
                tuple(
                    kind
                    for kind, holds in (
                        ("dropout", path in self._rates),
                        ("residual block", path in blocks),
                        ("norm", _is_norm(module)),
                        (named.get(path, ""), path in named),
                    )
                    if holds
                ),
                self._rates.get(path),
            )
            for path, module in self._modules.items()
        )

    def _is_block(self, path: str) -> bool:
        """Whether the sum is its own, not that of a chain of blocks inside it."""
        inside = [each for each in self._residual if each.startswith(f"{path}.")]
        outer = [
            each
            for each in inside
            if not any(each.startswith(f"{other}.") for other in inside if other != each)
        ]
        return len(outer) < 2


def shape_of(tensor: Tensor) -> Shape:
    """The shape and dtype of a tensor."""
    return Shape(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _numbers(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters() if not is_lazy(each))


def _weighs(module: nn.Module) -> bool:
    """Whether it has a matrix of its own, as layers that map features to others do."""
    return any(each is not None and each.ndim >= 2 for each in module._parameters.values())


def _is_norm(module: nn.Module) -> bool:
    named = re.search(r"Norm(\d|[A-Z]|$)", type(module).__name__)
    return isinstance(module, _NORMS) or (bool(named) and not list(module.children()))


def _first_tensor(returned: Any) -> Tensor | None:
    return next((each for each in tree_leaves(returned) if isinstance(each, Tensor)), None)


def _node(given: Any) -> Any:
    """Where a tensor is in the graph, or ``None``."""
    if not isinstance(given, Tensor) or not given.requires_grad:
        return None
    if given.grad_fn is not None:
        return given.grad_fn
    view = given.view_as(given).grad_fn
    return None if view is None else view.next_functions[0][0]


def _adds(start: Any, end: Any) -> bool:
    """Whether the graph leads from ``end`` back to ``start`` by sums, and by at least one."""
    seen: set[Any] = set()  # the nodes themselves: without them their ids would be used again
    waiting = [(end, False)]
    while waiting:
        node, summed = waiting.pop()
        if node is None or node in seen:
            continue
        if node is start:
            if summed:
                return True
            continue
        seen.add(node)
        name = type(node).__name__
        if name.startswith("AddBackward"):
            waiting += [(each, True) for each, _ in node.next_functions]
        elif name.partition("Backward")[0] in _AFTER_THE_SUM and node.next_functions:
            waiting.append((node.next_functions[0][0], summed))
    return False


def _back_from(node: Any, limit: int = 32) -> Iterator[Any]:
    """The nodes that a tensor was made of, the nearest first."""
    waiting: list[Any] = [node]
    seen: set[Any] = set()
    while waiting and len(seen) < limit:
        here = waiting.pop(0)
        if here is None or here in seen:
            continue
        seen.add(here)
        yield here
        waiting += [each for each, _ in here.next_functions]
