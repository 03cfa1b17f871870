# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Cost of a training step: time, peak memory, trained and optimiser bytes, for PEQA, AlphaTuning, LoRA and full
fine-tuning.

Every measurement is a process of its own, so that no peak hides another; the methods take turns for several rounds, so
that a slow minute of the machine hits them all. Tokens are random: neither time nor memory depends on them. Linux
only.

    python -m benchmarks peqa_training
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from typing import Any, NamedTuple, Optional

import torch
from peft import get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import baselines
from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.run import Run, log
from benchmarks.core.task import Runs, Task, claims_of_each, run_named, tables_of_each
from benchmarks.core.worker import fresh_process
from benchmarks.resident import available_bytes, peak_resident_bytes, reset_peak, resident_bytes
from benchmarks.tuning import float_model, trainable
from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.quant.kernel import KERNEL_VARIABLE
from peft_ext.quant.linear import PackedLinear
from peft_ext.scale_tuning.config import ScaleTuningConfig
from peft_ext.scale_tuning.quantization import pack_layer


BILLION = "random-llama-1b"
BILLION_CONFIG = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
# Models of random weights, by name; the small one is of the quick size.
RANDOM = {
    BILLION: BILLION_CONFIG,
    "two layers of random-llama-1b": {**BILLION_CONFIG, "vocab_size": 4096, "num_hidden_layers": 2},
}
MB = 1e6


class Method(NamedTuple):
    """What is trained, and in which format."""

    kind: str
    bits: Optional[int] = None
    group_size: int = -1
    kernel: str = "auto"  # PEFT_EXT_KERNEL

    @property
    def title(self) -> str:
        """The first column."""
        if self.bits is None:
            return self.kind
        form = "per channel" if self.group_size == -1 else f"group {self.group_size}"
        note = "" if self.kernel == "auto" else f"; {self.kernel}'s matmul"
        return f"{self.kind}, {self.bits} bits, {form}{note}"


LORA, FULL, PLAIN = "LoRA, r = 8", "Full fine-tuning", "PEQA by plain autograd"
ALPHA, ALL_ALPHAS = "AlphaTuning", "AlphaTuning, all alphas"
METHODS = (
    Method("PEQA", 4),
    Method(LORA),
    Method(PLAIN, 4),
    Method("PEQA", 4, kernel="torch"),
    Method("PEQA", 4, 64),
    Method(PLAIN, 4, 64),
    Method("PEQA", 3),
    Method("PEQA", 3, 64),
    Method(ALPHA, 4),
    Method(ALL_ALPHAS, 4),
    Method(ALPHA, 3),
    Method(FULL),
)


