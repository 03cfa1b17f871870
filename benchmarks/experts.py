# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A block of experts as packed layers, against transformers' own ways of running fused float experts.

    python -m benchmarks.experts

Time is the process's own on the CPU, of one thread, so that others at work on the machine don't count; the contenders take
turns, and the figure is the median of the rounds. Weights are random, as no kernel looks at them.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.common import Results, argument_parser, log, markdown_table, verdict
from peft_ext.quant.conversion import quantize_layer, replace_layer
from peft_ext.quant.experts import unfuse_experts
from peft_ext.quant.formats import Uniform


# Experts, experts for a token, width, width within an expert: half of Qwen3-30B-A3B's widths; few and larger ones.
SHAPES = {"128 experts, 8 for a token": (128, 8, 1024, 384), "8 experts, 2 for a token": (8, 2, 1024, 3584)}
SMOKE = {"4 experts, 2 for a token": (4, 2, 64, 64)}
TOKENS = (1, 8, 512)
EAGER, GROUPED, PACKED, TRAINED = "eager", "grouped_mm", "packed, 4 bits", " with its backward"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what isn't stored yet, and print the table."""
    args = argument_parser(__doc__, "experts.json", budget={"rounds": 7}).parse_args(argv)
    torch.set_num_threads(1)
    results, table, ratios = Results(args.output, args.seed), [], []
    for title, shape in (SMOKE if args.smoke else SHAPES).items():
        for tokens in TOKENS:
            settings = {"shape": list(shape), "tokens": tokens, "rounds": args.rounds}
            found = results.find(settings)
            if found is None and args.table:
                continue
            if found is None:
                log(f"{title}, {tokens} tokens")
                found = results.add(settings, measure(shape, tokens, args.rounds, args.seed))
            table.append([title, tokens, *(f"{1e3 * found[name]:.1f}" for name in _COLUMNS)])
            ratios.append(found[PACKED] / found[EAGER])
    print(markdown_table(["block", "tokens", *(f"{name}, ms" for name in _COLUMNS)], table))
    if ratios:
        print(verdict("packed over eager, forward, at worst", max(ratios), 1.0, " x"))


_COLUMNS = (EAGER, GROUPED, PACKED, EAGER + TRAINED, PACKED + TRAINED)


def measure(shape: tuple[int, int, int, int], tokens: int, rounds: int, seed: int) -> dict[str, float]:
    """Median seconds of each contender."""
    torch.manual_seed(seed)
    experts, chosen, width, inner = shape
    config = Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=inner, num_experts=experts, num_experts_per_tok=chosen
    )
    block = Qwen3MoeSparseMoeBlock(config).eval().requires_grad_(False)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.05)
    packed = copy.deepcopy(block)
    unfuse_experts(packed, lambda name: True)
    for name, layer in list(packed.named_modules()):
        if isinstance(layer, nn.Linear):
            replace_layer(packed, name, quantize_layer(layer, Uniform(4, 64), "minmax", name))
    x = torch.randn(1, tokens, width)

    def run(module: nn.Module, implementation: str | None, backward: bool) -> None:
        if implementation is not None:
            block.experts.config._experts_implementation = implementation
        with torch.set_grad_enabled(backward):
            output = module(x.detach().requires_grad_(backward))
            if backward:
                output.sum().backward()

    contenders: dict[str, Callable[[], None]] = {
        EAGER: lambda: run(block, "eager", False),
        GROUPED: lambda: run(block, "grouped_mm", False),
        PACKED: lambda: run(packed, None, False),
        EAGER + TRAINED: lambda: run(block, "eager", True),
        PACKED + TRAINED: lambda: run(packed, None, True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, contender in contenders.items():
            start = time.process_time()
            contender()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first warms up


if __name__ == "__main__":
    main()
