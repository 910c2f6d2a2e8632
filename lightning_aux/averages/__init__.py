"""Averages: callbacks that evaluate with, or write, other weights than the live ones."""

from lightning_aux.averages.ema_weights import EMAWeights
from lightning_aux.averages.model_soup import ModelSoup
from lightning_aux.averages.wise_ft import WiSEFT

__all__ = ["EMAWeights", "ModelSoup", "WiSEFT"]
