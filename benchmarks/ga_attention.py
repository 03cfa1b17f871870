# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What GA-Attention costs: one attention, forward and backward, against SDPA with a float mask of the same shape, and a
training step of C-DNPG against the plain Transformer of its size; time and peak memory.

Contenders take turns: a round is one measurement of each, and figures are medians of rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import nn

from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.run import Run, log
from benchmarks.core.task import Runs, Task, claims_of_each, tables_of_each
from generation_ext.granularity import (
    CDNPGConfig,
    CDNPGForConditionalGeneration,
    GranularityAttention,
    GranularityConfig,
)
from generation_ext.granularity.masks import MODES
from peft_ext.memory.tracker import AllocationTracker, FusedAttention


LENGTHS = (20, 128, 512)
STEP_OF_ALL = "step"
SIZE, HEADS = 450, 9  # the paper's
FORWARD, STEP = 1.3, 1.5
PLAIN = "SDPA, float mask"


class PlainAttention(nn.Module):
    """The same projections, and SDPA with a float mask."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(SIZE, SIZE) for _ in range(4))

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, size]`."""
        shape = (hidden_states.shape[0], -1, HEADS, SIZE // HEADS)
        q, k, v = (each(hidden_states).view(shape).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj))
        output = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return self.out_proj(output.transpose(1, 2).flatten(2))


