# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Label scoring behind 8 demonstrations of about 40 tokens: inputs per second of the shared-prefix scorer, of a naive loop
over whole strings, and of lm-evaluation-harness's `HFLM.loglikelihood`; and the memory that the scorer takes.

All contenders score the same requests with the same model in the same process, in turn: a round is one measurement of
each, and figures are medians of rounds. lm-evaluation-harness gets the best of several batch sizes.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import numpy as np
import torch

from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.run import Run, data_folder, log
from benchmarks.core.task import Runs, claims_of_each, tables_of_each
from benchmarks.core.task import Task as Benchmark
from benchmarks.in_context import (
    TITLES,
    Example,
    demonstrations,
    read_examples,
    smoke_examples,
    smoke_model,
    smoke_task,
    task_named,
)
from benchmarks.resident import peak_resident_bytes, reset_peak, resident_bytes
from generation_ext.in_context import LabelScorer, Task
from peft_ext.models import load, load_tokenizer


OURS, NAIVE = "shared prefix", "naive loop"
HARNESS = "lm-evaluation-harness, batches of"
OVER_NAIVE, OVER_HARNESS = 6.0, 4.0
TOLERANCE = 1e-4
MB = 1e6


class Requests(NamedTuple):
    """What is scored."""

    task: Task
    shown: list[tuple[Any, str]]
    examples: list[Any]

    def strings(self) -> list[tuple[str, str]]:
        """Context and label of every input, label by label."""
        contexts = [self.task.context(example, self.shown) for example in self.examples]
        return [(context, word) for context in contexts for word in self.task.words]


def measure(run: Run) -> None:
    """A row for each data set, and one for each memory limit on the first."""
    scoring = None
    for name in run.sets:
        if run.find({"set": name}) is None:
            scoring = scoring or Scoring(run)
            run.add({"set": name}, scoring.speed(name))
    for limit in run.memory_limits if sys.platform == "linux" else ():
        key = {"set": run.sets[0], "memory_limit": limit}
        if run.find(key) is None:
            scoring = scoring or Scoring(run)
            run.add(key, scoring.memory(run.sets[0], limit))


class Scoring:
    """The model and its contenders."""

    def __init__(self, run: Run) -> None:
        self.run = run
        for name in () if run.smoke else run.sets:
            data_folder(name)  # whether it is there, before anything takes long
        if run.smoke:
            self.model, self.tokenizer = smoke_model()
        else:
            self.model, self.tokenizer = load(run.model, dtype=torch.float32), load_tokenizer(run.model)

    def requests(self, name: str) -> Requests:
        """Inputs of the test split behind demonstrations of the wanted length."""
        run = self.run
        if run.smoke:
            task = smoke_task(name)
            shown, examples = smoke_examples(task, run.shots), smoke_examples(task, run.inputs, seed=1)
        else:
            task = task_named(name)
            training = read_examples(task, "train", run.seed)[:2000]
            shown = sorted(training, key=lambda each: abs(self._tokens(task, each) - run.shot_tokens))[: run.shots]
            examples = read_examples(task, "test", run.seed)[: run.inputs]
        return Requests(task, demonstrations(shown), [example.fields for example in examples])

    def _tokens(self, task: Task, example: Example) -> int:
        return len(self.tokenizer(task.demonstration(*example))["input_ids"])

    def speed(self, name: str) -> dict[str, Any]:
        """Inputs per second of every contender, and how far their numbers are from the naive loop's."""
        requests = self.requests(name)
        contenders: dict[str, Callable[[], np.ndarray]] = {NAIVE: lambda: self.naive(requests)}
        harness, missing = self.harness()
        for size in self.run.batch_sizes if harness is not None else ():
            contenders[f"{HARNESS} {size}"] = lambda size=size: self.run_harness(harness, requests, size)
        scorer = LabelScorer(self.model, self.tokenizer, requests.task)
        contenders[OURS] = lambda: scorer.score(requests.examples, requests.shown).log_probs
        seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
        values = {}
        for number in range(self.run.rounds):
            for contender, score in contenders.items():
                start = time.perf_counter()
                values[contender] = score()
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
        try:
            from lm_eval.models.huggingface import HFLM
        except ImportError as error:
            return None, f"not possible here: {error} (pip install lm-eval)"
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

    def memory(self, name: str, limit: int) -> dict[str, Any]:
        """Peak of the scorer's memory above the process's before it, and its speed."""
        requests = self.requests(name)
        scorer = LabelScorer(self.model, self.tokenizer, requests.task, memory_limit=limit)
        scorer.score(requests.examples[:1], requests.shown)  # what is allocated once
        reset_peak()
        before, start = resident_bytes(), time.perf_counter()
        scorer.score(requests.examples, requests.shown)
        seconds = time.perf_counter() - start
        return {"peak": peak_resident_bytes() - before, "inputs_per_second": len(requests.examples) / seconds}


