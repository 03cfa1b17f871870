# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What an earlier version saved, and the runs that it began, give what they gave then; see `tests/earlier/write.py`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers.utils import logging


pytest.importorskip("sklearn", reason="one of the files is a PALPClassifier's")
from tests.earlier.write import READERS  # noqa: E402


FILES = Path(__file__).parent / "earlier" / "files"
# Caches that were told apart by too little; what refuses one names it.
MAY_BE_REFUSED = {"features": "features.npy", "pools": "pools.jsonl"}


def leaves(value, at=""):
    """The numbers and texts of nested lists and dicts, by their place."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {place: leaf for key, below in items for place, leaf in leaves(below, f"{at}/{key}").items()}
    return {at: value}


@pytest.fixture(autouse=True)
def _verbosity():
    """Some commands quieten transformers, in a process that is otherwise their own."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.mark.parametrize("kind", READERS)
def test_loads_and_goes_on(kind, tmp_path, monkeypatch):
    shutil.copytree(FILES, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    expected = json.loads((FILES / "expected.json").read_text(encoding="utf-8"))[kind]
    try:
        found = READERS[kind]()
    except ValueError as error:
        if kind not in MAY_BE_REFUSED:
            raise
        assert MAY_BE_REFUSED[kind] in str(error)
        return
    expected, found = leaves(expected), leaves(found)
    assert found.keys() == expected.keys()
    for place, value in expected.items():
        if isinstance(value, float):
            value = pytest.approx(value, rel=1e-3, abs=1e-4)
        assert found[place] == value, place
