# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which layer a critic should read: how much of the outcome a linear map of each layer's states explains on roll-outs that
it wasn't fitted on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from generation_ext.critic.reading import Reading, widths
from generation_ext.critic.rollouts import Rollout, encode
from generation_ext.critic.value import Critic
from peft_ext.language_model import inference


LAYERS = 8  # that are compared
_ROLLOUTS, _STATES, _BYTES = 512, 2048, 2**29
_FOLDS, _LEAST = 4, 16
_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0)  # beside a kernel whose diagonal is 1 on average
_BATCH = 8


def candidate_layers(model: nn.Module, reading: Reading) -> list[int]:
    """Up to `LAYERS` layers from a quarter of the way to the last, of the width that the critic reads."""
    last = reading.last
    steps = torch.linspace(max(1, round(last / 4)), last, LAYERS).round().int().tolist()
    width = widths(model, reading.layers)[0]
    return [index for index, size in zip(sorted(set(steps)), widths(model, sorted(set(steps)))) if size == width]


def explained_by_layer(
    model: nn.Module, critic: Critic, rollouts: Sequence[Rollout], outcomes: torch.Tensor, seed: int
) -> dict[int, float]:
    """How much of the outcomes' variance each layer explains, in four-fold cross-validation over roll-outs.

    It costs one forward pass of at most 512 texts and some seconds; at most 512 MB of states are kept.

    Args:
        model: The language model.
        critic: Says what is read of each layer.
        rollouts: What to learn from.
        outcomes: `[roll-outs, states]`, of each state of each roll-out.
        seed: Which roll-outs and states.

    Returns:
        Layer -> explained variance, in the order of the layers; empty if there are fewer than 16 roll-outs, or all outcomes
        are the same.
    """
    reading = critic.reading(model)
    layers = candidate_layers(model, reading)
    generator = random.Random(seed)
    chosen = generator.sample(range(len(rollouts)), min(len(rollouts), _ROLLOUTS))
    width = critic.state_size
    count = min(_STATES, _BYTES // (4 * width * len(layers)))
    each = max(1, count // len(chosen))
    places = [sorted(generator.sample(range(rollouts[i].states), min(each, rollouts[i].states))) for i in chosen]
    targets = torch.cat([outcomes[i, place] for i, place in zip(chosen, places)]).double()
    if len(chosen) < _LEAST or float(targets.var(correction=0)) < 1e-12:
        return {}
    folds = torch.cat([torch.full((len(place),), number % _FOLDS) for number, place in enumerate(places)])
    parts: dict[int, list[torch.Tensor]] = {index: [] for index in layers}
    wide = replace(reading, layers=tuple(layers))
    with inference(model):
        for start in range(0, len(chosen), _BATCH):
            batch = [rollouts[i] for i in chosen[start : start + _BATCH]]
            states = encode(model, batch, reading=wide).float().cpu()
            for row, place in zip(states, places[start : start + _BATCH]):
                for index, state in zip(layers, row[place].split(width, dim=-1)):
                    parts[index].append(state.clone())
    return {index: _explained(torch.cat(parts.pop(index)), targets, folds) for index in layers}


def _explained(states: torch.Tensor, targets: torch.Tensor, folds: torch.Tensor) -> float:
    """Of ridge regression under the best of some penalties."""
    states = (states - states.mean(dim=0)) / states.std(dim=0).clamp(min=1e-6)
    kernel = (states @ states.T).double() / states.shape[1]
    total = targets.var(correction=0)
    best = -float("inf")
    for penalty in _PENALTIES:
        errors = torch.zeros_like(targets)
        for fold in range(_FOLDS):
            own, other = folds != fold, folds == fold
            mean = targets[own].mean()
            system = kernel[own][:, own] + penalty * torch.eye(int(own.sum()), dtype=kernel.dtype)
            weights = torch.linalg.solve(system, targets[own] - mean)
            errors[other] = targets[other] - mean - kernel[other][:, own] @ weights
        best = max(best, float(1 - errors.square().mean() / total))
    return best
