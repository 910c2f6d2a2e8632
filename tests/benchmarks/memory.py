"""How much memory an act needs at its peak beyond what was there, by the profiler of torch."""

from __future__ import annotations

from collections.abc import Callable

from torch.autograd.profiler import profile


def peak(act: Callable[[], object]) -> int:
    """Bytes on the CPU, whoever allocates them: operations, autograd, or Python."""
    with profile(use_kineto=True, profile_memory=True) as recorded:
        act()
    events = [each for each in recorded.kineto_results.events() if each.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest
