# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Many adapters on one packed base: memory of loading a thousand, time of a switch, cost of mixing 64 in one batch.

Once through PEFT's own `load_adapter`, `set_adapter` and `adapter_names=`, once through an `AdapterPool`. Adapters have
random scales: neither time nor memory depends on them. Mixed batches take turns with batches of one adapter, for PEQA and
for LoRA, so that a slow minute of the machine hits them all. Linux only.

    python -m benchmarks.adapters

Finished parts are stored and not measured again.
"""

from __future__ import annotations

import argparse
import gc
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

from benchmarks.common import Results, argument_parser, describe, log, markdown_table, verdict
from benchmarks.resident import reset_peak, resident_bytes
from benchmarks.tuning import tiny_llama
from peft_ext import AdapterPool, PeqaConfig
from peft_ext.models import DEFAULT_MODEL, load


PEQA, LORA = "PEQA, 4 bits, per channel", "LoRA, r = 8, all linear layers"
POOL = f"{PEQA}, AdapterPool"
FORWARD, GENERATE = "one forward", "generate"
PARTS = ("loading", "pool", "mixing")
BATCH, MIXED = 64, (8, 64)
MB = 1e6
_FILE = "adapter_model.safetensors"


def measure_loading(args: argparse.Namespace) -> dict[str, Any]:
    """Load adapters from files onto one base, one after another; then switch between them."""
    with tempfile.TemporaryDirectory() as folder:
        model = get_peft_model(_base(args), PeqaConfig(bits=4, task_type="CAUSAL_LM")).eval()
        folders = _write_adapters(model, Path(folder), args.adapters)
        few = _time_of_switches(model.set_adapter, ["default"] * 2)
        reset_peak()
        before, seconds = resident_bytes(), []
        for path in tqdm(folders, desc="Loading", leave=False, disable=None):
            started = time.process_time()  # of the processor: the files are in the system's cache
            model.load_adapter(str(path), path.name)
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
            "switch": _time_of_switches(model.set_adapter, names),
            "switch_frozen": _time_of_switches(model.set_adapter, names, inference_mode=True),
        }


def measure_pool(args: argparse.Namespace) -> dict[str, Any]:
    """The same files into an `AdapterPool`."""
    with tempfile.TemporaryDirectory() as folder:
        model = get_peft_model(_base(args), PeqaConfig(bits=4, task_type="CAUSAL_LM")).eval()
        folders = _write_adapters(model, Path(folder), args.adapters)
        pool = AdapterPool(model.unload())
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


def measure_mixing(args: argparse.Namespace) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Seconds of every repetition: method -> "one forward" or "generate" -> number of adapters in the batch."""
    rows = 4 if args.smoke else BATCH
    configs = {
        PEQA: PeqaConfig(bits=4, task_type="CAUSAL_LM"),
        LORA: LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    }
    counts = [count for count in MIXED if count <= rows] or [rows]
    models: dict[str, Any] = {
        method: _with_adapters(_base(args), config, max(counts)) for method, config in configs.items()
    }
    ids = torch.randint(3, models[PEQA].config.vocab_size, (rows, args.tokens))
    models[POOL] = _pool(args, max(counts))
    runs = {
        (method, task, count): _run(model, task, ids, count)
        for method, model in models.items()
        for task in (FORWARD, GENERATE)
        for count in (1, *counts)
    }
    found: dict[str, Any] = {method: {FORWARD: {}, GENERATE: {}} for method in models}
    for repeat in range(args.repeats + 1):
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


def _pool(args: argparse.Namespace, count: int) -> AdapterPool:
    with tempfile.TemporaryDirectory() as folder:
        model = get_peft_model(_base(args), PeqaConfig(bits=4, task_type="CAUSAL_LM")).eval()
        folders = _write_adapters(model, Path(folder), count)
        pool = AdapterPool(model.unload())
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


def _base(args: argparse.Namespace) -> nn.Module:
    return tiny_llama() if args.smoke else load(args.model, dtype=torch.float32)


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


def mixing_table(found: dict[str, Any]) -> str:
    """Median seconds, and over one adapter."""
    rows = []
    for method, tasks in found.items():
        for task, seconds in tasks.items():
            for count in seconds:
                over = "1" if count == "1" else f"{over_one(seconds, count):.2f}"
                rows.append([f"{method}: {task}", count, f"{statistics.median(seconds[count]):.3f}", over])
    return markdown_table(["Batch of 64", "Adapters in it", "Seconds", "Over one adapter"], rows)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure what isn't stored yet; print tables and verdicts."""
    parser = argument_parser(__doc__, "adapters.json", table=False)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--adapters", type=int, default=1000, help="how many are loaded")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each of the 64 prompts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args(argv)
    if args.smoke:
        args.adapters, args.repeats = 4, 2
    torch.manual_seed(args.seed)
    results = Results(args.output, args.seed)
    name = "tiny random Llama" if args.smoke else args.model
    measures = {"loading": measure_loading, "pool": measure_pool, "mixing": measure_mixing}
    settings = {
        "loading": {"part": "loading", "model": name, "adapters": args.adapters},
        "pool": {"part": "pool", "model": name, "adapters": args.adapters},
        "mixing": {"part": "mixing", "model": name, "tokens": args.tokens, "repeats": args.repeats},
    }
    for part in args.parts:
        if results.find(settings[part]) is None:
            log(f"Measuring {part}")
            results.add(settings[part], measures[part](args))
            gc.collect()
    loading, pool, mixing = (results.find(settings[part]) for part in PARTS)
    lines = []
    loaded = {title: found for title, found in (("PEFT", loading), ("AdapterPool", pool)) if found}
    if loaded:
        print(loading_table(loaded, args.adapters) + "\n")
    for title, found in loaded.items():
        lines.append(verdict(f"{title}: memory grown, over the adapter files", found["grown"] / found["files"], 1.5))
        lines.append(verdict(f"{title}: a switch, microseconds", 1e6 * found["switch"], 1000))
    if mixing:
        print(mixing_table(mixing) + "\n")
        for method, task in itertools.product((PEQA, POOL), (FORWARD, GENERATE)):
            seconds = mixing[method][task]
            most = max(seconds, key=int)
            lines.append(
                verdict(f"{method}: {task}, {most} adapters in a batch, over one", over_one(seconds, most), 1.1)
            )
    print("\n".join(lines))
    print("\n" + describe(results.rows[-1]["environment"]))


if __name__ == "__main__":
    main()
