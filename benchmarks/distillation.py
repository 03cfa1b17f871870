# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What scales learn from a teacher: cross-entropy, the divergence from the float model, and halves of both.

The packed model starts from the same codes for every weight of the divergence, sees the same batches, and is read on the text
that it was tuned on and on one that it wasn't. The teacher's logits are cached once, on disk (`CachedLogits`).
Learning rates are those that `peqa_quality` chose on validation text by cross-entropy.

    python -m benchmarks distillation
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

from benchmarks import baselines
from benchmarks.core.claims import Claim, markdown_table
from benchmarks.core.run import Run, log
from benchmarks.core.task import Task, claims_of_each, tables_of_each
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


UNTUNED = "untuned"


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


def key_of(form: Optional[Form], distill: Any) -> dict[str, Any]:
    """What tells a row from the others; no format: the float model."""
    if form is None:
        return {"bits": None, "group_size": None, "distill": UNTUNED}
    return {"bits": form.bits, "group_size": form.group_size, "distill": distill}


def keys(run: Run) -> list[tuple[Optional[Form], Any]]:
    """All rows, the float model first."""
    return [(None, UNTUNED), *((form, distill) for form in forms(run) for distill in (UNTUNED, *run.distill))]


class Bench:
    """The float model, its logits on disk, and the data."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.data = byte_data(run) if run.data == BYTES else load_data(run)
        self.float_model = float_model(run.model, run.seed)
        self.blocks = self.data.train[: run.steps * run.batch_size]

    def float_row(self) -> dict[str, Any]:
        """The untouched model."""
        return self.figures(self.float_model)

    def figures(self, model: nn.Module) -> dict[str, Any]:
        """Perplexity in and out of the domain."""
        size = self.run.batch_size
        return {
            "test": perplexity(model, self.data.test, batch_size=size),
            "other": perplexity(model, self.data.other, batch_size=size),
        }

    def teacher(self) -> CachedLogits:
        """The float model's logits of all blocks that are trained on, on disk."""
        examples = blocks_as_examples(self.blocks).examples
        cache = CachedLogits(
            self.run.work / "teacher",
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

    def rows(self, form: Form) -> None:
        """All rows of a format that aren't stored yet: one start for all."""
        missing = [key for key in (UNTUNED, *self.run.distill) if self.run.find(key_of(form, key)) is None]
        if not missing:
            return
        teacher = self.teacher()
        config = PeqaConfig(bits=form.bits, group_size=form.group_size, init_method="calibrated")
        log(f"{form.title}: calibrating")
        torch.manual_seed(self.run.seed)
        fresh = float_model(self.run.model, self.run.seed)
        model = baselines.quantized(fresh, config, self.data.calibration)
        restart, head = Restart(model), output_head(model)
        for distill in missing:
            restart()
            start = time.perf_counter()
            result: dict[str, Any] = {}
            if distill != UNTUNED:
                objective = Objective(distill)

                def loss_of(model: nn.Module, batch: Any, objective: Objective = objective) -> torch.Tensor:
                    teaching = teacher.of(batch) if objective.distill else None
                    found = student_pass(model, batch, teaching, objective, head)
                    return found.sums.loss / found.tokens

                batches = causal_batches(self.blocks, self.run.batch_size)
                losses = train(model, batches, learning_rate=form.learning_rate, loss_of=loss_of)
                result = {"losses": losses, "learning_rate": form.learning_rate}
                result["seconds"] = time.perf_counter() - start
            result.update(self.figures(model))
            self.run.add(key_of(form, distill), result)
            log(f"{form.title}, {distill}: test {result['test']:.2f}, other {result['other']:.2f}")


def measure(run: Run) -> None:
    """Measure every row that isn't stored yet."""
    missing = [key for key in keys(run) if run.find(key_of(*key)) is None]
    if not missing:
        return
    bench = Bench(run)
    with fast_linear():
        if run.find(key_of(None, UNTUNED)) is None:
            run.add(key_of(None, UNTUNED), bench.float_row())
        for form in forms(run):
            bench.rows(form)


def tables(run: Run) -> dict[str, str]:
    """What is measured so far."""
    lines = []
    for form, distill in keys(run):
        found = run.find(key_of(form, distill))
        name = "float" if form is None else form.title
        figures = ["not measured", None] if found is None else [_number(found["test"]), _number(found["other"])]
        seconds = (found or {}).get("seconds")
        lines.append([name, _towards(distill), *figures, None if seconds is None else f"{seconds:.0f}"])
    headers = ["Weights", "Trained towards", "Test perplexity", "Python's documentation", "Seconds"]
    return {"Towards the float model": markdown_table(headers, lines)}


def _towards(distill: Any) -> str:
    names = {UNTUNED: UNTUNED, 0.0: "the text (cross-entropy)", 1.0: "the float model (divergence)"}
    return names.get(distill, f"both, the divergence by {distill}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def claims(run: Run) -> list[Claim]:
    """Towards both, a model forgets less than by the cross-entropy alone, at little cost in the domain."""
    found = []
    for form in forms(run):
        alone, both = (run.find(key_of(form, distill)) for distill in (0.0, 0.5))
        for name, part, bar in (("other text", "other", 1.0), ("test text", "test", 1.05)):
            value = both[part] / alone[part] if alone and both else None
            found.append(Claim(f"{form.title}, both over cross-entropy, {name}", value, bar))
    return found


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims))
