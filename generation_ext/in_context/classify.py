# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext classify`: a file of inputs, by a frozen language model: zero-shot, behind given demonstrations, or behind the
model's own (SG-ICL).

    peft-ext classify --task sst2 --data test.jsonl --output predictions.jsonl

Data are JSON lines or CSV with the task's fields as columns. A task is the name of a built-in one (sst2, sst5, rte, cb)
or a JSON file with the arguments of `Task`. With `--pool_file`, generated demonstrations are kept, and a run that was
killed goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np

from generation_ext.columns import DataArguments, columns_of, fields_of, read_texts
from generation_ext.in_context.calibration import BY_CONTENT_FREE, CALIBRATIONS
from generation_ext.in_context.overflow import DROP, OVERFLOW
from generation_ext.in_context.presets import PRESETS, options_of
from generation_ext.in_context.scoring import Demonstration, LabelScorer, LabelScores
from generation_ext.in_context.self_generated import SelfGeneratedICL
from generation_ext.prompts import TASKS, Task
from peft_ext.command_line import ModelArguments, parse, show
from peft_ext.files import check_writable, read_json, written_whole
from peft_ext.rows import json_line, read_rows


ZERO_SHOT, DEMONSTRATIONS, SG_ICL = METHODS = ("zero-shot", "demonstrations", "sg-icl")


@dataclass
class ClassifyArguments(DataArguments, ModelArguments):
    """What to classify, by which task and method."""

    task: Optional[str] = field(
        default=None, metadata={"help": "sst2, sst5, rte, cb, or a .json file with template, labels, ..."}
    )
    output: Optional[str] = field(default=None, metadata={"help": "Predictions, as JSON lines in the inputs' order."})
    method: str = field(default=SG_ICL, metadata={"help": f"One of {', '.join(METHODS)}."})
    demonstrations: Optional[str] = field(
        default=None, metadata={"help": f"Labelled rows for --method {DEMONSTRATIONS}; --shots of them are drawn."}
    )
    shots: int = field(default=8, metadata={"help": "Demonstrations of an input."})
    samples: int = field(default=8, metadata={"help": "Texts that are generated for each input and class."})
    class_only: bool = field(default=False, metadata={"help": "Generate without showing the input."})
    preset: str = field(
        default="paper", metadata={"help": f"SG-ICL's options where no flag says: one of {', '.join(PRESETS)}."}
    )
    balanced: bool = field(default=False, metadata={"help": "Draw as many demonstrations of each class as possible."})
    self_consistent: bool = field(
        default=False, metadata={"help": "Drop demonstrations that the model labels otherwise."}
    )
    keep: Optional[float] = field(
        default=None, metadata={"help": "Share of each class's texts that are drawn from, the surest ones."}
    )
    shared: bool = field(default=False, metadata={"help": "The same demonstrations for all inputs."})
    pool_inputs: Optional[int] = field(
        default=None, metadata={"help": "Write texts for so many inputs only, with shared demonstrations."}
    )
    draws: Optional[int] = field(default=None, metadata={"help": "Mean over so many draws of demonstrations."})
    calibrate: bool = field(
        default=False, metadata={"help": "Compare labels with their prior, which --calibration says how to estimate."}
    )
    calibration: str = field(
        default=BY_CONTENT_FREE,
        metadata={"help": "content_free: after inputs without content; batch: the mean over all inputs."},
    )
    strength: Optional[float] = field(default=None, metadata={"help": "Of the calibration; 1 is all of it."})
    chat: bool = field(
        default=False,
        metadata={"help": "By the tokenizer's chat template: the user asks, the assistant answers the label."},
    )
    pool_file: Optional[str] = field(default=None, metadata={"help": "Keeps generated demonstrations (.jsonl)."})
    normalization: str = field(default="mean", metadata={"help": "sum or mean over the tokens of a label."})
    overflow: str = field(default=DROP, metadata={"help": f"For what is too long: {', '.join(OVERFLOW)}."})
    max_length: Optional[int] = field(default=None, metadata={"help": "Most tokens of a text."})
    memory_limit: Optional[int] = field(
        default=None, metadata={"help": "Bytes that a pass may take beside the weights; a quarter of what is free."}
    )
    label_column: str = field(default="label", metadata={"help": "Gold labels, where there are any."})
    seed: int = field(default=13, metadata={"help": "Of generation and of drawing."})


