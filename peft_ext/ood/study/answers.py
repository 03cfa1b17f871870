# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The study's two questions and ours, on quantising, answered from finished cells: paired differences in AUROC with t
intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from peft_ext.ood.metrics import Interval, mean_interval
from peft_ext.ood.study.methods import METHODS
from peft_ext.ood.study.results import CellResult


# The detectors whose numbers answer: the study's own choice, which sees features, and the usual one, which sees logits.
DETECTOR, SECOND_DETECTOR = "mahalanobis", "msp"
# What is compared with, and what it is called within a sentence.
REFERENCE, UNPACKED_REFERENCE = ("full", "full fine-tuning"), ("lora", "LoRA")
Differences = list[tuple[str, Interval, int]]


def size_answer(finished: Sequence[CellResult], detector: str = DETECTOR) -> tuple[str, Differences]:
    """How AUROC changes from a model to the next larger one: pairs that differ in nothing else.

    Args:
        finished: Cells that have a result.
        detector: Whose AUROC.

    Returns:
        A sentence, and for each step the mean difference, its interval and the number of pairs.
    """
    sizes = {row.cell.model.name: row.result["backbone_parameters"] for row in finished}
    values = _aurocs(finished, detector)
    # models that no other one shares a cell with say nothing about size
    models = Counter(key[1:] for key in values)
    ordered = sorted({key[0] for key in values if models[key[1:]] > 1}, key=lambda name: sizes[name])
    rows = []
    for small, large in [*zip(ordered, ordered[1:]), *([(ordered[0], ordered[-1])] if len(ordered) > 2 else [])]:
        pairs = [
            values[(large, *key[1:])] - value
            for key, value in values.items()
            if key[0] == small and (large, *key[1:]) in values
        ]
        if pairs:
            rows.append((f"{small} to {large}", mean_interval(pairs), len(pairs)))
    if not rows:
        return "There are no two models to compare yet.", []
    step = rows[-1]
    return f"{_verdict(step[1], 'Yes', 'No: they detect worse')} ({step[0]}, detector {detector}).", rows


def tuning_answer(finished: Sequence[CellResult], detector: str = DETECTOR) -> tuple[str, Differences]:
    """How AUROC differs from full fine-tuning's: pairs of the same set, model and seed, each method's budgets averaged.

    Arguments and answer are [`size_answer`]'s, the differences each method's.
    """
    return _against(finished, detector, REFERENCE, list(METHODS))


def quantisation_answer(finished: Sequence[CellResult], detector: str = DETECTOR) -> tuple[str, Differences]:
    """How AUROC on a packed base differs from LoRA's: pairs of the same set, model, seed and budget; budgets averaged.

    Arguments and answer are [`size_answer`]'s, the differences each method's.
    """
    packed = [name for name, method in METHODS.items() if method.packed]
    return _against(finished, detector, UNPACKED_REFERENCE, packed)


def _against(
    finished: Sequence[CellResult], detector: str, against: tuple[str, str], methods: Sequence[str]
) -> tuple[str, Differences]:
    reference, title = against
    values = _aurocs(finished, detector)
    others = {(*key[:3], key[4]): value for key, value in values.items() if key[3] == reference}
    rows = []
    for method in dict.fromkeys(row.cell.method for row in finished if row.cell.method in methods):
        by_budget: dict[Any, list[float]] = {}
        for key, value in values.items():
            other = others.get((*key[:3], key[4]), others.get((*key[:3], None)))
            if key[3] == method and other is not None:
                by_budget.setdefault(key[:3], []).append(value - other)
        pairs = [sum(values) / len(values) for values in by_budget.values()]
        if method != reference and pairs:
            rows.append((METHODS[method].title, mean_interval(pairs), len(pairs)))
    if not rows:
        return f"There is no method to compare with {title} yet.", []
    rows.sort(key=lambda row: -row[1].value)
    better = [name for name, interval, _ in rows if interval.low > 0]
    worse = [name for name, interval, _ in rows if interval.high < 0]
    sentence = "; ".join(
        f"{what} {title}: {', '.join(names)}"
        for what, names in (("better than", better), ("worse than", worse))
        if names
    )
    return f"{sentence[:1].upper()}{sentence[1:] or f'No method differs from {title}'} (detector {detector}).", rows


def _aurocs(finished: Sequence[CellResult], detector: str) -> dict[tuple[Any, ...], float]:
    """By model, set, seed, method and budget."""
    values = {}
    for row in finished:
        cell, value = row.cell, row.measure(detector, "auroc")
        if value is not None:
            values[cell.model.name, cell.setting.name, cell.seed, cell.method, cell.budget] = value
    return values


def _verdict(interval: Interval, yes: str, no: str) -> str:
    if interval.low > 0:
        return yes
    return no if interval.high < 0 else "No difference is shown"
