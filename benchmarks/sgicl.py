# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""SG-ICL on SST-2, SST-5, RTE and CB: zero-shot, gold demonstrations (k = 1 to 8), the model's own, five seeds each.

A seed of gold demonstrations is one random set that all inputs share, as in the paper; a seed of SG-ICL is one draw from
pools that are generated once (with --pools-per-seed: generated anew for each seed, at five times the cost). "Worth" is the
k at which the gold curve reaches SG-ICL, over 8. What goes beyond the paper is measured on examples that are
not those of the main table: the validation split, or for RTE and CB, whose test labels are not public and whose
validation split stands in the main table, the last examples of the training split (which no demonstration is drawn from).

    python -m benchmarks.sgicl --data-dir shared/data

Rows are stored as they finish and not measured again, and pools input by input: after a kill, start it again with the
same flags.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from benchmarks.common import Results, argument_parser, data_folder, describe, log, markdown_table, verdict
from benchmarks.in_context import (
    Example,
    accuracy,
    demonstrations,
    missing_file,
    read_examples,
    smoke_examples,
    smoke_model,
    smoke_task,
    task_named,
)
from generation_ext.in_context import LabelScorer, SelfGeneratedICL, Task
from peft_ext.models import DEFAULT_MODEL, load, load_tokenizer


SEEDS = (13, 21, 42, 87, 100)  # the paper's
ZERO_SHOT, GOLD, SG_ICL = "Zero-shot", "Gold demonstrations", "SG-ICL"
MAIN, DEVELOPMENT = "main", "development"
WORTH, SHOTS = 0.5, 8


class Budget(NamedTuple):
    """How much of the data is used; what decides how long the tables take."""

    inputs: int = 150
    development_inputs: int = 50
    gold_inputs: int = 150


SMOKE = Budget(4, 4, 4)


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

    @property
    def seeds(self) -> tuple[int, ...]:
        """Nothing is random without demonstrations."""
        return SEEDS[:1] if self.method == ZERO_SHOT else SEEDS


def main_rows() -> list[Row]:
    """The paper's table."""
    return [Row(ZERO_SHOT), Row(SG_ICL, SHOTS), *(Row(GOLD, shots) for shots in range(SHOTS, 0, -1))]


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


