# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Runs a study's cells: trains each classifier once, extracts its features once, and puts all detectors behind them."""

from __future__ import annotations

import functools
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase, set_seed

from peft_ext.files import written_whole
from peft_ext.language_model import unwrapped
from peft_ext.models import load_tokenizer
from peft_ext.ood import metrics
from peft_ext.ood.classifier import PooledClassifier
from peft_ext.ood.detectors import make_detector
from peft_ext.ood.features import Features, extract
from peft_ext.ood.study.data import Data, Setting, load_setting
from peft_ext.ood.study.grid import Cell, StudyConfig
from peft_ext.ood.study.manifest import DONE, FAILED, FINISHED, SKIPPED, Claim, Manifest
from peft_ext.ood.study.methods import NotPossibleError, Solution, apply, get_method, solve, trained_parameters
from peft_ext.ood.study.training import Trained, calibration_batch, probe, train


RESULT, SCORES, FEATURES = "result.json", "scores.safetensors", "features.safetensors"
_PARTS = ("train", "validation", "test", "outside")


def run(
    config: StudyConfig, *, retry: bool = False, wait: float = 10.0, log: Optional[Callable[[str], None]] = None
) -> dict[str, int]:
    """Work off all cells that are neither finished nor in another process's hands.

    Processes that a launcher started together (`accelerate launch`, torchrun) train each cell together, on batches of their
    number times `batch_size`; the first of them writes.

    Args:
        config: The study.
        retry: Run cells that failed, or were skipped, once more.
        wait: Seconds between looks at cells that others are working on, where some wait for their learning rate.
        log: Takes a line of progress; None: stderr.

    Returns:
        How many cells this call saw to each end: `{"done": ..., "failed": ..., "skipped": ...}`.

    Raises:
        FileNotFoundError: If the study's `data_dir` is no folder: without this, its sets would be looked for on the hub.
    """
    if config.data_dir and not Path(config.data_dir).is_dir():
        raise FileNotFoundError(
            f"data_dir={config.data_dir!r} is no folder; leave it out to read the sets from the hub."
        )
    log = log or _log
    state = processes()
    manifest = Manifest(config.output_dir)
    cells = {cell.id: cell for cell in config.cells()}
    again = {job for job, event in manifest.last().items() if retry and event["status"] in (FAILED, SKIPPED)}
    counts = dict.fromkeys(FINISHED, 0)
    while True:
        claim = _claim(config, manifest, cells, again) if state.is_main_process else None
        job, waiting = _shared(claim.job if claim else None, _waits(config, manifest, cells) if not claim else False)
        if job is None:
            if not waiting:
                return counts
            time.sleep(wait)
            continue
        again.discard(job)
        status, more = _attempt(config, cells[job], state.is_main_process)
        log(f"{job}: {status}" + (f" ({more['reason']})" if "reason" in more else f" in {more['seconds']:.0f} s"))
        counts[status] += 1
        if claim:
            claim.finish(status, **more)
        gc.collect()


def processes() -> PartialState:
    """The processes that a launcher started together; without a word, accelerate takes each for itself on a CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def result_of(config: StudyConfig, cell: Cell) -> Optional[dict[str, Any]]:
    """The stored result of a finished cell."""
    path = _folder(config, cell) / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def scores_path(config: StudyConfig, cell: Cell) -> Path:
    """Where a cell's scores lie: `<detector>.id` and `<detector>.outside`."""
    return _folder(config, cell) / SCORES


def _folder(config: StudyConfig, cell: Cell) -> Path:
    return Path(config.output_dir) / "cells" / cell.id


def _claim(config: StudyConfig, manifest: Manifest, cells: Mapping[str, Cell], again: set[str]) -> Optional[Claim]:
    events = manifest.last()
    ready = []
    for job, cell in cells.items():
        search = config.searching_cell(cell)
        if search is None or events.get(search.id, {}).get("status") in FINISHED and search.id not in again:
            ready.append(job)
    fresh = manifest.claim(job for job in ready if job not in again)
    return fresh or manifest.claim((job for job in ready if job in again), again=(FAILED, SKIPPED))


