"""``quantize`` is the loop over buckets and elements that the paper describes."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from lightning_aux.functional import quantize
from lightning_aux.functional.quantization import Buckets


def by_hand(values: numpy.ndarray, bits: int, bucket: int) -> numpy.ndarray:
    """Element by element: to the nearest of the levels between the bucket's least and greatest."""
    steps, flat = values.dtype.type(2**bits - 1), values.flatten()
    out = flat.copy()
    for begin in range(0, len(flat), bucket):
        part = flat[begin : begin + bucket]
        beta, alpha = part.min(), part.max() - part.min()
        if alpha < 1e-10:
            alpha = values.dtype.type(1)
        for place, value in enumerate(part, start=begin):
            out[place] = numpy.round((value - beta) / alpha * steps) / steps * alpha + beta
    return out.reshape(values.shape)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("bucket", [7, 256, 10**9])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 9), (3, 2, 60), (40, 50), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_bucket_is_that_of_the_loop(shape, bucket, bits, dtype):
    tensor = torch.randn(shape, dtype=dtype)
    expected = torch.from_numpy(numpy.asarray(by_hand(tensor.numpy(), bits, bucket)))
    before = tensor.clone()
    assert torch.equal(quantize(tensor, bits, bucket), expected.view(shape))
    assert torch.equal(tensor, before)


def test_a_bucket_has_no_more_values_than_its_bits_can_name():
    found = quantize(torch.randn(1000), bits=2, bucket=100)
    assert all(len(part.unique()) == 4 for part in found.split(100))
    assert len(found.unique()) > 30


def test_of_two_equally_near_levels_the_even_one_is_taken():
    found = quantize(torch.tensor([0.0, 0.5, 1.5, 2.5, 3.0]), bits=2)
    assert found.tolist() == [0.0, 0.0, 2.0, 2.0, 3.0]


def test_a_bucket_of_one_value_stays_and_nan_stays_in_its_bucket():
    tensor = torch.cat([torch.full((4,), 0.3), torch.tensor([1.0, math.nan, 2.0, 3.0])])
    found = quantize(tensor, bits=3, bucket=4)
    assert torch.equal(found[:4], tensor[:4])
    assert found[4:].isnan().all()


def test_many_tensors_at_once_are_each_quantised_alone_and_memory_is_used_again():
    like = [torch.randn(size, dtype=dtype) for size in (3, 700, 5000, 0) for dtype in DTYPES]
    buckets = Buckets(like, 256)
    for _ in range(2):
        tensors = [torch.randn_like(each) for each in like]
        for found, each in zip(buckets.quantize(tensors, 3), tensors, strict=True):
            assert torch.equal(found.to(each.dtype), quantize(each, 3, 256))


DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def test_half_precision_is_computed_in_float32():
    tensor = torch.randn(500).bfloat16()
    found = quantize(tensor, bits=4, bucket=64)
    assert found.dtype == torch.bfloat16
    expected = torch.from_numpy(by_hand(tensor.float().numpy(), 4, 64)).bfloat16()
    assert torch.equal(found, expected)


def test_rounding_at_random_has_the_tensor_as_its_expectation():
    tensor = torch.tensor([0.0, 0.1, 0.25, 0.9, 1.0])
    generator = torch.Generator().manual_seed(3)
    before = torch.get_rng_state()
    drawn = torch.stack([quantize(tensor, 1, 256, generator) for _ in range(4000)])
    assert torch.equal(torch.get_rng_state(), before)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    # The standard error of the mean of 4000 draws is below 0.008.
    assert torch.allclose(drawn.mean(0), tensor, atol=0.04)
    assert torch.equal(drawn[:, [0, 4]], tensor[[0, 4]].expand(4000, 2))
    again = torch.Generator().manual_seed(3)
    assert torch.equal(quantize(tensor, 1, 256, again), drawn[0])


@pytest.mark.parametrize(
    ("arguments", "message"), [({"bits": 0}, "bits=0"), ({"bucket": 1}, "bucket=1")]
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(torch.randn(4), **arguments)
