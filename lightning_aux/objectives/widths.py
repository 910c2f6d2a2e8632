"""How many features go into a module of the user's and come out of it, as its layers say."""

from __future__ import annotations

from torch import nn

__all__ = ["input_width", "output_width"]


def output_width(module: nn.Module) -> int | None:
    """Features of what the last layer with weights gives; ``None`` where none of them says."""
    for layer in reversed(list(module.modules())):
        for attribute in ("out_features", "out_channels", "embedding_dim", "num_features"):
            if isinstance(width := getattr(layer, attribute, None), int):
                return width
        if isinstance(layer, nn.LayerNorm):
            return layer.normalized_shape[-1]
    return None


def input_width(module: nn.Module) -> int | None:
    """Features that the first layer with weights takes; ``None`` where none of them says."""
    for layer in module.modules():
        for attribute in ("in_features", "in_channels", "num_features"):
            if isinstance(width := getattr(layer, attribute, None), int):
                return width
        if isinstance(layer, nn.LayerNorm):
            return layer.normalized_shape[-1]
    return None