def _waits(config: StudyConfig, manifest: Manifest, cells: Mapping[str, Cell]) -> bool:
    """Whether a cell waits for another, which a process works on, to choose its learning rate."""
    events = manifest.last()
    open_cells = [cell for job, cell in cells.items() if events.get(job, {}).get("status") not in FINISHED]
    return any(config.searching_cell(cell) is not None for cell in open_cells)


def _shared(job: Optional[str], waiting: bool) -> tuple[Optional[str], bool]:
    """The main process's decision, in all processes of a launcher."""
    values: list[Any] = [job, waiting]
    if processes().num_processes > 1:
        broadcast_object_list(values)
    return values[0], values[1]


def _attempt(config: StudyConfig, cell: Cell, writes: bool) -> tuple[str, dict[str, Any]]:
    """Run a cell, whatever comes of it."""
    start = time.time()
    try:
        result, tensors = _run_cell(config, cell)
        if writes:
            _write(_folder(config, cell), result, tensors)
    except NotPossibleError as error:
        return SKIPPED, {"reason": str(error)}
    except Exception as error:
        print(traceback.format_exc(), file=sys.stderr)
        return FAILED, {"reason": f"{type(error).__name__}: {error}"}
    return DONE, {"seconds": round(time.time() - start, 1)}


def _write(folder: Path, result: Mapping[str, Any], tensors: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in tensors.items():
        with written_whole(folder / name) as path:
            save_file(dict(found), path)
    with written_whole(folder / RESULT) as path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _run_cell(config: StudyConfig, cell: Cell) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    data = _data(cell.setting, config.data_dir)
    tokenizer = load_tokenizer(cell.model.path)
    start = time.time()
    model, solution, trained, rate, searched = _best(config, cell, tokenizer, data)
    seconds = {"training": round(time.time() - start, 1)}
    start = time.time()
    parts = zip(_PARTS, (data.train[0], data.validation[0], data.test[0], data.outside))
    features = {part: _extract(model, tokenizer, texts, cell) for part, texts in parts}
    seconds["features"] = round(time.time() - start, 1)
    start = time.time()
    detectors, scores = _detect(config, features, data.train[1])
    seconds["detectors"] = round(time.time() - start, 1)
    backbone = solve("full", unwrapped(model).config, None).parameters
    result = {
        "cell": cell.settings(),
        "classes": len(data.labels),
        "examples": {part: len(found.logits) for part, found in features.items()},
        "backbone_parameters": backbone,
        "size": solution.size,
        "size_name": get_method(cell.method).size_name,
        "parameters": solution.parameters,
        "learning_rate": rate,
        "searched": searched,
        "epochs": trained.epochs,
        "validation_accuracy": trained.validation_accuracy,
        "id_accuracy": metrics.id_accuracy(features["test"].logits.argmax(1).numpy(), data.test[1]),
        "detectors": detectors,
        "seconds": seconds,
    }
    tensors = {SCORES: scores}
    if config.keep_features:
        tensors[FEATURES] = {
            f"{part}.{name}": value.numpy() for part, f in features.items() for name, value in f._asdict().items()
        }
    return result, tensors


def _best(
    config: StudyConfig, cell: Cell, tokenizer: PreTrainedTokenizerBase, data: Data
) -> tuple[Any, Solution, Trained, float, dict[str, float]]:
    """The trained classifier: of several learning rates, the one with the best validation accuracy."""
    rates = list(cell.training.learning_rates.get(cell.method, ())) or [get_method(cell.method).learning_rate]
    search = config.searching_cell(cell)
    if search is not None:
        found = result_of(config, search)
        if found is None:
            raise NotPossibleError(f"its learning rate was to be chosen by {search.id}, which has no result.")
        rates = [found["learning_rate"]]
    searched: dict[str, float] = {}
    best: Optional[tuple[Any, Solution, Trained, float]] = None
    for rate in rates:
        model, solution = _prepared(cell, tokenizer, data)
        trained = _train(model, cell, tokenizer, data, float(rate))
        searched[f"{rate:g}"] = trained.validation_accuracy
        if best is None or trained.validation_accuracy > best[2].validation_accuracy:
            best = model, solution, trained, float(rate)
    if best is None:
        raise ValueError(f"learning_rates of {cell.method!r} is an empty list.")
    return *best, searched


def _prepared(cell: Cell, tokenizer: PreTrainedTokenizerBase, data: Data) -> tuple[Any, Solution]:
    set_seed(cell.seed)
    spec = cell.model
    model = PooledClassifier.from_backbone(spec.path, len(data.labels), spec.pooling, spec.layers)
    model.config.pad_token_id = tokenizer.pad_token_id
    device = processes().device
    model.to(device)
    solution = solve(cell.method, model.config, cell.budget)
    packed = get_method(cell.method).packed
    batches = [calibration_batch(tokenizer, data, cell.training).to(device)] if packed else []
    adapted = apply(cell.method, model, solution.size, batches)
    if solution.size is not None and trained_parameters(adapted) != solution.parameters:
        solution = Solution(solution.size, trained_parameters(adapted))
    return adapted, solution


def _train(model: Any, cell: Cell, tokenizer: PreTrainedTokenizerBase, data: Data, rate: float) -> Trained:
    if cell.method != "linear":
        return train(model, tokenizer, data, cell.training, rate, cell.seed)
    parts = [_extract(model, tokenizer, texts, cell) for texts in (data.train[0], data.validation[0])]
    return probe(model.score, parts[0], data.train[1], parts[1], data.validation[1])


def _extract(model: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str], cell: Cell) -> Features:
    """Each process of a launcher takes its share; all have all features in the end."""
    options: dict[str, Any] = {"max_length": cell.training.max_length, "batch_size": cell.training.eval_batch_size}
    state = processes()
    if state.num_processes == 1 or len(texts) < state.num_processes:
        return extract(model, tokenizer, texts, **options)
    with state.split_between_processes(texts) as share:
        found = gather_object([extract(model, tokenizer, share, **options)])
    return Features(*(torch.cat(tensors) for tensors in zip(*found)))


