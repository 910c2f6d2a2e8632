"""The fp32 island: formulas are computed in float32 where the model runs in half precision."""

from torch import Tensor, bfloat16, float16

HALF = (float16, bfloat16)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Returns half and bfloat16 tensors as float32 and every other tensor unchanged.

    Logarithms, norms and long sums lose their digits in half precision. The cast is part of the
    graph, so gradients come back in the dtype of the input. The formulas of this package use only
    operations that autocast leaves in float32, so it holds inside an autocast region too.
    """
    return tensor.float() if tensor.dtype in HALF else tensor
