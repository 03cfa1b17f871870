# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""SG-ICL on SST-2, SST-5, RTE and CB: zero-shot, gold demonstrations (k = 1 to 8), the model's own, five seeds each.

A seed of gold demonstrations is one random set that all inputs share, as in the paper; a seed of SG-ICL is one draw from
pools that are generated once (with `pools_per_seed`: generated anew for each seed, at five times the cost). "Worth" is the
k at which the gold curve reaches SG-ICL, over 8. What goes beyond the paper is measured on examples that are
not those of the main table: the validation split, or for RTE and CB, whose test labels are not public and whose
validation split stands in the main table, the last examples of the training split (which no demonstration is drawn from).

Pools are kept in the run's work folder, input by input, so that a run that was killed goes on within them.
"""

from __future__ import annotations

import random
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from benchmarks import sgicl_recommended
from benchmarks.core.claims import Claim, Headline, markdown_table, minus, spread, unless
from benchmarks.core.run import Run, data_folder, log
from benchmarks.core.task import Runs, run_named
from benchmarks.core.task import Task as Benchmark
from benchmarks.in_context import (
    TITLES,
    Example,
    accuracy,
    demonstrations,
    read_examples,
    smoke_examples,
    smoke_model,
    smoke_task,
    task_named,
)
from generation_ext.in_context import LabelScorer, SelfGeneratedICL, Task
from peft_ext.models import DEFAULT_MODEL, load, load_tokenizer


ZERO_SHOT, GOLD, SG_ICL = "Zero-shot", "Gold demonstrations", "SG-ICL"
MAIN, DEVELOPMENT, RECOMMENDED = "main", "development", "recommended"
WORTH, SHOTS = 0.5, 8
PAGE = "../benchmarks/in_context.md#sg-icl"


class Row(NamedTuple):
    """One measurement; what of it is the method, and the options of the paper or beyond."""

    method: str
    shots: int = 0
    calibrate: bool = False
    self_consistent: bool = False
    conditioned: bool = True
    balanced: bool = False

    @property
    def title(self) -> str:
        """The first column."""
        notes = [
            *[f"k = {self.shots}"] * (self.method == GOLD),
            *["class-only prompts"] * (not self.conditioned),
            *["balanced draw"] * self.balanced,
            *["self-consistent"] * self.self_consistent,
            *["calibrated"] * self.calibrate,
        ]
        return ", ".join([self.method, *notes])

    def seeds(self, run: Run) -> list[int]:
        """Nothing is random without demonstrations."""
        return run.seeds[:1] if self.method == ZERO_SHOT else run.seeds


def main_rows(gold_shots: Sequence[int]) -> list[Row]:
    """The paper's table."""
    return [Row(ZERO_SHOT), Row(SG_ICL, SHOTS), *(Row(GOLD, shots) for shots in gold_shots)]


def development_rows() -> list[Row]:
    """The paper's ablation, and what goes beyond the paper; with calibration for the others too, to be fair."""
    own = {"method": SG_ICL, "shots": SHOTS}
    return [
        Row(ZERO_SHOT),
        Row(ZERO_SHOT, calibrate=True),
        Row(GOLD, SHOTS),
        Row(GOLD, SHOTS, calibrate=True),
        Row(**own),
        Row(**own, conditioned=False),
        Row(**own, balanced=True),
        Row(**own, calibrate=True),
        Row(**own, self_consistent=True),
        Row(**own, self_consistent=True, calibrate=True),
    ]


def rows_of(run: Run) -> list[Row]:
    """What is measured of an experiment."""
    return main_rows(run.gold_shots) if run.part == MAIN else development_rows()


def measure(run: Run) -> None:
    """Every row, set and seed that isn't stored; all sets of a row, so that averages are known early."""
    if run.part == RECOMMENDED:
        sgicl_recommended.measure(run, lambda: InContext(run))
        return
    icl = None
    for row in rows_of(run):
        for name in run.sets:
            for seed in row.seeds(run):
                key = key_of(row, name, seed)
                if run.find(key) is None:
                    icl = icl or InContext(run)
                    start = time.perf_counter()
                    result = icl.measure(row, name, seed)
                    result["seconds"] = time.perf_counter() - start
                    run.add(key, result)
                    log(f"{name}: {row.title}, seed {seed}: {result['accuracy']:.1f} %, {result['seconds']:.0f} s")


def key_of(row: Row, name: str, seed: int) -> dict[str, Any]:
    """What identifies a result."""
    return {"set": name, "seed": seed, **row._asdict()}


def found(run: Run, row: Row, name: str) -> Optional[list[float]]:
    """The stored accuracies of all seeds, in percent."""
    results = [run.find(key_of(row, name, seed)) for seed in row.seeds(run)]
    return None if any(result is None for result in results) else [result["accuracy"] for result in results]


