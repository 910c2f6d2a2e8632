"""The script that shows how FSDP2 ends when one process gets an empty batch.

In a script of its own, because the processes do not survive it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from tests.contract.strategies.jobs import added_for, emptied
from tests.contract.strategies.places import PLACES, train

if __name__ == "__main__":
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = replace(PLACES["fsdp2"], rank=rank)
    try:
        train(place, added_for("self_distillation_kl"), data=emptied(place))
    except Exception as error:
        Path(sys.argv[1], str(rank)).write_text(f"{type(error).__name__}: {error}")
        raise
