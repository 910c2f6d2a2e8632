"""``ZLoss``: keep the normaliser of softmax near 1."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from lightning_aux.engine import Step
from lightning_aux.functional import z_loss
from lightning_aux.objective import Objective, ObjectiveOptions
from lightning_aux.schedule import Schedule

__all__ = ["ZLoss"]


class ZLoss(Objective):
    """Penalises the squared log-normaliser of softmax, ``(log Σ_k exp z_k)²``.

    Chowdhery et al. 2022, "PaLM: Scaling Language Modeling with Pathways", arXiv:2204.02311,
    section 5; shown to prevent the divergence of logits at high learning rates in small models by
    Wortsman et al. 2023, "Small-scale proxies for large-scale Transformer training
    instabilities", arXiv:2309.14322. `InstabilityMonitor` logs what that paper watches. No labels
    are read.

    Args:
        weight: 1e-4 in both papers.
        dim: class dimension of the logits: -1 for ``(batch, classes)`` and ``(batch, length,
            classes)``, 1 for dense predictions ``(batch, classes, height, width)``.
        common: name, taps and the like, see `ObjectiveOptions`.

    Raises:
        AuxiliaryError: in a step, logits without the dimension ``dim``.
    """

    def __init__(
        self,
        weight: float | str | Schedule = 1e-4,
        dim: int = -1,
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        super().__init__(weight, **common)
        self.dim = dim

    def loss(self, step: Step) -> Tensor:
        return z_loss(step.logits, step.mask, self.dim)
