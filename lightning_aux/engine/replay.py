"""Running the user's model a second time without leaving a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric

from lightning_aux.engine.patches import Patches
from lightning_aux.engine.random_states import RandomStates

__all__ = ["Unobserved"]

_LOGGING = ("log", "log_dict")
# Of a torchmetrics Metric: what an update or a forward changes besides its states.
_COUNTERS = ("_update_count", "_computed", "_forward_cache")


class Unobserved:
    """Contexts for a second pass of a step through the model, of which nothing is kept.

    The random streams are put back, ``self.log`` is silent, metrics are as they were, and so are
    buffers (BatchNorm's running statistics). Forward hooks of the user's own fire a second time.

    Args:
        module: the user's.
        whole_steps: not only the model's forward runs, of which the metrics that it updates are
            known after the first pass, but a ``training_step``, which may update any at any time.
    """

    def __init__(self, module: nn.Module, whole_steps: bool = False) -> None:
        self._module = module
        self._metrics = [each for each in module.modules() if isinstance(each, Metric)]
        self._settled = whole_steps
        self._draws_elsewhere: bool | None = None  # in evaluation, from Python's or NumPy's stream
        self._written: set[tuple[int, str]] | None = None  # holder and key of a buffer
        self._undone: list[Callable[[], None]] = []  # what is still to be undone

    @contextmanager
    def evaluated(self, device: torch.device) -> Iterator[None]:
        """Evaluation mode and no gradient, as a teacher runs.

        Autocast stays as it is but for its cache: that is keyed by parameter, so a cast of the
        student's weights made earlier in the step would be taken for the teacher's.
        """
        modules = [each for each in self._module.modules() if each.training]
        autocast = torch.autocast(
            device.type,
            dtype=torch.get_autocast_dtype(device.type),
            enabled=torch.is_autocast_enabled(device.type),
            cache_enabled=False,
        )
        with self._undoing(partial(_set_training, modules, True)):
            _set_training(modules, False)
            kept = self._aside(device, libraries=self._draws_elsewhere is not False)
            with self._buffers_kept(), kept as before, torch.no_grad(), autocast:
                yield
                if self._draws_elsewhere is None:  # a property of the model, as the buffers are
                    self._draws_elsewhere = before.libraries_moved()

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """Buffers are afterwards as they were: the model writes into copies of those it writes to.

        Which these are is a property of the model: in the first pass all are copies.
        """
        if torch.compiler.is_compiling():
            yield
            return
        places = [
            (holder._buffers, key, buffer)
            for holder in self._module.modules()
            if holder._buffers
            for key, buffer in holder._buffers.items()
            if buffer is not None
        ]
        if self._written is not None:
            places = [each for each in places if (id(each[0]), each[1]) in self._written]
        copies = [buffer.clone() for _, _, buffer in places]
        before = [None if each.is_inference() else each._version for each in copies]
        with self._undoing(partial(_hold, places)):
            _hold([(held, key, c) for (held, key, _), c in zip(places, copies, strict=True)])
            yield
            if self._written is None:
                self._written = {
                    (id(held), key)
                    for (held, key, buffer), copy, version in zip(
                        places, copies, before, strict=True
                    )
                    if held.get(key) is not copy
                    or (version is not None and copy._version != version)
                    or not torch.equal(copy, buffer)  # a kernel may leave no trace
                }

    @contextmanager
    def repeated(
        self,
        device: torch.device,
        draw: Callable[[], None],
        remembering: Mapping[nn.Module, Callable[..., Any]] = MappingProxyType({}),
    ) -> Iterator[None]:
        """Training mode and gradients.

        The model writes its running statistics into copies. The originals belong to the graph of
        the first pass too: written to once more, its backward would be refused.

        Args:
            device: where the model is.
            draw: puts the random streams to where the pass begins.
            remembering: modules that do not run, and what is called in place of their ``forward``.
        """
        buffers = [
            (holder._buffers, key, buffer)
            for holder in self._module.modules()
            if holder._buffers
            for key, buffer in holder._buffers.items()
            if buffer is not None
        ]
        # All of them: a kernel such as batch_norm's writes without a trace that could be asked for.
        copies = {id(buffer): buffer.clone() for _, _, buffer in buffers}
        patches = Patches()
        with self._undoing(partial(_hold, buffers)), self._undoing(patches.undo):
            _hold([(held, key, copies[id(buffer)]) for held, key, buffer in buffers])
            for module, function in remembering.items():
                patches.set(module, "forward", function)
            with self._aside(device):
                draw()
                yield

    @contextmanager
    def undone(self, undo: Callable[[], None], device: torch.device) -> Iterator[None]:
        """Whatever the block does, ``undo`` takes back."""
        with self._undoing(undo), self._aside(device):
            yield

    def restore(self) -> None:
        """Undo what an interrupted pass has left; to be called again if that is interrupted."""
        while self._undone:
            self._undone[-1]()
            self._undone.pop()

    @contextmanager
    def _undoing(self, undo: Callable[[], None]) -> Iterator[None]:
        self._undone.append(undo)
        try:
            yield
        finally:
            undo()
            self._undone.remove(undo)  # not the last: an interrupted one within stays

    @contextmanager
    def _aside(self, device: torch.device, libraries: bool = True) -> Iterator[RandomStates]:
        own = self._module.__dict__
        log: dict[str, Any] = {name: own[name] for name in _LOGGING if name in own}
        metrics = [_contents(each) for each in self._metrics]
        drawn = RandomStates.now(device, libraries)

        def undo() -> None:
            drawn.restore()
            for name in _LOGGING:
                own.pop(name, None)
            own.update(log)
            self._put_back(metrics)

        with self._undoing(undo):
            own.update(dict.fromkeys(_LOGGING, _silent))
            yield drawn

    def _put_back(self, metrics: list[dict[str, Any]]) -> None:
        updated = []
        for metric, contents in zip(self._metrics, metrics, strict=True):
            if metric._update_count != contents["_update_count"]:
                metric.__dict__.update(contents)
                updated.append(metric)
        if not self._settled:
            self._metrics, self._settled = updated, True


def _set_training(modules: list[nn.Module], training: bool) -> None:
    # nn.Module.__setattr__ costs a microsecond a call, and .eval() may be overridden by the user;
    # ``training`` is a plain entry of the instance dictionary.
    for each in modules:
        each.__dict__["training"] = training


def _hold(buffers: list[tuple[dict[str, Any], str, Tensor]]) -> None:
    for held, key, buffer in buffers:
        held[key] = buffer


def _contents(metric: Metric) -> dict[str, Any]:
    names = (*metric._defaults, *_COUNTERS)
    # Tensors with their graph: a loss may be a metric, which remembers the value it returned.
    # What a list has collected is never written to: a copy of the list is enough.
    return {name: _copied(metric.__dict__[name]) for name in names}


def _copied(held: Any) -> Any:
    return held.copy() if isinstance(held, list) else tree_map_only(Tensor, Tensor.clone, held)


def _silent(*args: Any, **kwargs: Any) -> None:
    """In place of ``self.log`` in a second pass."""
