"""Handwritten digits: a convolutional classifier, its data, and a YAML file per experiment."""

from recipes.digits.data import DigitsData
from recipes.digits.model import ImageClassifier
from recipes.digits.supervisor import SupervisorAccuracy

__all__ = ["DigitsData", "ImageClassifier", "SupervisorAccuracy"]
