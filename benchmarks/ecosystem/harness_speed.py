# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""lm-evaluation-harness with `--model peft_ext` and with `--model hf`: are the log-likelihoods the same, and how much less
time do they take behind eight demonstrations?

Both score the requests that the harness makes of five local tasks, with the same model in the same process, in turn: a
round is one measurement of each, and figures are medians of rounds. `hf` gets the best of several batch sizes. Seconds are
the process's own (CPU time), so that other work on the machine doesn't count; one thread.

    OMP_NUM_THREADS=1 python -m benchmarks harness_speed
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.run import Run, log
from benchmarks.core.task import Runs, Task, claims_of_each, tables_of_each
from benchmarks.ecosystem.harness_tasks import data_of, write_harness_tasks
from peft_ext.models import load, load_tokenizer


OURS, THEIRS = "peft_ext", "hf, batches of"
TOLERANCE, FASTER = 1e-3, 4.0
# Behind the same eight demonstrations.
CLAIMED = ("choice", "labels", "cloze")
KIND = {"rolling": "loglikelihood_rolling", "generate": "generate_until"}


class Pair:
    """The two models, and the requests of the tasks."""

    def __init__(self, run: Run) -> None:
        from lm_eval.models.huggingface import HFLM

        from generation_ext.in_context.lm_eval import SharedPrefixLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.run = run
        model, tokenizer = load(run.model, dtype=torch.float32), load_tokenizer(run.model)
        self.ours = SharedPrefixLM(pretrained=model, tokenizer=tokenizer)
        self.theirs = HFLM(pretrained=model, tokenizer=tokenizer)

    def requests(self, name: str, folder: Path) -> list[Any]:
        """What the harness asks a model for."""
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(folder), include_defaults=False)
        found = manager.load([name])
        tasks = found["tasks"] if isinstance(found, dict) and "tasks" in found else found
        task = tasks[name]
        task.build_all_requests(rank=0, world_size=1)
        return list(task.instances)

    def measure(self, name: str, folder: Path) -> None:
        """Store seconds of both, and how far their numbers differ, round by round."""
        found = self.run.find({"task": name}) or {"requests": 0, "seconds": {}, "difference": 0.0}
        requests = self.requests(name, folder)
        for number in range(rounds_of(found), self.run.rounds):
            values: dict[str, Any] = {}
            for label, lm, size in self.contenders():
                lm.batch_size_per_gpu = size
                start = time.process_time()
                values[label] = getattr(lm, KIND.get(name, "loglikelihood"))(requests, disable_tqdm=True)
                found["seconds"].setdefault(label, []).append(time.process_time() - start)
                log(f"{name}, round {number + 1}: {label}: {found['seconds'][label][-1]:.2f} s")
            theirs = values[f"{THEIRS} {self.run.batch_sizes[0]}"]
            found["requests"] = len(requests)
            found["difference"] = max(found["difference"], _difference(values[OURS], theirs))
            self.run.add({"task": name}, found)

    def contenders(self) -> list[tuple[str, Any, int]]:
        """Names, models, batch sizes."""
        theirs = [(f"{THEIRS} {size}", self.theirs, size) for size in self.run.batch_sizes]
        return [*theirs, (OURS, self.ours, self.run.batch_sizes[0])]


def rounds_of(found: Mapping[str, Any]) -> int:
    """How often all contenders of a stored row were measured."""
    return min(map(len, found["seconds"].values()), default=0)


def _difference(one: Sequence[Any], other: Sequence[Any]) -> float:
    """The largest of two lists of answers; infinite where texts or flags differ."""
    largest = 0.0
    for a, b in zip(one, other, strict=True):
        if isinstance(a, tuple):
            if a[1] != b[1]:
                return float("inf")
            a, b = a[0], b[0]
        if isinstance(a, str):
            if a != b:
                return float("inf")
        else:
            largest = max(largest, float(np.abs(a - b)))
    return largest


def measure(run: Run) -> None:
    """The rounds that aren't stored yet."""
    missing = [name for name in run.tasks if rounds_of(run.find({"task": name}) or {"seconds": {}}) < run.rounds]
    if missing:
        data, pair = data_of(run.data), Pair(run)
        with tempfile.TemporaryDirectory() as folder:
            write_harness_tasks(Path(folder), data, run.inputs, run.shots)
            for name in missing:
                pair.measure(name, Path(folder))


def faster(found: Mapping[str, Any]) -> tuple[float, float, float]:
    """Seconds of `hf` at its best, of ours, and their ratio."""
    seconds = {label: statistics.median(times) for label, times in found["seconds"].items()}
    best = min(value for label, value in seconds.items() if label != OURS)
    return best, seconds[OURS], best / seconds[OURS]


def tables(run: Run) -> dict[str, str]:
    """Time and agreement by task."""
    lines = []
    for name in run.tasks:
        found = run.find({"task": name})
        if found is None:
            lines.append([name, *[None] * 6])
            continue
        theirs, ours, ratio = faster(found)
        numbers = [f"{theirs:.1f}", f"{ours:.1f}", f"{ratio:.1f}x", f"{found['difference']:.1e}"]
        lines.append([name, found["requests"], *numbers, str(rounds_of(found))])
    headers = ["Task", "Requests", "hf at its best, s", "peft_ext, s", "Faster", "Largest difference", "Rounds"]
    return {f"{run.inputs} inputs behind {run.shots} demonstrations": markdown_table(headers, lines)}


def claims(run: Run) -> list[Claim]:
    """The same log-likelihoods, sooner."""
    claimed = []
    for name in run.tasks:
        found = run.find({"task": name})
        claimed.append(Claim(f"{name}: difference", found and found["difference"], TOLERANCE))
        if name in CLAIMED:
            ratio = found and faster(found)[2]
            claimed.append(Claim(f"{name}: over hf at its best", ratio, FASTER, "x", at_least=True))
    return claimed


def headlines(runs: Runs) -> list[Headline]:
    """The tasks behind eight demonstrations."""
    rows = [row["result"] for run in runs for row in run.rows if row["key"]["task"] in CLAIMED]
    if not rows:
        return []
    ratios, difference = [faster(found)[2] for found in rows], max(found["difference"] for found in rows)
    digit, power = f"{difference:.0e}".split("e")
    return [
        Headline(
            "Speed and serving on a CPU",
            "lm-evaluation-harness, eight shots: `--model peft_ext` over `--model hf`",
            f"{min(ratios):.1f} to {max(ratios):.1f} times as fast, log-likelihoods within {digit}e{int(power)}",
            unless(min(ratios) >= FASTER, f"{FASTER:g} times"),
            "tools.md#lm-evaluation-harness",
        )
    ]


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims), headlines)
