"""``DualHeadDistillation``: a second classifier for what the first cannot learn as well."""

from __future__ import annotations

import math

from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_aux.engine import AuxiliaryError, Engine, Step
from lightning_aux.engine.taps import modules_at
from lightning_aux.functional import sigmoid_divergence
from lightning_aux.objective import Objective, ObjectiveOptions
from lightning_aux.objectives.widths import input_width, output_width
from lightning_aux.schedule import Schedule

__all__ = ["DualHeadDistillation"]


class DualHeadDistillation(Objective):
    """Distils logits through a second classifier, so that the first one only learns the labels.

    Yang et al. 2024, "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an
    Auxiliary Head", arXiv:2411.08937: a loss of logits and one of probabilities pull the weights
    of a linear classifier into contradictory directions, but not those of what comes before it.
    The term is ``T² · mean_i Σ_c KL(½ ‖ σ((s_c − t_c)/T))``, with t the teacher's logits and s
    those of a head of our own on the input of ``classifier``; see `functional.sigmoid_divergence`.
    The head is not in the model and not in its checkpoints.

    The paper's alignment of gradients, and its measurement of their conflict, are not part of it.

    Args:
        classifier: path of the user's own last ``nn.Linear``, or of a block that begins with one,
            which gives the logits.
        teacher: name of a teacher among the Trainer's callbacks.
        weight: α; 1 for CIFAR-100 and 0.1 for ImageNet in the authors' commands.
        temperature: T; 2 in the authors' code.
        hidden: width of a hidden layer with ReLU in the head (200 in the authors' code, there with
            dropout and BatchNorm). Default: a linear head like the classifier.
        common: name, taps and the like, see `ObjectiveOptions`.

    Raises:
        AuxiliaryError: a temperature that is not positive; before training, a ``classifier`` that
            does not begin with an ``nn.Linear``, or a teacher that is not attached; in a step,
            teacher's logits of another shape than the head's.
    """

    def __init__(
        self,
        classifier: str,
        teacher: str = "frozen",
        weight: float | str | Schedule = 1.0,
        temperature: float = 2.0,
        hidden: int | None = None,
        **common: Unpack[ObjectiveOptions],
    ) -> None:
        super().__init__(weight, reads=(classifier,), **common)
        if not 0 < temperature < math.inf:
            raise AuxiliaryError(
                f"{self.name}: temperature={temperature} must be positive and finite."
            )
        if hidden is not None and hidden < 1:
            raise AuxiliaryError(f"{self.name}: hidden={hidden} is no width of a layer.")
        self.classifier = classifier
        self.teacher = teacher
        self.temperature = temperature
        self.hidden = hidden

    def build_head(self, module: nn.Module) -> nn.Module:
        (layer, *more) = modules_at(module, self.classifier, self.name).values()
        begins = next(iter(layer.children()), layer)
        inner, outer = input_width(begins), output_width(layer)
        if more or not isinstance(begins, nn.Linear) or inner is None or outer is None:
            raise AuxiliaryError(
                f"{self.name}: classifier={self.classifier!r} names {1 + len(more)} module(s), the "
                f"first a {type(layer).__name__} that begins with a {type(begins).__name__}. Name "
                f"the nn.Linear that gives the logits, or a block that begins with one."
            )
        if self.hidden is None:
            return nn.Linear(inner, outer)
        return nn.Sequential(
            nn.Linear(inner, self.hidden), nn.ReLU(), nn.Linear(self.hidden, outer)
        )

    def check(self, engine: Engine) -> None:
        super().check(engine)
        self.learn_from(self.teacher, engine)

    def loss(self, step: Step) -> Tensor:
        logits = self.head(step.input(self.classifier))
        taught = step.teacher(self.teacher).logits
        return sigmoid_divergence(logits, taught, self.temperature, step.mask)
