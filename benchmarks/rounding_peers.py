# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Integers of other libraries at the same widths, before any tuning: HQQ, torchao, optimum-quanto and AutoRound beside ours.

Each quantises all linear layers but the output layer as its own documentation shows, for a CPU. What is measured is the model of
the weights that come back (dequantised, in float32), so that kernels play no part: perplexity on wikitext-2 and on Python's
documentation. Calibration data, where a library reads any, is the same. A library that isn't installed is a row that says so.

    pip install hqq optimum-quanto torchao auto-round && python -m benchmarks rounding_peers
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

from benchmarks import baselines
from benchmarks.core.claims import Claim, markdown_table, perplexity_cell
from benchmarks.core.run import Run, log
from benchmarks.core.task import Task, claims_of_each, tables_of_each
from benchmarks.fast_linear import fast_linear
from benchmarks.in_context import smoke_model
from benchmarks.peqa_quality import _byte_data as byte_data
from benchmarks.peqa_quality import load_data
from benchmarks.tuning import BYTES, TINY, float_model
from peft_ext import PeqaConfig
from peft_ext.models import load_tokenizer
from peft_ext.perplexity import perplexity


OURS = {
    "minmax": "peft-ext, rounded to nearest",
    "mse": "peft-ext, least squared error",
    "calibrated": "peft-ext, calibrated",
}
HQQ, TORCHAO, QUANTO, AUTO_ROUND = "HQQ", "torchao", "optimum-quanto", "AutoRound"
# quanto has integers of these widths, and chooses the groups itself.
QUANTO_BITS = (4, 2)


