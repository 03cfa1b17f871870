# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Many adapters on one packed base: memory of loading a thousand, time of a switch, cost of mixing 64 in one batch.

Once through PEFT's own `load_adapter`, `set_adapter` and `adapter_names=`, once through an `AdapterPool`. Adapters have
random scales: neither time nor memory depends on them. Mixed batches take turns with batches of one adapter, for PEQA and
for LoRA, so that a slow minute of the machine hits them all. Linux only.

    python -m benchmarks adapters
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Optional, Union

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.run import Run, log
from benchmarks.core.task import Runs, Task, claims_of_each, run_named, tables_of_each
from benchmarks.core.worker import fresh_process
from benchmarks.resident import reset_peak, resident_bytes
from benchmarks.tuning import float_model
from peft_ext import AdapterPool, PeqaConfig


PEQA, LORA = "PEQA, 4 bits, per channel", "LoRA, r = 8, all linear layers"
POOL = f"{PEQA}, AdapterPool"
FORWARD, GENERATE = "one forward", "generate"
PARTS = ("loading", "pool", "mixing")
MIXED = (8, 64)
MB = 1e6
_FILE = "adapter_model.safetensors"


def measure_loading(model: str, adapters: int, seed: int, **_: Any) -> dict[str, Any]:
    """Load adapters from files onto one base, one after another; then switch between them."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        tuned = get_peft_model(float_model(model), PeqaConfig(bits=4, task_type="CAUSAL_LM")).eval()
        folders = _write_adapters(tuned, Path(folder), adapters)
        few = _time_of_switches(tuned.set_adapter, ["default"] * 2)
        reset_peak()
        before, seconds = resident_bytes(), []
        for path in tqdm(folders, desc="Loading", leave=False, disable=None):
            started = time.process_time()  # of the processor: the files are in the system's cache
            tuned.load_adapter(str(path), path.name)
            seconds.append(time.process_time() - started)
        reset_peak()
        grown = resident_bytes() - before
        names = [path.name for path in folders]
        return {
            "files": sum((path / _FILE).stat().st_size for path in folders),
            "grown": grown,
            "seconds": sum(seconds),
            "first_seconds": statistics.median(seconds[:20]),
            "last_seconds": statistics.median(seconds[-20:]),
            "switch_with_one": few,
            "switch": _time_of_switches(tuned.set_adapter, names),
            "switch_frozen": _time_of_switches(tuned.set_adapter, names, inference_mode=True),
        }


def measure_pool(model: str, adapters: int, seed: int, **_: Any) -> dict[str, Any]:
    """The same files into an `AdapterPool`."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        tuned = get_peft_model(float_model(model), PeqaConfig(bits=4, task_type="CAUSAL_LM")).eval()
        folders = _write_adapters(tuned, Path(folder), adapters)
        pool = AdapterPool(tuned.unload())
        reset_peak()
        before, seconds = resident_bytes(), []
        for path in tqdm(folders, desc="Loading", leave=False, disable=None):
            started = time.process_time()
            pool.load(path)
            seconds.append(time.process_time() - started)
        reset_peak()
        return {
            "files": sum((path / _FILE).stat().st_size for path in folders),
            "grown": resident_bytes() - before,
            "seconds": sum(seconds),
            "first_seconds": statistics.median(seconds[:20]),
            "last_seconds": statistics.median(seconds[-20:]),
            "switch": _time_of_switches(pool.activate, pool.names),
        }


def _write_adapters(model: PeftModel, folder: Path, count: int) -> list[Path]:
    """`count` adapter folders, as `save_pretrained` writes them, with random scales."""
    model.save_pretrained(folder / "first")
    tensors = load_file(folder / "first" / _FILE)
    folders = [folder / f"task{number}" for number in range(count)]
    for path in folders:
        path.mkdir()
        shutil.copy(folder / "first" / "adapter_config.json", path)
        own = {
            key: value * (1 + 0.02 * torch.randn_like(value)) if value.is_floating_point() else value
            for key, value in tensors.items()
        }
        save_file(own, path / _FILE, metadata={"format": "pt"})
    return folders


