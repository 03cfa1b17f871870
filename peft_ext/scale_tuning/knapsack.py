# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""One option for each of several items, so that the costs fit a budget and the losses add up to the least.

A multiple-choice knapsack. A price of the cost, found by halving (the Lagrangian), gives a first solution, which is improved
while anything fits, and a bound on what is still to come. Then items are added one after the other; kept are the sums that no
cheaper one beats and that may still end below the first solution. So it takes milliseconds for hundreds of layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


# Halvings of the interval in which the price of a unit of cost is sought.
_HALVINGS = 60
# A solution is sought only while it may be better by this share of what it can cost or save at all.
_WORTH_SEEKING = 1e-7
# Of more sums than these, which only layers of hundreds of shapes have, those with the best bounds are kept.
_MOST_SUMS = 1 << 13


def choose(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The option of each item with the least sum of losses among those whose costs fit.

    Args:
        costs: Of each item's options, whole numbers; items may have different numbers of options.
        losses: Of the same options; finite.
        budget: The most that the costs may add up to.

    Returns:
        Indexes, one for each item. Their losses are the least, or above it by at most a ten-millionth of the differences
        between each item's worst option and its best; where hundreds of items all have other sizes, nearly so.

    Raises:
        ValueError: If even the cheapest options don't fit.
    """
    cost = [np.asarray(each, dtype=np.int64) for each in costs]
    loss = [np.asarray(each, dtype=np.float64) for each in losses]
    least = sum(int(each.min()) for each in cost)
    if least > budget:
        raise ValueError(f"the cheapest options cost {least}, which is more than the budget of {budget}.")
    price, picks = _priced(cost, loss, budget)
    picks = _improved(cost, loss, budget, picks)
    worth = _WORTH_SEEKING * sum(float(each.max() - each.min()) for each in loss)
    found_already = sum(float(each[pick]) for each, pick in zip(loss, picks))
    limit = found_already - worth
    # what the items after each can't do better than, at that price; and what they cost at least
    ahead = _sums_from_the_end([float((value + price * each).min()) for each, value in zip(cost, loss)])
    cheapest = _sums_from_the_end([int(each.min()) for each in cost])
    spent, reached = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[
        tuple[np.ndarray, np.ndarray]
    ] = []  # of each item: of every sum that is kept, its option and the sum before
    for item, (each, value) in enumerate(zip(cost, loss)):
        new_cost, new_loss = (spent[:, None] + each).ravel(), (reached[:, None] + value).ravel()
        bound = new_loss + price * (new_cost - budget) + ahead[item + 1]
        kept = np.flatnonzero((new_cost + cheapest[item + 1] <= budget) & (bound < limit))
        if not len(kept):
            return picks
        kept = kept[np.lexsort((new_loss[kept], new_cost[kept]))]
        lowest = np.minimum.accumulate(new_loss[kept])
        kept = kept[np.concatenate([[True], lowest[1:] < lowest[:-1]])]
        if len(kept) > _MOST_SUMS:
            kept = kept[np.sort(np.argpartition(bound[kept], _MOST_SUMS)[:_MOST_SUMS])]
        before, option = np.divmod(kept, len(each))
        steps.append((option, before))
        spent, reached = new_cost[kept], new_loss[kept]
    if reached[-1] >= found_already:
        return picks
    at, found = len(spent) - 1, []  # the dearest sum that is kept has the least loss
    for option, before in reversed(steps):
        found.append(int(option[at]))
        at = int(before[at])
    return found[::-1]


def _sums_from_the_end(values: list) -> list:
    sums = [0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]


def _priced(cost: list[np.ndarray], loss: list[np.ndarray], budget: int) -> tuple[float, list[int]]:
    """Nearly the least price of a unit of cost at which the items' own best choices fit, and these choices."""

    def at(price: float) -> list[int]:
        return [int(np.lexsort((each, value + price * each))[0]) for each, value in zip(cost, loss)]

    def fits(picks: list[int]) -> bool:
        return sum(int(each[pick]) for each, pick in zip(cost, picks)) <= budget

    picks = at(0.0)
    if fits(picks):
        return 0.0, picks
    # costs are whole: above this nobody pays a unit more
    low, high = 0.0, 2 * max(float(each.max() - each.min()) for each in loss)
    picks = at(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = at(middle)
        if fits(found):
            high, picks = middle, found
        else:
            low = middle
    return high, picks


def _improved(cost: list[np.ndarray], loss: list[np.ndarray], budget: int, picks: list[int]) -> list[int]:
    """Spend what a solution leaves of the budget where it saves most, until nothing fits any more."""
    picks = list(picks)
    left = budget - sum(int(each[pick]) for each, pick in zip(cost, picks))
    while True:
        best = (0.0, -1, -1)
        for item, pick in enumerate(picks):
            saved = loss[item][pick] - loss[item]
            saved = np.where(cost[item] - cost[item][pick] <= left, saved, 0.0)
            option = int(saved.argmax())
            if saved[option] > best[0]:
                best = (float(saved[option]), item, option)
        if best[1] < 0:
            return picks
        _, item, option = best
        left -= int(cost[item][option] - cost[item][picks[item]])
        picks[item] = option
