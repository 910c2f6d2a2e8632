"""What every test needs: the same numbers on every machine, and a Trainer that writes nothing.

Settings of the process come first, because torch and wandb read them when they are imported.
"""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the suite is the same with and without a GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in one order, and room for pytest -n
os.environ.setdefault("WANDB_MODE", "offline")

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from tests.support_matrix import SupportMatrix

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``make support`` says where the table goes."""
    parser.addoption("--support-matrix", type=Path, help="write entries by strategies to this file")


def pytest_configure(config: pytest.Config) -> None:
    """Count what passes where."""
    config.pluginmanager.register(SupportMatrix(config.getoption("--support-matrix")))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random state, whatever ran before it in this process."""
    L.seed_everything(0, verbose=False)


@pytest.fixture
def plain_trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """A factory of Trainers on one CPU process that neither print, log nor save.

    Every argument of `Trainer` can be given, and overrides what stands here.
    """

    def make(**arguments: Any) -> L.Trainer:
        quiet: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**(quiet | arguments))

    return make


_LOGGERS = ("lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero")
_LEVELS = {name: logging.getLogger(name).level for name in _LOGGERS}


@pytest.fixture(autouse=True)
def _what_is_said_can_be_heard() -> None:
    """Whatever a test before has silenced: loggers, or the process being the first."""
    for name, level in _LEVELS.items():
        logger = logging.getLogger(name)
        logger.disabled = False
        logger.setLevel(level)
    rank_zero_only.rank = 0
