"""The most memory that the training of a run takes, on its device."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import ClassVar

import torch

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Measures from where it is made, which is right before a run's objects are.

    On CUDA it is what PyTorch allocated at most (`torch.cuda.max_memory_allocated`), parameters
    and optimizer state included. On the CPU it is the process's largest resident set less the one
    that it began with: on Linux the high-water mark `VmHWM`, which is set back to the present size
    where the kernel allows it (`/proc/self/clear_refs`), less `VmRSS` at the start; on other Unix
    systems the growth of `ru_maxrss`, which is less where the process was larger before. It is that
    of this process alone: what loader workers hold is not in it. On other accelerators, on
    Windows, and for a second run on the CPU in one process it is not known.
    """

    _began: ClassVar[bool] = False

    def __init__(self) -> None:
        # what an earlier run has left behind would be used again and not be seen
        self._first, PeakMemory._began = not PeakMemory._began, True
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS") if _STATUS.exists() else _largest_resident_set()

    def read(self, device: torch.device) -> int | None:
        """Bytes up to now, of a run on `device`."""
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        after = _status("VmHWM") if _STATUS.exists() else _largest_resident_set()
        if device.type != "cpu" or not self._first or after is None or self._before is None:
            return None
        return max(after - self._before, 0)


def _status(name: str) -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return None


def _largest_resident_set() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
