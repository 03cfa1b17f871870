# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What integers cost in answers: zero-shot accuracy at 4, 3 and 2 bits beside the float model's, by lm-evaluation-harness.

Its tasks are written out of local files; the prompts are those of `generation_ext.prompts`, without demonstrations, and a
label is chosen by its log-likelihood (`acc`). Integers are calibrated on wikitext-2, nothing is tuned. An accuracy near chance
says little of weights; so the table also has the share of inputs that get the float model's own answer.

    python -m benchmarks zero_shot
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
import yaml
from torch import nn

from benchmarks import baselines
from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.run import Run, data_folder, log
from benchmarks.core.task import Runs, Task, claims_of_each, run_named, tables_of_each
from benchmarks.fast_linear import fast_linear
from benchmarks.in_context import TITLES, read_examples, smoke_examples, smoke_model, task_named
from benchmarks.peqa_quality import find_split
from benchmarks.tuning import TINY, float_model, sample_blocks
from generation_ext import prompts
from peft_ext import PeqaConfig
from peft_ext.files import read_json, write_json
from peft_ext.models import DEFAULT_MODEL, load, load_tokenizer
from peft_ext.text import token_blocks


# Of the sets whose test labels aren't public.
SPLITS = {"rte": "validation", "cb": "validation"}
ANSWERS = "float_answers.json"


class Row(NamedTuple):
    """A line of the table: float weights, the integers of the model's own file, or integers of a format."""

    weights: str
    bits: Optional[int] = None
    group_size: Optional[int] = None

    @property
    def title(self) -> str:
        """The first column."""
        if self.bits is None:
            return self.weights
        return f"{self.bits} bits, " + ("per channel" if self.group_size == -1 else f"group {self.group_size}")

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from the others."""
        return {"weights": self.weights, "bits": self.bits, "group_size": self.group_size}


FLOAT, FILE = Row("Float"), Row("4 bits, group 32; the GGUF's own integers")


def rows_of(run: Run) -> list[Row]:
    """The table; a file's own integers where there is a file that has any."""
    packed = [Row("Quantised", *form) for form in run.forms]
    return [FLOAT, *([FILE] if run.model == DEFAULT_MODEL else []), *packed]


