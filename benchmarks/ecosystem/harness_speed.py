# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""lm-evaluation-harness with `--model peft_ext` and with `--model hf`: are the log-likelihoods the same, and how much less
time do they take behind eight demonstrations?

Both score the requests that the harness makes of five local tasks, with the same model in the same process, in turn: a
round is one measurement of each, and figures are medians of rounds. `hf` gets the best of several batch sizes. Seconds are
the process's own (CPU time), so that other work on the machine doesn't count; one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.ecosystem.harness_speed

Rounds are stored as they finish and not measured again.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from benchmarks.common import Results, argument_parser, data_folder, describe, log, markdown_table, verdict
from benchmarks.ecosystem.harness_tasks import write_harness_tasks
from peft_ext.models import DEFAULT_MODEL, load, load_tokenizer


OURS, THEIRS = "peft_ext", "hf, batches of"
TOLERANCE, FASTER = 1e-3, 4.0
# Behind the same eight demonstrations.
CLAIMED = ("choice", "labels", "cloze")
TASKS = ("choice", "cloze", "rolling", "generate", "labels", "labels_others")
KIND = {"rolling": "loglikelihood_rolling", "generate": "generate_until"}


class Study:
    """The two models and the requests of the tasks."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results = Results(args.output, args.seed)
        self.names = ["choice", "rolling"] if args.smoke else args.tasks
        self.made: dict[str, Any] = {}

    def settings(self, task: str) -> dict[str, Any]:
        """Everything that a row's result depends on."""
        args = self.args
        return {
            "task": task,
            "model": args.model,
            "inputs": args.inputs,
            "shots": args.shots,
            "batch_sizes": args.batch_sizes,
            "threads": torch.get_num_threads(),
        }

    def prepare(self) -> None:
        """Models and tasks."""
        from lm_eval.models.huggingface import HFLM

        from generation_ext.in_context.lm_eval import SharedPrefixLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        model, tokenizer = load(self.args.model, dtype=torch.float32), load_tokenizer(self.args.model)
        self.made["ours"] = SharedPrefixLM(pretrained=model, tokenizer=tokenizer)
        self.made["theirs"] = HFLM(pretrained=model, tokenizer=tokenizer)

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
        settings = self.settings(name)
        found = self.results.find(settings) or {"requests": 0, "seconds": {}, "difference": 0.0}
        requests = self.requests(name, folder)
        for number in range(rounds_of(found), self.args.rounds):
            values: dict[str, Any] = {}
            for label, lm, size in self.contenders():
                lm.batch_size_per_gpu = size
                start = time.process_time()
                values[label] = getattr(lm, KIND.get(name, "loglikelihood"))(requests, disable_tqdm=True)
                found["seconds"].setdefault(label, []).append(time.process_time() - start)
                log(f"{name}, round {number + 1}: {label}: {found['seconds'][label][-1]:.2f} s")
            theirs = values[f"{THEIRS} {self.args.batch_sizes[0]}"]
            found["requests"] = len(requests)
            found["difference"] = max(found["difference"], _difference(values[OURS], theirs))
            self.results.add(settings, found)

    def contenders(self) -> list[tuple[str, Any, int]]:
        """Names, models, batch sizes."""
        theirs = [(f"{THEIRS} {size}", self.made["theirs"], size) for size in self.args.batch_sizes]
        return [*theirs, (OURS, self.made["ours"], self.args.batch_sizes[0])]


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


def table(study: Study) -> str:
    """The Markdown table, and the verdicts."""
    lines, verdicts, record = [], [], None
    for name in study.names:
        found = study.results.find(study.settings(name))
        if found is None:
            lines.append([name, None, None, None, None, None])
            continue
        record = next(row for row in study.results.rows if row["settings"] == study.settings(name))["environment"]
        seconds = {label: statistics.median(times) for label, times in found["seconds"].items()}
        best = min(value for label, value in seconds.items() if label != OURS)
        ratio = best / seconds[OURS]
        numbers = [f"{best:.1f}", f"{seconds[OURS]:.1f}", f"{ratio:.1f}x", f"{found['difference']:.1e}"]
        numbers.append(str(rounds_of(found)))
        lines.append([name, found["requests"], *numbers])
        verdicts.append(verdict(f"{name}: difference", found["difference"], TOLERANCE))
        if name in CLAIMED:
            verdicts.append(verdict(f"{name}: over hf at its best", ratio, FASTER, "x", at_least=True))
    headers = ["Task", "Requests", "hf at its best, s", "peft_ext, s", "Faster", "Largest difference", "Rounds"]
    parts = [markdown_table(headers, lines), "\n".join(verdicts)]
    return "\n\n".join([*parts, describe(record)] if record else parts)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure what isn't stored yet, and print."""
    budget = {"inputs": 16, "shots": 8, "rounds": 3}
    parser = argument_parser(__doc__, "ecosystem_harness_speed.json", budget=budget)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default, hub id, folder or .gguf file")
    parser.add_argument("--data-dir", type=Path, default=data_folder(), help="holds sst2, sst5 and wikitext2")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], help="of --model hf")
    args = parser.parse_args(argv)
    if args.smoke:
        args.inputs, args.shots, args.rounds, args.batch_sizes = 2, 1, 1, [1]
    study = Study(args)
    if not args.table:
        if args.data_dir is None:
            parser.error("--data-dir: name the folder that holds sst2, sst5 and wikitext2")
        stored = {name: study.results.find(study.settings(name)) for name in study.names}
        missing = [name for name, found in stored.items() if found is None or rounds_of(found) < args.rounds]
        if missing:
            study.prepare()
        with tempfile.TemporaryDirectory() as folder:
            write_harness_tasks(Path(folder), args.data_dir, args.inputs, args.shots)
            for name in missing:
                study.measure(name, Path(folder))
    print(table(study))


if __name__ == "__main__":
    main()
