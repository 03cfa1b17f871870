# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A block of experts as packed layers, against transformers' own ways of running fused float experts.

    python -m benchmarks experts

Time is the process's own on the CPU, of one thread, so that others at work on the machine don't count; the contenders take
turns, and the figure is the median of the rounds. Weights are random, as no kernel looks at them.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.core.claims import Claim, markdown_table
from benchmarks.core.run import Run, log
from benchmarks.core.task import Task, claims_of_each, tables_of_each
from peft_ext.quant.conversion import quantize_layer
from peft_ext.quant.experts import unfuse_experts
from peft_ext.quant.formats import Uniform
from peft_ext.quant.packed_module import replace_layer


EAGER, GROUPED, PACKED, TRAINED = "eager", "grouped_mm", "packed, 4 bits", " with its backward"


_COLUMNS = (EAGER, GROUPED, PACKED, EAGER + TRAINED, PACKED + TRAINED)


def block(shape: list[int], tokens: int, rounds: int, seed: int) -> dict[str, float]:
    """Median seconds of each contender on a block of experts.

    Args:
        shape: Experts, experts for a token, width, width within an expert.
        tokens: That it is given.
        rounds: In which each contender has a turn.
        seed: Of weights and tokens.
    """
    torch.manual_seed(seed)
    experts, chosen, width, inner = shape
    config = Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=inner, num_experts=experts, num_experts_per_tok=chosen
    )
    fused = Qwen3MoeSparseMoeBlock(config).eval().requires_grad_(False)
    for parameter in fused.parameters():
        nn.init.normal_(parameter, std=0.05)
    packed = copy.deepcopy(fused)
    unfuse_experts(packed, lambda name: True)
    for name, layer in list(packed.named_modules()):
        if isinstance(layer, nn.Linear):
            replace_layer(packed, name, quantize_layer(layer, Uniform(4, 64), "minmax", name))
    x = torch.randn(1, tokens, width)

    def run(module: nn.Module, implementation: str | None, backward: bool) -> None:
        if implementation is not None:
            fused.experts.config._experts_implementation = implementation
        with torch.set_grad_enabled(backward):
            output = module(x.detach().requires_grad_(backward))
            if backward:
                output.sum().backward()

    contenders: dict[str, Callable[[], None]] = {
        EAGER: lambda: run(fused, "eager", False),
        GROUPED: lambda: run(fused, "grouped_mm", False),
        PACKED: lambda: run(packed, None, False),
        EAGER + TRAINED: lambda: run(fused, "eager", True),
        PACKED + TRAINED: lambda: run(packed, None, True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, contender in contenders.items():
            start = time.process_time()
            contender()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first warms up


def _keys(run: Run) -> list[tuple[str, dict]]:
    """The name of a block, and what tells its row from others."""
    return [
        (title, {"shape": shape, "tokens": tokens}) for title, shape in run.shapes.items() for tokens in run.tokens
    ]


def measure(run: Run) -> None:
    """What isn't stored yet."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for title, key in _keys(run):
            if run.find(key) is None:
                log(f"{title}, {key['tokens']} tokens")
                run.add(key, block(**key, rounds=run.rounds, seed=run.seed))
    finally:
        torch.set_num_threads(threads)


def tables(run: Run) -> dict[str, str]:
    """Milliseconds of a block."""
    found = [(title, key["tokens"], run.find(key)) for title, key in _keys(run)]
    lines = [[title, tokens, *(f"{1e3 * one[name]:.1f}" for name in _COLUMNS)] for title, tokens, one in found if one]
    return {"A block of experts": markdown_table(["block", "tokens", *(f"{name}, ms" for name in _COLUMNS)], lines)}


def claims(run: Run) -> list[Claim]:
    """Packed experts take no longer than eager ones."""
    ratios = [found[PACKED] / found[EAGER] for _, key in _keys(run) if (found := run.find(key))]
    return [Claim("packed over eager, forward, at worst", max(ratios, default=None), 1.0)]


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims))
