"""Where commands print."""

from __future__ import annotations

from rich.console import Console


def terminal(width: int = 110) -> Console:
    """The terminal; a file or a pipe has no width of its own and gets one that fits the tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=width)
