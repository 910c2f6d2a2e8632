"""Keeps Lightning's own lines and advice out of the contract's output."""

import logging
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Lightning says on every fit which devices exist; a hundred fits say it a hundred times."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.pytorch")
        yield
    logger.setLevel(before)