class InContext:
    """Model and data."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.data = {name: self._data(name) for name in run.sets}
        self.model, self.tokenizer = smoke_model() if run.smoke else _load(run.model, getattr(torch, run.dtype))

    def inputs(self, row: Row) -> int:
        """How many inputs a row is measured on."""
        return self.run.gold_inputs if row.method == GOLD else self.run.inputs

    def measure(self, row: Row, name: str, seed: int) -> dict[str, Any]:
        """Accuracy of a row under one seed."""
        task, data = self.task(name), self.data[name]
        examples = data[self.run.part][: self.inputs(row)]
        fields = [example.fields for example in examples]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # counted below
            if row.method == SG_ICL:
                return self._measure_own(row, task, examples, seed)
            shown = random.Random(seed).sample(data["train"], row.shots)
            # the paper's code drops what is too long from the left
            scorer = LabelScorer(self.model, self.tokenizer, task, normalization="mean", overflow="drop_then_truncate")
            scores = scorer.score(fields, demonstrations(shown), row.calibrate)
        return {"accuracy": accuracy(scores.predictions(), examples), "dropped": int(scores.dropped.sum())}

    def _measure_own(self, row: Row, task: Task, examples: Sequence[Example], seed: int) -> dict[str, Any]:
        generated_with = seed if self.run.pools_per_seed else self.run.seeds[0]
        sg_icl = SelfGeneratedICL(
            self.model,
            self.tokenizer,
            task,
            shots=row.shots,
            conditioned=row.conditioned,
            balanced=row.balanced,
            self_consistent=row.self_consistent,
            calibrate=row.calibrate,
            overflow="drop_then_truncate",
            seed=generated_with,
            progressbar=not self.run.smoke,
        )
        kind = "input" if row.conditioned else "class"
        path = self.run.work / f"{task.name}-{kind}-{generated_with}-{len(examples)}.jsonl"
        pools = sg_icl.generate([example.fields for example in examples], path)
        usable = sg_icl.consistent(pools) if row.self_consistent else pools
        drawn = sg_icl.draw(usable, seed)
        scores = sg_icl.scorer.score_each([example.fields for example in examples], drawn, row.calibrate)
        counts = [len(each) for each in drawn]
        return {
            "accuracy": accuracy(scores.predictions(), examples),
            "dropped": int(scores.dropped.sum()),
            "drawn": statistics.mean(counts),
            "without": sum(count == 0 for count in counts),
        }

    def task(self, name: str) -> Task:
        """The task of a set."""
        return smoke_task(name) if self.run.smoke else task_named(name)

    def _data(self, name: str) -> dict[str, list[Example]]:
        """`train` for demonstrations, and the inputs of the two parts."""
        task, seed = self.task(name), self.run.seed
        if self.run.smoke:
            return {part: smoke_examples(task, 20, seed) for seed, part in enumerate(("train", MAIN, DEVELOPMENT))}
        train, validation = (read_examples(task, split, seed) for split in ("train", "validation"))
        if (data_folder(name) / "test.jsonl").is_file():
            return {"train": train, MAIN: read_examples(task, "test", seed), DEVELOPMENT: validation}
        held = min(self.run.development_inputs, len(train) // 2)
        return {"train": train[:-held], MAIN: validation, DEVELOPMENT: train[-held:]}


def worth(curve: Sequence[Optional[float]], reached: float) -> float:
    """How many gold demonstrations SG-ICL is worth, over the most of the curve.

    Args:
        curve: Accuracies with k = 0, 1, ... gold demonstrations; None where it isn't measured.
        reached: SG-ICL's.

    Returns:
        The first k, linearly between neighbours that are measured, at which the curve is not below; 1 if it stays below,
        0 if it starts above.
    """
    points = [(shots, value) for shots, value in enumerate(curve) if value is not None]
    for (before, low), (after, high) in zip(points, points[1:]):
        if low >= reached:
            return before / (len(curve) - 1)
        if high >= reached:
            return (before + (after - before) * (reached - low) / (high - low)) / (len(curve) - 1)
    return 1.0


def table(run: Run) -> str:
    """Mean and standard deviation over seeds for each set, and the average of the sets."""
    lines = []
    for row in sorted(rows_of(run), key=lambda row: (row.method != ZERO_SHOT, row.method != GOLD, row.shots)):
        values = [found(run, row, name) for name in run.sets]
        measured = [each for each in values if each is not None]
        if measured:
            whole = len(measured) == len(run.sets)
            mean = f"{statistics.mean(map(statistics.mean, measured)):.1f}" if whole else None
            deviation = f"{statistics.mean(map(statistics.pstdev, measured)):.1f}" if whole else None
            lines.append([row.title, *(None if each is None else spread(each) for each in values), mean, deviation])
    return markdown_table(["Accuracy, %", *(TITLES[name] for name in run.sets), "average", "average deviation"], lines)


def average(run: Optional[Run], row: Row, of: Any = statistics.mean) -> Optional[float]:
    """Over sets, of the means (or deviations) over seeds; None if a set is missing."""
    values = [] if run is None else [found(run, row, name) for name in run.sets]
    return None if not values or any(each is None for each in values) else statistics.mean(map(of, values))


def claims(runs: Runs) -> list[Claim]:
    """The paper's claims, on the averages of the sets."""
    run, own = run_named(runs, MAIN), Row(SG_ICL, SHOTS)
    reached, zero, gold = (average(run, row) for row in (own, Row(ZERO_SHOT), Row(GOLD, SHOTS)))
    steady, shaky = (average(run, row, statistics.pstdev) for row in (own, Row(GOLD, SHOTS)))
    # some k may be left out in between
    curve = [zero, *(average(run, Row(GOLD, shots)) for shots in range(1, SHOTS + 1))]
    known = None not in (reached, zero, gold)
    return [
        Claim("average of SG-ICL over zero-shot", minus(reached, zero), 0.0, " points", at_least=True),
        Claim("deviation of SG-ICL over that of 8 gold demonstrations", minus(steady, shaky), 0.0, " points"),
        Claim("worth, on the averages", worth(curve, reached) if known else None, WORTH, at_least=True),
        *sgicl_recommended.claims(run_named(runs, RECOMMENDED)),
    ]