class Study:
    """Model, data and stored results; measures rows."""

    def __init__(self, args: argparse.Namespace, budget: Budget) -> None:
        self.args, self.budget = args, budget
        self.results = Results(args.output, args.seed)
        self.pools = args.output.with_suffix(".work")  # not kept in git
        self.model, self.tokenizer = smoke_model() if args.smoke else _load(args.model, getattr(torch, args.dtype))
        self.data = {name: self._data(name) for name in args.tasks}

    def settings(self, row: Row, name: str, part: str, seed: int) -> dict[str, Any]:
        """Everything that a measurement depends on."""
        model = "tiny random Llama" if self.args.smoke else self.args.model
        inputs = self.inputs(row, part)
        key = {"model": model, "dtype": self.args.dtype, "task": name, "part": part, "inputs": inputs, "seed": seed}
        if row.method == SG_ICL:
            key["pools_per_seed"] = self.args.pools_per_seed
        return {**key, **row._asdict()}

    def inputs(self, row: Row, part: str) -> int:
        """How many inputs a row is measured on."""
        if part == DEVELOPMENT:
            return self.budget.development_inputs
        return self.budget.gold_inputs if row.method == GOLD else self.budget.inputs

    def found(self, row: Row, name: str, part: str) -> Optional[list[float]]:
        """The stored accuracies of all seeds, in percent."""
        results = [self.results.find(self.settings(row, name, part, seed)) for seed in row.seeds]
        return None if any(result is None for result in results) else [result["accuracy"] for result in results]

    def fill(self, row: Row, name: str, part: str) -> None:
        """Measure the seeds that are missing."""
        for seed in row.seeds:
            key = self.settings(row, name, part, seed)
            if self.results.find(key) is None:
                start = time.perf_counter()
                result = self.measure(row, name, part, seed)
                result["seconds"] = time.perf_counter() - start
                self.results.add(key, result)
                log(f"{name}, {part}: {row.title}, seed {seed}: {result['accuracy']:.1f} %, {result['seconds']:.0f} s")

    def measure(self, row: Row, name: str, part: str, seed: int) -> dict[str, Any]:
        """Accuracy of a row under one seed."""
        task, data = self._task(name), self.data[name]
        examples = data[part][: self.inputs(row, part)]
        fields = [example.fields for example in examples]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # counted below
            if row.method == SG_ICL:
                return self._measure_own(row, task, examples, part, seed)
            shown = random.Random(seed).sample(data["train"], row.shots)
            # the paper's code drops what is too long from the left
            scorer = LabelScorer(self.model, self.tokenizer, task, normalization="mean", overflow="drop_then_truncate")
            scores = scorer.score(fields, demonstrations(shown), row.calibrate)
        return {"accuracy": accuracy(scores.predictions(), examples), "dropped": int(scores.dropped.sum())}

    def _measure_own(self, row: Row, task: Task, examples: Sequence[Example], part: str, seed: int) -> dict[str, Any]:
        generated_with = seed if self.args.pools_per_seed else SEEDS[0]
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
            progressbar=not self.args.smoke,
        )
        self.pools.mkdir(parents=True, exist_ok=True)
        kind = "input" if row.conditioned else "class"
        path = self.pools / f"{task.name}-{part}-{kind}-{generated_with}-{len(examples)}.jsonl"
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

    def _task(self, name: str) -> Task:
        return smoke_task(name) if self.args.smoke else task_named(name)

    def _data(self, name: str) -> dict[str, list[Example]]:
        """`train` for demonstrations, and the inputs of the two parts."""
        budget, task = self.budget, self._task(name)
        if self.args.smoke:
            return {part: smoke_examples(task, 20, seed) for seed, part in enumerate(("train", MAIN, DEVELOPMENT))}
        folder, seed = self.args.data_dir, self.args.seed
        train = read_examples(folder, task, "train", seed)
        validation = read_examples(folder, task, "validation", seed)
        if (folder / name / "test.jsonl").is_file():
            return {"train": train, MAIN: read_examples(folder, task, "test", seed), DEVELOPMENT: validation}
        held = min(budget.development_inputs, len(train) // 2)
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


def table(study: Study, rows: Sequence[Row], part: str) -> str:
    """A Markdown table: mean and standard deviation over seeds for each task, and the average of the tasks."""
    names = study.args.tasks
    lines = []
    for row in sorted(rows, key=lambda row: (row.method != ZERO_SHOT, row.method != GOLD, row.shots)):
        found = [study.found(row, name, part) for name in names]
        cells: list[Optional[str]] = ["not measured" if each is None else _spread(each) for each in found]
        measured = [each for each in found if each is not None]
        whole = len(measured) == len(names)
        mean = f"{statistics.mean(map(statistics.mean, measured)):.1f}" if whole else None
        deviation = f"{statistics.mean(map(statistics.pstdev, measured)):.1f}" if whole else None
        lines.append([row.title, *cells, mean, deviation])
    return markdown_table(["Accuracy, %", *names, "Average", "Average deviation"], lines)


def verdicts(study: Study) -> list[str]:
    """The lines that say which claims the tables bear out."""
    names = study.args.tasks

    def average(row: Row, of: Any = statistics.mean, part: str = MAIN) -> Optional[float]:
        found = [study.found(row, name, part) for name in names]
        return None if any(each is None for each in found) else statistics.mean(of(each) for each in found if each)

    own, zero = average(Row(SG_ICL, SHOTS)), average(Row(ZERO_SHOT))
    deviations = average(Row(SG_ICL, SHOTS), statistics.pstdev), average(Row(GOLD, SHOTS), statistics.pstdev)
    curve = [zero, *(average(Row(GOLD, shots)) for shots in range(1, SHOTS + 1))]
    # some k may be left out in between
    known = own is not None and curve[0] is not None and curve[-1] is not None
    gold_deviation = deviations[1]
    lines = [
        verdict("average of SG-ICL over zero-shot", _minus(own, zero), 0.0, " points", at_least=True),
        verdict(
            "average deviation of SG-ICL; at most that of 8 gold demonstrations",
            deviations[0] if gold_deviation is not None else None,
            0.0 if gold_deviation is None else gold_deviation,
            " points",
        ),
        verdict(
            "worth, on the averages", worth(curve, own) if known and own is not None else None, WORTH, at_least=True
        ),
    ]
    base = average(Row(SG_ICL, SHOTS), part=DEVELOPMENT)
    for row in development_rows():
        if row.method == SG_ICL and row != Row(SG_ICL, SHOTS):
            gain = _minus(average(row, part=DEVELOPMENT), base)
            lines.append(f"- development: {row.title}: {'not measured' if gain is None else f'{gain:+.1f} points'}")
    return lines


def worths(study: Study) -> str:
    """What SG-ICL is worth task by task."""
    parts = []
    for name in study.args.tasks:
        own, zero = study.found(Row(SG_ICL, SHOTS), name, MAIN), study.found(Row(ZERO_SHOT), name, MAIN)
        gold = [study.found(Row(GOLD, shots), name, MAIN) for shots in range(1, SHOTS + 1)]
        if own is None or zero is None or gold[-1] is None:
            parts.append(f"{name} not measured")
        else:
            curve = [None if each is None else statistics.mean(each) for each in (zero, *gold)]
            parts.append(f"{name} {worth(curve, statistics.mean(own)):.2f}")
    return "Worth by task: " + ", ".join(parts)


def _minus(one: Optional[float], two: Optional[float]) -> Optional[float]:
    return None if one is None or two is None else one - two


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}"


