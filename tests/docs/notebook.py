"""Runs the notebook of the documentation in a kernel of its own: ``python -m tests.docs.notebook``.

Written again with its outputs, it holds nothing of the machine or the day that it ran on.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs/notebook/from_module_to_decision.ipynb"
SECONDS = 300  # on a busy machine; alone it takes less than 60


def clean(path: Path = NOTEBOOK) -> Any:
    """The notebook without outputs, as one who has just got it runs it."""
    notebook: Any = nbformat.read(path, as_version=4)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for place, cell in enumerate(notebook.cells, start=1):
        cell.id, cell.metadata = f"cell-{place:02}", {}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def execute(notebook: Any, folder: Path) -> Any:
    """The notebook with outputs; what it writes goes into ``folder``.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised.
    """
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=SECONDS, resources=place, record_timing=False).execute()
    notebook.metadata["language_info"] = {"name": "python"}  # the kernel writes its version here
    return notebook


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        nbformat.write(execute(clean(), Path(folder)), NOTEBOOK)