def attentions(length: int, batch: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Contenders, by name."""
    torch.manual_seed(0)
    # one for every text, as a padding mask is
    mask = torch.zeros(batch, 1, length, length).masked_fill(torch.rand(batch, 1, 1, length) < 0.1, -1e9)
    plain = PlainAttention()
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {PLAIN: lambda hidden: plain(hidden, mask)}
    for mode in MODES:
        ours = GranularityAttention(SIZE, HEADS, GranularityConfig(mode=mode, max_length=max(length, 20)))
        found[mode] = lambda hidden, ours=ours: ours(hidden, attention_mask=mask)  # type: ignore[misc]
    return found


def seconds_of(functions: dict[str, Callable[[], Any]], rounds: int, repeats: int) -> dict[str, float]:
    """Median seconds of each, in turn."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            found[name].append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(values) for name, values in found.items()}


def peak_bytes(length: int, batch: int) -> dict[str, int]:
    """Most bytes of tensors that forward and backward of each contender have alive at a time, counted operation by
    operation on the meta device; attention itself counts as fused."""
    found = {}
    with torch.device("meta"):
        for name, function in attentions(length, batch).items():
            hidden = torch.randn(batch, length, SIZE, requires_grad=True)
            with AllocationTracker() as tracker, FusedAttention():
                function(hidden).sum().backward()
            found[name] = max(tracker.take_peaks().values())
    return found


def attention_row(length: int, run: Run) -> dict[str, Any]:
    """Forward and forward + backward of all contenders at a length."""
    batch = max(1, run.tokens // length)
    hidden = torch.randn(batch, length, SIZE, requires_grad=True)
    contenders = attentions(length, batch)

    def forward(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
        def call() -> None:
            with torch.no_grad():
                function(hidden)

        return call

    def both(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
        return lambda: function(hidden).sum().backward()

    rounds, repeats = run.rounds, run.repeats
    return {
        "batch": batch,
        "forward": seconds_of({name: forward(each) for name, each in contenders.items()}, rounds, repeats),
        "both": seconds_of({name: both(each) for name, each in contenders.items()}, rounds, repeats),
        "peak": peak_bytes(length, batch),
    }


def step_row(run: Run) -> dict[str, Any]:
    """A training step of the whole model at the paper's size, batch 32, 20 tokens."""
    sizes: dict[str, Any] = {"vocab_size": 100, "d_model": 36} if run.smoke else {"vocab_size": 8000}
    models = {
        mode: CDNPGForConditionalGeneration(CDNPGConfig(**sizes, granularity_mode=mode)).train()
        for mode in (None, *MODES)
    }
    ids = torch.randint(3, 100, (4 if run.smoke else 32, 20))
    optimizers = {mode: torch.optim.AdamW(model.parameters(), lr=1e-4) for mode, model in models.items()}

    def step(mode: Optional[str]) -> Callable[[], None]:
        def call() -> None:
            models[mode](input_ids=ids, labels=ids).loss.backward()
            optimizers[mode].step()
            optimizers[mode].zero_grad()

        return call

    steps = {mode or "Transformer": step(mode) for mode in models}
    return {"seconds": seconds_of(steps, run.rounds, run.step_repeats)}


def measure(run: Run) -> None:
    """A row for each length, and one for a training step."""
    for part in (*run.lengths, STEP_OF_ALL):
        if run.find({"part": part}) is None:
            run.add({"part": part}, step_row(run) if part == STEP_OF_ALL else attention_row(part, run))
            log(f"measured: {part}")


def tables(run: Run) -> dict[str, str]:
    """Times and memory, and how many times SDPA's."""
    lines, rows, worst = [], [], []
    for length in run.lengths:
        found = run.find({"part": length})
        if found:
            ratios = [max(found[p][mode] / found[p][PLAIN] for mode in MODES) for p in ("forward", "both", "peak")]
            worst.append([length, *(f"{ratio:.2f}" for ratio in ratios)])
        for name in (PLAIN, *MODES) if found else ():
            cells = []
            for part in ("forward", "both", "peak"):
                scale, unit = (1e3, "ms") if part != "peak" else (1e-6, "MB")
                ratio = found[part][name] / found[part][PLAIN]
                cells.append(f"{scale * found[part][name]:.1f} {unit} ({ratio:.2f})")
            lines.append([f"{length} tokens, batch {found['batch']}: {name}", *cells])
    seconds = (run.find({"part": STEP_OF_ALL}) or {}).get("seconds", {})
    for name, value in seconds.items():
        rows.append([name, f"{1e3 * value:.0f} ms ({value / seconds['Transformer']:.2f})"])
    return {
        "worst": markdown_table(
            ["tokens; worst mode over SDPA", "forward", "forward and backward", "peak memory"], worst
        ),
        "attention": markdown_table(
            ["Attention (and over SDPA)", "forward", "forward and backward", "peak memory"], lines
        ),
        "step": markdown_table(["Training step, 3 + 3 layers of 450, batch 32 x 20", "time"], rows),
    }


def claims(run: Run) -> list[Claim]:
    """The worst mode's."""
    lines = []
    for length in LENGTHS:
        found = run.find({"part": length})
        worst = found and max(found["forward"][mode] / found["forward"][PLAIN] for mode in MODES)
        lines.append(Claim(f"forward at {length} tokens over SDPA, worst mode", worst, FORWARD, "x"))
    seconds = (run.find({"part": STEP_OF_ALL}) or {}).get("seconds")
    worst = seconds and max(value / seconds["Transformer"] for value in seconds.values())
    return [*lines, Claim("training step over the Transformer's, worst mode", worst, STEP, "x")]


def headlines(runs: Runs) -> list[Headline]:
    """Forward passes and a training step."""
    values = [claim.value for run in runs[:1] for claim in claims(run)]
    if not values or None in values:
        return []
    *forwards, step = values
    area, page = "Writing", "../benchmarks/granularity.md#ga-attention-what-it-costs"
    shown = f"{min(forwards):.2f} to {max(forwards):.2f}"
    return [
        Headline(
            area,
            "GA-Attention, forward pass over SDPA with a mask",
            shown,
            unless(max(forwards) <= FORWARD, f"{FORWARD}"),
            page,
        ),
        Headline(
            area,
            "GA-Attention, a training step over a Transformer's",
            f"{step:.2f}",
            unless(step <= STEP, f"{STEP}"),
            page,
        ),
    ]


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims), headlines)
