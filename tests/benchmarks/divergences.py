"""Time and memory of formulas of logits, forward and backward, beside the same in plain torch.

``make bench-divergences`` prints the tables and writes them to docs/divergences.md. All take turns
in one process with one thread; what is given is the median turn over that of the peer, and the
highest memory over that of the peer, both measured by the same ruler.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_aux.functional import (
    DIVERGENCES,
    confidence_penalty,
    coverage_loss,
    label_smoothing,
    max_suppression,
    sigmoid_divergence,
    spectral_decoupling,
    target_change,
    z_loss,
)
from tests.benchmarks.memory import peak

ROOT = Path(__file__).parents[2]
TURNS = 9
MORE_TURNS = 75  # of what takes less than a millisecond, whose turns are short
T = 2.0
INPUTS = {
    "128 × 10": (128, 10, torch.float32),
    "4,096 × 100": (4096, 100, torch.float32),
    "2,048 × 32,000": (2048, 32_000, torch.float32),
    "2,048 × 32,000, bfloat16": (2048, 32_000, torch.bfloat16),
}


def log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits / T, -1)


def softmax(logits: Tensor) -> Tensor:
    return F.softmax(logits / T, -1)


def js(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    log_m = ((log_q.exp() + log_p.exp()) / 2).log()
    parts = [
        F.kl_div(log_m, each, reduction="batchmean", log_target=True) for each in (log_q, log_p)
    ]
    return T * T * (parts[0] + parts[1]) / 2


def alpha(student: Tensor, teacher: Tensor) -> Tensor:
    """The two sums of the published code; its gradient by a surrogate is about as long."""
    q, p = softmax(student), softmax(teacher)
    ratio = p / q
    high = (q * ratio * ratio.log()).sum(-1)
    low = (q * (ratio**-1).clamp(0, 5) - q).sum(-1) / 2
    return T * T * torch.maximum(low, high).mean()


PEERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": lambda s, t: T * T * F.kl_div(log_softmax(s), softmax(t), reduction="batchmean"),
    "reverse_kl": lambda s, t: T * T * F.kl_div(log_softmax(t), softmax(s), reduction="batchmean"),
    "js": js,
    "alpha": alpha,
    "tv": lambda s, t: T * (softmax(s) - softmax(t)).abs().sum(-1).mean() / 2,
    "mse": lambda s, t: F.mse_loss(s, t),
    "cosine": lambda s, t: (1 - F.cosine_similarity(s, t, dim=-1)).mean(),
}


def labels(logits: Tensor) -> Tensor:
    """The same for the same shape, without a gradient."""
    return torch.arange(len(logits)) % logits.shape[1]


def covered(z: Tensor, t: Tensor) -> Tensor:
    p = F.softmax(z, -1).gather(1, labels(z)[:, None])
    return -(1 - (1 - p) ** 16).log().mean()


def sigmoid_kl(s: Tensor, t: Tensor) -> Tensor:
    """As published, without the clamp."""
    sigma = torch.sigmoid((s - t) / T)
    half = torch.full_like(sigma, 0.5)
    both = F.kl_div(sigma.log(), half, reduction="sum")
    both = both + F.kl_div((1 - sigma).log(), half, reduction="sum")
    return T * T * both / len(s)


# Ours, and the single function of the paper or of torch, of the student's and a teacher's logits.
TERMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "label_smoothing": (
        lambda z, t: label_smoothing(z, labels(z)),
        lambda z, t: (z.gather(1, labels(z)[:, None])[:, 0] - z.mean(-1)).mean(),
    ),
    "max_suppression": (
        lambda z, t: max_suppression(z),
        lambda z, t: (z.max(-1).values - z.mean(-1)).mean(),
    ),
    "confidence_penalty": (
        lambda z, t: confidence_penalty(z),
        lambda z, t: (F.softmax(z, -1) * F.log_softmax(z, -1)).sum(-1).mean(),
    ),
    "coverage_loss": (lambda z, t: coverage_loss(z, labels(z), 16), covered),
    "spectral_decoupling": (
        lambda z, t: spectral_decoupling(z),
        lambda z, t: z.square().sum(-1).mean() / 2,
    ),
    "z_loss": (lambda z, t: z_loss(z), lambda z, t: torch.logsumexp(z, -1).square().mean()),
    "target_change": (
        lambda z, t: target_change(z, labels(z), t.softmax(-1)),
        lambda z, t: F.cross_entropy(z, t.softmax(-1)) - F.cross_entropy(z, labels(z)),
    ),
    "sigmoid_divergence": (lambda z, t: sigmoid_divergence(z, t, T), sigmoid_kl),
}
TERMS |= {
    name: (lambda s, t, name=name: DIVERGENCES[name](s, t, T), peer) for name, peer in PEERS.items()
}


def measured(acts: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Seconds of the median turn; all take turns, each turn long enough for the clock."""
    repeats, turns = {}, TURNS
    for name, act in acts.items():
        act()
        began = time.perf_counter()
        act()
        lasted = time.perf_counter() - began
        repeats[name] = max(1, round(0.02 / max(1e-6, lasted)))
        turns = MORE_TURNS if lasted < 1e-3 else turns
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    for turn in range(turns):
        for name in list(acts) if turn % 2 else list(reversed(acts)):
            began = time.perf_counter()
            for _ in range(repeats[name]):
                acts[name]()
            seconds[name].append((time.perf_counter() - began) / repeats[name])
    return {name: median(each) for name, each in seconds.items()}


