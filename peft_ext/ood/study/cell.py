# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""One cell of a study: trains its classifier, extracts its features once, and puts all detectors behind them."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase, set_seed

from peft_ext.language_model import unwrapped
from peft_ext.models import load_tokenizer
from peft_ext.ood import metrics
from peft_ext.ood.classifier import PooledClassifier
from peft_ext.ood.detectors import make_detector
from peft_ext.ood.features import Features, chosen_layers, extract
from peft_ext.ood.study.data import Data, load_setting
from peft_ext.ood.study.grid import Cell, StudyConfig
from peft_ext.ood.study.methods import NotPossibleError, Solution, apply, get_method, solve, trained_parameters
from peft_ext.ood.study.results import FEATURES, SCORES, result_of
from peft_ext.ood.study.training import Trained, calibration_batch, probe, train


_load_setting = functools.lru_cache(maxsize=2)(load_setting)  # cells of a set come one after another
_PARTS = ("train", "validation", "test", "outside")
_SCORED = ("train", "test", "outside")
# Ends the names of detectors that saw states of several layers.
_ON_LAYERS = "_layers"


def processes() -> PartialState:
    """The processes that a launcher started together; without a word, accelerate takes each for itself on a CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def measure_cell(config: StudyConfig, cell: Cell) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """Train a cell's classifier and measure all detectors behind it; its result, and tensors by the file they go to.

    Raises:
        NotPossibleError: If the method can't be applied.
    """
    data = _load_setting(cell.setting, config.data_dir)
    tokenizer = load_tokenizer(cell.model.path)
    start = time.time()
    model, solution, trained, rate, searched = _best(config, cell, tokenizer, data)
    seconds = {"training": round(time.time() - start, 1)}
    start = time.time()
    parts = zip(_PARTS, (data.train[0], data.validation[0], data.test[0], data.outside))
    texts_of = dict(parts)
    features = {part: _extract(model, tokenizer, texts, cell) for part, texts in texts_of.items()}
    layers = chosen_layers(model, config.layers)
    layered = {part: _extract(model, tokenizer, texts_of[part], cell, layers) for part in _SCORED if layers}
    seconds["features"] = round(time.time() - start, 1)
    start = time.time()
    detectors, scores = _detect(config, features, data.train[1])
    if layered:
        more, more_scores = _detect(config, layered, data.train[1], _ON_LAYERS)
        detectors, scores = {**detectors, **more}, {**scores, **more_scores}
    seconds["detectors"] = round(time.time() - start, 1)
    backbone = solve("full", unwrapped(model).config, None).parameters
    result = {
        "cell": cell.settings(),
        "classes": len(data.labels),
        "examples": {part: len(f.logits) for part, f in features.items()},
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
        **({"layers": layers} if layers else {}),
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
        chosen = result_of(config, search)
        if chosen is None:
            raise NotPossibleError(f"its learning rate was to be chosen by {search.id}, which has no result.")
        rates = [chosen["learning_rate"]]
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


def _extract(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str], cell: Cell, layers: Sequence[int] = ()
) -> Features:
    """Each process of a launcher takes its share; all have all features in the end."""
    options: dict[str, Any] = {"max_length": cell.training.max_length, "batch_size": cell.training.eval_batch_size}
    options["layers"] = layers
    state = processes()
    if state.num_processes == 1 or len(texts) < state.num_processes:
        return extract(model, tokenizer, texts, **options)
    with state.split_between_processes(texts) as share:
        shares = gather_object([extract(model, tokenizer, share, **options)])
    return Features(*(torch.cat(tensors) for tensors in zip(*shares)))


def _detect(
    config: StudyConfig, features: Mapping[str, Features], labels: list[int], ending: str = ""
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Every detector's measures, or why it has none, and the scores behind them; with an `ending` of their names, of detectors
    of features alone."""
    measured: dict[str, Any] = {}
    scores: dict[str, np.ndarray] = {}
    for spec in config.detectors:
        detector = make_detector(spec)
        if ending and detector.needs_logits:
            continue
        name = f"{detector.name}{ending}"
        try:
            detector.fit(*features["train"], labels)
            inside, outside = (np.asarray(detector.score(*features[part])) for part in ("test", "outside"))
        except ValueError as error:
            measured[name] = {"error": str(error)}
            continue
        values: dict[str, Any] = {each: measure(inside, outside) for each, measure in metrics.MEASURES.items()}
        interval = metrics.bootstrap(metrics.auroc, inside, outside, resamples=config.resamples)
        values["auroc_interval"] = [interval.low, interval.high]
        if np.ptp(np.concatenate([inside, outside])) == 0:
            values["note"] = "all scores are equal"
        measured[name] = values
        scores[f"{name}.id"], scores[f"{name}.outside"] = inside, outside
    return measured, scores
