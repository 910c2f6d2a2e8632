"""The moving average equals its recursion, whatever the dtypes, and its warm-up its rule."""

import pytest
import torch

from lightning_aux.functional import ema_decay, ema_update_


def test_the_average_is_the_weighted_sum_of_all_values() -> None:
    values = torch.randn(6, 3, 4, dtype=torch.float64)
    shadow = [values[0, 0].clone(), values[0, 1].clone()]
    for value in values[1:]:
        ema_update_(shadow, [value[0], value[1]], decay=0.8)
    weights = torch.tensor([0.8**5] + [0.2 * 0.8**k for k in (4, 3, 2, 1, 0)], dtype=torch.float64)
    for position in (0, 1):
        expected = (weights[:, None] * values[:, position]).sum(0)
        torch.testing.assert_close(shadow[position], expected)


def test_f17_a_float32_shadow_of_bfloat16_weights_moves_where_a_bfloat16_one_cannot() -> None:
    live = [torch.full((3,), 2.0, dtype=torch.bfloat16, requires_grad=True)]
    wide = [torch.ones(3)]
    for _ in range(100):
        ema_update_(wide, live, decay=0.999)
    torch.testing.assert_close(wide[0], torch.full((3,), 2 - 0.999**100))
    assert wide[0].dtype == torch.float32
    assert wide[0].grad_fn is None


def test_mixed_lists_are_averaged_and_counters_take_the_live_value() -> None:
    shadow = [torch.zeros(2), torch.zeros(2, dtype=torch.float64), torch.tensor(3)]
    live = [torch.ones(2), torch.ones(2, dtype=torch.bfloat16), torch.tensor(7)]
    addresses = [tensor.data_ptr() for tensor in shadow]
    ema_update_(shadow, live, decay=0.75)
    assert shadow[0].tolist() == [0.25, 0.25]
    assert shadow[1].tolist() == [0.25, 0.25]
    assert shadow[2].item() == 7
    assert [tensor.data_ptr() for tensor in shadow] == addresses


@pytest.mark.parametrize(("decay", "expected"), [(0.0, 5.0), (1.0, 1.0)])
def test_the_ends_of_the_range_copy_and_keep_exactly(decay: float, expected: float) -> None:
    shadow = [torch.full((3,), 1.0)]
    ema_update_(shadow, [torch.full((3,), 5.0)], decay)
    assert shadow[0].tolist() == [expected] * 3


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="1 tensors and live has 2"):
        ema_update_([torch.zeros(1)], [torch.zeros(1)] * 2, 0.9)
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.5"):
        ema_update_([torch.zeros(1)], [torch.zeros(1)], 1.5)


def test_warm_up_raises_the_decay_to_its_value() -> None:
    assert [ema_decay(0.99, n, warmup=True) for n in (0, 1, 8)] == [1 / 10, 2 / 11, 9 / 18]
    assert ema_decay(0.99, 890, warmup=True) == 891 / 900 == 0.99
    assert ema_decay(0.99, 10**6, warmup=True) == 0.99
    assert ema_decay(0.99, 0, warmup=False) == 0.99
