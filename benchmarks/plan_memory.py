# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext plan` against measured peaks: tuning and serving two small models on a CPU.

Every measurement is a process of its own: the most that it had resident, less what it had before it built the model
(after a first step on a miniature, which loads every library). Weights and tokens are random: memory doesn't depend
on them. The C library's allocator keeps freed memory in gaps that it can't use, and hence has more resident than
tensors take, here up to a half; MALLOC_MMAP_THRESHOLD_ makes it hand each freed tensor back. The plan is of the
tensors, so the claim is about that; the allocator's default stands beside it. Linux with glibc only.

    python -m benchmarks plan_memory
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Optional

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.run import Run, log
from benchmarks.core.task import Runs, Task, claims_of_each, tables_of_each
from benchmarks.core.worker import fresh_process
from benchmarks.resident import peak_resident_bytes, reset_peak, resident_bytes
from benchmarks.tuning import SMOKE_VOCAB, TINY, trainable
from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.memory.estimate import serving_memory, tuning_memory
from peft_ext.memory.trace import OPTIMIZERS, Generation, TrainingStep
from peft_ext.models import load_config


MB = 1e6
GPT2 = "gpt2"
MALLOC = {"tensors handed back": {"MALLOC_MMAP_THRESHOLD_": "131072"}, "default": {}}
CLAIM = 0.15  # predicted and measured differ by at most


class Row(NamedTuple):
    """What is measured: tuning or serving, under which method."""

    work: str
    method: str
    group_size: int = -1
    gradient_checkpointing: bool = False

    @property
    def title(self) -> str:
        """The first columns."""
        group = f", group {self.group_size}" if self.group_size != -1 else ""
        return f"{self.work}, {self.method}{group}{', checkpointing' if self.gradient_checkpointing else ''}"

    def peft_config(self) -> Optional[PeftConfig]:
        """The method's config, by the quickest start; None for float weights that are all trained, or just served."""
        if self.method == "PEQA, 4 bits":
            return PeqaConfig(bits=4, group_size=self.group_size)
        if self.method == "AlphaTuning, 4 bits":
            return AlphaTuningConfig(bits=4, group_size=self.group_size, init_method="greedy")
        return LoraConfig(r=8, target_modules="all-linear") if self.method == "LoRA, r = 8" else None


PEQA, ALPHA, LORA, FLOAT = "PEQA, 4 bits", "AlphaTuning, 4 bits", "LoRA, r = 8", "float"
ROWS = (
    Row("tuning", PEQA),
    Row("tuning", PEQA, 64),
    Row("tuning", PEQA, gradient_checkpointing=True),
    Row("tuning", ALPHA),
    Row("tuning", LORA),
    Row("tuning", FLOAT),
    Row("serving", PEQA),
    Row("serving", ALPHA),
    Row("serving", FLOAT),
)


def config_of(model: str) -> PretrainedConfig:
    """SmolLM2's real config, GPT-2's, or a tiny Llama's."""
    if model == TINY:
        return LlamaConfig(
            vocab_size=SMOKE_VOCAB,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
        )
    return GPT2Config() if model == GPT2 else load_config(model)


class Shape(NamedTuple):
    """How much is trained or served at once: sequences, tokens of one that is trained, and of one that is served."""

    batch_size: int
    block_size: int
    context: int


def predict(model: str, row: Row, shape: Shape) -> int:
    """Bytes by the plan."""
    config, method = config_of(model), row.peft_config()
    if row.work == "serving":
        return serving_memory(config, method, torch.float32, Generation(shape.batch_size, shape.context)).total
    return tuning_memory(config, method, torch.float32, _step(shape, row)).total


def peak(model: str, row: list, shape: list, seed: int) -> dict[str, int]:
    """Bytes in this process.

    Args:
        model: See [`config_of`].
        row: The fields of a [`Row`].
        shape: The fields of a [`Shape`].
        seed: Of weights and tokens.
    """
    torch.manual_seed(seed)
    config = config_of(model)
    miniature = copy.deepcopy(config)
    miniature.num_hidden_layers, miniature.vocab_size = 1, SMOKE_VOCAB
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(miniature, name, None)
    _work(miniature, Row(*row), Shape(*shape))
    reset_peak()
    before = resident_bytes()
    _work(config, Row(*row), Shape(*shape))
    return {"before": before, "measured": peak_resident_bytes() - before}


