# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""How close the initialisations come: error of the weights, and perplexity before any tuning, against bits, format and method.

Binary coding (greedy, alternating, calibrated) and uniform integers (min-max, MSE, calibrated), per channel, on
SmolLM2 and wikitext-2; a table, and a plot beside the JSON.

    python -m benchmarks reconstruction
"""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import nn

from benchmarks import baselines
from benchmarks.core.claims import Claim, markdown_table
from benchmarks.core.models import named
from benchmarks.core.run import Run, data_folder, log
from benchmarks.core.task import Runs, Task, claims_of_each, tables_of_each
from benchmarks.fast_linear import fast_linear
from benchmarks.peqa_quality import find_split
from benchmarks.tuning import BYTES, byte_blocks, float_model, sample_blocks
from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.models import load_tokenizer
from peft_ext.perplexity import perplexity
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.formats import GPTQ
from peft_ext.text import PYTHON_DOCS, load_text, token_blocks


BINARY, UNIFORM = "binary coding", "uniform integers"
METHODS = {
    BINARY: ("greedy", "alternating", "calibrated"),
    UNIFORM: ("minmax", "mse", GPTQ),
}
BITS = {BINARY: (1, 2, 3, 4), UNIFORM: (2, 3, 4)}
SHOWN = {BINARY: "BCQ", UNIFORM: "uniform", "minmax": "min-max", "mse": "MSE", GPTQ: "GPTQ"}


class Row(NamedTuple):
    """One initialisation."""

    format: str
    method: str
    bits: int

    @property
    def title(self) -> str:
        """As it is shown."""
        return f"{SHOWN[self.format]}, {SHOWN.get(self.method, self.method)}"

    def config(self) -> Any:
        """The initialisation as a tuner's config."""
        config_cls = AlphaTuningConfig if self.format == BINARY else PeqaConfig
        return config_cls(bits=self.bits, init_method=self.method)


FLOAT = Row("float", "none", 32)
ROWS = [
    Row(kind, method, bits)
    for bits in (3, 2, 4, 1)
    for kind in METHODS
    if bits in BITS[kind]
    for method in METHODS[kind]
]


def start(row: Row, floats: nn.Module, calibration: torch.Tensor, blocks: torch.Tensor) -> dict[str, float]:
    """Quantise, then compare weights and perplexity."""
    begin = time.perf_counter()
    model = copy.deepcopy(floats)
    model = (
        baselines.quantized(model, row.config(), calibration)
        if row.config().needs_data
        else get_peft_model(model, row.config())
    )
    seconds = time.perf_counter() - begin
    base = model.unload()
    of_float, error, size = dict(floats.named_modules()), 0.0, 0.0
    for name, layer in packed_layers(base).items():
        weight = of_float[name].weight.detach()
        error += (layer.dequantize() - weight).double().square().sum().item()
        size += weight.double().square().sum().item()
    return {"error": math.sqrt(error / size), "perplexity": perplexity(base, blocks), "seconds": seconds}


def tables(run: Run) -> dict[str, str]:
    """Error and perplexity by initialisation and bits."""
    headers = ["Start", *[f"{bits} bit{'s' * (bits > 1)}" for bits in (4, 3, 2, 1)], "Time at 4 bits"]
    lines = []
    for kind, methods in METHODS.items():
        for method in methods:
            cells = []
            for bits in (4, 3, 2, 1):
                found = run.find(Row(kind, method, bits)._asdict())
                cells.append(None if found is None else f"{found['error']:.3f} / {_number(found['perplexity'])}")
            four = run.find(Row(kind, method, 4)._asdict())
            lines.append([Row(kind, method, 4).title, *cells, None if four is None else f"{four['seconds']:.0f} s"])
    plain = (run.find(FLOAT._asdict()) or {}).get("perplexity", math.nan)
    table = markdown_table(headers, lines)
    return {
        "Starts": f"{table}\n\nRelative error of the weights / perplexity before tuning; of the float model: {plain:.1f}."
    }


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def claims(run: Run) -> list[Claim]:
    """Calibrated binary codes against calibrated integers; the time of alternating."""
    found = []
    for bits in (3, 2):
        starts = (Row(BINARY, "calibrated", bits), Row(UNIFORM, GPTQ, bits))
        pair = [run.find(row._asdict()) for row in starts]
        ratio = pair[0]["perplexity"] / pair[1]["perplexity"] if pair[0] and pair[1] else None
        found.append(Claim(f"calibrated BCQ over GPTQ, perplexity, {bits} bits", ratio, 1.0))
    four = run.find(Row(BINARY, "alternating", 4)._asdict())
    found.append(Claim("alternating BCQ of the whole model at 4 bits", four and four["seconds"], 120, " s"))
    return found


def draw(runs: Runs, folder: Path) -> None:
    """Error and perplexity against bits."""
    for run in runs:
        _draw(run, folder / f"{run.experiment}.png")


def _draw(run: Run, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8))
    left, right = figure.subplots(1, 2)
    for kind, style in ((BINARY, "-"), (UNIFORM, "--")):
        for method, colour, marker in zip(METHODS[kind], ("tab:red", "tab:orange", "tab:blue"), "sod"):
            found = {bits: run.find(Row(kind, method, bits)._asdict()) for bits in BITS[kind]}
            rows = {bits: result for bits, result in found.items() if result is not None}
            for axes, figure_name in ((left, "error"), (right, "perplexity")):
                values = [result[figure_name] for result in rows.values()]
                label = Row(kind, method, 4).title
                axes.plot(list(rows), values, style, color=colour, marker=marker, markersize=5, label=label)
    right.axhline((run.find(FLOAT._asdict()) or {})["perplexity"], color="gray", linewidth=1, label="float")
    right.set_yscale("log")
    for axes, label in ((left, "relative error of the weights"), (right, "perplexity before tuning")):
        axes.set_xlabel("bits")
        axes.set_ylabel(label)
        axes.set_xticks((1, 2, 3, 4))
        axes.grid(alpha=0.3)
    right.legend(fontsize=8, handlelength=3.5)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def load_blocks(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration blocks of the training text, and blocks of the validation text."""
    if run.data == BYTES:
        train, held_out = (byte_blocks(part[:5], run.block_size) for part in load_text(PYTHON_DOCS))
        return train[: run.calibration_blocks], held_out[: run.blocks]
    folder, tokenizer = data_folder(run.data), load_tokenizer(named(run.model))
    train, held_out = (
        token_blocks(tokenizer, [find_split(folder, name).read_text(encoding="utf-8")], run.block_size, name=name)
        for name in ("train", "validation")
    )
    return sample_blocks(train, run.calibration_blocks, run.seed + 1), held_out[: run.blocks]


def measure(run: Run) -> None:
    """What isn't stored yet; the float model first."""
    missing = [row for row in (FLOAT, *ROWS) if run.find(row._asdict()) is None]
    if not missing:
        return
    calibration, blocks = load_blocks(run)
    floats = float_model(run.model, run.seed)
    with fast_linear():
        for row in missing:
            if row == FLOAT:
                run.add(row._asdict(), {"perplexity": perplexity(floats, blocks)})
                continue
            result = run.add(row._asdict(), start(row, floats, calibration, blocks))
            log(f"{row.title}, {row.bits} bits: perplexity {result['perplexity']:.2f}, {result['seconds']:.0f} s")


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims), draw=draw)
