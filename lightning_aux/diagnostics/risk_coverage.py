"""``RiskCoverage``: how well a classifier knows what it gets wrong, as a metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_calibration_error
from torchmetrics.utilities import dim_zero_cat

from lightning_aux.functional.examples import labelled
from lightning_aux.functional.selective_classification import (
    coverage_at_risk,
    max_softmax_score,
    normalized_max_logit,
    risk_at_coverage,
    risk_coverage_curve,
)

__all__ = ["RiskCoverage"]


class RiskCoverage(Metric):
    """Risk and coverage of a classifier that abstains where its confidence is low.

    Two confidence scores are compared on the same predictions (the largest logit): the maximum
    softmax probability, and the normalised maximum logit max_k z_k/‖z‖_p, whose results end in
    ``_normalized``. ``compute()`` returns a dictionary of float32 scalars:

    - ``error``: the error rate;
    - ``aurc``, ``aurc_normalized``: area under the risk-coverage curve, (1/n) Σ_k risk_k;
    - ``aurc_optimal``: of a perfect order of these predictions; subtracted from the others it gives
      E-AURC, which compares models of different accuracy;
    - ``risk_at_coverage_…`` and ``coverage_at_risk_…``, with and without ``_normalized``;
    - ``ece``: expected calibration error of the maximum softmax probability, from torchmetrics.

    Examples with equal scores are taken in random order on average: nothing depends on the order
    of the data. Each example keeps three float32 numbers, on the device of the logits. All
    processes count, each with as many examples as it has; what a ``DistributedSampler`` repeats, to
    give every process as many, counts twice as in every metric. Without examples all is NaN.

    Args:
        p: of the norm, above 0. Both papers choose it, with other data than the test's.
        centre: whether the mean over classes is subtracted before the norm; for three classes or
            more.
        coverages: shares of the examples, at which the risk is returned.
        risks: error rates, for each of which the largest coverage that keeps to it is returned.
        ece: whether to return it.
        bins: equal bins of the calibration error.
        dim: class dimension of the logits.
        arguments: of `torchmetrics.Metric`.

    Raises:
        ValueError: for p ≤ 0, a coverage outside (0, 1], a risk outside [0, 1]; in ``update`` for
            logits with fewer than two classes, two with ``centre``, or a target of another shape.

    Source: Xia et al. 2025, arXiv:2403.14715; Cattelan & Silva 2024, arXiv:2305.15508; Geifman,
    Uziel & El-Yaniv 2019, arXiv:1805.08206.

    Examples:
        >>> metric = RiskCoverage(coverages=(0.5,), risks=())
        >>> metric.update(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        >>> {key: round(float(value), 2) for key, value in metric.compute().items()}["aurc"]
        0.25
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    confidence: list[Tensor]
    normalized: list[Tensor]
    wrong: list[Tensor]

    def __init__(
        self,
        p: float = 4.0,
        centre: bool = False,
        coverages: Sequence[float] = (0.8,),
        risks: Sequence[float] = (0.05,),
        ece: bool = False,
        bins: int = 15,
        dim: int = -1,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        if not p > 0:
            raise ValueError(f"p={p} is no norm: it must be above 0")
        shares = [0 < each <= 1 for each in coverages] + [0 <= each <= 1 for each in risks]
        if not all(shares):
            raise ValueError(
                f"coverages={tuple(coverages)} must be above 0 and at most 1, "
                f"risks={tuple(risks)} between 0 and 1: both are shares"
            )
        self.p = p
        self.centre = centre
        self.coverages = tuple(coverages)
        self.risks = tuple(risks)
        self.ece = ece
        self.bins = bins
        self.dim = dim
        # All of one type and rank, as is what torchmetrics sends for a process without examples.
        for name in ("confidence", "normalized", "wrong"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add examples.

        Args:
            logits: ``(batch, …, classes)``.
            target: class indices, −100 for an example without one; or probabilities in the shape
                of the logits, of which the largest counts.
            mask: the shape of the examples; where it is 0 an example does not count.
        """
        logits = logits.detach()
        target, counted = labelled(logits, target, mask, self.dim)
        if target.is_floating_point():
            target = target.argmax(self.dim)
        wrong = logits.argmax(self.dim) != target
        scores = (
            max_softmax_score(logits, self.dim),
            normalized_max_logit(logits, self.p, self.centre, self.dim),
            wrong,
        )
        for state, score in zip(self._scores(), scores, strict=True):
            kept = score.flatten() if counted is None else score[counted != 0]
            state.append(kept.float())

    def compute(self) -> dict[str, Tensor]:
        """The results by name, see the class."""
        # On the host, where float64 exists and sums have one order whatever the device.
        confidence, normalized, wrong = (
            dim_zero_cat(state).cpu() if len(state) else torch.zeros(0) for state in self._scores()
        )
        found = {
            "error": wrong.mean(),
            "aurc_optimal": risk_coverage_curve(-wrong, wrong).mean(),
        }
        for suffix, score in (("", confidence), ("_normalized", normalized)):
            risks = risk_coverage_curve(score, wrong)
            known = len(risks) > 0 and not risks.isnan().any()
            nan = risks.new_full((), torch.nan)
            found[f"aurc{suffix}"] = risks.mean()
            for each in self.coverages:
                key = f"risk_at_coverage_{each:g}{suffix}"
                found[key] = risk_at_coverage(risks, each) if known else nan
            for each in self.risks:
                key = f"coverage_at_risk_{each:g}{suffix}"
                found[key] = coverage_at_risk(risks, each) if known else nan
        if self.ece:
            found["ece"] = self._calibration_error(confidence, wrong)
        return {key: value.float().to(self.device) for key, value in found.items()}

    def _calibration_error(self, confidence: Tensor, wrong: Tensor) -> Tensor:
        """That of the predicted class is the one of a binary classifier of right and wrong."""
        if not len(confidence) or confidence.isnan().any():
            return torch.tensor(torch.nan)
        return binary_calibration_error(
            confidence.sigmoid(), (1 - wrong).long(), n_bins=self.bins, validate_args=False
        )

    def _scores(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self.confidence, self.normalized, self.wrong
