# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What packing the embedding and the output head saves and costs: bytes of the whole model, and perplexity before any tuning.

One calibrated model for each format of the layers; its two ends are left float, or packed.

    python -m benchmarks embeddings
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Optional

from torch import nn

from benchmarks import baselines
from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.experiments import FULL
from benchmarks.core.run import Run, log
from benchmarks.core.task import Runs, Task, claims_of_each, run_named, tables_of_each
from benchmarks.distillation import Form, forms
from benchmarks.fast_linear import fast_linear
from benchmarks.peqa_quality import _byte_data as byte_data
from benchmarks.peqa_quality import load_data
from benchmarks.tuning import BYTES, float_model
from peft_ext import PeqaConfig
from peft_ext.perplexity import perplexity
from peft_ext.scale_tuning.embeddings import pack_embeddings


MIB = 2**20
# Of SmolLM2 at 3 bits, with both ends at 8; and what they may cost.
MOST_MIB, MOST_COST = 70.0, 1.01


class Row(NamedTuple):
    """A line of the table: the layers' format (None: float), and the bits of the two ends (None: float)."""

    form: Optional[Form] = None
    embedding_bits: Optional[int] = None

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from the others."""
        bits, group_size = (None, None) if self.form is None else self.form[:2]
        return {"bits": bits, "group_size": group_size, "embedding_bits": self.embedding_bits}


def rows_of(run: Run) -> list[Row]:
    """The table, the float model first."""
    return [Row(), *(Row(form, bits) for form in forms(run) for bits in run.embedding_bits)]


def measure(run: Run) -> None:
    """Measure every row that isn't stored yet."""
    missing = [row for row in rows_of(run) if run.find(row.key) is None]
    if not missing:
        return
    data = byte_data(run) if run.data == BYTES else load_data(run)
    untouched = float_model(run.model, run.seed)
    calibrated: dict[Form, Any] = {}
    with fast_linear():
        for row in missing:
            log(f"{_name(row)}, embedding {row.embedding_bits or 'float'}")
            model: Any = untouched
            if row.form is not None:
                if row.form not in calibrated:
                    config = PeqaConfig(bits=row.form.bits, group_size=row.form.group_size, init_method="calibrated")
                    calibrated[row.form] = baselines.quantized(
                        copy.deepcopy(untouched), config, data.calibration
                    ).unload()
                model = copy.deepcopy(calibrated[row.form])
            if row.embedding_bits is not None:
                pack_embeddings(model, row.embedding_bits)
            run.add(row.key, {"bytes": _bytes(model), **_figures(run, model, data)})


def _bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _figures(run: Run, model: nn.Module, data: Any) -> dict[str, float]:
    return {name: perplexity(model, getattr(data, name), batch_size=run.batch_size) for name in ("test", "other")}


def tables(run: Run) -> dict[str, str]:
    """What is measured so far."""
    lines = []
    for row in rows_of(run):
        found = run.find(row.key)
        ends = "float32" if row.embedding_bits is None else f"{row.embedding_bits} bits"
        figures = (
            ["not measured", "", ""]
            if found is None
            else [f"{found['bytes'] / MIB:.1f}", f"{found['test']:.2f}", f"{found['other']:.2f}"]
        )
        lines.append([_name(row), ends, *figures])
    headers = ["Layers", "Embedding and head", "MiB in memory", "Test", "Python's documentation"]
    return {"Embedding and head": markdown_table(headers, lines)}


def _name(row: Row) -> str:
    return "float" if row.form is None else row.form.title


def claims(run: Run) -> list[Claim]:
    """Both ends at 8 bits cost at most 1 %; the whole model then takes at most 70 MiB."""
    found = []
    for form in forms(run):
        plain, packed = (run.find(Row(form, bits).key) for bits in (None, 8))
        cost = packed["test"] / plain["test"] if plain and packed else None
        found.append(Claim(f"{form.title}, perplexity with both ends at 8 bits, over float ends", cost, MOST_COST))
        if run.size == FULL:
            size = packed["bytes"] / MIB if packed else None
            found.append(Claim(f"{form.title}, MiB with both ends at 8 bits", size, MOST_MIB))
    return found


def headlines(runs: Runs) -> list[Headline]:
    """Size and cost with both ends at 8 bits."""
    run = run_named(runs, "wikitext2")
    form = None if run is None else forms(run)[0]
    plain, packed = (None, None) if run is None else (run.find(Row(form, bits).key) for bits in (None, 8))
    if run is None or form is None or plain is None or packed is None:
        return []
    what = f"SmolLM2, {form.title}, embedding and head at 8 bits"
    text = (
        f"{packed['bytes'] / MIB:.0f} MiB, perplexity on wikitext-2 {packed['test']:.2f}; both ends in float32 "
        f"{plain['bytes'] / MIB:.0f} MiB, {plain['test']:.2f}"
    )
    wanted = unless(all(claim.met for claim in claims(run)), f"{MOST_MIB:.0f} MiB, at most 1 % of perplexity")
    return [Headline("Tuning packed models", what, text, wanted, "../benchmarks/peqa.md#embedding-and-head")]


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims), headlines)
