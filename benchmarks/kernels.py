# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The CPU kernel against dense products and torch's own 4-bit one: milliseconds per product, weights beyond the cache.

Contenders take turns in one process, with a read of memory in every round, since a shared machine's bandwidth moves. Weights
rotate through more memory than the last cache holds. `avx2` rows hold both kernels to that
(`PEFT_EXT_CPU_CAPABILITY`, `ATEN_CPU_CAPABILITY`), in a process of their own. The kernel rounds activations to 8 bits: how far
products are off is measured on what a language model's layers are given.

    python -m benchmarks kernels
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, Optional

import torch
from peft import get_peft_model
from torch import nn

from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.run import Run, log
from benchmarks.core.task import Runs, Task, run_named
from benchmarks.core.worker import fresh_process
from benchmarks.tuning import float_model
from peft_ext import PeqaConfig
from peft_ext.models import DEFAULT_MODEL, load_tokenizer
from peft_ext.quant import kernel
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.functional import PackedWeight, packed_linear
from peft_ext.quant.kernel import CAPABILITY_VARIABLE, KERNEL_VARIABLE
from peft_ext.text import PYTHON_DOCS, load_text


CLAIMED = "Llama 7B"  # whose weights no cache holds
BEYOND_CACHE = 160 << 20  # bytes of each contender's weights
MOST_COPIES = 400
ATEN_GROUP = 128


