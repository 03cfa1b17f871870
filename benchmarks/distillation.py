# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What scales learn from a teacher: cross-entropy, the divergence from the float model, and halves of both.

The packed model starts from the same codes for every weight of the divergence, sees the same batches, and is read on the text
that it was tuned on and on one that it wasn't. The teacher's logits are cached once, on disk (`CachedLogits`).
Learning rates are those that `peqa_quality` chose on validation text by cross-entropy.

Where an experiment asks for it (`heal`), the other way round as well: LoRA on the float model, merged, packed and calibrated, and
its scales then tuned by cross-entropy, and towards the merged model.

    python -m benchmarks distillation
"""

from __future__ import annotations

import copy
import time
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

from benchmarks import baselines
from benchmarks.core.claims import Claim, Headline, markdown_table, perplexity_cell, ratio_of, unless
from benchmarks.core.run import Run, log
from benchmarks.core.task import Runs, Task, claims_of_each, run_named, tables_of_each
from benchmarks.fast_linear import fast_linear
from benchmarks.peqa_quality import _byte_data as byte_data
from benchmarks.peqa_quality import load_data
from benchmarks.tuning import BYTES, Restart, causal_batches, float_model, train
from peft_ext import PeqaConfig
from peft_ext.distillation import CachedLogits, LiveTeacher, Objective
from peft_ext.distillation.cached_logits import data_digest
from peft_ext.distillation.output_head import output_head
from peft_ext.distillation.student import student_pass
from peft_ext.distillation.teacher import teacher_digest
from peft_ext.examples import blocks_as_examples
from peft_ext.language_model import text_config
from peft_ext.perplexity import perplexity
from peft_ext.quant.formats import GPTQ


UNTUNED = "untuned"
# Of the float model that LoRA was merged into.
ADAPTED = "adapted"


class Form(NamedTuple):
    """How the weights are packed, and the learning rate of their scales."""

    bits: int
    group_size: int
    learning_rate: float

    @property
    def title(self) -> str:
        """For tables."""
        return f"{self.bits} bits, " + ("per channel" if self.group_size == -1 else f"group {self.group_size}")


def forms(run: Run) -> list[Form]:
    """The formats of an experiment."""
    return [Form(*form) for form in run.forms]


class Row(NamedTuple):
    """A line of the table: what is packed how (None: not at all), and how far its scales are trained towards it."""

    form: Optional[Form]
    distill: Any
    adapted: bool = False

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from the others."""
        form = (None, None) if self.form is None else self.form[:2]
        start = {"start": ADAPTED} if self.adapted else {}
        return {"bits": form[0], "group_size": form[1], "distill": self.distill, **start}


def heal(run: Run) -> list[float]:
    """How far the scales of the adapted model are trained towards it; nothing where the experiment doesn't adapt."""
    return run.settings.get("heal", [])


def all_rows(run: Run) -> list[Row]:
    """The table, the float model first."""
    rows = [Row(None, UNTUNED)]
    rows += [Row(form, distill) for form in forms(run) for distill in (UNTUNED, *run.distill)]
    if heal(run):
        rows.append(Row(None, UNTUNED, True))
        rows += [Row(form, distill, True) for form in forms(run) for distill in (UNTUNED, *heal(run))]
    return rows


class Bench:
    """The float model, the data, and the logits of teachers on disk."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.data = byte_data(run) if run.data == BYTES else load_data(run)
        self.float_model = float_model(run.model, run.seed)
        self.blocks = self.data.train[: run.steps * run.batch_size]

    def figures(self, model: nn.Module) -> dict[str, Any]:
        """Perplexity in and out of the domain."""
        size = self.run.batch_size
        return {
            "test": perplexity(model, self.data.test, batch_size=size),
            "other": perplexity(model, self.data.other, batch_size=size),
        }

    def adapt(self) -> None:
        """Train LoRA on the float model and merge it."""
        log("LoRA on the float model")
        torch.manual_seed(self.run.seed)
        model = baselines.lora(self.float_model)
        train(model, causal_batches(self.blocks, self.run.batch_size), learning_rate=self.run.lora_learning_rate)
        self.float_model = model.merge_and_unload()

    def teacher(self, name: str) -> CachedLogits:
        """The float model's logits of all blocks that are trained on, on disk."""
        examples = blocks_as_examples(self.blocks).examples
        cache = CachedLogits(
            self.run.work / name,
            teacher=teacher_digest(self.float_model),
            tokenizer=None,
            data=data_digest(examples),
            vocabulary=text_config(self.float_model).vocab_size,
            top_k=self.run.top_k,
        )
        if not cache.complete:
            log("The teacher's logits")
            cache.fill(LiveTeacher(self.float_model), examples)
        return cache

    def of_form(self, rows: list[Row]) -> None:
        """Measure rows of one format: one start for all."""
        form = rows[0].form
        if form is None:
            self.run.add(rows[0].key, self.figures(self.float_model))
            return
        teacher = self.teacher("teacher-adapted" if rows[0].adapted else "teacher")
        config = PeqaConfig(bits=form.bits, group_size=form.group_size, init_method=GPTQ)
        log(f"{form.title}: calibrating")
        torch.manual_seed(self.run.seed)
        model = baselines.quantized(copy.deepcopy(self.float_model), config, self.data.calibration)
        restart, head = Restart(model), output_head(model)
        for row in rows:
            restart()
            start = time.perf_counter()
            result: dict[str, Any] = {}
            if row.distill != UNTUNED:
                objective = Objective(row.distill)

                def loss_of(model: nn.Module, batch: Any, objective: Objective = objective) -> torch.Tensor:
                    teaching = teacher.of(batch) if objective.distill else None
                    found = student_pass(model, batch, teaching, objective, head)
                    return found.sums.loss / found.tokens

                batches = causal_batches(self.blocks, self.run.batch_size)
                losses = train(model, batches, learning_rate=form.learning_rate, loss_of=loss_of)
                result = {"losses": losses, "learning_rate": form.learning_rate}
                result["seconds"] = time.perf_counter() - start
            result.update(self.figures(model))
            self.run.add(row.key, result)
            log(f"{form.title}, {row.distill}: test {result['test']:.2f}, other {result['other']:.2f}")