def _load(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    if name != DEFAULT_MODEL and not name.endswith(".gguf"):
        if AutoConfig.from_pretrained(name).is_encoder_decoder:
            return AutoModelForSeq2SeqLM.from_pretrained(name, dtype=dtype).eval(), AutoTokenizer.from_pretrained(name)
        if torch.cuda.is_available():
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to("cuda")
            return model.eval(), load_tokenizer(name)
    return load(name, dtype=dtype), load_tokenizer(name)


def parse(argv: Optional[Sequence[str]]) -> tuple[argparse.Namespace, Budget]:
    """The command line; single numbers override the budget's."""
    parser = argument_parser(__doc__, "sgicl.json", budget=Budget()._asdict())
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default, hub id, folder or .gguf file")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the model's weights")
    parser.add_argument("--data-dir", type=Path, default=data_folder(), help="holds the tasks' folders")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "sst5", "rte", "cb"])
    parser.add_argument("--pools-per-seed", action="store_true", help="generate anew for each seed")
    parser.add_argument("--rows", nargs="*", default=[], help="only rows whose title contains one of these")
    parser.add_argument("--parts", nargs="+", choices=(MAIN, DEVELOPMENT), default=[MAIN, DEVELOPMENT])
    args = parser.parse_args(argv)
    problem = None if args.smoke else missing_file(args.data_dir, args.tasks, ["validation"])
    if problem:
        parser.error(problem)
    return args, SMOKE if args.smoke else Budget(*(getattr(args, name) for name in Budget._fields))


def parts(args: argparse.Namespace) -> Mapping[str, list[Row]]:
    """Which rows are measured on which part."""
    rows = {MAIN: main_rows(), DEVELOPMENT: development_rows()}
    wanted = {part: rows[part] for part in args.parts}
    return {
        part: [row for row in each if not args.rows or any(piece in row.title for piece in args.rows)]
        for part, each in wanted.items()
    }


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure, then print the tables and the verdicts."""
    args, budget = parse(argv)
    study = Study(args, budget)
    for part, rows in parts(args).items() if not args.table else ():
        for row in rows:  # all tasks of a row, so that averages are known early
            for name in args.tasks:
                study.fill(row, name, part)
    for part, rows in parts(args).items():
        print(f"\n{part}\n\n{table(study, rows, part)}")
    print(f"\n{worths(study)}\n")
    print("\n".join(verdicts(study)))
    print(f"\n{budget}, seeds {SEEDS}")
    if study.results.rows:
        print(describe(study.results.rows[-1]["environment"]))


if __name__ == "__main__":
    main()
