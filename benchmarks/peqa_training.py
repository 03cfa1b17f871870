# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Cost of a training step: time, peak memory, trained and optimiser bytes, for PEQA, AlphaTuning, LoRA and full
fine-tuning.

Every measurement is a process of its own, so that no peak hides another; the methods take turns for several rounds, so
that a slow minute of the machine hits them all. Tokens are random: neither time nor memory depends on them. Linux
only.

    python -m benchmarks.peqa_training

Measurements are stored as they finish and not repeated: after a kill, start it again with the same flags.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from peft import get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import baselines
from benchmarks.common import Results, argument_parser, describe, fresh_process, log, markdown_table, verdict
from benchmarks.resident import available_bytes, peak_resident_bytes, reset_peak, resident_bytes
from benchmarks.tuning import tiny_llama, trainable
from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.models import DEFAULT_MODEL, load
from peft_ext.quant.kernel import KERNEL_VARIABLE
from peft_ext.quant.linear import PackedLinear
from peft_ext.scale_tuning.config import ScaleTuningConfig
from peft_ext.scale_tuning.quantization import pack_layer


BILLION = "random-llama-1b"
TINY = "tiny random Llama"
BILLION_CONFIG = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
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
SMOKE_METHODS = (Method("PEQA", 4), Method(LORA), Method(PLAIN, 4), Method(ALPHA, 3), Method(FULL))


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
    if model == BILLION:
        base = billion(dtype, config)
    else:
        base = (tiny_llama() if model == TINY else load(model, dtype=dtype)).to(dtype)
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


def billion(dtype: torch.dtype, config: Optional[ScaleTuningConfig]) -> nn.Module:
    """A Llama of 1.1 billion random parameters; with a config, each layer is packed as soon as it is made."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**BILLION_CONFIG), dtype=dtype)
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


def measure(model: str, method: Method, shape: tuple[int, int], steps: int, dtype: torch.dtype, seed: int) -> dict:
    """Build, then train a few steps in this process; see the keys for what is measured."""
    torch.manual_seed(seed)
    before = resident_bytes()
    tuned = build(model, method, dtype).train()
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


def in_own_process(args: argparse.Namespace, model: str, method: Method) -> dict[str, Any]:
    """[`measure`] in a fresh process."""
    needed = _bytes_of_full_tuning(model, args) if method.kind == FULL else 0
    if needed > 0.9 * available_bytes():
        reason = f"needs about {needed / 1e9:.0f} GB, {available_bytes() / 1e9:.0f} GB are free"
        return {"skipped": reason}
    flags = ["--worker", json.dumps([model, *method]), "--dtype", args.dtype, "--seed", str(args.seed)]
    flags += ["--steps", str(args.steps), "--batch-size", str(args.batch_size), "--block-size", str(args.block_size)]
    variables = {KERNEL_VARIABLE: method.kernel}
    return fresh_process("benchmarks.peqa_training", flags, f"{method.title} on {model}", variables)


def _bytes_of_full_tuning(model: str, args: argparse.Namespace) -> float:
    """Weights, gradients and two moments, and a guess at activations: what full fine-tuning needs at least."""
    if model != BILLION:
        return 0
    hidden, layers, wide = (BILLION_CONFIG[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    parameters = layers * hidden * (2.5 * hidden + 3 * wide) + 2 * BILLION_CONFIG["vocab_size"] * hidden
    activations = args.batch_size * args.block_size * layers * (10 * hidden + 4 * wide)
    size = getattr(torch, args.dtype).itemsize
    return size * (4 * parameters + activations)


def settings(args: argparse.Namespace, model: str, method: Method, repeat: int) -> dict[str, Any]:
    """Everything that a measurement depends on."""
    names = ("batch_size", "block_size", "steps", "dtype", "seed")
    return {"model": model, **method._asdict(), "round": repeat, **{name: getattr(args, name) for name in names}}


def rounds_of(args: argparse.Namespace, model: str) -> int:
    """Processes per method: the large model's steps are long enough to be told apart after one."""
    return min(args.rounds, args.rounds_of_large) if model == BILLION else args.rounds


def collected(results: Results, args: argparse.Namespace, model: str, method: Method) -> Optional[dict[str, Any]]:
    """All rounds of a method as one: the median step, the largest peak. None before the first."""
    rounds = [results.find(settings(args, model, method, repeat)) for repeat in range(rounds_of(args, model))]
    rounds = [result for result in rounds if result is not None]
    if not rounds or "skipped" in rounds[0]:
        return rounds[0] if rounds else None
    merged = dict(rounds[0])
    merged["step"] = statistics.median(second for result in rounds for second in result["seconds"])
    for name in ("peak", "peak_of_set_up"):
        merged[name] = max(result[name] for result in rounds)
    return merged