class PlainLinear(nn.Module):
    """The comparison: `scale * (codes - zero_point)` as a tensor of the weight's size, the rest left to autograd."""

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.packed_layer = packed
        self.delta = nn.Parameter(torch.zeros_like(packed.scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.packed_layer
        scale = (packed.scale * (1 + self.delta)).to(x.dtype)[..., None]
        centred = packed.codes().view(*packed.scale.shape, -1) - packed.zero_point.to(x.dtype)[..., None]
        return nn.functional.linear(x, (scale * centred).view(packed.out_features, packed.in_features), packed.bias)


def build(model: str, method: Method, dtype: torch.dtype) -> nn.Module:
    """The model, ready for the method's training."""
    config = config_of(method)
    if model in RANDOM:
        base = random_llama(RANDOM[model], dtype, config)
    else:
        base = float_model(model).to(dtype)
    if method.kind == FULL:
        return base.requires_grad_(True)
    if method.kind == LORA:
        return baselines.lora(base)
    tuned = get_peft_model(base, config)
    return plain_autograd(tuned.unload()) if method.kind == PLAIN else tuned


def config_of(method: Method) -> Optional[ScaleTuningConfig]:
    """The tuner's config, by the quickest start: time and memory don't depend on it."""
    if method.bits is None:
        return None
    if method.kind in (ALPHA, ALL_ALPHAS):
        trained = "first" if method.kind == ALPHA else "all"
        return AlphaTuningConfig(
            bits=method.bits, group_size=method.group_size, init_method="greedy", trained_alphas=trained
        )
    return PeqaConfig(bits=method.bits, group_size=method.group_size)


def plain_autograd(base: nn.Module) -> nn.Module:
    """Every packed layer of `base` replaced by the comparison's."""
    base.requires_grad_(False)
    for name, layer in list(base.named_modules()):
        if isinstance(layer, PackedLinear):
            base.set_submodule(name, PlainLinear(layer))
    return base


def random_llama(shape: dict[str, int], dtype: torch.dtype, config: Optional[ScaleTuningConfig]) -> nn.Module:
    """A Llama of random parameters; with a config, each layer is packed as soon as it is made."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype)
    output = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        module.to_empty(device="cpu", recurse=False)
        for _, parameter in module.named_parameters(recurse=False):
            # uniform numbers with the standard deviation of 0.02 that models start from; norms start at one
            nn.init.ones_(parameter) if "norm" in name else nn.init.uniform_(parameter, -0.035, 0.035)
        if config is not None and isinstance(module, nn.Linear) and module is not output:
            model.set_submodule(name, pack_layer(module, config, name))
    return model.eval()


def train(model: str, method: list, shape: tuple[int, int], steps: int, dtype: str, seed: int) -> dict[str, Any]:
    """Build, then train a few steps in this process; see the keys for what is measured.

    Args:
        model: Its name.
        method: The fields of a [`Method`].
        shape: Sequences of a batch, and their tokens.
        steps: Those that are timed, after one that isn't.
        dtype: Of the weights.
        seed: Of weights and tokens.
    """
    torch.manual_seed(seed)
    before = resident_bytes()
    tuned = build(model, Method(*method), getattr(torch, dtype)).train()
    parameters = trainable(tuned)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    peak_of_set_up = peak_resident_bytes()
    gc.collect()
    reset_peak()
    at_start = resident_bytes()
    batches = torch.randint(0, tuned.config.vocab_size, (steps + 1, *shape))
    seconds = [_step(tuned, optimizer, batch) for batch in batches]
    state = (value for entry in optimizer.state.values() for value in entry.values())
    with tempfile.TemporaryDirectory() as folder:
        adapter = baselines.adapter_bytes(tuned, folder)
    return {
        "seconds": seconds[1:],
        "before": before,
        "at_start": at_start,
        "peak": peak_resident_bytes(),
        "peak_of_set_up": peak_of_set_up,
        "trained": sum(parameter.numel() for parameter in parameters),
        "trained_bytes": sum(parameter.nbytes for parameter in parameters),
        "optimizer_bytes": sum(value.nbytes for value in state if isinstance(value, torch.Tensor)),
        "adapter_bytes": adapter,
    }


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def in_own_process(run: Run, method: Method) -> dict[str, Any]:
    """[`train`] in a fresh process."""
    needed = _bytes_of_full_tuning(run) if method.kind == FULL else 0
    if needed > 0.9 * available_bytes():
        reason = f"needs about {needed / 1e9:.0f} GB, {available_bytes() / 1e9:.0f} GB are free"
        return {"skipped": reason}
    arguments = {name: run.settings[name] for name in ("model", "steps", "dtype", "seed")}
    arguments = {**arguments, "method": method, "shape": (run.batch_size, run.block_size)}
    return fresh_process(train, arguments, f"{method.title} on {run.model}", {KERNEL_VARIABLE: method.kernel})


def _bytes_of_full_tuning(run: Run) -> float:
    """Weights, gradients and two moments, and a guess at activations: what full fine-tuning needs at least."""
    if run.model != BILLION:
        return 0
    hidden, layers, wide = (BILLION_CONFIG[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    parameters = layers * hidden * (2.5 * hidden + 3 * wide) + 2 * BILLION_CONFIG["vocab_size"] * hidden
    activations = run.batch_size * run.block_size * layers * (10 * hidden + 4 * wide)
    size = getattr(torch, run.dtype).itemsize
    return size * (4 * parameters + activations)


def methods_of(run: Run) -> list[Method]:
    """The methods of an experiment, by their titles; all if it names none."""
    return [method for method in METHODS if not run.only or method.title in run.only]


def key_of(method: Method, repeat: int) -> dict[str, Any]:
    """What tells a measurement from others of the experiment."""
    return {**method._asdict(), "round": repeat}


def collected(run: Run, method: Method) -> Optional[dict[str, Any]]:
    """All rounds of a method as one: the median step, the largest peak. None before the first."""
    rounds = [run.find(key_of(method, repeat)) for repeat in range(run.rounds)]
    rounds = [result for result in rounds if result is not None]
    if not rounds or "skipped" in rounds[0]:
        return rounds[0] if rounds else None
    merged = dict(rounds[0])
    merged["step"] = statistics.median(second for result in rounds for second in result["seconds"])
    for name in ("peak", "peak_of_set_up"):
        merged[name] = max(result[name] for result in rounds)
    return merged


def ratio_of_steps(run: Run, over: Method, under: Method) -> Optional[float]:
    """Median over the rounds of the ratio of the two methods' median steps."""
    ratios = []
    for repeat in range(run.rounds):
        pair = [run.find(key_of(method, repeat)) for method in (over, under)]
        if all(result and "seconds" in result for result in pair):
            ratios.append(statistics.median(pair[0]["seconds"]) / statistics.median(pair[1]["seconds"]))
    return statistics.median(ratios) if ratios else None


def ratio_of_peaks(run: Run, over: Method, under: Method) -> Optional[float]:
    """The ratio of the two methods' peaks."""
    pair = [collected(run, method) for method in (over, under)]
    return pair[0]["peak"] / pair[1]["peak"] if all(found and "peak" in found for found in pair) else None


def tables(run: Run) -> dict[str, str]:
    """Time and memory of every method."""
    headers = ["Method", "s / step", "step / LoRA's", "Peak, MB", "peak / LoRA's", "Peak growth, MB"]
    headers += ["Peak of set-up, MB", "Trained numbers", "Optimiser, MB", "Adapter file, bytes"]
    lines = []
    for method in methods_of(run):
        found = collected(run, method)
        if found is None or "skipped" in found:
            reason = "not measured" if found is None else found["skipped"]
            lines.append([method.title, reason, *[None] * (len(headers) - 2)])
            continue
        ratio, memory = ratio_of_steps(run, method, Method(LORA)), ratio_of_peaks(run, method, Method(LORA))
        lines.append(
            [
                method.title,
                f"{found['step']:.2f}",
                None if ratio is None else f"{ratio:.2f}",
                f"{found['peak'] / MB:,.0f}",
                None if memory is None else f"{memory:.2f}",
                f"{(found['peak'] - found['before']) / MB:,.0f}",
                f"{found['peak_of_set_up'] / MB:,.0f}",
                f"{found['trained']:,}",
                f"{found['optimizer_bytes'] / MB:.2f}",
                None if found["adapter_bytes"] is None else f"{found['adapter_bytes']:,}",
            ]
        )
    return {"a training step": markdown_table(headers, lines)}


def claims(run: Run) -> list[Claim]:
    """What PEQA's step is held to."""
    found, methods = [], methods_of(run)
    for bits in (4, 3):
        method = Method("PEQA", bits)
        if method in methods:
            found.append(Claim(f"step of {method.title}, over LoRA's", ratio_of_steps(run, method, Method(LORA)), 1.0))
    for group in (-1, 64):
        over, under = Method("PEQA", 4, group), Method(PLAIN, 4, group)
        if under in methods:
            found.append(Claim(f"step of {over.title}, over plain autograd's", ratio_of_steps(run, over, under), 0.75))
    if run.model == BILLION or run.size != "full":
        memory = ratio_of_peaks(run, Method("PEQA", 4), Method(LORA))
        found.append(Claim("peak memory of PEQA, 4 bits, per channel, over LoRA's", memory, 0.6))
    peqa = collected(run, Method("PEQA", 4))
    if peqa is not None:
        spare = (peqa["adapter_bytes"] - 4 * peqa["trained"]) / 1024
        found.append(Claim("adapter file beyond 4 bytes for each scale", spare, 64, " KiB"))
    return found


def headlines(runs: Runs) -> list[Headline]:
    """A step of both models."""
    area, page = "Tuning packed models", "../benchmarks/peqa.md#cost-of-training"
    found = []
    small, large = run_named(runs, "smollm2"), run_named(runs, "billion")
    if small and small.rows:
        time_ratio = ratio_of_steps(small, Method("PEQA", 4), Method(LORA))
        memory = ratio_of_peaks(small, Method("PEQA", 4), Method(LORA))
        sizes = [
            (collected(small, method) or {})["adapter_bytes"] / MB for method in (Method("PEQA", 4), Method(LORA))
        ]
        shown = f"{time_ratio:.2f} of LoRA's time, {memory:.2f} of its peak memory; "
        shown += f"the adapter has {sizes[0]:.2f} MB, LoRA's {sizes[1]:.1f}"
        wanted = unless(bool(time_ratio and time_ratio <= 1), "time at most 1")
        found.append(Headline(area, "PEQA, a training step of SmolLM2", shown, wanted, page))
    if large and large.rows:
        time_ratio = ratio_of_steps(large, Method("PEQA", 4), Method(LORA))
        memory = ratio_of_peaks(large, Method("PEQA", 4), Method(LORA))
        shown = f"{time_ratio:.2f} of LoRA's time, {memory:.2f} of its peak memory"
        wanted = unless(bool(memory and memory <= 0.6), "memory at most 0.6")
        found.append(Headline(area, "PEQA, a training step at 1.1 billion parameters (random)", shown, wanted, page))
    return found


def measure(run: Run) -> None:
    """Every method in turn, for several rounds."""
    turns = [(repeat, method) for repeat in range(run.rounds) for method in methods_of(run)]
    for repeat, method in tqdm(turns, desc="Measuring", disable=None):
        key = key_of(method, repeat)
        if run.find(key) is None:
            log(f"{run.model}, round {repeat + 1}: {method.title}")
            run.add(key, in_own_process(run, method))


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims), headlines)
