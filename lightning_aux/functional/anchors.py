"""Terms that pull a model towards an anchor: a slowly moving or frozen copy of itself.

`squared_distance` does so in weight space, `output_anchor` in output space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .blocks import block_size
from .divergences import entropy, reverse_kl_divergence
from .precision import at_least_float32
from .shards import is_sharded, like, local, sum_over_parts, sums_over_parts


def squared_distance(tensors: Sequence[Tensor], anchors: Sequence[Tensor]) -> Tensor:
    """Squared distance Σ ‖θ − φ‖² between two lists of tensors, as one node of the graph.

    The gradient is 2·(θ − φ). Differences are taken and kept in float32 (float64 for float64), at
    the cost of one more copy of the parameters until the backward pass. Of sharded parameters
    (DTensors) each process looks at its part; the sum is over all parts, with one collective.

    Args:
        tensors: θ, such as a module's parameters; differentiated, once.
        anchors: φ, of the same shapes; no gradient reaches them.

    Returns:
        A scalar in float32, or float64 where a tensor is, on the device of the first tensor.

    Raises:
        ValueError: for empty lists, or lists that differ in length or shapes.
        RuntimeError: in a backward pass with `create_graph=True`.
    """
    tensors, anchors = list(tensors), list(anchors)
    shapes, anchor_shapes = [t.shape for t in tensors], [a.shape for a in anchors]
    if not tensors:
        raise ValueError("no tensors to measure the distance of")
    if len(shapes) != len(anchor_shapes):
        raise ValueError(
            f"{len(shapes)} tensors cannot be paired with {len(anchor_shapes)} anchors"
        )
    if shapes != anchor_shapes:
        index = next(i for i, shape in enumerate(shapes) if shape != anchor_shapes[i])
        raise ValueError(
            f"tensor {index} has shape {tuple(shapes[index])}, "
            f"its anchor {tuple(anchor_shapes[index])}"
        )
    distance: Tensor = _SquaredDistance.apply(anchors, *tensors)  # type: ignore[no-untyped-call]
    return distance


class _SquaredDistance(torch.autograd.Function):
    """Σ ‖θ − φ‖² on lists: the differences are formed once and scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, anchors: list[Tensor], *tensors: Tensor) -> Tensor:
        parts = [at_least_float32(local(tensor)) for tensor in tensors]
        fixed = [at_least_float32(local(anchor)) for anchor in anchors]
        differences = torch._foreach_sub(parts, fixed)
        ctx.save_for_backward(*differences)
        ctx.sharded = [tensor.detach() if is_sharded(tensor) else None for tensor in tensors]
        ctx.any_sharded = any(each is not None for each in ctx.sharded)
        # On the CPU a norm is summed in one sequence, which in float32 loses 1e-3 of 1e7 elements.
        on_cpu = differences[0].device.type == "cpu"
        norms = torch._foreach_norm(differences, dtype=torch.float64 if on_cpu else None)
        ctx.one_device = len({norm.device for norm in norms}) == 1
        if not ctx.one_device:
            norms = tuple(norm.to(norms[0].device) for norm in norms)
        widest = max((d.dtype for d in differences), key=lambda dtype: dtype.itemsize)
        squares = torch.stack(norms).square()
        if ctx.any_sharded:
            return sum_over_parts(list(squares.unbind()), list(tensors)).to(widest)
        return squares.sum().to(widest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only under create_graph=True, where it would be wrong
            raise RuntimeError(
                "squared_distance can be differentiated once; for a second derivative "
                "(create_graph=True) write the sum of the squared differences out"
            )
        differences = list(ctx.saved_tensors)
        # A tensor factor costs no synchronisation with the device, a Python number would.
        if ctx.one_device:
            gradients = list(torch._foreach_mul(differences, 2 * gradient))
        else:
            gradients = [2 * gradient.to(d.device) * d for d in differences]
        if ctx.any_sharded:
            pairs = zip(gradients, ctx.sharded, strict=True)
            gradients = [part if whole is None else like(part, whole) for part, whole in pairs]
        return None, *gradients


@torch.no_grad()
def relative_distance(tensors: Sequence[Tensor], anchors: Sequence[Tensor]) -> Tensor:
    """Distance ‖φ − θ‖₂ / ‖θ‖₂ between two lists of tensors, to look at; no gradient.

    Differences are taken in float32 (float64 for float64), of a few tensors or rows at a time: the
    memory is a few blocks, not a copy of the lists. Of sharded parameters (DTensors) each process
    looks at its part, and the sums meet in one collective for each way of sharding.

    Args:
        tensors: θ, such as a module's parameters.
        anchors: φ, of the same shapes; on another device (host memory) they are brought over in
            blocks.

    Returns:
        A float32 scalar on the device of the first tensor, the same on every process; 0 for lists
        that are equal, empty ones included.

    Raises:
        ValueError: for lists that differ in length.
    """
    if len(tensors) != len(anchors):
        raise ValueError(f"{len(tensors)} tensors and {len(anchors)} anchors: one list is shorter")
    if not tensors:
        return torch.zeros(())
    device = tensors[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    dtype = wide if device.type == "cpu" else None  # there a norm is summed in one sequence
    away: list[list[Tensor]] = [[] for _ in tensors]
    whole: list[list[Tensor]] = [[] for _ in tensors]
    for block in _blocks(tensors, anchors):
        own = [at_least_float32(part) for _, part, _ in block]
        theirs = [part.to(live.device, non_blocking=True) for _, live, part in block]
        differences = torch._foreach_sub(own, [at_least_float32(part) for part in theirs])
        for norms, parts in ((away, list(differences)), (whole, own)):
            for (place, *_), norm in zip(
                block, torch._foreach_norm(parts, dtype=dtype), strict=True
            ):
                norms[place].append(norm.to(device))
    nothing = torch.zeros((), dtype=dtype, device=device)
    squares = torch.stack([_norm(each or [nothing]).to(wide) for each in (*away, *whole)]).square()
    sums = sums_over_parts(squares, [*tensors, *tensors]).view(2, -1).sum(1).sqrt()
    return (sums[0] / sums[1].clamp_min(torch.finfo(torch.float32).tiny)).float()


def _norm(norms: list[Tensor]) -> Tensor:
    """The norm of what these are the norms of."""
    together: Tensor = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    return together


_Parts: TypeAlias = tuple[int, Tensor, Tensor]  # of which pair, and the rows of both


def _blocks(tensors: Sequence[Tensor], anchors: Sequence[Tensor]) -> Iterator[list[_Parts]]:
    """Views of the parts that are here, together as many as make a block."""
    block: list[_Parts] = []
    size, most = 0, block_size(tensors[0])
    for place, (tensor, anchor) in enumerate(zip(tensors, anchors, strict=True)):
        pair = (_rows(local(tensor), most), _rows(local(anchor), most))
        for rows, others in zip(*pair, strict=True):
            if block and size + rows.numel() > most:
                yield block
                block, size = [], 0
            block.append((place, rows, others))
            size += rows.numel()
    if block:
        yield block


def _rows(tensor: Tensor, most: int) -> Sequence[Tensor]:
    """``tensor`` whole, or, of a large one, a few rows at a time; nothing of an empty one."""
    if tensor.numel() <= most:
        return [tensor] if tensor.numel() else []
    return torch.split(tensor, max(1, most * len(tensor) // tensor.numel()))


def output_anchor(
    student: Tensor,
    anchor: Tensor,
    temperature: float = 1.0,
    entropy_weight: float = 0.0,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Output-space anchor with an entropy bonus: T²·KL(student‖anchor) − entropy_weight·H(student).

    Hou et al. 2025, "T1: Advancing Language Model Reasoning through Reinforcement Learning and
    Inference Scaling", arXiv:2501.11651: "an entropy bonus as an auxiliary loss, alongside a
    dynamic anchor for regularization" (abstract). That the anchor is the reference model of the KL
    penalty and moves as an exponential moving average of the policy follows summaries of the
    paper; its section and equation, and that the KL is KL(policy‖anchor) as usual in
    reinforcement learning, could not be checked against the full text. There both terms act on
    sampled tokens and the KL is centred; here they are exact sums over the classes.

    Args:
        student: logits `(batch, …, classes)`, differentiated.
        anchor: logits of the same shape; detached.
        temperature: T of the divergence, above 0; the entropy is that of the predictions at T = 1.
        entropy_weight: weight of the bonus in the loss, in loss per nat; 0 leaves it out.
        mask: the shape of the examples, as in `kl_divergence`.
        dim: class dimension.

    Returns:
        A scalar: float64 for float64 logits, else float32. It may be negative with the bonus.

    Raises:
        ValueError: as in `kl_divergence`.
    """
    divergence = reverse_kl_divergence(student, anchor, temperature, mask, dim)
    if entropy_weight == 0:
        return divergence
    return divergence - entropy_weight * entropy(student, mask=mask, dim=dim)


def wasserstein_distance(tensors: Sequence[Tensor], anchors: Sequence[Tensor]) -> Tensor:
    """Squared distance Σ ‖sort(θ) − sort(φ)‖² of the distributions of values, tensor by tensor.

    For each tensor its number of elements times the squared 2-Wasserstein distance in one
    dimension: weights may move as long as their distribution does not (Lewandowski et al. 2024,
    "Learning Continually by Spectral Regularization", arXiv:2406.06811, compares with it; the
    formula is that of their earlier arXiv:2312.00246, which we know from summaries).

    Args:
        tensors: θ, whole (not sharded); differentiated.
        anchors: φ, of the same shapes; detached.

    Returns:
        A scalar in float32, or float64 where a tensor is.

    Raises:
        ValueError: for empty or sharded lists, or lists that differ in length or shapes.
    """
    tensors, anchors = list(tensors), list(anchors)
    if any(is_sharded(tensor) for tensor in tensors):
        raise ValueError("the values of a sharded tensor cannot be sorted by parts")
    if not tensors or [t.shape for t in tensors] != [a.shape for a in anchors]:
        raise ValueError("tensors and anchors must be lists of the same shapes, and not empty")
    distances = [
        (sorted_values(tensor) - sorted_values(anchor.detach())).square().sum()
        for tensor, anchor in zip(tensors, anchors, strict=True)
    ]
    return torch.stack([each.to(distances[0].device) for each in distances]).sum()


def sorted_values(tensor: Tensor) -> Tensor:
    """All values of a tensor in order, in at least float32."""
    return at_least_float32(tensor).flatten().sort().values


def data_emphasized_divergence(
    distances: Sequence[Tensor], counts: Sequence[int], sigma: Tensor
) -> Tensor:
    """KL(q ‖ p) per parameter for normal q and p, with the best variance of p in closed form.

    q = N(θ, σ²) and, for each group of D parameters, p = N(φ, λ) with λ* = ‖θ − φ‖²/D + σ², for
    which KL = D/2 · log(λ*/σ²). Divided by all parameters it is the regulariser of the
    data-emphasised evidence bound, 1/(κN) · KL with κ = D/N (Harvey, Petrov & Hughes 2025,
    "Learning Hyperparameters via a Data-Emphasized Variational Objective", arXiv:2502.01861;
    checked against the authors' code). No strength is left to be chosen.

    Args:
        distances: ‖θ − φ‖² of each group, scalars; differentiated.
        counts: D of each group.
        sigma: σ, a positive scalar; differentiated.

    Returns:
        A scalar.

    Raises:
        ValueError: for lists that are empty or of different lengths.
    """
    if not distances or len(distances) != len(counts):
        raise ValueError(f"{len(distances)} distances and {len(counts)} counts of groups")
    variance = at_least_float32(sigma).square()
    terms = [
        count / 2 * torch.log1p(distance / (count * variance))
        for distance, count in zip(distances, counts, strict=True)
    ]
    return torch.stack(terms).sum() / sum(counts)