def differentiate(leaf: Tensor, formula: Callable[..., Tensor], *rest: Tensor) -> None:
    """One forward and backward pass, without a gradient from the last one."""
    leaf.grad = None
    formula(leaf, *rest).backward()


def compared(name: str, rows: int, classes: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """Milliseconds of the peer, and time and memory of ours over those of the peer."""
    student, teacher = torch.randn(2, rows, classes).to(dtype).unbind()
    student.requires_grad_()

    both = dict(zip(("ours", "peer"), TERMS[name], strict=True))
    if dtype == torch.float32 and name != "alpha":  # whose peer has no bound beyond the clip
        values = (each(student, teacher) for each in both.values())
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)
    acts = {who: partial(differentiate, student, each, teacher) for who, each in both.items()}
    times = measured(acts)
    bytes_ = {}
    for who, act in acts.items():
        student.grad = None
        bytes_[who] = peak(act)
    return times["peer"] * 1e3, times["ours"] / times["peer"], bytes_["ours"] / bytes_["peer"]


class Nothing(torch.autograd.Function):
    """A sum, by the least that a formula with a gradient of its own needs."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.shape = z.shape
        return z.sum()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        return outer.expand(ctx.shape)


class Squares(torch.autograd.Function):
    """The mean of squares, with no operation more than the value and the derivatives need."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, t: Tensor) -> Tensor:
        ctx.difference = (z - t).view(-1)
        ctx.shape = z.shape
        return ctx.difference.dot(ctx.difference).mul_(1 / z.numel())

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        scale = outer.item() * 2 / ctx.difference.numel()
        return ctx.difference.mul_(scale).view(ctx.shape), None


def floor() -> str:
    """What no formula can do without, whatever it computes."""
    student, teacher = torch.randn(2, 128, 10).unbind()
    student.requires_grad_()
    acts = {
        "sum": partial(differentiate, student, torch.sum),
        "own sum": partial(differentiate, student, Nothing.apply),
        "mse": partial(differentiate, student, F.mse_loss, teacher),
        "own mse": partial(differentiate, student, Squares.apply, teacher),
    }
    found = {name: f"{1e6 * each:.0f} µs" for name, each in measured(acts).items()}
    return (
        f"For 128 × 10, forward and backward of a sum take {found['sum']} here, and "
        f"{found['own sum']} as a Python `autograd.Function`, which most formulas of ours are. "
        f"`torch`'s mean of squares takes {found['mse']}, being one native call that keeps the "
        f"logits, which then may not be overwritten; written as a function with no operation too "
        f"many and no check it takes {found['own mse']}. So `mse` cannot be at most 1.0 there. The "
        f"difference is tens of microseconds a step, and gone where the logits are larger."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.divergences")
    parser.add_argument("--rows", type=int, help="at most so many, to see whether it runs")
    parser.add_argument("--write", action="store_true", help="write docs/divergences.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [
        "# Speed of formulas of logits",
        "",
        "Written by `make bench-divergences`: forward and backward pass in one process with one "
        "thread,",
        f"ours and the formula in plain torch in turns; the median of {TURNS} turns, of "
        f"{MORE_TURNS} below a millisecond.",
    ]
    for size, (rows, classes, dtype) in INPUTS.items():
        lines += ["", f"## {size}", "", "| | peer | time | memory |", "|---|---:|---:|---:|"]
        for name in TERMS:
            found = compared(name, min(rows, given.rows or rows), classes, dtype)
            lines.append(f"| {name} | {found[0]:.3g} ms | {found[1]:.2f} | {found[2]:.2f} |")
            print(size, lines[-1], flush=True)
    load = os.getloadavg()[0]
    lines += [
        "",
        floor(),
        "",
        f"Time and memory are ours over the peer's. The machine's load at the end was {load:.1f}; "
        f"torch {torch.__version__}, {platform.machine()}.",
        "",
    ]
    print("\n".join(lines))
    if given.write:
        (ROOT / "docs" / "divergences.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
