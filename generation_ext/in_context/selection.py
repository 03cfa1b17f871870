# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which of the texts that a model wrote may become demonstrations, by what the model itself says of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from generation_ext.in_context.calibration import mean_prior, normalized
from generation_ext.in_context.overflow import Demonstration
from generation_ext.in_context.pools import Pool
from generation_ext.in_context.scoring import LabelScorer
from generation_ext.prompts import Task


def consistent(scorer: LabelScorer, task: Task, pools: Sequence[Pool]) -> list[Pool]:
    """Pools without the texts that the model, without demonstrations and with contextual calibration, labels otherwise than
    intended."""
    demonstrations = [each for pool in pools for each in pool.demonstrations(task)]
    predictions = iter(scorer.score([example for example, _ in demonstrations], calibrate=True).predictions())
    kept = []
    for pool in pools:
        samples = {
            label: [text for text in texts if text and next(predictions) == label]
            for label, texts in pool.samples.items()
        }
        kept.append(Pool(pool.example, samples))
    return kept


def surest(
    scorer: LabelScorer, task: Task, pools: Sequence[Pool], keep: float, fewest: int, together: bool
) -> list[Pool]:
    """Pools with the texts of which the model, without demonstrations and compared with the mean over all of them, is surest.

    Args:
        scorer, task: Of the classification.
        pools: Of inputs.
        keep: Share of each class's texts.
        fewest: Texts of a class that are kept in any case, if there are so many.
        together: Whether the share is of all pools together, else of each.
    """
    demonstrations = [each for pool in pools for each in pool.demonstrations(task)]
    if not demonstrations:
        return list(pools)
    # texts of one input share what of it is kept, as a premise: it runs once for those that are given the same list
    contexts: list[list[Demonstration]] = [[]] * len(demonstrations)
    if len(task.fields) > 1:
        contexts = []
        for pool in pools:
            nothing: list[Demonstration] = []
            contexts += [nothing] * len(pool.demonstrations(task))
    log_probs = scorer.score_each([example for example, _ in demonstrations], contexts).log_probs
    sure = iter(normalized(normalized(log_probs) - mean_prior(log_probs)))
    columns = {label: column for column, label in enumerate(task.labels)}
    places: dict[tuple[str, int], list[tuple[float, int, int]]] = {}
    for index, pool in enumerate(pools):
        for label, texts in pool.samples.items():
            group = places.setdefault((label, 0 if together else index), [])
            group += [(-float(next(sure)[columns[label]]), index, place) for place, text in enumerate(texts) if text]
    kept: set[tuple[str, int, int]] = set()
    for (label, _), group in places.items():
        best = sorted(group)[: max(fewest, math.ceil(keep * len(group)))]
        kept.update((label, index, place) for _, index, place in best)
    return [
        Pool(
            pool.example,
            {
                label: [text for place, text in enumerate(texts) if (label, index, place) in kept]
                for label, texts in pool.samples.items()
            },
        )
        for index, pool in enumerate(pools)
    ]
