"""The notebook of the documentation runs, and what is stored in it is what a run gives."""

from __future__ import annotations

import importlib.util
import re
from html import escape
from pathlib import Path
from typing import Any

import nbformat
import pytest
from scipy.stats import ttest_rel

from tests.docs.notebook import NOTEBOOK, clean, execute

pytestmark = pytest.mark.xdist_group("notebook")  # it runs once, for all tests

ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
CODE_CELLS = 10
BY = 3.0  # points of accuracy that another processor's rounding may make


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A copy without outputs, run from its first cell to its last in a folder of its own."""
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(ROOT))
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
            environment.setenv(name, str(folder / name))
        return execute(clean(), folder)


@pytest.fixture(scope="module")
def stored() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    return "".join(each["text"] for each in cell.outputs if each.output_type == "stream")


def lines(notebook: Any, begin: str) -> dict[str, list[float]]:
    """The numbers that the one cell with this beginning prints, by what stands before them."""
    (cell,) = [cell for cell in code(notebook) if cell.source.startswith(begin)]
    found = {}
    for line in printed(cell).splitlines():
        name, *_ = NUMBER.split(line, maxsplit=1)
        found[name.strip()] = [float(each) for each in NUMBER.findall(line)]
    return found


@pytest.mark.slow
def test_it_ends_in_the_decision_that_its_text_gives_reasons_for(ran: Any) -> None:
    (decision,) = [cell for cell in code(ran) if cell.source.startswith("best = ")]
    assert printed(decision) == "Keep early learning.\n"
    after = ran.cells[ran.cells.index(decision) + 1].source
    assert after.startswith("Early-learning regularisation")
    with_it, without = map(float, NUMBER.findall(printed(code(ran)[-1])))
    assert with_it > without + BY


@pytest.mark.slow
def test_its_intervals_are_those_of_the_paired_t_test(ran: Any) -> None:
    accuracy, difference = lines(ran, "seeds = "), lines(ran, "difference = ")
    assert list(accuracy) == ["plain", *difference]
    for name, (mean, low, high) in difference.items():
        test = ttest_rel(accuracy[name], accuracy["plain"])
        expected = test.confidence_interval(1 - 0.05 / 3)
        # Both are rounded to a tenth of a point.
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.3)
        assert mean == pytest.approx((expected.low + expected.high) / 2, abs=0.2)


@pytest.mark.slow
def test_the_outputs_that_are_stored_are_those_of_a_run(ran: Any, stored: Any) -> None:
    for cell, again in zip(code(stored), code(ran), strict=True):
        assert cell.source == again.source
        assert cell.execution_count == again.execution_count
        assert [o.output_type for o in cell.outputs] == [o.output_type for o in again.outputs]
        for output, other in zip(cell.outputs, again.outputs, strict=True):
            assert set(output.get("data", {})) == set(other.get("data", {}))
        (one, ours), (two, theirs) = (
            (NUMBER.sub("#", printed(each)).split(), NUMBER.findall(printed(each)))
            for each in (cell, again)
        )
        assert one == two
        assert list(map(float, ours)) == pytest.approx(list(map(float, theirs)), abs=BY)


def test_it_is_short_and_shows_what_the_module_is_made_of(stored: Any) -> None:
    assert len(code(stored)) <= CODE_CELLS
    shown = [
        o.data["text/html"]
        for c in code(stored)
        for o in c.outputs
        if "text/html" in o.get("data", {})
    ]
    assert len(shown) == 1
    assert "aux-inspection" in shown[0]
    assert "early_learning_regularization" in shown[0]


def test_nothing_of_a_machine_or_a_day_is_stored(stored: Any) -> None:
    assert set(stored.metadata) == {"kernelspec", "language_info"}
    assert dict(stored.metadata["language_info"]) == {"name": "python"}
    for cell in stored.cells:
        assert not cell.metadata
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr"
    text = NOTEBOOK.read_text("utf-8")
    assert not re.search(r"site-packages|/(home|root|tmp|Users|work)/", text)
    assert len(text) < 150_000


def test_its_page_has_all_of_it(stored: Any) -> None:
    path = ROOT / "docs/notebook_page.py"
    spec = importlib.util.spec_from_file_location("notebook_page", path)
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = hook.page(NOTEBOOK)
    for cell in stored.cells:
        assert cell.source in page
    pictures = [o for c in code(stored) for o in c.outputs if "image/png" in o.get("data", {})]
    assert page.count("data:image/png;base64,") == len(pictures) == 2
    assert "Keep early learning." in page
    assert escape('<main class="aux-inspection">') in page
