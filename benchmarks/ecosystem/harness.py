# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""lm-evaluation-harness's own command line behind `peft-ext run`, on a packed base, with an adapter, and merged: are its
figures those of `LabelScorer`?

    PEFT_EXT_KERNEL=exact python -m benchmarks.ecosystem.harness

The CPU kernel rounds activations to 8 bits where few rows are multiplied, and how many are is another matter in each of
the two; `exact` shows that nothing else differs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from transformers import AutoModelForCausalLM

from benchmarks.common import Results, argument_parser, data_folder, describe, markdown_table, verdict
from benchmarks.ecosystem.common import Folders, adapted, checked, prepare, run_tool
from benchmarks.ecosystem.harness_tasks import SST2, write_harness_tasks
from generation_ext.in_context import LabelScorer, Task
from peft_ext.models import DEFAULT_MODEL, load_tokenizer
from peft_ext.rows import read_rows


TOLERANCE = 2e-3
TASK = Task("Review: {text}\nSentiment:", {label: f" {label}" for label in SST2}, separator="\n\n")


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run, compare, print."""
    parser = argument_parser(__doc__, "ecosystem_harness.json", budget={"inputs": 16, "shots": 4})
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default, hub id, folder or .gguf file")
    parser.add_argument("--data-dir", type=Path, default=data_folder(), help="holds sst2, sst5 and wikitext2")
    args = parser.parse_args(argv)
    if args.smoke:
        args.inputs, args.shots = 2, 1
    results = Results(args.output, args.seed)
    if not args.table:
        if args.data_dir is None:
            parser.error("--data-dir: name the folder that holds sst2, sst5 and wikitext2")
        with tempfile.TemporaryDirectory() as folder:
            made = prepare(Path(folder) / "models", args.model)
            write_harness_tasks(Path(folder) / "tasks", args.data_dir, args.inputs, args.shots)
            for name, arguments in _contenders(made).items():
                if results.find(_settings(args, name)) is None:
                    results.add(_settings(args, name), _measure(args, made, name, arguments, Path(folder)))
    print(_table(args, results))


def _contenders(made: Folders) -> dict[str, tuple[str, str]]:
    """Name -> the harness's model and its arguments."""
    return {
        "base": ("hf", f"pretrained={made.base}"),
        "base + adapter": ("hf", f"pretrained={made.base},peft={made.adapter}"),
        "base + adapter, peft_ext": ("peft_ext", f"pretrained={made.base},peft={made.adapter}"),
        "merged": ("hf", f"pretrained={made.merged}"),
    }


def _settings(args: argparse.Namespace, name: str) -> dict[str, Any]:
    kernel = os.environ.get("PEFT_EXT_KERNEL", "auto")
    return {"contender": name, "model": args.model, "inputs": args.inputs, "shots": args.shots, "kernel": kernel}


def _measure(
    args: argparse.Namespace, made: Folders, name: str, arguments: tuple[str, str], folder: Path
) -> dict[str, Any]:
    """Accuracy and log-likelihoods of the harness, and ours."""
    output = folder / "out" / name.replace(" ", "_")
    flags = ["lm_eval", "run", "--model", arguments[0], "--model_args", arguments[1], "--tasks", "choice,rolling"]
    flags += ["--include_path", folder / "tasks", "--device", "cpu", "--batch_size", "4", "--log_samples"]
    checked(run_tool([*flags, "--output_path", output]), f"lm_eval on {name}")
    found = json.loads(next(output.rglob("results_*.json")).read_text())["results"]
    samples = read_rows(next(output.rglob("samples_choice_*.jsonl")))
    theirs = np.array([[float(each[0][0]) for each in row["resps"]] for row in sorted(samples, key=_place)])
    model = {"base": made.base, "merged": made.merged}.get(name)
    ours = _scores(
        adapted(made) if model is None else AutoModelForCausalLM.from_pretrained(model), made, args, folder / "tasks"
    )
    answers = [row["answer"] for row in read_rows(folder / "tasks" / "choice_test.jsonl")]
    return {
        "accuracy": found["choice"]["acc,none"],
        "our_accuracy": float(np.mean(ours.argmax(axis=1) == answers)),
        "word_perplexity": found["rolling"]["word_perplexity,none"],
        "difference": float(np.abs(ours - theirs).max()),
    }


def _place(row: dict[str, Any]) -> int:
    return row["doc_id"]


def _scores(model: Any, made: Folders, args: argparse.Namespace, tasks: Path) -> np.ndarray:
    """`LabelScorer`'s log-probabilities of the same inputs behind the same demonstrations."""
    shown = [(row["text"], row["label"]) for row in read_rows(tasks / "choice_train.jsonl")[: args.shots]]
    texts = [row["text"] for row in read_rows(tasks / "choice_test.jsonl")]
    return LabelScorer(model, load_tokenizer(str(made.base)), TASK).score(texts, shown).log_probs


def _table(args: argparse.Namespace, results: Results) -> str:
    lines, verdicts = [], []
    for row in results.rows:
        found = row["result"]
        if row["settings"] != _settings(args, row["settings"]["contender"]):
            continue
        name = row["settings"]["contender"]
        numbers = [f"{found[each]:.4g}" for each in ("accuracy", "our_accuracy", "word_perplexity")]
        lines.append([name, *numbers, f"{found['difference']:.1e}"])
        verdicts.append(verdict(f"{name}: log-likelihoods beside LabelScorer's", found["difference"], TOLERANCE))
    headers = ["Model", "Accuracy, lm_eval", "Accuracy, LabelScorer", "Word perplexity, lm_eval", "Largest difference"]
    parts = [markdown_table(headers, lines), "\n".join(verdicts)]
    return "\n\n".join([*parts, describe(results.rows[-1]["environment"])] if results.rows else parts)


if __name__ == "__main__":
    main()
