"""The one exception type that the package raises for what a user can mend."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["AuxiliaryError", "near_matches"]


class AuxiliaryError(RuntimeError):
    """Something about the model, the batch or the configuration does not fit.

    The message says what was wrong, where, and what would work.
    """


def near_matches(word: str, known: Iterable[str], limit: int = 5) -> str:
    """Return a clause that names the entries of ``known`` nearest to ``word``."""
    known = [entry for entry in known if entry]
    near = get_close_matches(word, known, n=limit, cutoff=0.4)
    if near:
        return "Near matches: " + ", ".join(repr(entry) for entry in near) + "."
    shown = ", ".join(repr(entry) for entry in known[:20])
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"Known: {shown}{more}." if known else "There are none to choose from."
