"""Weights beside the live ones: a store of values by name, and checkpoint files of such values."""

from lightning_aux.weights.batch_norm import recompute_batch_norm
from lightning_aux.weights.files import export, quantized
from lightning_aux.weights.soups import (
    Soup,
    greedy_soup,
    interpolate,
    synthesize_ema,
    uniform_soup,
    wise_ft,
)
from lightning_aux.weights.store import WeightStore

__all__ = [
    "Soup",
    "WeightStore",
    "export",
    "greedy_soup",
    "interpolate",
    "quantized",
    "recompute_batch_norm",
    "synthesize_ema",
    "uniform_soup",
    "wise_ft",
]