def contenders(
    out_features: int, in_features: int, rows: int, peers: bool
) -> dict[str, tuple[Callable[[Any], Any], list[Any], int]]:
    """By name: a function of a weight, weights that it rotates through, and the bytes of one."""
    x = torch.randn(rows, in_features)
    half = x.bfloat16()

    def rotated(make: Callable[[], Any], size: int) -> list[Any]:
        return [make() for _ in range(max(2, min(MOST_COPIES, -(-BEYOND_CACHE // size))))]

    def packed(bits: int, groups: int, exact: bool = False) -> tuple[Callable[[Any], Any], list[Any], int]:
        size = out_features * in_features * bits // 8 + out_features * groups * 5
        scale = torch.rand(out_features, groups) + 0.1
        zero_point = torch.full((out_features, groups), 2 ** (bits - 1), dtype=torch.uint8)

        def make() -> PackedWeight:
            planes = torch.randint(0, 256, (-(-out_features // 32), in_features // 8, bits, 32), dtype=torch.uint8)
            return PackedWeight(planes, zero_point, out_features, in_features)

        def run(weight: PackedWeight) -> torch.Tensor:
            return packed_linear(x, weight, scale)

        def run_exact(weight: PackedWeight) -> torch.Tensor:
            with kernel.using(**{KERNEL_VARIABLE: "exact"}):
                return run(weight)

        return run_exact if exact else run, rotated(make, size), size

    def int4() -> tuple[Callable[[Any], Any], list[Any], int]:
        size = out_features * in_features // 2
        groups = torch.rand(in_features // ATEN_GROUP, out_features, 2, dtype=torch.bfloat16)

        def make() -> torch.Tensor:
            codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.int32)
            return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)

        return (
            lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(half, w, ATEN_GROUP, groups),
            rotated(make, size),
            size,
        )

    def module(
        dtype: torch.dtype, quantize: Callable[[nn.Module], None]
    ) -> tuple[Callable[[Any], Any], list[Any], int]:
        def make() -> nn.Module:
            layer = nn.Sequential(nn.Linear(in_features, out_features, bias=False, dtype=dtype))
            quantize(layer)
            return layer[0]

        return lambda layer: layer(x.to(dtype)), rotated(make, count // 2), count // 2

    count = out_features * in_features
    found = {
        "float32": (
            lambda w: torch.nn.functional.linear(x, w),
            rotated(lambda: torch.randn(out_features, in_features), 4 * count),
            4 * count,
        ),
        "bfloat16": (
            lambda w: torch.nn.functional.linear(half, w),
            rotated(lambda: torch.randn(out_features, in_features).bfloat16(), 2 * count),
            2 * count,
        ),
    }
    if in_features % ATEN_GROUP == 0:
        found["aten int4"] = int4()
        for name, quantize in (_peers() if peers else {}).items():
            found[name] = module(torch.bfloat16, quantize)
    for bits in (4, 3, 2):
        found[f"ours, {bits} bits"] = packed(bits, 1)
    if in_features % 128 == 0:
        found["ours, 4 bits, groups of 128"] = packed(4, in_features // 128)
    found["ours, 4 bits, exact"] = packed(4, 1, exact=True)
    return found


def _peers() -> dict[str, Callable[[nn.Module], None]]:
    """How other libraries make 4-bit layers in groups of 128 for a CPU; those that are installed."""
    peers: dict[str, Callable[[nn.Module], None]] = {}
    try:
        from optimum import quanto

        def by_quanto(module: nn.Module) -> None:
            quanto.quantize(module, weights=quanto.qint4)
            quanto.freeze(module)

        peers["optimum-quanto, qint4"] = by_quanto
    except ImportError:
        log("left out: pip install optimum-quanto")
    try:
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

        # its Int4WeightOnlyConfig has no CPU path any more (0.18)
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(ATEN_GROUP))
        peers["torchao, IntxWeightOnly int4"] = lambda module: quantize_(module, config)
    except ImportError:
        log("left out: pip install torchao")
    return peers


@torch.no_grad()
def product(
    out_features: int, in_features: int, rows: int, rounds: int, seconds: float, peers: bool
) -> dict[str, Any]:
    """Median milliseconds of each contender and median gigabytes per second of a plain read.

    Args:
        out_features: Of the weight.
        in_features: Of the weight.
        rows: Of the activations.
        rounds: In which each contender has a turn.
        seconds: Of a turn.
        peers: Whether other libraries' 4-bit layers take part.
    """
    torch.manual_seed(0)
    who = contenders(out_features, in_features, rows, peers)
    memory = torch.ones(BEYOND_CACHE // 4)
    milliseconds: dict[str, list[float]] = {name: [] for name in who}
    bandwidth = []
    for _ in range(rounds):
        for name, (run, weights, _) in who.items():
            run(weights[0])
            turn, begin = itertools.cycle(weights), time.perf_counter()
            calls = 0
            while (took := time.perf_counter() - begin) < seconds:
                run(next(turn))
                calls += 1
            milliseconds[name].append(1e3 * took / calls)
        begin = time.perf_counter()
        memory.sum()
        bandwidth.append(memory.nbytes / (time.perf_counter() - begin) / 1e9)
    return {
        "milliseconds": {name: statistics.median(values) for name, values in milliseconds.items()},
        "all_milliseconds": milliseconds,
        "bytes": {name: size for name, (_, _, size) in who.items()},
        "read_gigabytes_per_second": statistics.median(bandwidth),
        "all_read": bandwidth,
    }


@torch.no_grad()
def rounding(model: str, tokens: int, seed: int) -> dict[str, float]:
    """How far products are off by the kernel's rounding of activations: mean and largest relative error of a layer's output.

    Args:
        model: Packed to 4 bits, by channels.
        tokens: Of the text whose activations are multiplied, one row at a time.
        seed: Of the tokens.
    """
    torch.manual_seed(seed)
    packed = get_peft_model(float_model(model), PeqaConfig(bits=4)).unload().eval()
    given: dict[str, torch.Tensor] = {}
    layers = packed_layers(packed)
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, name=name: given.update({name: args[0][0].clone()}))
        for name, layer in layers.items()
    ]
    with kernel.using(**{KERNEL_VARIABLE: "exact"}):
        packed(input_ids=_text(packed, model, tokens))
    for hook in hooks:
        hook.remove()
    errors = []
    for name, layer in layers.items():
        with kernel.using(**{KERNEL_VARIABLE: "exact"}):
            exact = layer(given[name])
        for row, wanted in zip(given[name], exact):
            errors.append(((layer(row[None])[0] - wanted).norm() / wanted.norm()).item())
    return {"mean": statistics.mean(errors), "largest": max(errors), "products": len(errors)}


def _text(packed: nn.Module, model: str, tokens: int) -> torch.Tensor:
    if model != DEFAULT_MODEL:
        return torch.randint(0, packed.config.vocab_size, (1, tokens))
    text = "\n\n".join(load_text(PYTHON_DOCS).train[:20])
    return torch.tensor([load_tokenizer(model)(text).input_ids[:tokens]])


def paths() -> list[str]:
    """The best path of this machine's processor, and AVX2."""
    return list(dict.fromkeys([kernel.CAPABILITIES[kernel.capability()], "avx2"]))


def measure(run: Run) -> None:
    """All products on all paths, then the rounding."""
    for capability in paths():
        # torch reads its variable when it is loaded
        held = {CAPABILITY_VARIABLE: capability, "ATEN_CPU_CAPABILITY": capability} if capability != paths()[0] else {}
        for (model, shape), rows in itertools.product(run.shapes.items(), run.batch_rows):
            key = {"shape": shape, "model": model, "rows": rows, "capability": capability}
            if run.find(key) is None:
                log(f"{capability}: {model}, {rows} rows")
                arguments = dict(zip(("out_features", "in_features"), shape))
                arguments |= {"rows": rows, **{name: run.settings[name] for name in ("rounds", "seconds", "peers")}}
                run.add(key, fresh_process(product, arguments, f"{model} on {capability}", held))
        key = {"part": "rounding", "capability": capability}
        if run.find(key) is None:
            log(f"{capability}: rounding")
            arguments = {"model": run.rounding_model, "tokens": run.rounding_tokens, "seed": run.seed}
            run.add(key, fresh_process(rounding, arguments, f"rounding on {capability}", held))


def tables(runs: Runs) -> dict[str, str]:
    """Milliseconds, by shape and path; the rounding."""
    found = {}
    for run in runs:
        products = [row for row in run.rows if "model" in row["key"]]
        for capability in dict.fromkeys(row["key"]["capability"] for row in products):
            for model in dict.fromkeys(row["key"]["model"] for row in products):
                of_model = [
                    row for row in products if (row["key"]["model"], row["key"]["capability"]) == (model, capability)
                ]
                of_model.sort(key=lambda row: row["key"]["rows"])
                if not of_model:
                    continue
                names = list(of_model[0]["result"]["milliseconds"])
                header = ["", *(f"{row['key']['rows']} rows" for row in of_model)]
                lines = [[name, *(f"{row['result']['milliseconds'][name]:.3f}" for row in of_model)] for name in names]
                found[f"{model}, {capability}: milliseconds"] = markdown_table(header, lines)
        errors = [row for row in run.rows if row["key"].get("part") == "rounding"]
        lines = [
            [row["key"]["capability"], *(f"{100 * row['result'][name]:.2f} %" for name in ("mean", "largest"))]
            for row in errors
        ]
        found["Products, off by the rounding of activations"] = markdown_table(
            ["path", "on average", "at most"], lines
        )
    return found


def _one_row(run: Run, capability: str) -> Optional[dict[str, Any]]:
    """The result of one row of the largest shape on a path."""
    wanted = {"model": CLAIMED, "rows": 1, "capability": capability}
    return next((row["result"] for row in run.rows if wanted.items() <= row["key"].items()), None)


def ratio(run: Run, capability: str, over: str, under: str) -> Optional[float]:
    """Of two contenders' times on one row of the largest shape."""
    took = (_one_row(run, capability) or {}).get("milliseconds", {})
    return took[over] / took[under] if over in took and under in took else None


def share(run: Run, bits: int) -> Optional[float]:
    """Of a plain read's bandwidth, on the best path."""
    result, name = _one_row(run, _best(run)), f"ours, {bits} bits"
    if result is None:
        return None
    return result["bytes"][name] / result["milliseconds"][name] / 1e6 / result["read_gigabytes_per_second"]


def _best(run: Run) -> str:
    """The best path that was measured."""
    return next((row["key"]["capability"] for row in run.rows if row["key"]["capability"] != "avx2"), "avx2")


def _rounding(run: Run, capability: str, name: str) -> Optional[float]:
    found = run.find({"part": "rounding", "capability": capability})
    return found and 100 * found[name]


def claims(runs: Runs) -> list[Claim]:
    """One row against the bandwidth and torch's int4; and what the rounding may cost."""
    found = []
    for run in runs:
        best = _best(run)
        for bits in (4, 3, 2):
            found.append(Claim(f"{bits} bits: share of the read bandwidth", share(run, bits), 0.8, at_least=True))
        found += [
            Claim(
                "4 bits: time of aten's int4 over ours",
                ratio(run, best, "aten int4", "ours, 4 bits"),
                1.0,
                at_least=True,
            ),
            Claim(
                "3 bits: times faster than our 4",
                ratio(run, best, "ours, 4 bits", "ours, 3 bits"),
                1.25,
                at_least=True,
            ),
            Claim(
                "2 bits: times faster than our 4", ratio(run, best, "ours, 4 bits", "ours, 2 bits"), 1.7, at_least=True
            ),
            Claim(
                "AVX2, 4 bits: time of aten's int4 over ours",
                ratio(run, "avx2", "aten int4", "ours, 4 bits"),
                3.0,
                at_least=True,
            ),
            Claim("rounding: the worst product off by, best path", _rounding(run, best, "largest"), 1.0, " %"),
            Claim("rounding: the worst product off by, AVX2", _rounding(run, "avx2", "largest"), 1.0, " %"),
        ]
    return found


def headlines(runs: Runs) -> list[Headline]:
    """One row, and the rounding."""
    run = run_named(runs, "three_shapes")
    if run is None or not run.rows:
        return []
    area, page = "Speed and serving on a CPU", "../benchmarks/serving.md#the-cpu-kernel"
    best = _best(run)
    fast, slow = ratio(run, best, "aten int4", "ours, 4 bits"), ratio(run, "avx2", "aten int4", "ours, 4 bits")
    assert fast and slow
    found = [
        Headline(
            area,
            "The CPU kernel, one row, against torch's int4",
            f"{fast:.2f} times as fast; held to AVX2 {slow:.1f} times",
            unless(fast >= 1 and slow >= 3, "1 and 3 times"),
            page,
        )
    ]
    mean, *worst = (_rounding(run, *of) for of in ((best, "mean"), (best, "largest"), ("avx2", "largest")))
    if mean is not None and None not in worst:
        found.append(
            Headline(
                area,
                "The CPU kernel's rounding of activations",
                f"products off by {mean:.1f} % on average; at most {worst[0]:.1f} % on AVX-512, {worst[1]:.1f} % on AVX2",
                unless(max(worst) <= 1, "1 % at most"),
                page,
            )
        )
    return found


TASK = Task(measure, tables, claims, headlines)
