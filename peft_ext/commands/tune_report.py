# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What `peft-ext tune` shows of a finished run: its figures as a table, its losses as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

from peft_ext.commands.packed_base import BASE, average_label, number
from peft_ext.commands.teaching import distilled_in_words
from peft_ext.examples import TEXTS
from peft_ext.scale_tuning.bit_budget import by_kind
from peft_ext.tables import mebibytes, pairs


def table(metrics: dict[str, Any]) -> str:
    """The figures of a run, as text."""
    perplexities, sizes, seconds = metrics["perplexity"], metrics["bytes"], metrics["seconds"]
    rows = [
        *([("perplexity, untouched model", number(perplexities["untouched"]))] if "untouched" in perplexities else []),
        (
            "perplexity, adapted by LoRA" if "recipe" in metrics else "perplexity, float model",
            number(perplexities["float"]),
        ),
        (_packed_label(metrics["bits"], metrics.get("bits_budget")), number(perplexities["quantized"])),
        ("perplexity, tuned", number(perplexities["tuned"])),
        ("float model", mebibytes(sizes["float_model"])),
        ("packed base", mebibytes(sizes["packed_base"])),
        ("adapter", mebibytes(sizes["adapter"])),
        *([("teacher's logits", mebibytes(sizes["teacher_logits"]))] if "teacher_logits" in sizes else []),
        ("trained parameters", f"{metrics['trained_parameters']:,}"),
        *([("time to adapt", f"{seconds['adapt']:.0f} s")] if "adapt" in seconds else []),
        ("time to quantise", f"{seconds['quantize']:.0f} s"),
        ("time to tune", f"{seconds['train']:.0f} s, {metrics['steps']} steps"),
    ]
    if "held_out" in metrics and metrics["shape"] != TEXTS:
        counts = metrics["held_out"]
        measured = f"{counts['tokens']:,} tokens of {counts['rows']:,} rows of {metrics['shape']}"
        rows.insert(1 + [name for name, _ in rows].index("perplexity, tuned"), ("measured on", measured))
    if "widths" in metrics:
        counts = sorted(Counter(metrics["widths"].values()).items())
        rows.append(("layers' widths", ", ".join(f"{bits} bits x{count}" for bits, count in counts)))
    if "distilled" in metrics:
        rows.append(("distilled from", distilled_in_words(metrics["distilled"])))
    return pairs(rows)


def _packed_label(bits: Union[int, str], budget: Optional[float]) -> str:
    if budget is not None:
        return f"perplexity, {average_label(budget)}"
    return "perplexity, packed base" if bits == BASE else f"perplexity, {bits} bits"


def plot_losses(history: list[tuple[int, float]], path: Path) -> None:
    """Draw a training's losses.

    Args:
        history: Steps and losses.
        path: The picture's.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the loss curve needs: pip install 'peft-ext[cli]'") from error
    figure = Figure(figsize=(6, 3.5))
    axes = figure.add_subplot(xlabel="step", ylabel="training loss")
    axes.plot([step for step, _ in history], [loss for _, loss in history], marker=".")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def plot_widths(widths: Mapping[str, int], path: Path) -> None:
    """Draw who got what: a row for each kind of layer, a square for each layer in the order of the blocks.

    Args:
        widths: Bits of each layer, by name.
        path: The picture's.
    """
    try:
        from matplotlib.colors import BoundaryNorm, ListedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture of the widths needs: pip install 'peft-ext[cli]'") from error
    kinds = by_kind(widths)
    longest = max(map(len, kinds.values()))
    grid = [[*row.values(), *[float("nan")] * (longest - len(row))] for row in kinds.values()]
    colours = ListedColormap(["#d9e6f2", "#93b7d9", "#3f7fb8", "#12335c"])
    figure = Figure(figsize=(2.5 + 0.22 * longest, 1.3 + 0.3 * len(kinds)))
    axes = figure.add_subplot(xlabel="block")
    axes.imshow(grid, cmap=colours, norm=BoundaryNorm([1.5, 2.5, 3.5, 4.5, 8.5], 4), aspect="auto")
    for row, values in enumerate(grid):
        for column, bits in enumerate(values):
            if bits == bits:  # not where a kind has fewer layers
                axes.text(
                    column, row, f"{bits:g}", ha="center", va="center", color="white" if bits > 3 else "black", size=7
                )
    axes.set_yticks(range(len(kinds)), list(kinds))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