class Bench:
    """The float model, its tokenizer, calibration blocks, and the tasks as files in `folder`."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        if run.model == TINY:
            self.model, self.tokenizer = smoke_model()
            self.calibration = torch.arange(run.calibration_blocks * run.block_size).view(-1, run.block_size) % 200
        else:
            self.model, self.tokenizer = float_model(run.model, run.seed), load_tokenizer(run.model)
            text = find_split(data_folder(run.data), "train").read_text(encoding="utf-8")
            blocks = token_blocks(self.tokenizer, [text], run.block_size)
            self.calibration = sample_blocks(blocks, run.calibration_blocks, run.seed + 1)
        for name in run.tasks:
            task = task_named(name)
            if run.model == TINY:
                examples = smoke_examples(task, run.inputs)
            else:
                examples = read_examples(task, SPLITS.get(name, "test"), run.seed)[: run.inputs]
            write_task(folder, task, examples)

    def build(self, row: Row) -> nn.Module:
        """The model of a row."""
        if row == FILE:
            return load(self.run.model, dtype=torch.float32, packed=True)
        model = copy.deepcopy(self.model)
        if row == FLOAT:
            return model
        config = PeqaConfig(bits=row.bits, group_size=row.group_size, init_method="calibrated")
        return baselines.quantized(model, config, self.calibration).unload()

    def measure(self, row: Row) -> dict[str, Any]:
        """Accuracy by task, and the share of inputs that get the float model's answer."""
        answers = self.answers(self.build(row))
        path = self.run.work / ANSWERS
        if row == FLOAT:
            write_json(path, answers)
        elif not path.is_file():
            write_json(path, self.answers(self.build(FLOAT)))
        known = read_json(path)
        return {name: judged(answers[name], known[name]) for name in self.run.tasks}

    def answers(self, model: nn.Module) -> dict[str, dict[str, list[int]]]:
        """By task, what the harness says a model chooses (`chosen`), and what is right (`right`)."""
        import lm_eval
        from lm_eval.tasks import TaskManager

        from generation_ext.in_context.lm_eval import SharedPrefixLM

        found = lm_eval.simple_evaluate(
            model=SharedPrefixLM(pretrained=model, tokenizer=self.tokenizer, batch_size=4),
            tasks=list(self.run.tasks),
            task_manager=TaskManager(include_path=str(self.folder), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
        answers = {}
        for name, samples in found["samples"].items():
            ordered = sorted(samples, key=lambda sample: sample["doc_id"])
            chosen = [_largest(sample["filtered_resps"]) for sample in ordered]
            right = [sample["doc"]["answer"] for sample in ordered]
            accuracy = sum(map(int.__eq__, chosen, right)) / len(right)
            if abs(accuracy - found["results"][name]["acc,none"]) > 1e-6:
                raise RuntimeError(f"{name}: the harness's accuracy isn't that of the log-likelihoods that it logged")
            answers[name] = {"chosen": chosen, "right": right}
        return answers


def _largest(scores: list[Any]) -> int:
    values = [float(score[0]) for score in scores]
    return values.index(max(values))


def judged(answers: dict[str, list[int]], known: dict[str, list[int]]) -> dict[str, float]:
    """Shares: of right answers, and of those that the float model gives."""
    count = len(answers["right"])
    return {
        "inputs": count,
        "accuracy": sum(map(int.__eq__, answers["chosen"], answers["right"])) / count,
        "agreement": sum(map(int.__eq__, answers["chosen"], known["chosen"])) / count,
    }


def write_task(folder: Path, task: prompts.Task, examples: list[Any]) -> None:
    """A task of the harness as files: whole prompts, label words behind them."""
    labels = list(task.labels)
    rows = [
        {"prompt": task.text(example.fields).rstrip(), "answer": labels.index(example.label)} for example in examples
    ]
    data = folder / f"{task.name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    form = {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": task.words,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / f"{task.name}.yaml").write_text(yaml.safe_dump(form, sort_keys=False), encoding="utf-8")


def measure(run: Run) -> None:
    """Measure every row that isn't stored yet."""
    missing = [row for row in rows_of(run) if run.find(row.key) is None]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder, fast_linear():
        bench = Bench(run, Path(folder))
        for row in missing:
            log(row.title)
            run.add(row.key, bench.measure(row))


def mean(run: Run, row: Row, what: str) -> Optional[float]:
    """Over the tasks; None if the row isn't measured."""
    found = run.find(row.key)
    return None if found is None else sum(found[name][what] for name in run.tasks) / len(run.tasks)


def tables(run: Run) -> dict[str, str]:
    """Accuracy by task, and the mean."""
    lines, counts = [], {}
    for row in rows_of(run):
        found = run.find(row.key)
        if found is None:
            lines.append([row.title, *["not measured"] * (len(run.tasks) + 2)])
            continue
        counts = {name: found[name]["inputs"] for name in run.tasks}
        shown = [f"{100 * found[name]['accuracy']:.1f}" for name in run.tasks]
        shown += [f"{100 * (mean(run, row, what) or 0):.1f}" for what in ("accuracy", "agreement")]
        lines.append([row.title, *shown])
    named = [f"{TITLES[name]} ({counts[name]})" if counts else TITLES[name] for name in run.tasks]
    return {"Zero-shot": markdown_table(["Weights", *named, "mean", "the float model's answer, %"], lines)}


def claims(run: Run) -> list[Claim]:
    """What a width may cost."""
    found = []
    for row in rows_of(run):
        accuracy, known = mean(run, row, "accuracy"), mean(run, FLOAT, "accuracy")
        if row != FLOAT and row.group_size != -1 and row.bits in (None, 4):
            lost = None if accuracy is None or known is None else 100 * (known - accuracy)
            found.append(Claim(f"{row.title}: points of accuracy that are lost", lost, 2.0))
    return found


def headlines(runs: Runs) -> list[Headline]:
    """Means at all widths."""
    run = run_named(runs, "smollm2")
    shown = {} if run is None else {row: mean(run, row, "accuracy") for row in rows_of(run)}
    if run is None or None in shown.values():
        return []
    text = ", ".join(f"{row.title} {100 * (value or 0):.1f}" for row, value in shown.items() if row != FILE)
    wanted = unless(all(claim.met for claim in claims(run)), "at 4 bits at most 2 points below float")
    what = "Zero-shot accuracy (lm-evaluation-harness, mean of SST-2, RTE, CB, AG News), nothing tuned"
    return [Headline("Tuning packed models", what, text, wanted, "../benchmarks/peqa.md#answers-at-4-3-and-2-bits")]


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims), headlines)
