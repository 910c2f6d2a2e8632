"""The measures of the recipes' models: values that are known in closed form or by a plain loop."""

import math

import pytest
import torch

from recipes.confidence import (
    Coverage,
    NegativeLogLikelihood,
    RiskCoverageArea,
    WithinClassVariation,
    confidence_measures,
)


def logits_of(*probabilities):
    """Two classes, of which the first is predicted with these probabilities."""
    return torch.tensor([[math.log(p), math.log(1 - p)] for p in probabilities])


@pytest.mark.parametrize("norm", [None, 4.0])
def test_area_is_the_mean_share_of_errors_from_the_most_confident_down(norm):
    z = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) * 3
    y = torch.randint(5, (60,), generator=torch.Generator().manual_seed(1))
    score = z.softmax(-1).amax(-1) if norm is None else z.amax(-1) / (z**norm).sum(-1) ** (1 / norm)
    risks, wrong = [], 0
    for answered, i in enumerate(sorted(range(60), key=lambda i: -float(score[i])), start=1):
        wrong += int(z[i].argmax() != y[i])
        risks.append(wrong / answered)
    metric = RiskCoverageArea(norm)
    metric.update(z[:17], y[:17])
    metric.update(z[17:], y[17:])
    assert metric.compute().item() == pytest.approx(sum(risks) / 60, abs=1e-6)


def test_equal_confidence_has_no_order():
    """Half of them are wrong: so is half of any number of them, whatever comes first."""
    for target in ([0, 0, 1, 1], [1, 1, 0, 0]):
        metric = RiskCoverageArea()
        metric.update(logits_of(0.9, 0.9, 0.9, 0.9), torch.tensor(target))
        assert metric.compute().item() == pytest.approx(0.5)


def test_confidence_that_rounds_to_one_still_ranks():
    z = torch.tensor([[40.0, 0.0], [80.0, 0.0]])
    metric = RiskCoverageArea()
    metric.update(z, torch.tensor([1, 0]))  # the less confident one is wrong
    assert z.softmax(-1).amax(-1).tolist() == [1.0, 1.0]
    assert metric.compute().item() == pytest.approx((0 + 1 / 2) / 2)


def test_variation_within_a_class_is_that_of_all_pairs():
    features = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    target = torch.arange(30) % 3
    metric = WithinClassVariation()
    metric.update(features[:10], target[:10])
    metric.update(features[10:], target[10:])
    expected = []
    for each in range(3):
        own = features[target == each]
        pairs = [torch.cosine_similarity(a, b, dim=0).item() for a in own for b in own]
        expected.append(1 - sum(pairs) / len(pairs))
    assert metric.compute().item() == pytest.approx(sum(expected) / 3, abs=1e-6)


def test_coverage_is_the_chance_of_one_right_answer_in_sixteen():
    metric = Coverage()
    metric.update(logits_of(0.9, 0.5), torch.tensor([1, 0]))
    assert metric.compute().item() == pytest.approx((2 - 0.9**16 - 0.5**16) / 2, abs=1e-6)


def test_likelihood_counts_samples_and_not_batches():
    metric = NegativeLogLikelihood()
    metric.update(logits_of(0.5, 0.5, 0.5), torch.tensor([0, 0, 0]))
    metric.update(logits_of(0.25), torch.tensor([0]))
    assert metric.compute().item() == pytest.approx((3 * math.log(2) + math.log(4)) / 4, abs=1e-6)


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    measures = confidence_measures(2)
    measures.update(logits_of(0.9, 0.9, 0.9, 0.9), torch.tensor([0, 0, 1, 1]))
    found = measures.compute()
    assert found["test_acc"] == 0.5
    assert found["test_ece"].item() == pytest.approx(0.4, abs=1e-6)
