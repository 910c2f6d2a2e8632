"""Keeps two commands from working in one folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lightning_aux.comparison import ComparisonError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


@contextlib.contextmanager
def only_one_in(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made, for one comparison.

    The system lets go of it when the process ends, however it does. Nothing is held where there are
    no such locks: on Windows, on some network file systems.

    Raises:
        ComparisonError: When another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ComparisonError(
                    f"another compare works in {folder}; wait for it or give --output."
                ) from None
            except OSError:
                pass
        yield