def measure(run: Run) -> None:
    """Measure every row that isn't stored yet."""
    missing = [row for row in all_rows(run) if run.find(row.key) is None]
    if not missing:
        return
    bench = Bench(run)
    with fast_linear():
        for adapted in (False, True):
            of_start = [row for row in missing if row.adapted is adapted]
            if adapted and of_start:
                bench.adapt()
            for form in (None, *forms(run)):
                rows = [row for row in of_start if row.form == form]
                if rows:
                    bench.of_form(rows)


def tables(run: Run) -> dict[str, str]:
    """What is measured so far."""
    lines = []
    for row in all_rows(run):
        found = run.find(row.key)
        name = ("adapted by LoRA, " if row.adapted else "") + ("float" if row.form is None else row.form.title)
        figures = (
            ["not measured", None]
            if found is None
            else [perplexity_cell(found["test"]), perplexity_cell(found["other"])]
        )
        seconds = (found or {}).get("seconds")
        lines.append([name, _towards(row), *figures, None if seconds is None else f"{seconds:.0f}"])
    headers = ["Weights", "Trained towards", "Test perplexity", "Python's documentation", "Seconds"]
    return {"Towards the float model": markdown_table(headers, lines)}


def _towards(row: Row) -> str:
    if row.distill == UNTUNED:
        return UNTUNED
    names = {0.0: "the text (cross-entropy)", 1.0: "the float model (divergence)"}
    return names.get(row.distill, f"both, the divergence by {row.distill}")


def claims(run: Run) -> list[Claim]:
    """Towards both, a model forgets less than by the cross-entropy alone, at little cost in the domain; and a model that was
    adapted, packed and healed is ahead of either half."""
    found = []
    for form in forms(run):
        for name, part, bar in (("other text", "other", 1.0), ("test text", "test", 1.05)):
            value = ratio_of(run, part, Row(form, 0.5).key, Row(form, 0.0).key)
            found.append(Claim(f"{form.title}, both over cross-entropy, {name}", value, bar))
        if heal(run):
            healed = Row(form, 0.5, True)
            for name, half in (("packed alone", Row(form, UNTUNED, True)), ("tuned alone", Row(form, 0.0))):
                value = ratio_of(run, "test", healed.key, half.key)
                found.append(Claim(f"{form.title}, adapted, packed and healed over {name}", value, 1.0))
    return found


def headlines(runs: Runs) -> list[Headline]:
    """What is forgotten at 2 bits, by cross-entropy and towards both."""
    run = run_named(runs, "wikitext2_short")
    if run is None:
        return []
    form = forms(run)[0]
    alone, both = run.find(Row(form, 0.0).key), run.find(Row(form, 0.5).key)
    forgotten, cost = (ratio_of(run, part, Row(form, 0.5).key, Row(form, 0.0).key) for part in ("other", "test"))
    if alone is None or both is None or forgotten is None or cost is None:
        return []
    return [
        Headline(
            "Tuning packed models",
            "Scales trained towards text and float model, 2 bits in groups of 64: perplexity on Python's documentation",
            f"{both['other']:.0f}; by cross-entropy alone {alone['other']:.0f}",
            unless(cost <= 1.05, f"at most 5 % on wikitext-2: {100 * cost - 100:.2g} %"),
            "../benchmarks/peqa.md#towards-the-float-model",
        )
    ]


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims), headlines)
