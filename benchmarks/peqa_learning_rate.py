# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which parametrisation of the scales lets one learning rate serve every model?

The scales of PEQA can be trained as they are (s0 + delta, the paper's way), relative to where they start
(s0 * (1 + delta)), or by their logarithm (s0 * exp(delta)). Each is tuned over a grid of learning rates on models of
different width and size of weights: small Llamas trained here from scratch, the real model, and the real model with
its weights rescaled so that it computes the same function. The lines under the table tell what the best single rate
costs on the worst model.

    python -m benchmarks peqa_learning_rate
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks.core.claims import Claim, markdown_table
from benchmarks.core.run import Run, log
from benchmarks.core.task import Task, claims_of_each, tables_of_each
from benchmarks.tuning import Restart, byte_blocks, causal_batches, sample_blocks, train, trained_llama
from peft_ext import PeqaConfig, calibrate
from peft_ext.models import load, load_tokenizer
from peft_ext.perplexity import perplexity
from peft_ext.quant.formats import GPTQ
from peft_ext.scale_tuning.config import PARAMETRIZATIONS
from peft_ext.text import load_text, token_blocks


# Perplexity that one rate for all models may cost on the worst, over its own best rate's.
AT_MOST = 1.02
CALIBRATION_BLOCKS = 16


class Subject(NamedTuple):
    """A float model with its data: `train`, `held_out` and `calibration` are token blocks `[n, tokens]`."""

    model: nn.Module
    train: torch.Tensor
    held_out: torch.Tensor
    calibration: torch.Tensor
    batch_size: int


def small_llama(hidden_size: int, run: Run) -> Subject:
    """A byte-level Llama, trained from scratch on half of the text's blocks; the other half is for tuning."""
    texts = load_text(run.data)
    blocks, held_out = (byte_blocks(part, 128) for part in texts)
    blocks = sample_blocks(blocks, len(blocks), run.seed)
    half = len(blocks) // 2
    model = trained_llama(hidden_size, run.layers, run.pretraining_steps, run.seed, blocks[:half])
    tuning = sample_blocks(blocks[half:], 16 * run.small_steps, run.seed)
    return Subject(model, tuning, held_out[:64], blocks[:CALIBRATION_BLOCKS], 16)


def real(run: Run) -> Subject:
    """The experiment's model."""
    tokenizer, texts = load_tokenizer(run.model), load_text(run.data)
    blocks, held_out = (token_blocks(tokenizer, part, 128) for part in texts)
    blocks = sample_blocks(blocks, len(blocks), run.seed)
    count = 2 * run.steps
    return Subject(
        load(run.model, dtype=torch.float32),
        sample_blocks(blocks[CALIBRATION_BLOCKS:], count, run.seed),
        held_out[:16],
        blocks[:CALIBRATION_BLOCKS],
        2,
    )


def rescaled(subject: Subject, run: Run) -> Subject:
    """The same, each layer's weights larger or smaller by up to a factor of 16 (values and ups by two such)."""
    rescale(subject.model, 16.0, run.seed)
    return subject


@torch.no_grad()
def rescale(model: LlamaForCausalLM, most: float, seed: int) -> None:
    """Multiply weights of a Llama by factors from 1 / most to most that cancel out, so that its function stays.

    Norms against what reads them, the value against the output projection, and the up against the down projection.

    Raises:
        TypeError: If the model isn't built like a Llama.
    """
    if not isinstance(model, LlamaForCausalLM):
        raise TypeError(f"a {type(model).__name__} can't be rescaled here; leave it out of the experiment's subjects.")
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


SUBJECTS: dict[str, Callable[[Run], Subject]] = {
    "Llama, 64 wide": lambda run: small_llama(64, run),
    "Llama, 64 wide, rescaled": lambda run: rescaled(small_llama(64, run), run),
    "Llama, 128 wide": lambda run: small_llama(128, run),
    "Llama, 256 wide": lambda run: small_llama(256, run),
    "real": real,
    "real, rescaled": lambda run: rescaled(real(run), run),
}


class Tuned:
    """A calibrated subject that every run starts from anew."""

    def __init__(self, subject: Subject, run: Run) -> None:
        self.subject = subject
        self.config = PeqaConfig(bits=run.bits, group_size=run.group_size, init_method=GPTQ)
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


def keys(run: Run) -> list[dict[str, Any]]:
    """Subject, parametrisation and learning rate of everything that is tuned."""
    return [
        {"subject": subject, "parametrization": parametrization, "rate": rate}
        for subject in run.subjects
        for parametrization in PARAMETRIZATIONS
        for rate in run.learning_rates[parametrization]
    ]


def measure(run: Run) -> None:
    """Everything that isn't stored yet."""
    current, tuned = None, None
    for key in keys(run):
        if run.find(key) is not None:
            continue
        if current != key["subject"]:
            tuned = None  # frees the last one first
            log(f"Preparing {key['subject']}")
            current, tuned = key["subject"], Tuned(SUBJECTS[key["subject"]](run), run)
        assert tuned is not None
        found = run.add(key, tuned.run(key["parametrization"], key["rate"]))
        log(f"{', '.join(map(str, key.values()))}: {found['before']:.3f} -> {found['after']:.3f}")


def losses_of(run: Run) -> dict[str, dict[float, dict[str, float]]]:
    """Held-out loss after tuning, by parametrisation, rate and subject; only what is measured."""
    losses: dict[str, dict[float, dict[str, float]]] = {}
    for key in keys(run):
        found = run.find(key)
        if found is not None:
            losses.setdefault(key["parametrization"], {}).setdefault(key["rate"], {})[key["subject"]] = found["after"]
    return losses


def tables(run: Run) -> dict[str, str]:
    """Held-out loss of everything, the best of a subject under a parametrisation in bold; and what one rate for all costs."""
    losses, lines = losses_of(run), []
    before = {row["key"]["subject"]: row["result"]["before"] for row in run.rows}
    lines.append(["quantised, untuned", None, *(_number(before.get(name)) for name in run.subjects)])
    for parametrization, by_rate in losses.items():
        best = {name: min(row.get(name, math.inf) for row in by_rate.values()) for name in run.subjects}
        for rate, row in by_rate.items():
            cells = [_number(row.get(name), row.get(name) == best[name]) for name in run.subjects]
            lines.append([parametrization, f"{rate:g}", *cells])
    headers = ["Parametrisation", "Learning rate", *run.subjects]
    costs = [
        [
            name,
            ", ".join(f"{rate:g}" for rate in one.best.values()),
            f"{one.rate:g}",
            f"{one.excess:.3f}",
            f"{math.exp(one.excess):.3f}",
        ]
        for name, one in best_rates(run).items()
    ]
    cost_headers = [
        "Parametrisation",
        "Best rate of each model",
        "Best single rate",
        "Loss that it costs at worst",
        "Ratio of perplexities",
    ]
    return {
        "Held-out loss": markdown_table(headers, lines),
        "What one learning rate for all costs": markdown_table(cost_headers, costs),
    }


def _number(value: Optional[float], bold: bool = False) -> Optional[str]:
    if value is None:
        return None
    text = f"{value:.3f}" if math.isfinite(value) else "diverged"
    return f"**{text}**" if bold and math.isfinite(value) else text


class Rates(NamedTuple):
    """The best rate of each subject, and the best single one with what it costs on the worst of them."""

    best: dict[str, float]
    rate: float
    excess: float


def best_rates(run: Run) -> dict[str, Rates]:
    """By parametrisation, of rates that all subjects were tuned with."""
    found = {}
    for parametrization, by_rate in losses_of(run).items():
        by_rate = {rate: row for rate, row in by_rate.items() if len(row) == len(run.subjects)}
        if by_rate:
            best = {name: min(by_rate, key=lambda rate: by_rate[rate][name]) for name in run.subjects}
            excess = {
                rate: max(row[name] - by_rate[best[name]][name] for name in run.subjects)
                for rate, row in by_rate.items()
            }
            rate = min(excess, key=lambda rate: excess[rate])
            found[parametrization] = Rates(best, rate, excess[rate])
    return found


def claims(run: Run) -> list[Claim]:
    """Relative scales want the same rate in every model; scales as they are, don't."""
    found = best_rates(run)
    relative, absolute = (math.exp(found[name].excess) if name in found else None for name in ("relative", "absolute"))
    name = "perplexity that one rate for all costs on the worst model, "
    return [
        Claim(f"{name}relative", relative, AT_MOST),
        Claim(f"{name}relative over absolute", relative and absolute and relative / absolute, 1.0),
    ]


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims))
