# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""How close the initialisations come: error of the weights, and perplexity before any tuning, against bits, format and method.

Binary coding (greedy, alternating, calibrated) and uniform integers (min-max, MSE, calibrated), per channel, on
SmolLM2 and wikitext-2; a table, and a plot beside the JSON.

    python -m benchmarks.reconstruction --data-dir wikitext2

Rows are stored as they finish and not measured again: after a kill, start it again with the same flags.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from peft import get_peft_model
from torch import nn

from benchmarks import baselines
from benchmarks.common import Results, argument_parser, data_folder, describe, log, markdown_table, verdict
from benchmarks.fast_linear import fast_linear
from benchmarks.peqa_quality import find_split
from benchmarks.tuning import byte_blocks, sample_blocks, tiny_llama
from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.models import DEFAULT_MODEL, load, load_tokenizer
from peft_ext.perplexity import perplexity
from peft_ext.quant.conversion import packed_layers
from peft_ext.text import PYTHON_DOCS, load_text, token_blocks


BINARY, UNIFORM = "binary coding", "uniform integers"
METHODS = {
    BINARY: ("greedy", "alternating", "calibrated"),
    UNIFORM: ("minmax", "mse", "calibrated"),
}
BITS = {BINARY: (1, 2, 3, 4), UNIFORM: (2, 3, 4)}
SHOWN = {BINARY: "BCQ", UNIFORM: "uniform", "minmax": "min-max", "mse": "MSE"}


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


ROWS = [
    Row(kind, method, bits)
    for bits in (3, 2, 4, 1)
    for kind in METHODS
    if bits in BITS[kind]
    for method in METHODS[kind]
]


def measure(row: Row, float_model: nn.Module, calibration: torch.Tensor, blocks: torch.Tensor) -> dict[str, float]:
    """Quantise, then compare weights and perplexity."""
    start = time.perf_counter()
    model = copy.deepcopy(float_model)
    model = (
        baselines.quantized(model, row.config(), calibration)
        if row.method == "calibrated"
        else get_peft_model(model, row.config())
    )
    seconds = time.perf_counter() - start
    base = model.unload()
    floats, error, size = dict(float_model.named_modules()), 0.0, 0.0
    for name, layer in packed_layers(base).items():
        weight = floats[name].weight.detach()
        error += (layer.dequantize() - weight).double().square().sum().item()
        size += weight.double().square().sum().item()
    return {"error": math.sqrt(error / size), "perplexity": perplexity(base, blocks), "seconds": seconds}


