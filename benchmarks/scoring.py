# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Label scoring behind 8 demonstrations of about 40 tokens: inputs per second of the shared-prefix scorer, of a naive loop
over whole strings, and of lm-evaluation-harness's `HFLM.loglikelihood`; and the memory that the scorer takes.

All contenders score the same requests with the same model in the same process, in turn: a round is one measurement of
each, and figures are medians of rounds. lm-evaluation-harness gets the best of several batch sizes.

    python -m benchmarks.scoring --lm-eval path/to/site-packages-with-lm_eval

Rows are stored as they finish and not measured again: after a kill, start it again with the same flags.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch

from benchmarks.common import Results, argument_parser, data_folder, describe, log, markdown_table, verdict
from benchmarks.in_context import (
    Example,
    demonstrations,
    missing_file,
    read_examples,
    smoke_examples,
    smoke_model,
    smoke_task,
    task_named,
)
from benchmarks.resident import peak_resident_bytes, reset_peak, resident_bytes
from generation_ext.in_context import LabelScorer, Task
from peft_ext.models import DEFAULT_MODEL, load, load_tokenizer


OURS, NAIVE = "shared prefix", "naive loop"
HARNESS = "lm-evaluation-harness, batches of"
OVER_NAIVE, OVER_HARNESS = 6.0, 4.0
TOLERANCE = 1e-4
MB = 1e6


class Budget(NamedTuple):
    """How much is measured."""

    inputs: int = 32
    shots: int = 8
    shot_tokens: int = 40
    rounds: int = 3


SMOKE = Budget(4, 2, 20, 1)


class Requests(NamedTuple):
    """What is scored."""

    task: Task
    shown: list[tuple[Any, str]]
    examples: list[Any]

    def strings(self) -> list[tuple[str, str]]:
        """Context and label of every input, label by label."""
        contexts = [self.task.context(example, self.shown) for example in self.examples]
        return [(context, word) for context in contexts for word in self.task.words]


class Study:
    """Model, data and stored results; measures rows."""

    def __init__(self, args: argparse.Namespace, budget: Budget) -> None:
        self.args, self.budget = args, budget
        self.results = Results(args.output, args.seed)
        if args.smoke:
            self.model, self.tokenizer = smoke_model()
        else:
            self.model, self.tokenizer = load(args.model, dtype=torch.float32), load_tokenizer(args.model)

    def settings(self, **more: Any) -> dict[str, Any]:
        """Everything that a row's result depends on."""
        model = "tiny random Llama" if self.args.smoke else self.args.model
        return {"model": model, "threads": torch.get_num_threads(), **self.budget._asdict(), **more}

    def requests(self, name: str) -> Requests:
        """Inputs of the test split behind demonstrations of the wanted length."""
        budget = self.budget
        if self.args.smoke:
            task = smoke_task(name)
            shown, examples = smoke_examples(task, budget.shots), smoke_examples(task, budget.inputs, seed=1)
        else:
            task = task_named(name)
            training = read_examples(self.args.data_dir, task, "train", self.args.seed)[:2000]
            shown = sorted(training, key=lambda each: abs(self._tokens(task, each) - budget.shot_tokens))[
                : budget.shots
            ]
            examples = read_examples(self.args.data_dir, task, "test", self.args.seed)[: budget.inputs]
        return Requests(task, demonstrations(shown), [example.fields for example in examples])

    def _tokens(self, task: Task, example: Example) -> int:
        return len(self.tokenizer(task.demonstration(*example))["input_ids"])

    def measure(self, name: str) -> dict[str, Any]:
        """Inputs per second of every contender, and how far their numbers are from the naive loop's."""
        requests = self.requests(name)
        contenders: dict[str, Callable[[], np.ndarray]] = {NAIVE: lambda: self.naive(requests)}
        harness, missing = self.harness()
        for size in self.args.batch_sizes if harness is not None else ():
            contenders[f"{HARNESS} {size}"] = lambda size=size: self.run_harness(harness, requests, size)
        scorer = LabelScorer(self.model, self.tokenizer, requests.task)
        contenders[OURS] = lambda: scorer.score(requests.examples, requests.shown).log_probs
        seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
        values = {}
        for number in range(self.budget.rounds):
            for contender, run in contenders.items():
                start = time.perf_counter()
                values[contender] = run()
                seconds[contender].append(time.perf_counter() - start)
                log(f"{name}, round {number + 1}: {contender}: {seconds[contender][-1]:.2f} s")
        return {
            "demonstration_tokens": len(self.tokenizer(requests.task.context("", requests.shown))["input_ids"]),
            "inputs_per_second": {
                contender: len(requests.examples) / statistics.median(times) for contender, times in seconds.items()
            },
            "seconds": seconds,
            "differences": {
                contender: float(np.abs(found - values[NAIVE]).max()) for contender, found in values.items()
            },
            "harness": missing,
        }

    @torch.no_grad()
    def naive(self, requests: Requests) -> np.ndarray:
        """Every string by itself."""
        totals = []
        for context, word in requests.strings():
            before = len(self.tokenizer(context)["input_ids"])
            ids = self.tokenizer(context + word, return_tensors="pt")["input_ids"]
            logits = self.model(input_ids=ids, use_cache=False).logits[0, before - 1 : -1]
            totals.append(logits.log_softmax(-1).gather(1, ids[0, before:, None]).sum().item())
        return np.array(totals).reshape(len(requests.examples), -1)

    def harness(self) -> tuple[Any, Optional[str]]:
        """lm-evaluation-harness's wrapper of the model; or None, and why."""
        if self.args.lm_eval is not None and str(self.args.lm_eval) not in sys.path:
            sys.path.append(str(self.args.lm_eval))
        try:
            from lm_eval.models.huggingface import HFLM
        except ImportError as error:
            return None, f"not possible here: {error} (pip install lm-eval, or --lm-eval FOLDER)"
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        return HFLM(pretrained=self.model, tokenizer=self.tokenizer, device="cpu"), None

    def run_harness(self, harness: Any, requests: Requests, size: int) -> np.ndarray:
        """All requests through `HFLM.loglikelihood`."""
        from lm_eval.api.instance import Instance

        instances = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index)
            for index, pair in enumerate(requests.strings())
        ]
        harness.batch_size_per_gpu = size
        found = harness.loglikelihood(instances, disable_tqdm=True)
        return np.array([total for total, _ in found]).reshape(len(requests.examples), -1)

    def measure_memory(self, name: str, limit: int) -> dict[str, Any]:
        """Peak of the scorer's memory above the process's before it, and its speed."""
        requests = self.requests(name)
        scorer = LabelScorer(self.model, self.tokenizer, requests.task, memory_limit=limit)
        scorer.score(requests.examples[:1], requests.shown)  # what is allocated once
        reset_peak()
        before, start = resident_bytes(), time.perf_counter()
        scorer.score(requests.examples, requests.shown)
        seconds = time.perf_counter() - start
        return {"peak": peak_resident_bytes() - before, "inputs_per_second": len(requests.examples) / seconds}


