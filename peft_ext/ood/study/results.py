# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What a study's cells have measured, on disk: a folder for each, `result.json` and the scores behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from peft_ext.files import read_json, written_whole
from peft_ext.ood.study.grid import Cell, StudyConfig
from peft_ext.tensor_files import write_tensors


RESULT, SCORES, FEATURES = "result.json", "scores.safetensors", "features.safetensors"


class CellResult(NamedTuple):
    """A finished cell and what it has measured."""

    cell: Cell
    result: dict[str, Any]

    def measure(self, detector: str, name: str) -> Optional[float]:
        """A detector's measure; None if the detector had none here."""
        return self.result["detectors"].get(detector, {}).get(name)


def finished_cells(config: StudyConfig) -> list[CellResult]:
    """All cells that have a result, in the study's order."""
    return [CellResult(cell, result) for cell in config.cells() if (result := result_of(config, cell)) is not None]


def result_of(config: StudyConfig, cell: Cell) -> Optional[dict[str, Any]]:
    """The stored result of a finished cell."""
    path = _folder(config, cell) / RESULT
    return read_json(path) if path.is_file() else None


def scores_path(config: StudyConfig, cell: Cell) -> Path:
    """Where a cell's scores lie: `<detector>.id` and `<detector>.outside`."""
    return _folder(config, cell) / SCORES


def write_result(
    config: StudyConfig, cell: Cell, result: Mapping[str, Any], tensors: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Write a cell's result, after its tensors (by file name)."""
    folder = _folder(config, cell)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tensors.items():
        write_tensors(folder / name, content)
    with written_whole(folder / RESULT) as path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _folder(config: StudyConfig, cell: Cell) -> Path:
    return Path(config.output_dir) / "cells" / cell.id
