# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A packed checkpoint, loaded in a fresh process: peak memory above the interpreter's own, time to load and to the first
token, tokens a second; against the same model that was never saved, stock transformers and the float model.

Every measurement is a process of its own, and contenders take turns; figures are medians.

    python -m benchmarks loading memory   # may run beside other work
    python -m benchmarks loading time     # time as well: on a quiet machine

Linux only.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.run import Run, log
from benchmarks.core.task import Runs, Task, claims_of_each, run_named, tables_of_each
from benchmarks.core.worker import fresh_process
from benchmarks.peqa_training import BILLION_CONFIG
from benchmarks.tuning import float_model
from peft_ext import PeqaConfig
from peft_ext.checkpoint.saving import make_saveable


BILLION = "random Llama, 1.1 billion"
MB = 1e6


class Contender(NamedTuple):
    """Who loads what."""

    title: str
    checkpoint: str  # a folder of `prepare`
    how: str = "stock"  # see `loading_worker.load`


FLOAT, SAVED, BCQ = "float", "pack-quantized", "bcq"
NEVER_SAVED = Contender("packed in this process, never saved", FLOAT, "packed here")
OURS = Contender("saved, loaded in a fresh process", SAVED, "peft_ext")
OUR_BCQ = Contender("the same, `bcq`", BCQ, "peft_ext")
STOCK = Contender("the same file, stock transformers (float layers)", SAVED)
BFLOAT16 = Contender("the float model, bfloat16", FLOAT)
CONTENDERS = (NEVER_SAVED, OURS, OUR_BCQ, STOCK, BFLOAT16)


def build(model: str, seed: int) -> PreTrainedModel:
    """The model in bfloat16; [`BILLION`] with random weights."""
    if model != BILLION:
        return float_model(model, seed).bfloat16()
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(LlamaConfig(**BILLION_CONFIG), dtype=torch.bfloat16)


def chosen(run: Run) -> list[Contender]:
    """The contenders of an experiment, by their titles; all if it names none."""
    # what the float model takes while it is packed is no question of loading
    wanted = [each for each in CONTENDERS if run.what == "time" or each != NEVER_SAVED]
    return [each for each in wanted if not run.contenders or each.title in run.contenders]


def prepare(run: Run, folder: Path) -> None:
    """Write the float checkpoint and the packed ones that are loaded (4 bits, a scale and a zero point for each channel)."""
    model, wanted = run.model, {FLOAT, *(each.checkpoint for each in chosen(run))}
    for name in (FLOAT, SAVED, BCQ):
        if name not in wanted:
            continue
        log(f"{model}: writing {name}")
        if name == FLOAT:
            loaded = build(model, run.seed)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(folder / FLOAT)
            loaded = get_peft_model(loaded, PeqaConfig(bits=4)).merge_and_unload()
            make_saveable(loaded, name)
        partial = folder / f"{name}.partial"
        loaded.save_pretrained(partial)
        del loaded
        partial.rename(folder / name)


def measure_all(run: Run, folder: Path) -> dict[str, dict[str, Any]]:
    """All contenders, `repeats` times in turn: medians, and all values, by title."""
    contenders = chosen(run)
    repeats: dict[str, list[dict[str, Any]]] = {contender.title: [] for contender in contenders}
    for number in range(run.repeats):
        for contender in contenders:
            log(f"Round {number + 1} of {run.repeats}: {contender.title}")
            arguments = {"folder": str(folder / contender.checkpoint), "how": contender.how, "threads": run.threads}
            arguments |= {name: run.settings[name] for name in ("prompt_tokens", "new_tokens")}
            figures = fresh_process("benchmarks.loading_worker:load", arguments, contender.title)
            repeats[contender.title].append(figures)
    found: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        rows = repeats[contender.title]
        numbers = [key for key, value in rows[0].items() if isinstance(value, (int, float))]
        found[contender.title] = {
            **{key: statistics.median(row[key] for row in rows) for key in numbers},
            "layers": rows[0]["layers"],
            "file_bytes": sum(path.stat().st_size for path in (folder / contender.checkpoint).glob("*.safetensors")),
            "repeats": rows,
        }
    return found


def measure(run: Run) -> None:
    """All contenders, stored together."""
    if run.rows:
        return
    with tempfile.TemporaryDirectory() as temporary:
        prepare(run, Path(temporary))
        run.add({}, measure_all(run, Path(temporary)))


def tables(run: Run) -> dict[str, str]:
    """Memory, and time where it was measured."""
    found, timed = run.find({}), run.what == "time"
    if found is None:
        return {}
    header = ["", "file, MB", "peak of loading, MB", "over its file", "peak after generating, MB"]
    if timed:
        header += ["seconds to load", "first token, first call, ms", "first token, later, ms", "tokens/s"]
    table = []
    for title, figures in found.items():
        cells = [
            title,
            f"{figures['file_bytes'] / MB:,.0f}",
            f"{figures['load_peak_bytes'] / MB:,.0f}",
            f"{figures['load_peak_bytes'] / figures['file_bytes']:.2f}",
            f"{figures['peak_bytes'] / MB:,.0f}",
        ]
        if timed:
            cells += [
                f"{figures['load_seconds']:.1f}",
                f"{1e3 * figures['first_call_seconds']:,.0f}",
                f"{1e3 * figures['first_token_seconds']:,.0f}",
                f"{figures['tokens_per_second']:.1f}",
            ]
        table.append(cells)
    return {"Loading": markdown_table(header, table)}


def claims(run: Run) -> list[Claim]:
    """Loading takes no more than the file, and what was saved is as fast as what wasn't."""
    found = run.find({}) or {}
    ours, never = found.get(OURS.title), found.get(NEVER_SAVED.title)

    def over(kind: str, other: Optional[dict[str, Any]], other_kind: str) -> Optional[float]:
        return ours[kind] / other[other_kind] if ours and other else None

    claimed = [
        Claim("peak of loading, over the packed bytes", over("load_peak_bytes", ours, "file_bytes"), 1.15),
        Claim("peak, generation included, over the packed bytes", over("peak_bytes", ours, "file_bytes"), 1.15),
    ]
    if run.what == "time":
        for kind, what in (("first_call_seconds", "first call"), ("first_token_seconds", "later calls")):
            claimed.append(Claim(f"first token, {what}, over the never-saved model's", over(kind, never, kind), 1.1))
        ratio = over("tokens_per_second", never, "tokens_per_second")
        claimed.append(Claim("tokens per second, over the never-saved model's", ratio, 0.95, at_least=True))
    return claimed


def headlines(runs: Runs) -> list[Headline]:
    """The peak of loading."""
    found = (run_named(runs, "time") or runs[0]).find({}) if runs else None
    if found is None:
        return []
    ours, stock = (found[one.title]["load_peak_bytes"] / found[one.title]["file_bytes"] for one in (OURS, STOCK))
    return [
        Headline(
            "Speed and serving on a CPU",
            "Loading a saved model of 1.1 billion, 4 bits: peak memory over the file",
            f"{ours:.2f}; stock transformers {stock:.2f}",
            unless(ours <= 1.15, "1.15"),
            "../benchmarks/serving.md#loading-a-saved-model",
        )
    ]


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims), headlines)
