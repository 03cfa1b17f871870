# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Layers of several widths under a budget of bytes, against the same width for each.

All start from the same initialisation and the same calibration text. What a layer loses at each width is measured in several
ways; the validation text shows which pays, and only `allocate_bits`'s own is judged by the test text.

    python -m benchmarks bits_budget
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

from benchmarks import baselines
from benchmarks.core.claims import Claim, Headline, markdown_table, perplexity_cell, ratio_of, unless
from benchmarks.core.run import Run, log
from benchmarks.core.task import Runs, Task, claims_of_each, run_named, tables_of_each
from benchmarks.fast_linear import fast_linear
from benchmarks.peqa_quality import _byte_data as byte_data
from benchmarks.peqa_quality import load_data
from benchmarks.tuning import BYTES, float_model
from peft_ext import PeqaConfig, allocate_bits
from peft_ext.commands.tune_report import plot_widths
from peft_ext.perplexity import perplexity
from peft_ext.quant.conversion import dequantize_layers, packed_layers
from peft_ext.scale_tuning.bit_budget import BUDGET_WIDTHS, choose_widths, rounding_error
from peft_ext.scale_tuning.model import check_targets
from peft_ext.scale_tuning.sensitivity import sensitivities


UNIFORM, OURS = "uniform", "allocate_bits"


class Row(NamedTuple):
    """A line of the table: a group size, a width (None: float), and how the layers' widths were chosen."""

    group_size: Optional[int]
    bits: Optional[float]
    chosen_by: str

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from the others."""
        return {"group_size": self.group_size, "bits": self.bits, "chosen_by": self.chosen_by}

    @property
    def title(self) -> str:
        """For tables."""
        if self.bits is None:
            return "float"
        groups = "per channel" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{self.bits:g} bits{'' if self.chosen_by == UNIFORM else ' on average'}, {groups}"


def all_rows(run: Run) -> list[Row]:
    """The table, the float model first."""
    rows = [Row(None, None, UNIFORM)]
    for group_size in run.group_sizes:
        rows += [Row(group_size, bits, UNIFORM) for bits in run.uniform]
        rows += [Row(group_size, bits, OURS) for bits in run.budgets]
        rows += [Row(group_size, run.budgets[0], criterion) for criterion in run.criteria]
    return rows


def _weight_error(model: nn.Module, config: PeqaConfig, _: torch.Tensor) -> dict[str, list[float]]:
    """The squared error of the weights alone."""
    layers = check_targets(copy.copy(config), model)
    return {
        name: [float(rounding_error(config, name, layer.weight, bits).square().sum()) for bits in BUDGET_WIDTHS]  # type: ignore[arg-type]
        for name, layer in layers.items()
    }


def _fisher(model: nn.Module, config: PeqaConfig, calibration: torch.Tensor) -> dict[str, list[float]]:
    """As `allocate_bits`, as if nothing made up for rounding errors."""
    layers = check_targets(copy.copy(config), model)

    def errors(name: str, weight: torch.Tensor):
        return (rounding_error(config, name, weight, bits) for bits in BUDGET_WIDTHS)

    return sensitivities(model, layers, errors, calibration.split(4))


CRITERIA: dict[str, Callable[[nn.Module, PeqaConfig, torch.Tensor], dict[str, list[float]]]] = {
    "weight error": _weight_error,
    "Fisher": _fisher,
}


class Bench:
    """The float model and the data."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.data = byte_data(run) if run.data == BYTES else load_data(run)
        self.float_model = float_model(run.model, run.seed)

    def figures(self, model: nn.Module) -> dict[str, Any]:
        """Perplexity on three texts."""
        size = self.run.batch_size
        return {
            name: perplexity(model, getattr(self.data, name), batch_size=size)
            for name in ("validation", "test", "other")
        }

    def measure(self, row: Row) -> dict[str, Any]:
        """Choose, calibrate, read."""
        if row.bits is None:
            return self.figures(self.float_model)
        torch.manual_seed(self.run.seed)
        model, calibration, start = copy.deepcopy(self.float_model), self.data.calibration, time.perf_counter()
        config = self.config(row)
        if row.chosen_by == OURS:
            allocate_bits(model, config, calibration.split(4), progressbar=False)
        elif row.chosen_by != UNIFORM:
            choose_widths(model, config, CRITERIA[row.chosen_by](model, config, calibration))
        chosen = time.perf_counter() - start
        model = baselines.quantized(model, config, calibration).unload()
        layers = packed_layers(model)
        result = {
            "widths": {name: layer.bits for name, layer in layers.items()},
            "bytes": sum(parameter.nbytes for layer in layers.values() for parameter in layer.parameters()),
            "seconds": {"choice": chosen, "all": time.perf_counter() - start},
        }
        return {**result, **self.figures(dequantize_layers(model))}

    def config(self, row: Row) -> PeqaConfig:
        """What the row asks for."""
        width = {"bits": int(row.bits or 0)} if row.chosen_by == UNIFORM else {"bits_budget": row.bits}
        return PeqaConfig(
            **width,  # type: ignore[arg-type]
            group_size=row.group_size,
            init_method=self.run.init_method,
            target_modules="all-linear",
        )


