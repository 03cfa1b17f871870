# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Ridge regression of outcomes on what a critic reads: how much each layer explains on roll-outs that it wasn't fitted on, under
which penalty, and the head that it gives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from generation_ext.critic.reading import Reading, widths
from generation_ext.critic.rollouts import Rollout, encode
from generation_ext.critic.value import Critic
from peft_ext.language_model import inference


LAYERS = 8  # that are compared
_ROLLOUTS, _STATES, _BYTES = 512, 1024, 2**29
_FOLDS, _LEAST = 4, 16
_PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0)
_BATCH = 16
_LARGEST = 8192  # rows of a linear system


class Explained(NamedTuple):
    """What a linear map knows.

    Attributes:
        share: Explained variance of the outcomes of roll-outs that it wasn't fitted on.
        penalty: Of the squares of its weights, beside the mean squared error, for standardised states.
        rollouts: How many it was fitted on. The best penalty goes down as they grow, since states of one roll-out share an
            outcome.
    """

    share: float
    penalty: float
    rollouts: int

    def penalty_of(self, rollouts: int) -> float:
        """The penalty for so many roll-outs."""
        return self.penalty * self.rollouts / rollouts


def candidate_layers(model: nn.Module, reading: Reading) -> list[int]:
    """Up to `LAYERS` layers from a quarter of the way to the last, of the width that the critic reads."""
    last = reading.last
    steps = sorted(set(torch.linspace(max(1, round(last / 4)), last, LAYERS).round().int().tolist()))
    width = widths(model, reading.layers)[0]
    return [index for index, size in zip(steps, widths(model, steps)) if size == width]