def _detect(
    config: StudyConfig, features: Mapping[str, Features], labels: list[int]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Every detector's measures, or why it has none, and the scores behind them."""
    measured: dict[str, Any] = {}
    scores: dict[str, np.ndarray] = {}
    for spec in config.detectors:
        detector = make_detector(spec)
        try:
            detector.fit(*features["train"], labels)
            inside, outside = (np.asarray(detector.score(*features[part])) for part in ("test", "outside"))
        except ValueError as error:
            measured[detector.name] = {"error": str(error)}
            continue
        values: dict[str, Any] = {name: measure(inside, outside) for name, measure in metrics.MEASURES.items()}
        interval = metrics.bootstrap(metrics.auroc, inside, outside, resamples=config.resamples)
        values["auroc_interval"] = [interval.low, interval.high]
        if np.ptp(np.concatenate([inside, outside])) == 0:
            values["note"] = "all scores are equal"
        measured[detector.name] = values
        scores[f"{detector.name}.id"], scores[f"{detector.name}.outside"] = inside, outside
    return measured, scores


@functools.lru_cache(maxsize=2)
def _cached_data(setting: str, data_dir: Optional[str]) -> Data:
    return load_setting(Setting(**json.loads(setting)), data_dir)


def _data(setting: Setting, data_dir: Optional[str]) -> Data:
    return _cached_data(json.dumps(asdict(setting), sort_keys=True), data_dir)


def _log(message: str) -> None:
    if processes().is_main_process:
        print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)