def main(argv: Sequence[str]) -> None:
    """Classify, write the predictions, show a summary."""
    (args,) = parse(argv, ClassifyArguments, positional="data")
    for name in ("task", "data", "output"):
        if not getattr(args, name):
            raise ValueError(f"{name} is missing: pass --{name}.")
    if args.method not in METHODS:
        raise ValueError(f"method={args.method!r} is unknown; choose one of {', '.join(METHODS)}.")
    if args.calibration not in CALIBRATIONS:
        raise ValueError(f"calibration={args.calibration!r} is unknown; choose one of {', '.join(CALIBRATIONS)}.")
    if args.calibration != BY_CONTENT_FREE and not args.calibrate:
        raise ValueError(f"calibration={args.calibration!r} goes with --calibrate; pass that too.")
    calibrate = args.calibration if args.calibrate else False
    # a flag that isn't given leaves the preset's value
    flags = {name: getattr(args, name) or None for name in ("balanced", "self_consistent", "shared")}
    own = {name: getattr(args, name) for name in ("keep", "pool_inputs", "draws", "strength")} | flags
    own["calibrate"] = calibrate or None
    if args.method == SG_ICL:
        options_of(args.preset, args.shots, args.samples, own)
    task = read_task(args.task)
    columns = columns_of(task.fields, args.fields)
    rows, examples = read_texts(args.data, columns, limit=args.limit)
    shown = _demonstrations(args, task, columns)
    check_writable(Path(args.output), "output")
    model, tokenizer = args.load("auto")
    options = {
        name: getattr(args, name) for name in ("chat", "normalization", "overflow", "max_length", "memory_limit")
    }
    options["progressbar"] = sys.stderr.isatty()
    if args.method == SG_ICL:
        own |= {name: getattr(args, name) for name in ("shots", "samples", "preset", "seed")}
        sg_icl = SelfGeneratedICL(model, tokenizer, task, conditioned=not args.class_only, **own, **options)
        scores = sg_icl.score(examples, args.pool_file)
    else:
        scores = LabelScorer(model, tokenizer, task, **options).score(
            examples, shown, calibrate, strength=1.0 if args.strength is None else args.strength
        )
    _write(Path(args.output), scores)
    show(*_summary(args, scores, [row.get(args.label_column) for row in rows]))


def read_task(name: str) -> Task:
    """A built-in task by its name, or one from a JSON file.

    Raises:
        ValueError: If it is neither, or the file has arguments that `Task` doesn't know or refuses.
    """
    if name in TASKS:
        return TASKS[name]
    if not name.endswith(".json"):
        raise ValueError(f"--task {name!r} is unknown; choose one of {list(TASKS)}, or a .json file.")
    values = read_json(Path(name), "a task has 'template' and 'labels'")
    try:
        return Task(**{"name": Path(name).stem, **values})
    except TypeError as error:
        raise ValueError(f"--task {name}: {error}") from error


def _demonstrations(args: ClassifyArguments, task: Task, columns: Mapping[str, str]) -> list[Demonstration]:
    """`shots` labelled rows at random."""
    if (args.method == DEMONSTRATIONS) != (args.demonstrations is not None):
        raise ValueError(f"--demonstrations FILE goes with --method {DEMONSTRATIONS}, and is needed by it.")
    if args.demonstrations is None:
        return []
    rows = read_rows(args.demonstrations)
    chosen = np.random.default_rng(args.seed).permutation(len(rows))[: args.shots]
    if len(rows) < args.shots:
        raise ValueError(f"{args.demonstrations} has {len(rows)} rows, fewer than --shots {args.shots}.")
    shown: list[Demonstration] = []
    for index in chosen:
        where = f"{args.demonstrations}, row {index + 1}"
        label = rows[index].get(args.label_column)
        if label not in task.labels:
            raise ValueError(
                f"{where}: {args.label_column}={label!r} is none of the task's labels {list(task.labels)}."
            )
        shown.append((fields_of(rows[index], columns, where), str(label)))
    return shown


def _write(path: Path, scores: LabelScores) -> None:
    """One JSON line for each input; the file is whole or not there."""
    with written_whole(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for index, prediction in enumerate(scores.predictions()):
            probabilities = dict(zip(scores.labels, scores.probabilities()[index].round(6).tolist()))
            line: dict[str, Any] = {"prediction": prediction, "probabilities": probabilities}
            if scores.dropped[index]:
                line["dropped_demonstrations"] = int(scores.dropped[index])
            if scores.truncated[index]:
                line["truncated_characters"] = int(scores.truncated[index])
            file.write(json_line(line) + "\n")


def _summary(args: ClassifyArguments, scores: LabelScores, gold: Sequence[Any]) -> tuple[dict[str, Any], str]:
    """How often each label was chosen, and how often rightly; as values and as text."""
    predictions = scores.predictions()
    counts = {label: predictions.count(label) for label in scores.labels}
    result: dict[str, Any] = {"predictions": len(predictions), "output": args.output, "counts": counts}
    lines = [f"{len(predictions)} predictions in {args.output}"]
    lines += [f"  {label}: {count}" for label, count in counts.items()]
    correct = [label == prediction for label, prediction in zip(gold, predictions) if label is not None]
    if correct:
        result["accuracy"] = sum(correct) / len(correct)
        lines.append(f"accuracy: {100 * result['accuracy']:.1f} % of {len(correct)} labelled inputs")
    return result, "\n".join(lines)