def measure(run: Run) -> None:
    """Measure every row that isn't stored yet."""
    missing = [row for row in all_rows(run) if run.find(row.key) is None]
    if not missing:
        return
    bench = Bench(run)
    with fast_linear():
        for row in missing:
            log(f"{row.title}, {row.chosen_by}")
            result = run.add(row.key, bench.measure(row))
            log(f"test {result['test']:.2f}, other {result['other']:.2f}")


def tables(run: Run) -> dict[str, str]:
    """What is measured so far."""
    lines = []
    for row in all_rows(run):
        found = run.find(row.key) or {}
        counts = sorted(Counter(found.get("widths", {}).values()).items())
        lines.append(
            [
                row.title,
                "" if row.bits is None else _CHOICES.get(row.chosen_by, row.chosen_by),
                *(
                    perplexity_cell(found[name]) if name in found else "not measured"
                    for name in ("validation", "test", "other")
                ),
                f"{found['bytes'] / 2**20:.1f}" if "bytes" in found else "",
                ", ".join(f"{bits} bits x{count}" for bits, count in counts),
            ]
        )
    headers = ["Weights", "Widths by", "Validation", "Test", "Python's documentation", "MiB of layers", "Layers"]
    return {"Bits where they matter": markdown_table(headers, lines)}


_CHOICES = {UNIFORM: "all alike", OURS: "Fisher, behind error feedback (`allocate_bits`)"}


def claims(run: Run) -> list[Claim]:
    """Mixed layers are ahead of layers of one width, at no more bytes."""
    found = []
    for group_size in run.group_sizes:
        mixed, uniform = Row(group_size, run.budgets[0], OURS), Row(group_size, run.budgets[0], UNIFORM)
        found.append(
            Claim(f"{mixed.title}, over uniform, test text", ratio_of(run, "test", mixed.key, uniform.key), 0.92)
        )
        found.append(Claim(f"{mixed.title}, over uniform, bytes", ratio_of(run, "bytes", mixed.key, uniform.key), 1.0))
    return found


def headlines(runs: Runs) -> list[Headline]:
    """The budget against one width for all."""
    run = run_named(runs, "wikitext2_short")
    found = []
    for group_size in [] if run is None else run.group_sizes[:1]:
        mixed, uniform = Row(group_size, run.budgets[0], OURS), Row(group_size, run.budgets[0], UNIFORM)
        ratio, more = ratio_of(run, "test", mixed.key, uniform.key), ratio_of(run, "bytes", mixed.key, uniform.key)
        if ratio is None or more is None:
            continue
        found.append(
            Headline(
                "Tuning packed models",
                f"Layers of 2, 3, 4 and 8 bits, {mixed.title}, untuned: perplexity on wikitext-2, over 3 bits each",
                f"{ratio:.2f}",
                unless(ratio <= 0.92 and more <= 1, "at most 0.92, at no more bytes"),
                "../benchmarks/peqa.md#bits-where-they-matter",
            )
        )
    return found


def draw(runs: Runs, folder: Path) -> None:
    """Who got what, in the first row of the first run that has it."""
    for run in runs:
        found = run.find(Row(run.group_sizes[0], run.budgets[0], OURS).key)
        if found is not None:
            plot_widths(found["widths"], folder / f"{run.experiment}.png")


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims), headlines, draw)