class Row(NamedTuple):
    """A line of the table: who quantises, to which width."""

    library: str
    bits: Optional[int] = None

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from the others."""
        return self._asdict()


FLOAT = Row("float")


def rows_of(run: Run) -> list[Row]:
    """The table, by widths."""
    libraries = (*OURS.values(), HQQ, TORCHAO, QUANTO, AUTO_ROUND)
    rows = [Row(library, bits) for bits in run.bits for library in libraries]
    return [FLOAT, *(row for row in rows if row.library != QUANTO or row.bits in QUANTO_BITS)]


class Bench:
    """The float model and the data of a run; a row's model in float layers."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.data = byte_data(run) if run.data == BYTES else load_data(run)
        self.float_model = float_model(run.model, run.seed)
        self.others: dict[str, Callable[[nn.Module, int], tuple[nn.Module, int]]] = {
            HQQ: self.hqq,
            TORCHAO: self.torchao,
            QUANTO: self.quanto,
            AUTO_ROUND: self.auto_round,
        }

    def measure(self, row: Row) -> dict[str, Any]:
        """Perplexities, the groups that were used, and how long quantising took."""
        torch.manual_seed(self.run.seed)
        model, start, group_size = copy.deepcopy(self.float_model), time.perf_counter(), None
        if row.bits is not None:
            quantise = self.others.get(row.library)
            model, group_size = quantise(model, row.bits) if quantise else self.ours(model, row)
        seconds = time.perf_counter() - start
        with fast_linear():
            found = {
                name: perplexity(model, blocks, batch_size=self.run.batch_size)
                for name, blocks in (("test", self.data.test), ("other", self.data.other))
            }
        return {**found, "group_size": group_size, "seconds": seconds}

    def ours(self, model: nn.Module, row: Row) -> tuple[nn.Module, int]:
        """`PeqaConfig`'s starts."""
        init_method = next(name for name, title in OURS.items() if title == row.library)
        config = PeqaConfig(bits=row.bits, group_size=self.run.group_size, init_method=init_method)
        return baselines.rounded(model, config, self.data.calibration), self.run.group_size

    def hqq(self, model: nn.Module, bits: int) -> tuple[nn.Module, int]:
        """Half-quadratic, groups along the input."""
        from hqq.core.quantize import Quantizer

        for layer in _linear_layers(model).values():
            codes, meta = Quantizer.quantize(
                layer.weight.data,
                bits,
                group_size=self.run.group_size,
                axis=1,
                device="cpu",
                compute_dtype=torch.float32,
            )
            layer.weight.data = Quantizer.dequantize(codes, meta).view_as(layer.weight)
        return model, self.run.group_size

    def torchao(self, model: nn.Module, bits: int) -> tuple[nn.Module, int]:
        """Weight-only integers with zero points, scales chosen by torchao."""
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
        from torchao.quantization.quant_primitives import MappingType

        layers = _linear_layers(model)
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerGroup(self.run.group_size),
            mapping_type=MappingType.ASYMMETRIC,
        )
        quantize_(model, config, filter_fn=lambda _, name: name in layers)
        for name in layers:
            layer = model.get_submodule(name)
            layer.weight = nn.Parameter(layer.weight.dequantize().detach(), requires_grad=False)
        return model, self.run.group_size

    def quanto(self, model: nn.Module, bits: int) -> tuple[nn.Module, int]:
        """As `QuantoConfig` does it; groups as it chooses them."""
        from optimum.quanto import freeze, qint2, qint4, quantize

        layers, group_size = _linear_layers(model), 0
        quantize(model, weights={4: qint4, 2: qint2}[bits], include=list(layers))
        freeze(model)
        for name in layers:
            layer = model.get_submodule(name)
            group_size = max(group_size, layer.weight_group_size or layer.in_features)
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight = nn.Parameter(layer.weight.dequantize().detach(), requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(name, plain)
        return model, group_size

    def auto_round(self, model: nn.Module, bits: int) -> tuple[nn.Module, int]:
        """SignRound on the calibration blocks."""
        from auto_round import AutoRound

        tokenizer = smoke_model()[1] if self.run.model == TINY else load_tokenizer(self.run.model)
        blocks = [{"input_ids": block} for block in self.data.calibration]
        rounding = AutoRound(
            model,
            tokenizer=tokenizer,
            bits=bits,
            group_size=self.run.group_size,
            sym=False,
            iters=self.run.auto_round_iters,
            nsamples=len(blocks),
            seqlen=self.run.block_size,
            batch_size=self.run.batch_size,
            dataset=torch.utils.data.DataLoader(blocks, batch_size=self.run.batch_size),
            device_map="cpu",
        )
        return rounding.quantize()[0].to(torch.float32), self.run.group_size


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Those that are quantised, by name."""
    output = model.get_output_embeddings()
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, nn.Linear) and module is not output}


def measure(run: Run) -> None:
    """Measure every row that isn't stored yet."""
    missing = [row for row in rows_of(run) if run.find(row.key) is None]
    missing.sort(key=lambda row: row.library == AUTO_ROUND)  # which takes longest
    bench = Bench(run) if missing else None
    for row in missing:
        assert bench is not None
        log(f"{row.library}, {row.bits} bits")
        try:
            result = bench.measure(row)
        except ImportError as error:
            result = {"skipped": f"not installed: {error}"}
        run.add(row.key, result)


def tables(run: Run) -> dict[str, str]:
    """What is measured so far."""
    lines = []
    for row in rows_of(run):
        found = run.find(row.key)
        name = row.library if row.bits is None else f"{row.bits} bits, {row.library}"
        if found is None:
            continue
        if "skipped" in found:
            lines.append([name, None, found["skipped"], None, None])
            continue
        figures = [perplexity_cell(found[part]) for part in ("test", "other")]
        lines.append([name, found["group_size"], *figures, f"{found['seconds']:.0f}" if row.bits else None])
    headers = ["Weights", "Groups of", "Test perplexity", "Python's documentation", "Seconds to quantise"]
    return {"Integers of other libraries": markdown_table(headers, lines)}


def claims(run: Run) -> list[Claim]:
    """Ours are ahead of each at its width."""
    found = []
    for row in rows_of(run):
        ours, theirs = run.find(Row(OURS["calibrated"], row.bits).key), run.find(row.key)
        if row.library in (HQQ, TORCHAO, QUANTO, AUTO_ROUND):
            both = ours and theirs and "skipped" not in theirs
            ratio = ours["test"] / theirs["test"] if both and ours and theirs else None
            found.append(Claim(f"{row.bits} bits, calibrated over {row.library}", ratio, 1.0))
    return found


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims))
