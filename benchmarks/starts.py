# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Starts from data: what a packed model reads before any tuning, how long its calibration takes, and what is left after tuning.

Each start quantises the same float model to the same formats. The blocks that are calibrated on are those of `peqa_quality`, or
more of the same text. Behind each, the scales are tuned for a few steps on the same batches, so that a better start that tuning
would reach anyway shows as such.

    python -m benchmarks starts
"""

from __future__ import annotations

import copy
import os
import time
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

from benchmarks import baselines
from benchmarks.core.claims import Claim, markdown_table
from benchmarks.core.run import Run, log
from benchmarks.core.task import Task, claims_of_each, tables_of_each
from benchmarks.distillation import Form, forms
from benchmarks.fast_linear import fast_linear
from benchmarks.peqa_quality import _byte_data as byte_data
from benchmarks.peqa_quality import load_data
from benchmarks.tuning import BYTES, causal_batches, float_model, train
from peft_ext import PeqaConfig
from peft_ext.perplexity import perplexity


GPTQ, CALIBRATED = "gptq", "calibrated"
TITLES = {GPTQ: "error feedback (`gptq`)", CALIBRATED: "and sweeps, refits (`calibrated`)"}


class Row(NamedTuple):
    """A line of the table: what is packed how (None: not at all), and calibrated by what on how many blocks."""

    form: Optional[Form] = None
    start: Optional[str] = None
    blocks: Optional[int] = None

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from the others."""
        bits, group_size = (None, None) if self.form is None else self.form[:2]
        return {"bits": bits, "group_size": group_size, "start": self.start, "blocks": self.blocks}


def rows_of(run: Run) -> list[Row]:
    """The table, the float model first."""
    return [Row(), *(Row(form, *start) for form in forms(run) for start in run.starts)]


class Bench:
    """The float model and the data of a run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.data = byte_data(run) if run.data == BYTES else load_data(run)
        self.float_model = float_model(run.model, run.seed)
        self.batches = causal_batches(self.data.train[: run.steps * run.batch_size], run.batch_size)

    def figures(self, model: nn.Module, texts: tuple[str, ...] = ("validation", "test", "other")) -> dict[str, float]:
        """Perplexity on each text."""
        size = self.run.batch_size
        return {name: perplexity(model, getattr(self.data, name), batch_size=size) for name in texts}

    def measure(self, row: Row) -> dict[str, Any]:
        """Perplexities before and after tuning, and the processor's seconds of calibration."""
        if row.form is None:
            return self.figures(self.float_model)
        torch.manual_seed(self.run.seed)
        config = PeqaConfig(bits=row.form.bits, group_size=row.form.group_size, init_method=row.start)
        blocks, model = self.data.calibration[: row.blocks], copy.deepcopy(self.float_model)
        processor, clock = time.process_time(), time.perf_counter()
        model = baselines.quantized(model, config, blocks)
        seconds = {"cpu_seconds": time.process_time() - processor, "seconds": time.perf_counter() - clock}
        found = self.figures(model)
        train(model, self.batches, learning_rate=row.form.learning_rate)
        tuned = self.figures(model, ("test", "other"))
        return {
            **found,
            **{f"tuned_{name}": value for name, value in tuned.items()},
            **seconds,
            "load": os.getloadavg()[0],
        }


def measure(run: Run) -> None:
    """Measure every row that isn't stored yet."""
    missing = [row for row in rows_of(run) if run.find(row.key) is None]
    bench = Bench(run) if missing else None
    with fast_linear():
        for row in missing:
            assert bench is not None
            log(f"{_name(row)}, {row.start}, {row.blocks} blocks")
            run.add(row.key, bench.measure(row))


def tables(run: Run) -> dict[str, str]:
    """What is measured so far."""
    lines = []
    for row in rows_of(run):
        found = run.find(row.key) or {}
        parts = ("validation", "test", "other", "tuned_test", "tuned_other", "cpu_seconds")
        figures = [None if part not in found else f"{found[part]:.2f}" for part in parts[:-1]]
        seconds = f"{found['cpu_seconds']:.0f}" if "cpu_seconds" in found else None
        start = None if row.start is None else f"{TITLES[row.start]}, {row.blocks} blocks"
        lines.append([_name(row), start if found else "not measured", *figures, seconds])
    headers = [
        "Weights",
        "Start",
        "Validation",
        "Test",
        "Python's documentation",
        f"Test after {run.steps} steps",
        "Python's after them",
        "Seconds of a core to calibrate",
    ]
    return {"Starts from data": markdown_table(headers, lines)}


def _name(row: Row) -> str:
    return "float" if row.form is None else row.form.title


def claims(run: Run) -> list[Claim]:
    """Sweeps and refits are ahead of error feedback alone, before tuning and after; 2 bits cost at most half; calibration
    takes at most 3 minutes of two cores."""
    found = []
    for form in forms(run):
        alone, swept = (run.find(Row(form, start, run.starts[0][1]).key) for start in (GPTQ, CALIBRATED))
        for name, part in (("untuned", "test"), ("tuned", "tuned_test")):
            ratio = swept[part] / alone[part] if alone and swept else None
            found.append(Claim(f"{form.title}, {name}, sweeps and refits over error feedback", ratio, 1.0))
        untouched = run.find(Row().key)
        if form.bits == 2:
            ratio = swept["test"] / untouched["test"] if swept and untouched else None
            found.append(Claim(f"{form.title}, untuned, over float", ratio, 1.5))
        minutes = swept["cpu_seconds"] / 120 if swept else None
        found.append(Claim(f"{form.title}, minutes of two cores to calibrate", minutes, 3.0))
    return found


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims))
