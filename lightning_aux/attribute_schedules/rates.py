"""Where modules keep the rate of their dropout, and how it changes without a recompilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_aux.attribute_schedules.places import AttributePlace, is_number
from lightning_aux.engine.patches import Patches
from lightning_aux.engine.taps import plain_path

__all__ = ["Rate", "layer_of", "rates_in"]

# What an element that is dropped becomes in alpha dropout: the limit of SELU (Klambauer et al.
# 2017, "Self-Normalizing Neural Networks", arXiv:1706.02515, section "New Dropout Technique").
_ALPHA = -1.7580993408473766
_TORCHS_OWN: tuple[type[nn.Module], ...] = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


class Rate(AttributePlace):
    """The rate of one module.

    A compiled graph holds a Python number as a constant and is compiled again for each new one.
    After `hold_as_tensor` the rate is a tensor there: torch's own dropout modules read it while
    they are compiled (in eager mode they run as ever, to the bit); other modules of a compiled
    model hold it as a tensor on the CPU, at the price of a graph break where they branch on it.
    """

    owner: nn.Module

    def __init__(self, path: str, owner: nn.Module, key: str) -> None:
        super().__init__(path, owner, key)
        self._tensor: Tensor | None = None

    def hold_as_tensor(self, patches: Patches, device: torch.device, compiled: bool) -> None:
        """From now on, `set` changes a tensor too, or only a tensor.

        Args:
            patches: undo what is done to the module.
            device: where the model is.
            compiled: whether the model, or a part of it, is compiled.
        """
        if type(self.owner) in _TORCHS_OWN:
            self._tensor = torch.tensor(float(self.plain()), device=device)
            function = _while_compiling(self.owner, self._tensor, self.owner.forward)
            patches.wrap(self.owner, "forward", function)
        elif compiled:
            setattr(self.owner, self.key, torch.tensor(float(self.plain())))

    def set(self, value: float) -> None:
        super().set(value)
        if self._tensor is not None:
            self._tensor.fill_(value)

    def give_back(self, value: float | int) -> None:
        self._tensor = None
        self._write(value)


def _while_compiling(
    module: Any, rate: Tensor, forward: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    alpha = isinstance(module, nn.AlphaDropout | nn.FeatureAlphaDropout)
    batched_dims = {nn.Dropout1d: 3, nn.Dropout2d: None, nn.Dropout3d: 5}

    def dropped(input: Tensor) -> Tensor:  # torch's name: it may be given as a keyword
        x = input
        if not torch.compiler.is_compiling():
            return forward(x)
        if not module.training:
            return x
        shape = list(x.shape)
        if type(module) is nn.FeatureAlphaDropout:
            shape = shape[:2] + [1] * (len(shape) - 2)
        elif type(module) in batched_dims:  # whole channels, of a batch or of one sample
            # Dropout2d takes whatever it is given for a batch, as torch does (its issue 77081).
            channels = 2 if batched_dims[type(module)] in (None, len(shape)) else 1
            shape = shape[:channels] + [1] * (len(shape) - channels)
        keep = 1.0 - rate
        # In float32: a uniform number in half precision has steps of less than a hundredth.
        mask = torch.rand(shape, device=x.device) < keep
        if alpha:
            a = (keep * (1.0 + rate * _ALPHA**2)).clamp_min(1e-30).rsqrt()
            b = -a * _ALPHA * rate
            result = torch.where(mask, x, torch.full_like(x, _ALPHA)) * a.to(x.dtype) + b.to(
                x.dtype
            )
            # At the rate 1 nothing is left; torch returns zeros.
            result = torch.where(rate < 1.0, result, torch.zeros_like(result))
        else:
            result = x * (mask / keep.clamp_min(1e-30)).to(x.dtype)
        return x.copy_(result) if module.inplace else result

    return dropped


def rates_in(model: nn.Module, attribute: str | None = None) -> dict[str, Rate]:
    """The rates in a model by module path.

    Args:
        model: its own attributes are the user's hyperparameters and left out, unless named.
        attribute: what the rate is called in modules of the user's, in place of what is known.
    """
    found = {}
    for path, module in model.named_modules():
        key = attribute if attribute is not None else _key(module)
        if key is None or (module is model and attribute is None):
            continue
        if attribute is None or is_number(getattr(module, attribute, None)):
            found[plain_path(path)] = Rate(plain_path(path), module, key)
    return found


def _key(module: nn.Module) -> str | None:
    if isinstance(module, _DropoutNd):
        return "p"
    if isinstance(module, nn.MultiheadAttention):
        return "dropout"
    if isinstance(module, nn.RNNBase):
        return "dropout" if module.num_layers > 1 else None
    if hasattr(module, "drop_prob"):
        return "drop_prob"
    return "p" if type(module).__name__ == "StochasticDepth" else None


def layer_of(path: str) -> str:
    """The layer that a module belongs to: its path up to the last number before its own name.

    ``blocks.3.mlp.drop`` and ``blocks.3.drop_path`` are of ``blocks.3``; where no number is, a
    module is a layer of its own.
    """
    parts = path.split(".")[:-1]
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else path
