from pathlib import Path

import pytest

from tests.cli.comparing import Workplace


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    return Workplace(tmp_path)
