"""`KnowledgeDistillation`: where its teacher comes from, what it is asked, and how it blends."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_aux as aux
from lightning_aux.functional import DIVERGENCES
from lightning_aux.teachers.storage import LogitsWriter, checks_of
from tests.contract.models import Classifier, Samples
from tests.contract.training import fit, largest_difference, seeded, weights


def wide(seed: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


class ByHand(Classifier):
    """Cross entropy and T²·KL(teacher ‖ student) at T = 2, blended."""

    def __init__(self, teacher: nn.Module, share: float) -> None:
        super().__init__()
        self.teacher, self.share = [teacher], share

    def total_loss(self, batch: Any) -> Tensor:
        x, y = batch
        z, t = self(x), self.teacher[0](x).detach()
        log_p, log_q = (t / 2).log_softmax(1), (z / 2).log_softmax(1)
        kl = 4 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
        return (1 - self.share) * F.cross_entropy(z, y) + self.share * kl


def distilled(**arguments: Any) -> dict[str, Tensor]:
    module = seeded(Classifier)
    fit(module, [aux.KnowledgeDistillation(weight=0.7, blend=True, **arguments)])
    return weights(module)


def expected() -> dict[str, Tensor]:
    module = seeded(ByHand, wide(), 0.7)
    fit(module)
    return weights(module)


def test_a_module_as_it_is() -> None:
    assert largest_difference(distilled(module=wide()), expected()) < 1e-6


def test_a_module_with_the_weights_of_a_file(tmp_path) -> None:
    torch.save(wide().state_dict(), tmp_path / "wide.pt")
    found = distilled(module=wide(seed=4), checkpoint=tmp_path / "wide.pt")
    assert largest_difference(found, expected()) < 1e-6


def test_logits_on_disk(tmp_path) -> None:
    samples = Samples()
    writer = LogitsWriter(tmp_path / "logits", len(samples), "float32")
    writer.add(wide()(samples.x), checks_of(samples.y, len(samples)))
    writer.finish()
    assert largest_difference(distilled(logits=tmp_path / "logits"), expected()) < 1e-6


@pytest.mark.parametrize(
    "arguments",
    [{}, {"teacher": "frozen", "module": nn.Linear(1, 1)}, {"logits": "x", "teacher": "y"}],
)
def test_one_teacher_is_needed_and_no_more(arguments: dict[str, Any]) -> None:
    with pytest.raises(aux.AuxiliaryError, match="one teacher is needed"):
        aux.KnowledgeDistillation(**arguments)


class Regressor(L.LightningModule):
    """Two outputs; by hand with half the mean squared distance to a teacher's."""

    def __init__(self, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.teacher = [teacher]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self(x)
        loss = F.mse_loss(out, y)
        if self.teacher[0] is not None:
            loss = loss + 0.5 * distance(out, self.teacher[0](x).detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def distance(one: Tensor, other: Tensor) -> Tensor:
    """What "mse" is on outputs, as its documentation says it."""
    return ((one - other) ** 2).mean()


def test_a_regression_learns_from_the_outputs_of_another_one() -> None:
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 3, generator=random), torch.randn(32, 2, generator=random)
    data = DataLoader(TensorDataset(x, y), batch_size=8)
    teacher = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    hand = seeded(Regressor, teacher)
    fit(hand, data=data)
    ours = seeded(Regressor)
    term = aux.KnowledgeDistillation(module=teacher, divergence="mse", temperature=1, weight=0.5)
    fit(ours, [term], data=data)
    assert largest_difference(weights(ours), weights(hand)) < 1e-6


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js", "mse"])
def test_the_size_of_the_gradient_hardly_depends_on_the_temperature(divergence: str) -> None:
    """To 10 % for logits below the temperature, which is what the factor T² is for."""
    random = torch.Generator().manual_seed(0)
    s, t = (torch.randn(64, 10, generator=random, dtype=torch.float64) for _ in "st")
    s.requires_grad_()
    norms = []
    for temperature in (4.0, 8.0, 16.0):
        loss = DIVERGENCES[divergence](s, t, temperature)
        norms.append(float(torch.autograd.grad(loss, s)[0].norm()))
    assert max(norms) / min(norms) < 1.1