def table(results: Results, args: argparse.Namespace) -> str:
    """Error and perplexity by initialisation and bits."""
    headers = ["Start", *[f"{bits} bit{'s' * (bits > 1)}" for bits in (4, 3, 2, 1)], "Time at 4 bits"]
    lines = []
    for kind, methods in METHODS.items():
        for method in methods:
            cells = []
            for bits in (4, 3, 2, 1):
                found = results.find(settings(args, Row(kind, method, bits)))
                cells.append(None if found is None else f"{found['error']:.3f} / {_number(found['perplexity'])}")
            four = results.find(settings(args, Row(kind, method, 4)))
            lines.append([Row(kind, method, 4).title, *cells, None if four is None else f"{four['seconds']:.0f} s"])
    return markdown_table(headers, lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def verdicts(results: Results, args: argparse.Namespace) -> list[str]:
    """The lines that say which claims the table bears out."""
    lines = []
    for bits in (3, 2):
        pair = [results.find(settings(args, Row(kind, "calibrated", bits))) for kind in (BINARY, UNIFORM)]
        ratio = pair[0]["perplexity"] / pair[1]["perplexity"] if pair[0] and pair[1] else None
        lines.append(verdict(f"calibrated BCQ over calibrated uniform, perplexity, {bits} bits", ratio, 1.0))
    four = results.find(settings(args, Row(BINARY, "alternating", 4)))
    lines.append(verdict("alternating BCQ of the whole model at 4 bits", four and four["seconds"], 120, " s"))
    return lines


def plot(results: Results, args: argparse.Namespace, path: Path, float_perplexity: float) -> None:
    """Error and perplexity against bits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8))
    left, right = figure.subplots(1, 2)
    for kind, style in ((BINARY, "-"), (UNIFORM, "--")):
        for method, colour, marker in zip(METHODS[kind], ("tab:red", "tab:orange", "tab:blue"), "sod"):
            found = {bits: results.find(settings(args, Row(kind, method, bits))) for bits in BITS[kind]}
            rows = {bits: result for bits, result in found.items() if result is not None}
            for axes, figure_name in ((left, "error"), (right, "perplexity")):
                values = [result[figure_name] for result in rows.values()]
                label = Row(kind, method, 4).title
                axes.plot(list(rows), values, style, color=colour, marker=marker, markersize=5, label=label)
    right.axhline(float_perplexity, color="gray", linewidth=1, label="float")
    right.set_yscale("log")
    for axes, label in ((left, "relative error of the weights"), (right, "perplexity before tuning")):
        axes.set_xlabel("bits")
        axes.set_ylabel(label)
        axes.set_xticks((1, 2, 3, 4))
        axes.grid(alpha=0.3)
    right.legend(fontsize=8, handlelength=3.5)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def settings(args: argparse.Namespace, row: Row) -> dict[str, Any]:
    """Everything that the row's result depends on."""
    names = ("blocks", "block_size", "calibration_blocks", "seed")
    model = "tiny random Llama" if args.smoke else args.model
    data = "smoke" if args.smoke else args.data_dir.name
    return {**row._asdict(), "model": model, "data": data, **{name: getattr(args, name) for name in names}}


def load_blocks(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration blocks of the training text, and blocks of the validation text."""
    if args.smoke:
        texts = load_text(PYTHON_DOCS)
        return tuple(byte_blocks(part[:5], args.block_size)[: args.blocks] for part in texts)  # type: ignore[return-value]
    tokenizer = load_tokenizer(args.model)
    train, held_out = (
        token_blocks(
            tokenizer, [find_split(args.data_dir, name).read_text(encoding="utf-8")], args.block_size, name=name
        )
        for name in ("train", "validation")
    )
    return sample_blocks(train, args.calibration_blocks, args.seed + 1), held_out[: args.blocks]


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure, then print the table and the verdicts and draw the plot."""
    parser = argument_parser(__doc__, "reconstruction.json")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default, hub id, folder or .gguf file")
    parser.add_argument(
        "--data-dir", type=Path, default=data_folder("PEFT_EXT_DATA", "wikitext2"), help="train.txt and valid.txt"
    )
    parser.add_argument("--blocks", type=int, default=32, help="of the validation text")
    parser.add_argument("--block-size", type=int, default=256, help="tokens of a block")
    parser.add_argument("--calibration-blocks", type=int, default=32, help="of the training text")
    args = parser.parse_args(argv)
    if args.smoke:
        args.blocks, args.block_size, args.calibration_blocks = 4, 32, 4
    elif args.data_dir is None:
        parser.error("no data: pass --data-dir (or PEFT_EXT_DATA) with train.txt and valid.txt")
    results = Results(args.output, args.seed)
    missing = [] if args.table else [row for row in ROWS if results.find(settings(args, row)) is None]
    float_key = settings(args, Row("float", "none", 32))
    if missing or results.find(float_key) is None:
        calibration, blocks = load_blocks(args)
        float_model = tiny_llama() if args.smoke else load(args.model, dtype=torch.float32)
        with fast_linear():
            if results.find(float_key) is None:
                results.add(float_key, {"perplexity": perplexity(float_model, blocks)})
            for row in missing:
                result = results.add(settings(args, row), measure(row, float_model, calibration, blocks))
                log(f"{row.title}, {row.bits} bits: perplexity {result['perplexity']:.2f}, {result['seconds']:.0f} s")
    print(table(results, args))
    found = results.find(float_key)
    assert found is not None
    print(f"\nRelative error of the weights / perplexity before tuning; float: {found['perplexity']:.1f}\n")
    print("\n".join(verdicts(results, args)))
    plot(results, args, args.output.with_suffix(".png"), found["perplexity"])
    print(describe(results.rows[-1]["environment"]))


if __name__ == "__main__":
    main()
