"""The script of this folder: every job of one place, in one start of two processes.

Lightning starts this file once more for the second process. The place is the name of the folder to
write to. A job that raises is noted, and the next one runs.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from lightning.pytorch.strategies import model_parallel

from tests.contract.strategies.jobs import jobs
from tests.contract.strategies.places import PLACES

if __name__ == "__main__":
    torch.set_num_threads(1)
    # Each mesh makes process groups of its own, whose threads stay: a thousand after all jobs.
    model_parallel._setup_device_mesh = cache(model_parallel._setup_device_mesh)
    folder = Path(sys.argv[1])
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = replace(PLACES[folder.name], rank=rank)
    for name, job in jobs(place, folder).items():
        try:
            ended = job()
        except Exception:
            ended = {"error": traceback.format_exc()}
        torch.save(ended, folder / f"{name}.{rank}.pt")