def tables(runs: Runs) -> dict[str, str]:
    """Accuracies, what SG-ICL is worth set by set, and what options beyond the paper change."""
    tables = {RECOMMENDED: sgicl_recommended.table}
    shown = {run.part: tables.get(run.part, table)(run) for run in runs}
    run, development, own = run_named(runs, MAIN), run_named(runs, DEVELOPMENT), Row(SG_ICL, SHOTS)
    if run is not None:
        lines = []
        for name in run.sets:
            curve = [found(run, row, name) for row in (Row(ZERO_SHOT), *(Row(GOLD, k) for k in range(1, SHOTS + 1)))]
            reached = found(run, own, name)
            if None not in (reached, curve[0], curve[-1]):
                means = [None if each is None else statistics.mean(each) for each in curve]
                lines.append([TITLES[name], f"{worth(means, statistics.mean(reached)):.2f}"])
        shown["worth"] = markdown_table(["Set", f"gold demonstrations that SG-ICL is worth, over {SHOTS}"], lines)
    base, lines = average(development, own), []
    for row in development_rows():
        gain = minus(average(development, row), base)
        if row.method == SG_ICL and row != own and gain is not None:
            lines.append([row.title, f"{gain:+.1f}"])
    if lines:
        shown["options"] = markdown_table(["Option", "points"], lines)
    return shown


def _load(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    if name != DEFAULT_MODEL and not name.endswith(".gguf"):
        if AutoConfig.from_pretrained(name).is_encoder_decoder:
            return AutoModelForSeq2SeqLM.from_pretrained(name, dtype=dtype).eval(), AutoTokenizer.from_pretrained(name)
        if torch.cuda.is_available():
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to("cuda")
            return model.eval(), load_tokenizer(name)
    return load(name, dtype=dtype), load_tokenizer(name)


def headlines(runs: Runs) -> list[Headline]:
    """The averages of the sets: of the paper's form, and of the recommended one."""
    return [*_paper_headlines(runs), *sgicl_recommended.headlines(run_named(runs, RECOMMENDED), PAGE)]


def _paper_headlines(runs: Runs) -> list[Headline]:
    run, rows = run_named(runs, MAIN), (Row(SG_ICL, SHOTS), Row(ZERO_SHOT), Row(GOLD, SHOTS))
    means, deviations = ([average(run, row, of) for row in rows] for of in (statistics.mean, statistics.pstdev))
    if run is None or None in means:
        return []
    own, zero, gold = means
    shown = f"{own:.1f} ± {deviations[0]:.1f}; zero-shot {zero:.1f}, eight gold demonstrations {gold:.1f} ± {deviations[2]:.1f}"
    wanted = (
        f"{unless(own >= zero, 'above zero-shot')}, {unless(deviations[0] <= deviations[2], 'steadier than gold')}"
    )
    return [Headline("Reading", "SG-ICL, average accuracy on four sets", shown, wanted, PAGE)]


TASK = Benchmark(measure, tables, claims, headlines)