def explained_by(
    model: nn.Module,
    critic: Critic,
    layers: Sequence[tuple[int, ...]],
    rollouts: Sequence[Rollout],
    outcomes: torch.Tensor,
    seed: int,
) -> list[Explained]:
    """How much of the outcomes' variance layers explain, in four-fold cross-validation over prompts (over roll-outs, where there
    are fewer than eight prompts).

    It costs one forward pass of at most 512 texts and 160 linear systems of at most 768 rows; at most 512 MB of states are kept.

    Args:
        model: The language model.
        critic: Says what is read of each layer.
        layers: The layers of critics to compare.
        rollouts: What to learn from.
        outcomes: `[roll-outs, states]`, of each state of each roll-out.
        seed: Which roll-outs and states.

    Returns:
        One for each; nothing if there are fewer than 16 roll-outs, or all outcomes are the same.
    """
    reading, width = critic.reading(model), critic.state_size
    generator = random.Random(seed)
    chosen = generator.sample(range(len(rollouts)), min(len(rollouts), _ROLLOUTS))
    each = max(1, min(_STATES, _BYTES // (4 * width * len(layers))) // len(chosen))
    places = [sorted(generator.sample(range(rollouts[i].states), min(each, rollouts[i].states))) for i in chosen]
    targets = torch.cat([outcomes[i, place] for i, place in zip(chosen, places)]).double()
    if len(chosen) < _LEAST or float(targets.var(correction=0)) < 1e-12:
        return []
    fold_of = _folds([rollouts[i] for i in chosen])
    folds = torch.cat([torch.full((len(place),), fold) for fold, place in zip(fold_of, places)])
    parts: list[list[torch.Tensor]] = [[] for _ in layers]
    wide = replace(reading, layers=tuple(index for several in layers for index in several))
    with inference(model), critic.adapted(model):
        for start in range(0, len(chosen), _BATCH):
            batch = [rollouts[i] for i in chosen[start : start + _BATCH]]
            states = encode(model, batch, reading=wide).float().cpu()
            for row, place in zip(states, places[start : start + _BATCH]):
                for part, state in zip(parts, row[place].split(width, dim=-1)):
                    part.append(state.clone())
    found = []
    for part in parts:
        share, penalty = _explained(torch.cat(part), targets, folds)
        part.clear()
        found.append(Explained(share, penalty, len(chosen) * (_FOLDS - 1) // _FOLDS))
    return found


def _folds(rollouts: Sequence[Rollout]) -> list[int]:
    prompts = {
        prompt: number for number, prompt in enumerate(dict.fromkeys(tuple(each.prompt_ids) for each in rollouts))
    }
    if len(prompts) < 2 * _FOLDS:
        return [number % _FOLDS for number in range(len(rollouts))]
    return [prompts[tuple(rollout.prompt_ids)] % _FOLDS for rollout in rollouts]


def _explained(states: torch.Tensor, targets: torch.Tensor, folds: torch.Tensor) -> tuple[float, float]:
    """The share that is explained under the best penalty, and that."""
    states = (states - states.mean(dim=0)) / states.std(dim=0).clamp(min=1e-6)
    kernel = (states @ states.T).double()
    total = targets.var(correction=0)
    found = []
    for penalty in _PENALTIES:
        errors = torch.zeros_like(targets)
        for fold in range(_FOLDS):
            own, other = folds != fold, folds == fold
            mean, count = targets[own].mean(), int(own.sum())
            system = kernel[own][:, own] + penalty * count * torch.eye(count, dtype=kernel.dtype)
            factor = torch.linalg.cholesky(system)
            weights = torch.cholesky_solve((targets[own] - mean)[:, None], factor)[:, 0]
            errors[other] = targets[other] - mean - kernel[other][:, own] @ weights
        found.append((float(1 - errors.square().mean() / total), penalty))
    return max(found)


@torch.no_grad()
def fit_head(critic: Critic, states: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], penalty: float) -> None:
    """Set a linear head to the ridge regression of targets on standardised states.

    The map to probabilities becomes one to logits by the sigmoid's slope at the mean target.

    Args:
        critic: Its standardisation is fitted.
        states: Of each roll-out what is read, `[states, state_size]`.
        targets: Of each roll-out `[states]`.
        penalty: Of the squares of the weights, beside the mean squared error.
    """
    mean = float(torch.cat([each.double() for each in targets]).mean())
    size, count = critic.state_size, sum(len(each) for each in targets)
    if size <= _LARGEST:
        gram, moment = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        for rows, wanted in zip(_joined(states), _joined(targets)):
            rows = _standardised(critic, rows)
            gram += (rows.T @ rows).double()
            moment += rows.T.double() @ (wanted.double() - mean)
        gram.diagonal().add_(penalty * count)
        weights = torch.linalg.solve(gram, moment)
    else:  # as many states as a system can have rows, in its dual form
        step = max(1, -(-count // _LARGEST))
        rows = _standardised(critic, torch.cat([each[number % step :: step] for number, each in enumerate(states)]))
        wanted = torch.cat([each[number % step :: step] for number, each in enumerate(targets)]).double() - mean
        kernel = (rows @ rows.T).double()
        kernel.diagonal().add_(penalty * len(rows))
        weights = rows.T.double() @ torch.linalg.solve(kernel, wanted)
    value = min(max(mean, 1e-3), 1 - 1e-3)
    critic.head.weight.copy_(weights[None] / (value * (1 - value)))
    critic.head.bias.fill_(float(torch.logit(torch.tensor(value, dtype=torch.float64))))


def slope_of(kind: str, value: float) -> float:
    """By what a penalty in terms of probabilities is one of a loss in terms of logits, at a mean value."""
    value = min(max(value, 1e-3), 1 - 1e-3)
    slope = value * (1 - value)
    return slope**2 if kind == "squared_error" else slope


def _standardised(critic: Critic, rows: torch.Tensor) -> torch.Tensor:
    return (rows.float() - critic.mean.cpu()) / critic.std.cpu()


def _joined(parts: Sequence[torch.Tensor], size: int = 256) -> list[torch.Tensor]:
    return [torch.cat(list(parts[start : start + size])) for start in range(0, len(parts), size)]


def best_of(found: dict[int, Explained]) -> int:
    """The layer that explains most."""
    return max(found, key=lambda index: found[index].share)
