# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which parametrisation of the scales lets one learning rate serve every model?

The scales of PEQA can be trained as they are (s0 + delta, the paper's way), relative to where they start
(s0 * (1 + delta)), or by their logarithm (s0 * exp(delta)). Each is tuned over a grid of learning rates on models of
different width and size of weights: small Llamas trained here from scratch, the real model, and the real model with
its weights rescaled so that it computes the same function. The lines under the table tell what the best single rate
costs on the worst model.

    python -m benchmarks.peqa_learning_rate

About 12 minutes on two cores. Runs are stored as they finish and not repeated.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks.common import Results, argument_parser, describe, log, markdown_table
from benchmarks.tuning import Restart, byte_blocks, causal_batches, sample_blocks, tiny_llama, train
from peft_ext import PeqaConfig, calibrate
from peft_ext.models import DEFAULT_MODEL, load, load_tokenizer
from peft_ext.perplexity import perplexity
from peft_ext.scale_tuning.config import PARAMETRIZATIONS
from peft_ext.text import PYTHON_DOCS, load_text, token_blocks


LEARNING_RATES = {
    "absolute": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "relative": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "log": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
CALIBRATION_BLOCKS = 16


class Subject(NamedTuple):
    """A float model with its data: `train`, `held_out` and `calibration` are token blocks `[n, tokens]`."""

    model: nn.Module
    train: torch.Tensor
    held_out: torch.Tensor
    calibration: torch.Tensor
    batch_size: int


def small_llama(hidden_size: int, args: argparse.Namespace) -> Subject:
    """A byte-level Llama, trained from scratch on half of the text's blocks; the other half is for tuning."""
    texts = load_text(args.data)
    blocks, held_out = (byte_blocks(part, 128) for part in texts)
    blocks = sample_blocks(blocks, len(blocks), args.seed)
    half, count = len(blocks) // 2, 16 * args.small_steps
    model = tiny_llama(hidden_size, layers=1 if args.smoke else 4, seed=args.seed)
    pretraining = sample_blocks(blocks[:half], 16 * args.pretraining_steps, args.seed)
    rate = 3e-3 * math.sqrt(64 / hidden_size)
    batches = causal_batches(pretraining, 16)
    losses = train(model, batches, learning_rate=rate, name=f"Pre-training, {hidden_size} wide")
    log(f"Llama, {hidden_size} wide: loss {losses[-1]:.2f} after {len(losses)} steps")
    tuning = sample_blocks(blocks[half:], count, args.seed)
    return Subject(model, tuning, held_out[:64], blocks[:CALIBRATION_BLOCKS], 16)


def real(args: argparse.Namespace) -> Subject:
    """The model named on the command line."""
    tokenizer, texts = load_tokenizer(args.model), load_text(args.data)
    blocks, held_out = (token_blocks(tokenizer, part, 128) for part in texts)
    blocks = sample_blocks(blocks, len(blocks), args.seed)
    count = 2 * args.steps
    return Subject(
        load(args.model, dtype=torch.float32),
        sample_blocks(blocks[CALIBRATION_BLOCKS:], count, args.seed),
        held_out[:16],
        blocks[:CALIBRATION_BLOCKS],
        2,
    )


def real_rescaled(args: argparse.Namespace) -> Subject:
    """The same, each layer's weights larger or smaller by up to a factor of 16 (values and ups by two such)."""
    subject = real(args)
    rescale(subject.model, 16.0, args.seed)
    return subject


@torch.no_grad()
def rescale(model: LlamaForCausalLM, most: float, seed: int) -> None:
    """Multiply weights of a Llama by factors from 1 / most to most that cancel out, so that its function stays.

    Norms against what reads them, the value against the output projection, and the up against the down projection.

    Raises:
        TypeError: If the model isn't built like a Llama.
    """
    if not isinstance(model, LlamaForCausalLM):
        raise TypeError(f"a {type(model).__name__} can't be rescaled here; leave 'real, rescaled' out of --subjects.")
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        factors = torch.exp((2 * torch.rand(4, generator=generator) - 1) * math.log(most)).tolist()
        _move(factors[0], layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        _move(factors[1], layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        _move(factors[2], attention.v_proj, attention.o_proj)
        _move(factors[3], mlp.up_proj, mlp.down_proj)


def _move(factor: float, giver: nn.Module, *takers: nn.Module) -> None:
    giver.weight.div_(factor)
    for taker in takers:
        taker.weight.mul_(factor)


SUBJECTS: dict[str, Callable[[argparse.Namespace], Subject]] = {
    "Llama, 64 wide": lambda args: small_llama(64, args),
    "Llama, 128 wide": lambda args: small_llama(128, args),
    "Llama, 256 wide": lambda args: small_llama(256, args),
    "real": real,
    "real, rescaled": real_rescaled,
}


class Tuned:
    """A calibrated subject that every run starts from anew."""

    def __init__(self, subject: Subject, args: argparse.Namespace) -> None:
        self.subject, self.args = subject, args
        self.config = PeqaConfig(bits=args.bits, group_size=args.group_size, init_method="calibrated")
        batches = subject.calibration.split(4)
        self.base = calibrate(subject.model, self.config, batches, progressbar=False)
        self.model: Optional[PeftModel] = None
        self.parametrization: Optional[str] = None
        self.restart: Callable[[], None] = lambda: None
        self.before = math.log(perplexity(self.base, subject.held_out, batch_size=8))

    def run(self, parametrization: str, rate: float) -> dict[str, float]:
        """Held-out loss before and after tuning at one learning rate; infinite if it diverged."""
        if parametrization != self.parametrization:
            base = self.base if self.model is None else self.model.unload()
            config = copy.copy(self.config)
            config.parametrization = parametrization
            self.base, self.model, self.parametrization = base, get_peft_model(base, config), parametrization
            self.restart = Restart(self.model)
        self.restart()
        name = f"{parametrization}, rate {rate:g}"
        blocks, batch_size = self.subject.train, self.subject.batch_size
        losses = train(self.model, causal_batches(blocks, batch_size), learning_rate=rate, name=name)
        after = math.log(perplexity(self.model, self.subject.held_out, batch_size=8))
        diverged = not (math.isfinite(losses[-1]) and math.isfinite(after))
        return {"before": self.before, "after": math.inf if diverged else after}


def settings(args: argparse.Namespace, subject: str, parametrization: str, rate: float) -> dict[str, Any]:
    """Everything that a run depends on."""
    names = ("bits", "group_size", "seed", "data", *(("steps", "model") if subject.startswith("real") else ()))
    if not subject.startswith("real"):
        names += ("small_steps", "pretraining_steps", "smoke")
    return {
        "subject": subject,
        "parametrization": parametrization,
        "rate": rate,
        **{name: getattr(args, name) for name in names},
    }


def runs(args: argparse.Namespace) -> list[tuple[str, str, float]]:
    """Subject, parametrisation and learning rate of every run."""
    return [
        (subject, parametrization, rate)
        for subject in args.subjects
        for parametrization in PARAMETRIZATIONS
        for rate in (LEARNING_RATES[parametrization][1:3] if args.smoke else LEARNING_RATES[parametrization])
    ]


def measure(results: Results, args: argparse.Namespace) -> None:
    """Every run that isn't stored yet."""
    current, tuned = None, None
    for subject, parametrization, rate in runs(args):
        key = settings(args, subject, parametrization, rate)
        if results.find(key) is not None:
            continue
        if current != subject:
            tuned = None  # frees the last one first
            log(f"Preparing {subject}")
            current, tuned = subject, Tuned(SUBJECTS[subject](args), args)
        found = results.add(key, tuned.run(parametrization, rate))
        log(f"{subject}, {parametrization}, {rate:g}: {found['before']:.3f} -> {found['after']:.3f}")


def losses_of(results: Results, args: argparse.Namespace) -> dict[str, dict[float, dict[str, float]]]:
    """Held-out loss after tuning, by parametrisation, rate and subject; only what is measured."""
    losses: dict[str, dict[float, dict[str, float]]] = {}
    for subject, parametrization, rate in runs(args):
        found = results.find(settings(args, subject, parametrization, rate))
        if found is not None:
            losses.setdefault(parametrization, {}).setdefault(rate, {})[subject] = found["after"]
    return losses


def table(results: Results, args: argparse.Namespace) -> str:
    """Held-out loss of every run; the best of a subject under a parametrisation in bold."""
    losses, lines = losses_of(results, args), []
    measured = {run[0]: found for run in runs(args) if (found := results.find(settings(args, *run)))}
    before = [_number(measured[name]["before"]) if name in measured else None for name in args.subjects]
    lines.append(["quantised, untuned", None, *before])
    for parametrization, by_rate in losses.items():
        best = {name: min(row.get(name, math.inf) for row in by_rate.values()) for name in args.subjects}
        for rate, row in by_rate.items():
            cells = [_number(row.get(name), row.get(name) == best[name]) for name in args.subjects]
            lines.append([parametrization, f"{rate:g}", *cells])
    return markdown_table(["Parametrisation", "Learning rate", *args.subjects], lines)


def _number(value: Optional[float], bold: bool = False) -> Optional[str]:
    if value is None:
        return None
    text = f"{value:.3f}" if math.isfinite(value) else "diverged"
    return f"**{text}**" if bold and math.isfinite(value) else text


def conclusion(results: Results, args: argparse.Namespace) -> list[str]:
    """Per parametrisation: the best rate of each subject, and the best single rate with its worst excess loss."""
    lines, worst_of = [], {}
    for parametrization, by_rate in losses_of(results, args).items():
        by_rate = {rate: row for rate, row in by_rate.items() if len(row) == len(args.subjects)}
        if not by_rate:
            continue
        best = {name: min(by_rate, key=lambda rate: by_rate[rate][name]) for name in args.subjects}
        excess = {
            rate: max(row[name] - by_rate[best[name]][name] for name in args.subjects) for rate, row in by_rate.items()
        }
        rate = min(excess, key=lambda rate: excess[rate])
        worst_of[parametrization] = excess[rate]
        own = ", ".join(f"{name} {best[name]:g}" for name in args.subjects)
        lines.append(
            f"- {parametrization}: best rates {own}; the best single rate, {rate:g}, costs at most "
            f"{excess[rate]:.3f} of loss on any model (ratio of perplexities {math.exp(excess[rate]):.3f})"
        )
    if worst_of:
        lines.append(f"- one learning rate serves best: {min(worst_of, key=lambda name: worst_of[name])}")
    return lines


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__, "peqa_learning_rate.json")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the real model: a Llama, for the rescaled one")
    parser.add_argument(
        "--data", default=PYTHON_DOCS, help="text: Python's documentation, a file, a folder or a hub id"
    )
    parser.add_argument("--subjects", nargs="+", choices=tuple(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--steps", type=int, default=12, help="steps of 2 x 128 tokens on the real models")
    parser.add_argument("--small-steps", type=int, default=40, help="steps of 16 x 128 bytes on the small ones")
    parser.add_argument("--pretraining-steps", type=int, default=300)
    args = parser.parse_args(argv)
    if args.smoke:
        args.subjects, args.small_steps, args.pretraining_steps = list(SUBJECTS)[:2], 2, 2
    return args


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure, then print the table and what follows from it."""
    args = parse(argv)
    results = Results(args.output, args.seed)
    if not args.table:
        measure(results, args)
    print(table(results, args))
    print()
    print("\n".join(conclusion(results, args)))
    if results.rows:
        print("\n" + describe(results.rows[-1]["environment"]))


if __name__ == "__main__":
    main()
