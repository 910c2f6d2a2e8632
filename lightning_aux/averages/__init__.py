"""Averages: callbacks that evaluate with, or write, other weights than the live ones."""

from lightning_aux.averages.ema_weights import EMAWeights

__all__ = ["EMAWeights"]
