# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The contrastive term against its formula, and batches that have pairs."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from peft_ext.ood.contrastive import ByClass, supervised_contrastive_loss


LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def _by_the_formula(features, labels, temperature) -> float:
    vectors = [row / row.norm() for row in features]
    losses = []
    for i, label in enumerate(labels):
        same = [j for j, other in enumerate(labels) if other == label and j != i]
        below = sum(math.exp(vectors[i] @ vectors[j] / temperature) for j in range(len(labels)) if j != i)
        terms = [-math.log(math.exp(vectors[i] @ vectors[j] / temperature) / below) for j in same]
        losses += [sum(terms) / len(terms)] if same else []
    return sum(losses) / len(losses)


def test_the_loss_is_its_formula():
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    found = supervised_contrastive_loss(features, LABELS, 0.3)
    assert found.item() == pytest.approx(_by_the_formula(features, LABELS, 0.3), rel=1e-5)
    half = supervised_contrastive_loss(7 * features.bfloat16(), LABELS, 0.3)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(found.item(), rel=0.02)


def test_a_class_that_is_alone_adds_nothing():
    features = torch.randn(3, 4, requires_grad=True)
    loss = supervised_contrastive_loss(features, torch.arange(3))
    loss.backward()
    assert loss.item() == 0 and torch.equal(features.grad, torch.zeros_like(features))
    paired = supervised_contrastive_loss(torch.eye(3, requires_grad=True), torch.tensor([0, 0, 1]))
    paired.backward()  # neither the example itself nor the one without another is a NaN
    assert torch.isfinite(paired)


def test_shapes_and_temperature_are_checked():
    with pytest.raises(ValueError, match=r"features \(2, 3, 4\)"):
        supervised_contrastive_loss(torch.ones(2, 3, 4), torch.ones(2))
    with pytest.raises(ValueError, match="temperature=0"):
        supervised_contrastive_loss(torch.ones(2, 3), torch.ones(2), 0)


def test_texts_of_a_class_stand_together():
    labels = [row % 5 for row in range(50)]
    sampler = ByClass(labels, together=2, seed=3)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(50)) and first != second and len(sampler) == 50
    assert all(labels[first[row]] == labels[first[row + 1]] for row in range(0, 50, 2))
    assert len({tuple(first[row : row + 10]) for row in range(0, 50, 10)}) == 5
    assert max(Counter(labels[row] for row in first[:10]).values()) < 10, "classes aren't mixed"
    again = ByClass(labels, together=2, seed=3)
    again.set_epoch(1)
    assert list(again) == second, "a training that goes on sees another order"
    with pytest.raises(ValueError, match="together=1"):
        ByClass(labels, together=1)
