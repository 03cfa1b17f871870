# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The CPU kernel against dense products and torch's own 4-bit one: milliseconds per product, weights beyond the cache.

Contenders take turns in one process, with a read of memory in every round, since a shared machine's bandwidth moves. Weights
rotate through more memory than the last cache holds. `avx2` rows hold both kernels to that
(`PEFT_EXT_CPU_CAPABILITY`, `ATEN_CPU_CAPABILITY`).

    python -m benchmarks.kernels
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import RESULTS, ROOT, Results, log, markdown_table, verdict
from peft_ext.quant import kernel
from peft_ext.quant.functional import PackedWeight, packed_linear
from peft_ext.quant.kernel import CAPABILITY_VARIABLE, KERNEL_VARIABLE


# [out, in] of the largest layers: SmolLM2-135M, Llama 3.2 1B, Llama 2 7B
SHAPES = {"SmolLM2-135M": (1536, 576), "Llama 1B": (8192, 2048), "Llama 7B": (4096, 11008)}
ROWS = (1, 2, 4, 8, 16)
BEYOND_CACHE = 160 << 20  # bytes of each contender's weights
MOST_COPIES = 400
SECONDS = 0.05  # of each contender in a round
ATEN_GROUP = 128


def contenders(
    out_features: int, in_features: int, rows: int
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
        for name, quantize in _peers().items():
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
def measure(out_features: int, in_features: int, rows: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Median milliseconds of each contender and median gigabytes per second of a plain read."""
    torch.manual_seed(0)
    who = contenders(out_features, in_features, rows)
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


def main(argv: Sequence[str] = ()) -> None:
    """Measure what the results file lacks, on both paths, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--capability", choices=kernel.CAPABILITIES, help="measure on this path only, in this process")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: checks that the script runs")
    args = parser.parse_args(argv)
    best = kernel.CAPABILITIES[kernel.capability()]
    for capability in [args.capability] if args.capability else dict.fromkeys([best, "avx2"]):
        if capability == best or args.capability:
            _measure_all(args, capability)
            continue
        # torch reads its variable when it is loaded
        variables = {
            **os.environ,
            CAPABILITY_VARIABLE: capability,
            "ATEN_CPU_CAPABILITY": capability,
            "PYTHONPATH": str(ROOT),
        }
        options = ["--output", str(args.output), "--rounds", str(args.rounds), "--capability", capability]
        subprocess.run(
            [sys.executable, "-m", "benchmarks.kernels", *options, *["--smoke"] * args.smoke],
            env=variables,
            check=True,
        )
    if not args.capability:
        print_tables(args.output, best)


def _measure_all(args: argparse.Namespace, capability: str) -> None:
    results = Results(args.output, seed=0)
    shapes = {"smoke": (64, 128)} if args.smoke else SHAPES
    for (model, shape), rows in itertools.product(shapes.items(), ROWS[:1] if args.smoke else ROWS):
        settings = {
            "shape": list(shape),
            "model": model,
            "rows": rows,
            "capability": capability,
            "threads": torch.get_num_threads(),
            "rounds": args.rounds,
        }
        if results.find(settings) is None:
            log(f"{capability}: {model}, {rows} rows")
            results.add(settings, measure(*shape, rows, args.rounds, 0.001 if args.smoke else SECONDS))


def print_tables(output: Path, best: str) -> None:
    """One table per path and shape, and what was to be reached."""
    rows = Results(output, seed=0).rows
    for capability in dict.fromkeys(row["settings"]["capability"] for row in rows):
        for model in dict.fromkeys(row["settings"]["model"] for row in rows):
            of_model = [
                r for r in rows if r["settings"]["model"] == model and r["settings"]["capability"] == capability
            ]
            if not of_model:
                continue
            of_model.sort(key=lambda row: row["settings"]["rows"])
            shape = of_model[0]["settings"]["shape"]
            print(
                f"\n{model}, {shape[0]} x {shape[1]}, {capability}, {of_model[0]['settings']['threads']} threads: milliseconds\n"
            )
            names = list(of_model[0]["result"]["milliseconds"])
            header = ["", *(f"{row['settings']['rows']} rows" for row in of_model)]
            table = [[name, *(f"{row['result']['milliseconds'][name]:.3f}" for row in of_model)] for name in names]
            print(markdown_table(header, table))
    for row in rows:
        settings, result = row["settings"], row["result"]
        if settings["model"] != "Llama 7B" or settings["rows"] != 1:
            continue
        took, read = result["milliseconds"], result["read_gigabytes_per_second"]
        print(f"\n{settings['capability']}, one row, reads at {read:.1f} GB/s:")
        if settings["capability"] == best:
            for bits in (4, 3, 2):
                name = f"ours, {bits} bits"
                share = result["bytes"][name] / took[name] / 1e6 / read
                print(verdict(f"{bits} bits: share of the read bandwidth", share, 0.8, at_least=True))
            print(
                verdict(
                    "4 bits: time of aten's int4 over ours",
                    took["aten int4"] / took["ours, 4 bits"],
                    1.0,
                    at_least=True,
                )
            )
            print(
                verdict(
                    "3 bits: times faster than our 4", took["ours, 4 bits"] / took["ours, 3 bits"], 1.25, at_least=True
                )
            )
            print(
                verdict(
                    "2 bits: times faster than our 4", took["ours, 4 bits"] / took["ours, 2 bits"], 1.7, at_least=True
                )
            )
        if settings["capability"] == "avx2":
            print(
                verdict(
                    "4 bits: time of aten's int4 over ours",
                    took["aten int4"] / took["ours, 4 bits"],
                    3.0,
                    at_least=True,
                )
            )


if __name__ == "__main__":
    main(sys.argv[1:])
