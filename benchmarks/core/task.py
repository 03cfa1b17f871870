# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What a benchmark's module says about itself: `TASK`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from benchmarks.core.claims import Claim, Headline
from benchmarks.core.run import Run


Runs = Sequence[Run]


def _nothing(runs: Runs) -> list:
    return []


class Task(NamedTuple):
    """How a benchmark is measured and shown.

    Attributes:
        measure: Measures the rows that a run lacks, most telling first, and stores each through `run.add`.
        tables: Markdown by title, of what is stored.
        claims: What the figures are held to; a claim without its rows has no value.
        headlines: Rows of docs/results.md.
        draw: Draws pictures into a folder.
    """

    measure: Callable[[Run], None]
    tables: Callable[[Runs], dict[str, str]]
    claims: Callable[[Runs], list[Claim]] = _nothing
    headlines: Callable[[Runs], list[Headline]] = _nothing
    draw: Optional[Callable[[Runs, Path], None]] = None


def tables_of_each(function: Callable[[Run], dict[str, str]]) -> Callable[[Runs], dict[str, str]]:
    """Tables of several runs from those of one; with several runs, titles begin with the experiment."""

    def of_all(runs: Runs) -> dict[str, str]:
        return {
            f"{run.experiment}: {title}" if len(runs) > 1 else title: table
            for run in runs
            for title, table in function(run).items()
        }

    return of_all


def claims_of_each(function: Callable[[Run], list[Claim]]) -> Callable[[Runs], list[Claim]]:
    """Claims of several runs from those of one; their names begin with the experiment."""

    def of_all(runs: Runs) -> list[Claim]:
        return [claim._replace(name=f"{run.experiment}: {claim.name}") for run in runs for claim in function(run)]

    return of_all


def run_named(runs: Runs, experiment: str) -> Optional[Run]:
    """The run of an experiment, or None."""
    return next((run for run in runs if run.experiment == experiment), None)
