"""`DualHeadDistillation` and `MultiTeacherDistillation`: their layers, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_aux as aux
from lightning_aux.objectives.multi_teacher_distillation import _Scale
from tests.contract.models import Classifier
from tests.contract.training import fit, seeded


def test_the_second_head_is_like_the_classifier_or_has_a_hidden_layer() -> None:
    plain = aux.DualHeadDistillation("head")
    wide = aux.DualHeadDistillation("head", hidden=20, name="wide")
    fit(seeded(Classifier), [aux.FrozenTeacher(), plain, wide], max_epochs=1)
    assert (plain.head.in_features, plain.head.out_features) == (8, 4)
    assert [type(each) for each in wide.head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert wide.head[0].out_features == 20


def test_a_classifier_may_be_a_block_and_has_to_have_weights() -> None:
    block = aux.DualHeadDistillation("encoder", taps=aux.Taps(logits="encoder"))
    fit(seeded(Classifier), [aux.FrozenTeacher(), block], max_epochs=1)
    assert (block.head.in_features, block.head.out_features) == (6, 8)
    with pytest.raises(aux.AuxiliaryError, match="begins with a Tanh"):
        fit(seeded(Classifier), [aux.FrozenTeacher(), aux.DualHeadDistillation("encoder.1")])


def test_a_teacher_with_other_classes_is_an_error_that_names_both_shapes() -> None:
    teacher = aux.FrozenTeacher(module=nn.Linear(6, 3))
    with pytest.raises(aux.AuxiliaryError, match=r"\(8, 4\) and \(8, 3\)"):
        fit(seeded(Classifier), [teacher, aux.DualHeadDistillation("head")])


def test_running_scales_resume_on_the_device_of_the_features() -> None:
    term = aux.MultiTeacherDistillation(["one"], "encoder", {"one": "0"})
    fit(seeded(Classifier), [teachers()[0], term], max_epochs=1)
    scale = _Scale(term.state()["scales"]["one"])
    mean, deviation = scale._known_on(torch.device("meta"))
    assert mean.device == deviation.device == torch.device("meta")


@pytest.mark.parametrize(
    ("arguments", "said"), [({"widths": {"typo": 3}}, "typo"), ({"hidden": 0}, "hidden=0")]
)
def test_widths_that_name_nothing_or_are_none_are_errors_at_once(arguments, said) -> None:
    with pytest.raises(aux.AuxiliaryError, match=said):
        aux.MultiTeacherDistillation(["one"], "encoder", **arguments)


def teachers() -> list[aux.FrozenTeacher]:
    return [
        aux.FrozenTeacher("one", module=nn.Sequential(nn.Linear(6, 16), nn.Tanh())),
        aux.FrozenTeacher("two", module=nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12))),
    ]


def test_widths_are_those_of_the_layers_that_are_named() -> None:
    term = aux.MultiTeacherDistillation(["one", "two"], "encoder", {"one": "0", "two": "1"})
    fit(seeded(Classifier), [*teachers(), term], max_epochs=1)
    shapes = [
        [(each[0].in_features, each[2].out_features) for each in row] for row in term.head.ladders
    ]
    assert shapes == [[(8, 16)], [(8, 12)]]


def test_a_width_that_cannot_be_seen_asks_for_it() -> None:
    term = aux.MultiTeacherDistillation(["one"], "encoder", {"one": "1"})
    with pytest.raises(aux.AuxiliaryError, match=r"widths=\{'one': \.\.\.\}"):
        fit(seeded(Classifier), [teachers()[0], term])


def test_without_dropping_and_scaling_no_random_number_and_no_state_is_left() -> None:
    term = aux.MultiTeacherDistillation(
        ["one", "two"], "encoder", {"one": "0", "two": "1"}, drop=0.0, normalize=False
    )
    fit(seeded(Classifier), [*teachers(), term], max_epochs=1)
    assert term.state()["scales"] == {}


def test_a_running_scale_is_that_of_all_features_when_the_latest_batch_counts_alone() -> None:
    kept = []

    class Watching(aux.MultiTeacherDistillation):
        def loss(self, step: aux.Step) -> torch.Tensor:
            kept.append(step.teacher("one").features("0"))
            return super().loss(step)

    term = Watching(["one"], "encoder", {"one": "0"}, momentum=1.0)
    fit(seeded(Classifier), [teachers()[0], term], max_epochs=1, accumulate_grad_batches=5)
    window = torch.cat(kept)
    scale = term.state()["scales"]["one"]
    torch.testing.assert_close(scale["mean"], window.mean(0))
    torch.testing.assert_close(scale["deviation"], window.std(0))
