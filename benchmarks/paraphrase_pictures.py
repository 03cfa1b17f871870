# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Pictures of `benchmarks.paraphrase`: iBLEU as bars, z by layer as violins, z of a sentence as a heat map."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from generation_ext.granularity.pictures import heat_map


def bars_and_granularities(found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """iBLEU of all variants on all sets, a dot a seed; and how z is spread in each layer, on the first set's first seed.

    Args:
        found: Set -> variant -> results, seed by seed.
        path: A .png.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8))
    bars, spread = figure.subplots(1, 2)
    names = list(dict.fromkeys(name for variants in found.values() for name in variants))
    width = 0.8 / max(1, len(found))
    for number, (data, variants) in enumerate(found.items()):
        for name, rows in variants.items():
            place, values = names.index(name) + number * width, [row["metrics"]["iBLEU"] for row in rows]
            bars.bar(place, statistics.mean(values), width, color=f"C{number}", alpha=0.6)
            bars.plot([place] * len(values), values, ".", color=f"C{number}")
        bars.bar(0, 0, color=f"C{number}", alpha=0.6, label=data)
    middle = (len(found) - 1) * width / 2
    bars.set_xticks([place + middle for place in range(len(names))], names, rotation=25, ha="right")
    bars.set_ylabel("iBLEU")
    bars.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(found), frameon=False)
    first = next(iter(found.values()), {})
    known = {name: rows[0]["granularities"] for name, rows in first.items() if "granularities" in rows[0]}
    for place, layers in enumerate(known.values()):
        for layer, values in enumerate(layers):
            at = place + (layer - (len(layers) - 1) / 2) * 0.8 / len(layers)
            body = spread.violinplot(values, [at], widths=0.7 / len(layers), showextrema=False)["bodies"][0]
            body.set_facecolor(f"C{layer}")
            if not place:
                body.set_label(f"layer {layer + 1}")
    spread.set_xticks(range(len(known)), list(known))
    spread.set(ylabel="z of the encoder's tokens", ylim=(0, 1))
    if known:
        spread.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def sentence_picture(sentence: Mapping[str, Any], path: Path) -> None:
    """z of a sentence's tokens, layer by layer."""
    heat_map(sentence["tokens"], torch.tensor(sentence["granularities"]), path)
