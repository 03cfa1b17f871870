# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""How tests run a benchmark: as a user does, at smoke size."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest


class Smoke(NamedTuple):
    """What a smoke run printed, and the rows that it stored, by experiment."""

    shown: str
    rows: dict[str, list[dict]]

    @property
    def results(self) -> list[dict]:
        """The results of all rows."""
        return [row["result"] for rows in self.rows.values() for row in rows]


@pytest.fixture
def smoke(tmp_path, capsys):
    """Runs a task's experiments at smoke size; a second run measures nothing, and shows the same."""
    from benchmarks.__main__ import main

    def stored(task):
        return {path.stem: path.read_text() for path in (tmp_path / task).glob("*.json")}

    def run(task, *experiments):
        arguments = [task, *experiments, "--smoke", "--output_dir", str(tmp_path)]
        assert main(arguments) == 0, capsys.readouterr().err
        first, before = capsys.readouterr().out, stored(task)
        assert main(arguments) == 0
        assert stored(task) == before, "finished rows were measured again"
        assert capsys.readouterr().out == first
        assert not list(tmp_path.rglob("*-partial-*"))
        return Smoke(first, {name: json.loads(text)["rows"] for name, text in before.items()})

    return run


@pytest.fixture
def measured(tmp_path):
    """Measures one experiment at smoke size, with some of its settings replaced; returns the run."""
    from benchmarks.__main__ import TASKS
    from benchmarks.core import experiments
    from benchmarks.core.run import Run

    def measure(task, experiment, **replaced):
        settings = {**experiments.settings(task, experiment, "smoke"), **replaced}
        run = Run(task, experiment, settings, "smoke", tmp_path)
        TASKS[task].load().measure(run)
        return run

    return measure