def table(study: Study, names: Sequence[str]) -> str:
    """The Markdown table of all tasks."""
    lines = []
    for name in names:
        found = study.results.find(study.settings(task=name))
        if found is None:
            lines.append([name, "not measured", None, None, None])
            continue
        if found["harness"]:
            lines.append([name, HARNESS.split(",")[0], found["harness"], None, None])
        rates = found["inputs_per_second"]
        for contender, rate in rates.items():
            cells = [f"{rate:.3g}", f"{rate / rates[NAIVE]:.1f}x", f"{found['differences'][contender]:.1e}"]
            lines.append([name, contender, *cells])
    headers = [
        "Task",
        "Contender",
        "Inputs per second",
        "Over the naive loop",
        "Largest difference of a log-probability",
    ]
    return markdown_table(headers, lines)


def memory_table(study: Study, name: str) -> str:
    """The Markdown table of memory."""
    lines = []
    for limit in study.args.memory_limits:
        found = study.results.find(study.settings(task=name, memory_limit=limit))
        cells = [None, None] if found is None else [f"{found['peak'] / MB:.0f}", f"{found['inputs_per_second']:.3g}"]
        lines.append([f"{limit / MB:.0f} MB", *cells])
    return markdown_table([f"Memory limit ({name})", "Peak, MB", "Inputs per second"], lines)


def verdicts(study: Study, names: Sequence[str]) -> list[str]:
    """The lines that say which claims the table bears out."""
    lines = []
    for name in names:
        found = study.results.find(study.settings(task=name)) or {"inputs_per_second": {}, "differences": {}}
        rates = found["inputs_per_second"]
        ours, best = rates.get(OURS), max((rates[key] for key in rates if key.startswith(HARNESS)), default=None)
        over_naive = ours and ours / rates[NAIVE]
        over_best = ours / best if ours and best else None
        lines += [
            verdict(f"{name}: over the naive loop", over_naive, OVER_NAIVE, "x", at_least=True),
            verdict(f"{name}: over lm-evaluation-harness at its best", over_best, OVER_HARNESS, "x", at_least=True),
            verdict(f"{name}: difference from the naive loop", found["differences"].get(OURS), TOLERANCE),
        ]
    for limit in study.args.memory_limits:
        found = study.results.find(study.settings(task=names[0], memory_limit=limit))
        lines.append(
            verdict(f"peak at a limit of {limit / MB:.0f} MB", found and found["peak"] / MB, limit / MB, " MB")
        )
    return lines


def parse(argv: Optional[Sequence[str]]) -> tuple[argparse.Namespace, Budget]:
    """The command line; single numbers override the budget's."""
    parser = argument_parser(__doc__, "scoring.json", budget=Budget()._asdict())
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default, hub id, folder or .gguf file")
    parser.add_argument("--data-dir", type=Path, default=data_folder(), help="holds the tasks' folders")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "sst5", "ag_news"])
    parser.add_argument("--lm-eval", type=Path, help="a folder of packages that has lm_eval")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 16], help="of lm-evaluation-harness")
    parser.add_argument("--memory-limits", nargs="*", type=int, default=[int(100 * MB), int(300 * MB), int(1000 * MB)])
    args = parser.parse_args(argv)
    problem = None if args.smoke else missing_file(args.data_dir, args.tasks, ["test"])
    if problem:
        parser.error(problem)
    return args, SMOKE if args.smoke else Budget(*(getattr(args, name) for name in Budget._fields))


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure, then print the tables and the verdicts."""
    args, budget = parse(argv)
    study = Study(args, budget)
    if not args.table:
        for name in args.tasks:
            if study.results.find(study.settings(task=name)) is None:
                study.results.add(study.settings(task=name), study.measure(name))
        for limit in args.memory_limits if sys.platform == "linux" else ():
            key = study.settings(task=args.tasks[0], memory_limit=limit)
            if study.results.find(key) is None:
                study.results.add(key, study.measure_memory(args.tasks[0], limit))
    print(f"\n{table(study, args.tasks)}\n\n{memory_table(study, args.tasks[0])}\n")
    print("\n".join(verdicts(study, args.tasks)))
    print(f"\n{budget}")
    if study.results.rows:
        print(describe(study.results.rows[-1]["environment"]))


if __name__ == "__main__":
    main()
