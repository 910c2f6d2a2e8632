"""Shows the notebook as a page of the site: text, code and outputs as they are stored in it.

A plug-in would run it again, or bring a notebook server's dependencies; the outputs are there
already, since `make notebook` and the tests run it.
"""

import json
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

NOTEBOOK = PurePosixPath("notebook/from_module_to_decision.ipynb")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page beside the notebook."""
    text = page(Path(config.docs_dir, NOTEBOOK))
    files.append(File.generated(config, str(NOTEBOOK.with_suffix(".md")), content=text))
    return files


def page(notebook: Path) -> str:
    """The notebook in Markdown, pictures included, with a link to itself below its title."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    title, *parts = [part for cell in cells for part in _parts(cell)]
    link = f"[The notebook itself]({notebook.name}), to run and to change."
    return "\n\n".join([title, link, *parts]) + "\n"


def _parts(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    return [f"```python\n{source}\n```", *map(_shown, cell["outputs"])]


def _shown(output: dict[str, Any]) -> str:
    """An output as HTML, in the richest of the forms that it has."""
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="The picture that the cell draws" src="data:image/png;base64,{picture}">'
    if "text/html" in data:
        # In a frame, which the styles of the site do not reach.
        inside = escape(" ".join("".join(data["text/html"]).split()))
        frame = "width: 100%; height: 34rem; border: 0"
        return f'<div><iframe title="The output" style="{frame}" srcdoc="{inside}"></iframe></div>'
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"<pre><code>{escape(text)}</code></pre>"
