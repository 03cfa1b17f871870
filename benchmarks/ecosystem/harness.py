# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""lm-evaluation-harness's own command line behind `peft-ext run`, on a packed base, with an adapter, and merged: are its
figures those of `LabelScorer`?

    python -m benchmarks harness

The CPU kernel rounds activations to 8 bits where few rows are multiplied, and how many are is another matter in each of
the two; the experiment `exact` shows that nothing else differs.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM

from benchmarks.core.claims import Claim, markdown_table
from benchmarks.core.run import Run, log
from benchmarks.core.task import Task, claims_of_each, tables_of_each
from benchmarks.ecosystem.common import Folders, adapted, checked, prepare, run_tool
from benchmarks.ecosystem.harness_tasks import SST2, data_of, write_harness_tasks
from generation_ext.in_context import LabelScorer
from generation_ext.in_context import Task as Prompts
from peft_ext.models import load_tokenizer
from peft_ext.quant import kernel
from peft_ext.quant.kernel import KERNEL_VARIABLE
from peft_ext.rows import read_rows


TOLERANCE = 2e-3
SENTIMENT = Prompts("Review: {text}\nSentiment:", {label: f" {label}" for label in SST2}, separator="\n\n")


def measure(run: Run) -> None:
    """What the harness says of each contender, and what we say."""
    if all(run.find({"contender": name}) for name in run.contenders):
        return
    data = data_of(run.data)
    with tempfile.TemporaryDirectory() as folder, kernel.using(**{KERNEL_VARIABLE: run.kernel}):
        made = prepare(Path(folder) / "models", run.model)
        write_harness_tasks(Path(folder) / "tasks", data, run.inputs, run.shots)
        for name, arguments in _contenders(made).items():
            if name in run.contenders and run.find({"contender": name}) is None:
                log(name)
                run.add({"contender": name}, _compare(run, made, name, arguments, Path(folder)))


def _contenders(made: Folders) -> dict[str, tuple[str, str]]:
    """Name -> the harness's model and its arguments."""
    return {
        "base": ("hf", f"pretrained={made.base}"),
        "base + adapter": ("hf", f"pretrained={made.base},peft={made.adapter}"),
        "base + adapter, peft_ext": ("peft_ext", f"pretrained={made.base},peft={made.adapter}"),
        "merged": ("hf", f"pretrained={made.merged}"),
    }


def _compare(run: Run, made: Folders, name: str, arguments: tuple[str, str], folder: Path) -> dict[str, Any]:
    """Accuracy and log-likelihoods of the harness, and ours."""
    output = folder / "out" / name.replace(" ", "_")
    flags = ["lm_eval", "run", "--model", arguments[0], "--model_args", arguments[1], "--tasks", "choice,rolling"]
    flags += ["--include_path", folder / "tasks", "--device", "cpu", "--batch_size", "4", "--log_samples"]
    checked(run_tool([*flags, "--output_path", output], **{KERNEL_VARIABLE: run.kernel}), f"lm_eval on {name}")
    found = json.loads(next(output.rglob("results_*.json")).read_text())["results"]
    samples = read_rows(next(output.rglob("samples_choice_*.jsonl")))
    theirs = np.array([[float(each[0][0]) for each in row["resps"]] for row in sorted(samples, key=_place)])
    model = {"base": made.base, "merged": made.merged}.get(name)
    ours = _scores(
        adapted(made) if model is None else AutoModelForCausalLM.from_pretrained(model),
        made,
        run.shots,
        folder / "tasks",
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


def _scores(model: Any, made: Folders, shots: int, tasks: Path) -> np.ndarray:
    """`LabelScorer`'s log-probabilities of the same inputs behind the same demonstrations."""
    shown = [(row["text"], row["label"]) for row in read_rows(tasks / "choice_train.jsonl")[:shots]]
    texts = [row["text"] for row in read_rows(tasks / "choice_test.jsonl")]
    return LabelScorer(model, load_tokenizer(str(made.base)), SENTIMENT).score(texts, shown).log_probs


def tables(run: Run) -> dict[str, str]:
    """The harness's figures beside ours."""
    lines = []
    for row in run.rows:
        found = row["result"]
        numbers = [f"{found[each]:.4g}" for each in ("accuracy", "our_accuracy", "word_perplexity")]
        lines.append([row["key"]["contender"], *numbers, f"{found['difference']:.1e}"])
    headers = ["Model", "Accuracy, lm_eval", "Accuracy, LabelScorer", "Word perplexity, lm_eval", "Largest difference"]
    return {
        f"{run.inputs} inputs behind {run.shots} demonstrations, kernel: {run.kernel}": markdown_table(headers, lines)
    }


def claims(run: Run) -> list[Claim]:
    """Their log-likelihoods are ours, where the kernel rounds nothing."""
    if run.kernel != "exact":
        return []
    found = {name: run.find({"contender": name}) for name in run.contenders}
    return [
        Claim(f"{name}: log-likelihoods beside LabelScorer's", one and one["difference"], TOLERANCE)
        for name, one in found.items()
    ]


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims))