def ratio_of_steps(
    results: Results, args: argparse.Namespace, model: str, over: Method, under: Method
) -> Optional[float]:
    """Median over the rounds of the ratio of the two methods' median steps."""
    ratios = []
    for repeat in range(rounds_of(args, model)):
        pair = [results.find(settings(args, model, method, repeat)) for method in (over, under)]
        if all(result and "seconds" in result for result in pair):
            ratios.append(statistics.median(pair[0]["seconds"]) / statistics.median(pair[1]["seconds"]))
    return statistics.median(ratios) if ratios else None


def table(results: Results, args: argparse.Namespace, model: str) -> str:
    """The Markdown table of one model."""
    headers = ["Method", "s / step", "step / LoRA's", "Peak, MB", "peak / LoRA's", "Peak growth, MB"]
    headers += ["Peak of set-up, MB", "Trained", "Trained, MB", "Optimiser, MB", "Adapter file, bytes"]
    lora, lines = collected(results, args, model, Method(LORA)), []
    for method in METHODS:
        found = collected(results, args, model, method)
        if found is None or "skipped" in found:
            reason = "not measured" if found is None else found["skipped"]
            lines.append([method.title, reason, *[None] * (len(headers) - 2)])
            continue
        ratio = ratio_of_steps(results, args, model, method, Method(LORA))
        memory = found["peak"] / lora["peak"] if lora else None
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
                f"{found['trained_bytes'] / MB:.2f}",
                f"{found['optimizer_bytes'] / MB:.2f}",
                None if found["adapter_bytes"] is None else f"{found['adapter_bytes']:,}",
            ]
        )
    return markdown_table(headers, lines)


def verdicts(results: Results, args: argparse.Namespace) -> list[str]:
    """The lines that say which claims the tables bear out."""
    lines = []
    for model in args.model:
        for bits in (4, 3):
            method = Method("PEQA", bits)
            time_ratio = ratio_of_steps(results, args, model, method, Method(LORA))
            lines.append(verdict(f"{model}: step of {method.title}, over LoRA's", time_ratio, 1.0))
        for group in (-1, 64):
            over, under = Method("PEQA", 4, group), Method(PLAIN, 4, group)
            plain_ratio = ratio_of_steps(results, args, model, over, under)
            lines.append(verdict(f"{model}: step of {over.title}, over plain autograd's", plain_ratio, 0.75))
        found = [collected(results, args, model, method) for method in (Method("PEQA", 4), Method(LORA))]
        memory = found[0]["peak"] / found[1]["peak"] if all(found) else None
        if model == BILLION:
            lines.append(verdict(f"{model}: peak memory of PEQA, 4 bits, per channel, over LoRA's", memory, 0.6))
        lines += _file_verdict(model, found[0])
    return lines


def _file_verdict(model: str, found: Optional[dict[str, Any]]) -> list[str]:
    if found is None:
        return []
    spare = (found["adapter_bytes"] - 4 * found["trained"]) / 1024
    claim = f"{model}: adapter file beyond 4 bytes for each of {found['trained']:,} scales"
    return [verdict(claim, spare, 64, " KiB")]


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__, "peqa_training.json")
    parser.add_argument("--model", nargs="+", default=[DEFAULT_MODEL, BILLION], help=f"{BILLION}: random weights")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round, after one that isn't timed")
    parser.add_argument("--rounds", type=int, default=3, help="processes per method")
    parser.add_argument("--rounds-of-large", type=int, default=1, help=f"processes per method for {BILLION}")
    parser.add_argument("--methods", nargs="*", default=[], help="only methods whose title contains one of these")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.smoke:
        args.model, args.steps, args.rounds, args.batch_size, args.block_size = [TINY], 1, 1, 2, 32
    return args


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure, then print the tables and the verdicts."""
    args = parse(argv)
    if args.worker:
        model, *fields = json.loads(args.worker)
        shape = (args.batch_size, args.block_size)
        print(json.dumps(measure(model, Method(*fields), shape, args.steps, getattr(torch, args.dtype), args.seed)))
        return
    results = Results(args.output, args.seed)
    turns = [
        (model, repeat, method)
        for model in args.model
        for repeat in range(rounds_of(args, model))
        for method in (SMOKE_METHODS if args.smoke else METHODS)
        if not args.methods or any(part in method.title for part in args.methods)
    ]
    for model, repeat, method in tqdm([] if args.table else turns, desc="Measuring"):
        key = settings(args, model, method, repeat)
        if results.find(key) is None:
            log(f"{model}, round {repeat + 1}: {method.title}")
            results.add(key, in_own_process(args, model, method))
    for model in args.model:
        print(f"\n{model}, {args.batch_size} x {args.block_size} tokens, {args.dtype}\n")
        print(table(results, args, model))
    print()
    print("\n".join(verdicts(results, args)))
    if results.rows:
        print("\n" + describe(results.rows[-1]["environment"]))


if __name__ == "__main__":
    main()
