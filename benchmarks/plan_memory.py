# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext plan` against measured peaks: tuning and serving two small models on a CPU.

Every measurement is a process of its own: the most that it had resident, less what it had before it built the model
(after a first step on a miniature, which loads every library). Weights and tokens are random: memory doesn't depend
on them. The C library's allocator keeps freed memory in gaps that it can't use, and hence has more resident than
tensors take, here up to a half; MALLOC_MMAP_THRESHOLD_ makes it hand each freed tensor back. The plan is of the
tensors, so the claim is about that; the allocator's default stands beside it. Linux with glibc only.

    python -m benchmarks.plan_memory

Measurements are stored as they finish and not repeated: after a kill, start it again with the same flags.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from benchmarks.common import Results, argument_parser, describe, fresh_process, log, markdown_table, verdict
from benchmarks.resident import peak_resident_bytes, reset_peak, resident_bytes
from benchmarks.tuning import SMOKE_VOCAB, trainable
from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.memory.estimate import serving_memory, tuning_memory
from peft_ext.memory.trace import OPTIMIZERS, Generation, TrainingStep
from peft_ext.models import DEFAULT_MODEL, load_config


MB = 1e6
TINY, GPT2 = "tiny random Llama", "gpt2"
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


def predict(args: argparse.Namespace, model: str, row: Row) -> int:
    """Bytes by the plan."""
    config, method = config_of(model), row.peft_config()
    if row.work == "serving":
        return serving_memory(config, method, torch.float32, Generation(args.batch_size, args.context)).total
    return tuning_memory(config, method, torch.float32, _step(args, row)).total


def measure(args: argparse.Namespace, model: str, row: Row) -> dict[str, int]:
    """Bytes in this process."""
    torch.manual_seed(args.seed)
    config = config_of(model)
    miniature = copy.deepcopy(config)
    miniature.num_hidden_layers, miniature.vocab_size = 1, SMOKE_VOCAB
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(miniature, name, None)
    _work(args, miniature, row)
    reset_peak()
    before = resident_bytes()
    _work(args, config, row)
    return {"before": before, "measured": peak_resident_bytes() - before}


def _step(args: argparse.Namespace, row: Row) -> TrainingStep:
    return TrainingStep(args.batch_size, args.block_size, gradient_checkpointing=row.gradient_checkpointing)


def _work(args: argparse.Namespace, config: PretrainedConfig, row: Row) -> None:
    """Build the model, then train two steps or generate; the peak of building it isn't measured."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    method = row.peft_config()
    if method is not None:
        model = get_peft_model(model, method)
    if row.work == "serving":
        model = model if method is None else model.unload()
        reset_peak()
        _generate(args, model.eval())
    else:
        reset_peak()
        _train(_step(args, row), model.train())


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


def _generate(args: argparse.Namespace, model: Any) -> None:
    prompt = torch.randint(0, SMOKE_VOCAB, (args.batch_size, args.context - 1))
    mask = torch.ones_like(prompt)
    # the second new token is made from a full context
    model.generate(prompt, attention_mask=mask, do_sample=False, min_new_tokens=2, max_new_tokens=2, pad_token_id=0)


def in_own_process(args: argparse.Namespace, model: str, row: Row, malloc: str) -> dict[str, Any]:
    """[`measure`] in a fresh process, and [`predict`]."""
    flags = ["--worker", json.dumps([model, *row])]
    for name in ("batch_size", "block_size", "context", "seed"):
        flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    found = fresh_process("benchmarks.plan_memory", flags, f"{row.title} on {model}", MALLOC[malloc])
    predicted = predict(args, model, row)
    return {**found, "predicted": predicted, "ratio": predicted / found["measured"]}


def settings(args: argparse.Namespace, model: str, row: Row, malloc: str) -> dict[str, Any]:
    """Everything that a measurement depends on."""
    shape = {name: getattr(args, name) for name in ("batch_size", "block_size", "context", "seed")}
    return {"model": model, **row._asdict(), "malloc": malloc, **shape}


def table(results: Results, args: argparse.Namespace, model: str) -> str:
    """The Markdown table of one model."""
    headers = ["Work", "Predicted, MB", "Measured, MB", "predicted / measured", "default malloc, MB", "predicted / it"]
    lines = []
    for row in ROWS:
        cells: list[Optional[str]] = [row.title]
        for malloc in MALLOC:
            found = results.find(settings(args, model, row, malloc))
            numbers = ("predicted", "measured") if len(cells) == 1 else ("measured",)
            cells += [f"{found[name] / MB:,.0f}" if found else None for name in numbers]
            cells.append(f"{found['ratio']:.3f}" if found else None)
        lines.append(cells)
    return markdown_table(headers, lines)


def worst(results: Results, args: argparse.Namespace, model: str, malloc: str) -> Optional[float]:
    """The largest difference of predicted and measured, over measured, among the rows that there are."""
    found = [results.find(settings(args, model, row, malloc)) for row in ROWS]
    return max((abs(one["ratio"] - 1) for one in found if one), default=None)


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__, "plan_memory.json")
    parser.add_argument("--model", nargs="+", default=[DEFAULT_MODEL, GPT2], help="for their configs alone")
    parser.add_argument("--rows", nargs="*", default=[], help="only rows whose title contains one of these")
    parser.add_argument("--batch-size", type=int, default=4, help="rows that are trained, or served")
    parser.add_argument("--block-size", type=int, default=256, help="tokens of a row in training")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a row that is served")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.smoke:
        args.model, args.batch_size, args.block_size, args.context = [TINY], 2, 32, 32
    return args


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure, then print the tables and the verdicts."""
    args = parse(argv)
    if args.worker:
        model, *fields = json.loads(args.worker)
        print(json.dumps(measure(args, model, Row(*fields))))
        return
    results = Results(args.output, args.seed)
    rows = [ROWS[0], ROWS[-1]] if args.smoke else list(ROWS)
    mallocs = list(MALLOC)[:1] if args.smoke else list(MALLOC)
    rows = [row for row in rows if not args.rows or any(part in row.title for part in args.rows)]
    turns = [(malloc, model, row) for malloc in mallocs for model in args.model for row in rows]
    for malloc, model, row in tqdm([] if args.table else turns, desc="Measuring"):
        key = settings(args, model, row, malloc)
        if results.find(key) is None:
            log(f"{model}: {row.title}; malloc: {malloc}")
            results.add(key, in_own_process(args, model, row, malloc))
    for model in args.model:
        print(
            f"\n{model}, {args.batch_size} x {args.block_size} tokens trained, {args.batch_size} x {args.context} served\n"
        )
        print(table(results, args, model))
    print()
    for model, malloc in itertools.product(args.model, MALLOC):
        claim = f"{model}, malloc: {malloc}: largest difference of predicted and measured"
        print(verdict(claim, worst(results, args, model, malloc), CLAIM))
    if results.rows:
        print("\n" + describe(results.rows[-1]["environment"]))


if __name__ == "__main__":
    main()