def tables(run: Run) -> dict[str, str]:
    """Inputs per second of all contenders, and the scorer's memory."""
    lines, limits = [], []
    for name in run.sets:
        found = run.find({"set": name})
        if found is None:
            continue
        if found["harness"]:
            lines.append([f"{TITLES[name]}: {HARNESS.split(',')[0]}", found["harness"], None, None])
        rates = found["inputs_per_second"]
        for contender, rate in rates.items():
            cells = [f"{rate:.3g}", f"{rate / rates[NAIVE]:.1f}x", f"{found['differences'][contender]:.1e}"]
            lines.append([f"{TITLES[name]}: {contender}", *cells])
    for limit in run.memory_limits:
        found = run.find({"set": run.sets[0], "memory_limit": limit})
        if found is not None:
            limits.append([f"{limit / MB:.0f} MB", f"{found['peak'] / MB:.0f}", f"{found['inputs_per_second']:.3g}"])
    headers = [
        "",
        "inputs per second",
        "over the naive loop",
        "largest difference of a log-probability",
    ]
    shown = {"speed": markdown_table(headers, lines)}
    if limits:
        shown["memory"] = markdown_table(
            [f"Memory limit ({TITLES[run.sets[0]]})", "peak, MB", "inputs per second"], limits
        )
    return shown


def claims(run: Run) -> list[Claim]:
    """Speed and exactness on each set, and memory limits that are kept."""
    lines = []
    for name in run.sets:
        found = run.find({"set": name}) or {"inputs_per_second": {}, "differences": {}}
        rates = found["inputs_per_second"]
        ours, best = rates.get(OURS), max((rates[key] for key in rates if key.startswith(HARNESS)), default=None)
        lines += [
            Claim(f"{name}: over the naive loop", ours and ours / rates[NAIVE], OVER_NAIVE, "x", at_least=True),
            Claim(
                f"{name}: over lm-evaluation-harness at its best",
                ours / best if ours and best else None,
                OVER_HARNESS,
                "x",
                at_least=True,
            ),
            Claim(f"{name}: difference from the naive loop", found["differences"].get(OURS), TOLERANCE),
        ]
    for limit in run.memory_limits:
        found = run.find({"set": run.sets[0], "memory_limit": limit})
        lines.append(Claim(f"peak at a limit of {limit / MB:.0f} MB", found and found["peak"] / MB, limit / MB, " MB"))
    return lines


def headlines(runs: Runs) -> list[Headline]:
    """The first set's."""
    found = [result for run in runs if (result := run.find({"set": run.sets[0]})) is not None]
    if not found:
        return []
    rates = found[0]["inputs_per_second"]
    best = max((rate for name, rate in rates.items() if name.startswith(HARNESS)), default=None)
    harness = "" if best is None else f"lm-evaluation-harness {best:.3g}, "
    shown = f"{rates[OURS]:.3g} inputs/s; {harness}a naive loop {rates[NAIVE]:.2g}"
    met = rates[OURS] >= OVER_NAIVE * rates[NAIVE] and (best is None or rates[OURS] >= OVER_HARNESS * best)
    page = "../benchmarks/in_context.md"
    wanted = unless(met, f"{OVER_HARNESS:g} and {OVER_NAIVE:g} times these")
    return [Headline("Reading", "Label scoring behind eight demonstrations", shown, wanted, page)]


TASK = Benchmark(measure, tables_of_each(tables), claims_of_each(claims), headlines)
