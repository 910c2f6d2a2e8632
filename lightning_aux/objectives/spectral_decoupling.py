"""``SpectralDecoupling``: an L2 penalty of the logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, tensor
from typing_extensions import Unpack

from lightning_aux.engine import Step
from lightning_aux.functional import spectral_decoupling
from lightning_aux.objective import Objective, ObjectiveOptions
from lightning_aux.schedule import Schedule

__all__ = ["SpectralDecoupling"]


class SpectralDecoupling(Objective):
    """An L2 penalty of the logits, ``λ/2 · ‖z − γ‖²``, against features that starve the others.

    Pezeshki et al. 2021, "Gradient Starvation: A Learning Proclivity in Neural Networks",
    arXiv:2011.09468. The paper sets weight decay aside for it. Outputs of a regression, or one
    margin logit ``(batch, 1)``, are penalised alike. See `functional.spectral_decoupling`, which
    says where the authors' code differs.

    Args:
        weight: λ. The authors' experiments use 2e-5 to 0.1 (of the mean square, without the ½).
        offset: γ: one number, or one for each class of the target; 0.44 and 2.5 in the paper's
            experiment with two classes of different size.
        dim: class dimension of the logits: -1 for ``(batch, classes)`` and ``(batch, length,
            classes)``, 1 for dense predictions ``(batch, classes, height, width)``.
        common: name, taps and the like, see `ObjectiveOptions`.

    Raises:
        AuxiliaryError: in a step, logits without the dimension ``dim``; an offset per class with a
            target that is not class indices below their number.
    """

    def __init__(
        self,
        weight: float | str | Schedule = 0.1,
        offset: float | Sequence[float] = 0.0,
        dim: int = -1,
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        super().__init__(weight, **common)
        self.offset = offset
        self.dim = dim
        self._offset: float | Tensor = offset if isinstance(offset, int | float) else tensor(offset)

    def loss(self, step: Step) -> Tensor:
        if not isinstance(self._offset, Tensor):
            return spectral_decoupling(step.logits, self._offset, None, step.mask, self.dim)
        self._offset = self._offset.to(step.logits.device)  # once: a copy waits for the device
        return spectral_decoupling(step.logits, self._offset, step.target, step.mask, self.dim)
