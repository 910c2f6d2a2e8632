"""Weights beside the live ones: a store of values by name, and checkpoint files of such values."""

from lightning_aux.weights.store import WeightStore

__all__ = ["WeightStore"]
