"""What a classifier's confidence is worth: the measures that the recipes' models log in `test`.

Accuracy and calibration error are those of torchmetrics; what it lacks is here.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

ANSWERS = 16


class RiskCoverageArea(Metric):
    """AURC: the share of errors among the k most confident of n predictions, averaged over k.

    Geifman, Uziel & El-Yaniv 2019, arXiv:1805.08206. 0 when nothing is wrong; for the same errors
    lower when the wrong predictions are the least confident. Predictions of equal confidence count
    as if each had the mean error of all that are equal.

    Args:
        norm: None ranks by the largest probability; p ranks by the normalised largest logit,
            max_k z_k / ‖z‖_p (Xia et al. 2025, arXiv:2403.14715).
    """

    def __init__(self, norm: float | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.add_state("confidence", default=[], dist_reduce_fx="cat")
        self.add_state("wrong", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add logits `(batch, classes)` and labels `(batch,)`."""
        if self.norm is None:
            # log-odds of the largest probability, which rounds to 1 where these still differ
            ranked = logits.double().sort(dim=-1, descending=True).values
            confidence = ranked[:, 0] - ranked[:, 1:].logsumexp(-1)
        else:
            confidence = (logits.amax(-1) / logits.norm(self.norm, dim=-1)).double()
        self.confidence.append(confidence)
        self.wrong.append((logits.argmax(-1) != target).double())

    def compute(self) -> Tensor:
        confidence, wrong = torch.cat(self.confidence), torch.cat(self.wrong)
        _, group = confidence.unique(return_inverse=True)
        among_equals = group.bincount(wrong) / group.bincount()
        ranked = among_equals[group.sort(descending=True).values]
        return (ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)).mean().float()


class WithinClassVariation(Metric):
    """How far features of one class lie apart: mean 1 − cosine of two of them, mean over classes.

    The d_within of Kornblith et al. 2021, arXiv:2010.16402, with which MaxSup (arXiv:2502.15798)
    is compared with label smoothing. Near 0 when each class has collapsed to one direction.
    """

    def __init__(self) -> None:
        super().__init__()
        self.add_state("features", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add features `(batch, width)` and labels `(batch,)`."""
        self.features.append(normalize(features.double(), dim=-1))
        self.target.append(target)

    def compute(self) -> Tensor:
        features, target = torch.cat(self.features), torch.cat(self.target)
        present = target.unique()
        # the mean cosine over all pairs of unit vectors is the squared length of their mean
        means = torch.stack([features[target == each].mean(0) for each in present])
        return (1 - means.square().sum(-1)).mean().float()


class NegativeLogLikelihood(MeanMetric):
    """Mean cross entropy over all samples, whatever the size of the batches."""

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add logits `(batch, classes)` and labels `(batch,)`."""
        super().update(cross_entropy(logits, target, reduction="none"))


class Coverage(MeanMetric):
    """pass@N: the chance that one of N answers, drawn from the predicted probabilities, is right.

    Chen et al. 2025, arXiv:2502.07154, in closed form: the mean of 1 − (1 − p)^N.
    """

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add logits `(batch, classes)` and labels `(batch,)`."""
        p = logits.softmax(-1).gather(-1, target[:, None])
        super().update(1 - (1 - p) ** ANSWERS)


def confidence_measures(num_classes: int) -> MetricCollection:
    """What is measured of logits in `test`, under the names that the comparisons use."""
    return MetricCollection(
        {
            "acc": MulticlassAccuracy(num_classes, average="micro"),
            "nll": NegativeLogLikelihood(),
            "ece": MulticlassCalibrationError(num_classes, n_bins=15),
            "aurc": RiskCoverageArea(),
            "aurc_normalized": RiskCoverageArea(norm=4.0),
            f"pass{ANSWERS}": Coverage(),
        },
        prefix="test_",
        compute_groups=False,
    )