def _time_of_switches(switch: Callable[..., None], names: Sequence[str], **kwargs: Any) -> float:
    """Median seconds of a switch to another adapter."""
    seconds = []
    for step in range(100):
        name = names[(7 * step) % len(names)]  # neighbours in memory would flatter
        started = time.perf_counter()
        switch(name, **kwargs)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure_mixing(
    model: str, batch: int, tokens: int, repeats: int, seed: int, **_: Any
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Seconds of every repetition: method -> "one forward" or "generate" -> number of adapters in the batch."""
    torch.manual_seed(seed)
    configs = {
        PEQA: PeqaConfig(bits=4, task_type="CAUSAL_LM"),
        LORA: LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    }
    counts = [count for count in MIXED if count <= batch] or [batch]
    models: dict[str, Any] = {
        method: _with_adapters(float_model(model), config, max(counts)) for method, config in configs.items()
    }
    ids = torch.randint(3, models[PEQA].config.vocab_size, (batch, tokens))
    models[POOL] = _pool(model, max(counts))
    runs = {
        (method, task, count): _run(one, task, ids, count)
        for method, one in models.items()
        for task in (FORWARD, GENERATE)
        for count in (1, *counts)
    }
    found: dict[str, Any] = {method: {FORWARD: {}, GENERATE: {}} for method in models}
    for repeat in range(repeats + 1):
        order = list(runs.items())
        for (method, task, count), run in tqdm(order[:: 1 if repeat % 2 else -1], leave=False, disable=None):
            seconds = run()
            if repeat:  # the first round warms up
                found[method][task].setdefault(str(count), []).append(seconds)
    return found


def _with_adapters(base: nn.Module, config: Any, count: int) -> PeftModel:
    model = get_peft_model(base, config, "task0")
    for number in range(1, count):
        model.add_adapter(f"task{number}", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".task" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.set_adapter("task0", inference_mode=True)
    return model.eval()


def _pool(model: str, count: int) -> AdapterPool:
    with tempfile.TemporaryDirectory() as folder:
        tuned = get_peft_model(float_model(model), PeqaConfig(bits=4, task_type="CAUSAL_LM")).eval()
        folders = _write_adapters(tuned, Path(folder), count)
        pool = AdapterPool(tuned.unload())
        for path in folders:
            pool.load(path)
    pool.activate("task0")
    return pool


def _run(model: Union[PeftModel, AdapterPool], task: str, ids: torch.Tensor, count: int) -> Callable[[], float]:
    """A run of a batch that mixes `count` adapters; of one adapter, which is active, without naming it."""
    kwargs: dict[str, Any] = {}
    names = [f"task{row % count}" for row in range(len(ids))]
    pool = model if isinstance(model, AdapterPool) else None
    if pool is None and count > 1:
        kwargs["adapter_names"] = names
    new_tokens = 16
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}

    inner = model.model if isinstance(model, AdapterPool) else model

    @torch.no_grad()
    def run() -> float:
        started = time.perf_counter()
        with pool.mixed(names) if pool is not None and count > 1 else nullcontext():
            if task == FORWARD:
                inner(input_ids=ids, **kwargs)
            else:
                inner.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **kwargs)
        return time.perf_counter() - started

    return run


def over_one(seconds: dict[str, list[float]], count: str) -> float:
    """Median over the rounds of a mixed batch's time over the same batch's with one adapter, in the same round."""
    return statistics.median(mixed / one for mixed, one in zip(seconds[count], seconds["1"]))


def loading_table(found: dict[str, dict[str, Any]], adapters: int) -> str:
    """Memory and time of loading, time of a switch: through PEFT and in a pool, where measured."""
    lines = {
        f"{adapters:,} adapter files, MB": ("files", 1 / MB, ",.1f"),
        "Resident memory grown, MB": ("grown", 1 / MB, ",.1f"),
        "Loading one, the first, ms of processor time": ("first_seconds", 1e3, ".1f"),
        "Loading one, the last, ms of processor time": ("last_seconds", 1e3, ".1f"),
        "Loading all, s of processor time": ("seconds", 1, ".1f"),
        "A switch with one adapter loaded, microseconds": ("switch_with_one", 1e6, ".0f"),
        "A switch with all loaded, microseconds": ("switch", 1e6, ".0f"),
        "A switch with all loaded, inference_mode, microseconds": ("switch_frozen", 1e6, ".0f"),
    }
    rows = [
        [title, *(format(one[key] * factor, shown) if key in one else "" for one in found.values())]
        for title, (key, factor, shown) in lines.items()
    ]
    return markdown_table(["Adapters on one base", *found], rows)


def mixing_table(found: dict[str, Any], batch: int) -> str:
    """Median seconds, and over one adapter."""
    rows = []
    for method, tasks in found.items():
        for task, seconds in tasks.items():
            for count in seconds:
                over = "1" if count == "1" else f"{over_one(seconds, count):.2f}"
                rows.append([f"{method}: {task}", count, f"{statistics.median(seconds[count]):.3f}", over])
    return markdown_table([f"Batch of {batch}", "Adapters in it", "Seconds", "Over one adapter"], rows)


MEASURES = {"loading": measure_loading, "pool": measure_pool, "mixing": measure_mixing}


def measure(run: Run) -> None:
    """Each part in a process of its own, so that its memory is its own."""
    for part in run.parts:
        if run.find({"part": part}) is None:
            log(f"Measuring {part}")
            run.add({"part": part}, fresh_process(MEASURES[part], run.settings, part))


def _loaded(run: Run) -> dict[str, dict[str, Any]]:
    """Through PEFT and in a pool, where measured."""
    found = {"PEFT": run.find({"part": "loading"}), "AdapterPool": run.find({"part": "pool"})}
    return {title: result for title, result in found.items() if result is not None}


def tables(run: Run) -> dict[str, str]:
    """Loading and switching; mixed batches."""
    found, loaded, mixing = {}, _loaded(run), run.find({"part": "mixing"})
    if loaded:
        found["Loading and switching"] = loading_table(loaded, run.adapters)
    if mixing:
        found["Mixed batches"] = mixing_table(mixing, run.batch)
    return found


def _mixed(run: Run, method: str, task: str) -> Optional[float]:
    """Time of a batch that mixes the most adapters, over one."""
    mixing = run.find({"part": "mixing"})
    return None if mixing is None else over_one(mixing[method][task], max(mixing[method][task], key=int))


def claims(run: Run) -> list[Claim]:
    """Memory of loading, time of a switch, cost of mixing."""
    found, loaded = [], _loaded(run)
    for title in ("PEFT", "AdapterPool"):
        one = loaded.get(title)
        grown, switch = (one["grown"] / one["files"], 1e6 * one["switch"]) if one else (None, None)
        found.append(Claim(f"{title}: memory grown, over the adapter files", grown, 1.5))
        found.append(Claim(f"{title}: a switch, microseconds", switch, 1000))
    for method, task in itertools.product((PEQA, POOL), (FORWARD, GENERATE)):
        found.append(Claim(f"{method}: {task}, all adapters in a batch, over one", _mixed(run, method, task), 1.1))
    return found


def headlines(runs: Runs) -> list[Headline]:
    """64 adapters in a batch."""
    run = run_named(runs, "thousand")
    ours, loras = (_mixed(run, method, FORWARD) if run else None for method in (PEQA, LORA))
    if ours is None or loras is None:
        return []
    return [
        Headline(
            "Speed and serving on a CPU",
            "64 adapters mixed in a batch, time over one",
            f"PEQA {ours:.2f}, LoRA {loras:.2f}",
            unless(ours <= 1.1, "1.1"),
            "../benchmarks/serving.md#many-adapters-on-one-base",
        )
    ]


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims), headlines)