def _step(shape: Shape, row: Row) -> TrainingStep:
    return TrainingStep(shape.batch_size, shape.block_size, gradient_checkpointing=row.gradient_checkpointing)


def _work(config: PretrainedConfig, row: Row, shape: Shape) -> None:
    """Build the model, then train two steps or generate; the peak of building it isn't measured."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    method = row.peft_config()
    if method is not None:
        model = get_peft_model(model, method)
    if row.work == "serving":
        model = model if method is None else model.unload()
        reset_peak()
        _generate(shape, model.eval())
    else:
        reset_peak()
        _train(_step(shape, row), model.train())


def _train(step: TrainingStep, model: nn.Module) -> None:
    if step.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = OPTIMIZERS[step.optim](trainable(model), lr=1e-4)
    shape = (step.per_device_train_batch_size, step.max_length)
    for _ in range(2):
        tokens = torch.randint(0, SMOKE_VOCAB, shape)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _generate(shape: Shape, model: Any) -> None:
    prompt = torch.randint(0, SMOKE_VOCAB, (shape.batch_size, shape.context - 1))
    mask = torch.ones_like(prompt)
    # the second new token is made from a full context
    model.generate(prompt, attention_mask=mask, do_sample=False, min_new_tokens=2, max_new_tokens=2, pad_token_id=0)


def rows_of(run: Run) -> list[Row]:
    """The rows of an experiment, by their titles; all if it names none."""
    return [row for row in ROWS if not run.only or row.title in run.only]


def measure(run: Run) -> None:
    """Each row in a process of its own, with what the plan says."""
    shape = Shape(run.batch_size, run.block_size, run.context)
    for malloc in run.mallocs:
        for row in rows_of(run):
            key = {**row._asdict(), "malloc": malloc}
            if run.find(key) is None:
                log(f"{run.model}: {row.title}; malloc: {malloc}")
                arguments = {"model": run.model, "row": row, "shape": shape, "seed": run.seed}
                found = fresh_process(peak, arguments, f"{row.title} on {run.model}", MALLOC[malloc])
                predicted = predict(run.model, row, shape)
                run.add(key, {**found, "predicted": predicted, "ratio": predicted / found["measured"]})


def tables(run: Run) -> dict[str, str]:
    """Predicted and measured peaks."""
    headers = ["Work", "Predicted, MB", "Measured, MB", "predicted / measured", "default malloc, MB", "predicted / it"]
    lines = []
    for row in rows_of(run):
        cells: list[Optional[str]] = [row.title]
        for malloc in MALLOC:
            found = run.find({**row._asdict(), "malloc": malloc})
            numbers = ("predicted", "measured") if len(cells) == 1 else ("measured",)
            cells += [f"{found[name] / MB:,.0f}" if found else None for name in numbers]
            cells.append(f"{found['ratio']:.3f}" if found else None)
        lines.append(cells)
    return {"Predicted and measured": markdown_table(headers, lines)}


def differences(run: Run, malloc: str) -> list[float]:
    """Of predicted and measured, over measured, of the rows that there are."""
    found = [run.find({**row._asdict(), "malloc": malloc}) for row in rows_of(run)]
    return [one["ratio"] - 1 for one in found if one]


def claims(run: Run) -> list[Claim]:
    """Predicted and measured differ little."""
    found = {malloc: [abs(one) for one in differences(run, malloc)] for malloc in run.mallocs}
    return [
        Claim(f"malloc: {malloc}: largest difference of predicted and measured", max(all_of, default=None), CLAIM)
        for malloc, all_of in found.items()
    ]


def headlines(runs: Runs) -> list[Headline]:
    """Peaks under the default allocator."""
    plain = [-one for run in runs for one in differences(run, "default")]
    exact = [abs(one) for run in runs for one in differences(run, "tensors handed back")]
    if not plain or not exact:
        return []
    missed = sum(abs(one) > CLAIM for one in plain)
    name = "no one two three four five six seven eight nine ten".split()
    return [
        Headline(
            "Speed and serving on a CPU",
            f"`peft-ext plan` against the process's peak memory, {name[len(plain)]} models and settings",
            f"{100 * min(plain):.0f} to {100 * max(plain):.0f} % low (glibc keeps freed memory; within "
            f"{100 * max(exact):.0f} % of what tensors took)",
            unless(not missed, f"within 15 %: missed on {name[missed]}" if missed else "within 15 %"),
            "../benchmarks/serving.md",
        )
    ]


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims), headlines)
