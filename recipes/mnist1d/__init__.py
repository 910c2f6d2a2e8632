"""MNIST-1D: a small convolutional classifier, its data, and one YAML file per experiment."""

from recipes.mnist1d.data import MNIST1DData
from recipes.mnist1d.model import ConvClassifier

__all__ = ["ConvClassifier", "MNIST1DData"]
