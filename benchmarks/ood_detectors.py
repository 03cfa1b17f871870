# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Seconds and memory of every out-of-distribution detector: fitted on as many examples as CLINC150 trains on, and scoring
100,000 features of MiniLM's size, drawn around class means.

Memory is what the process takes beyond inputs and detector.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.run import Run, log
from benchmarks.core.task import Runs, Task, tables_of_each
from benchmarks.resident import peak_resident_bytes, reset_peak, resident_bytes
from peft_ext.ood.detectors import make_detector


CLASSES = 150
SECONDS, SCORED = 30.0, 100_000


def measure(run: Run) -> None:
    """A row for each detector."""
    inputs = None
    for name in run.detectors:
        if run.find({"detector": name}) is None:
            inputs = inputs or _inputs(run)
            run.add({"detector": name}, measured(name, *inputs, rounds=run.rounds))
            log(f"measured: {name}")


def tables(run: Run) -> dict[str, str]:
    """Seconds and memory of each detector."""
    found = {name: result for name in run.detectors if (result := run.find({"detector": name})) is not None}
    lines = [
        [name, f"{r['fit']:.2f}", f"{r['score']:.2f}", f"{r['bytes'] / 1e6:.0f}", f"{r['single'] * 1e3:.2f}"]
        for name, r in found.items()
    ]
    headers = ["Detector", "fit, s", f"score {run.scored:,}, s", "memory of scoring, MB", "one example, ms"]
    return {"cost": markdown_table(headers, lines)}


def claims(runs: Runs) -> list[Claim]:
    """The slowest detector's; from fewer examples, at their rate."""
    found = [
        result["score"] * SCORED / run.scored
        for run in runs
        for name in run.detectors
        if (result := run.find({"detector": name})) is not None
    ]
    return [Claim(f"the slowest detector's seconds for {SCORED:,} examples", max(found, default=None), SECONDS, " s")]


def measured(
    name: str, train: tuple[np.ndarray, np.ndarray, np.ndarray], scored: tuple[np.ndarray, np.ndarray], rounds: int
) -> dict[str, float]:
    """Seconds of fitting, of scoring (median of `rounds`) and of scoring one example, bytes that scoring takes."""
    start = time.perf_counter()
    detector = make_detector(name).fit(*train)
    fit = time.perf_counter() - start
    seconds = []
    reset_peak()
    before = resident_bytes()
    for _ in range(rounds):
        start = time.perf_counter()
        detector.score(*scored)
        seconds.append(time.perf_counter() - start)
    taken = peak_resident_bytes() - before
    start = time.perf_counter()
    for row in range(10):
        detector.score(scored[0][row], scored[1][row])
    single = (time.perf_counter() - start) / 10
    return {"fit": fit, "score": statistics.median(seconds), "single": single, "bytes": taken}


def _inputs(run: Run) -> tuple[Any, Any]:
    """Features, logits and labels to fit on; features and logits to score."""
    generator = np.random.default_rng(run.seed)
    means = generator.standard_normal((CLASSES, run.features)).astype(np.float32)
    head = generator.standard_normal((run.features, CLASSES)).astype(np.float32)

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        labels = generator.integers(CLASSES, size=count)
        features = means[labels] + generator.standard_normal((count, run.features), dtype=np.float32)
        return features, features @ head, labels

    return drawn(run.train), drawn(run.scored)[:2]


def headlines(runs: Runs) -> list[Headline]:
    """The fastest and the slowest."""
    found = {
        name: result["score"] for run in runs for name in run.detectors if (result := run.find({"detector": name}))
    }
    if not {"msp", "knn"} <= set(found):
        return []
    shown = f"{found['msp']:.1f} s (MSP) to {found['knn']:.0f} s (exact kNN)"
    page = "../benchmarks/ood_study.md#what-the-detectors-cost"
    wanted = unless(max(found.values()) <= SECONDS, "seconds")
    return [Headline("Reading", f"Scoring {SCORED:,} examples by a detector", shown, wanted, page)]


TASK = Task(measure, tables_of_each(tables), claims, headlines)
