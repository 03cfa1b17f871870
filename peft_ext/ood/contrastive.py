# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Supervised contrastive tuning beside cross-entropy: texts of a class close together, those of others apart, which leaves
room between classes for what belongs to none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.utils.data import Sampler


def supervised_contrastive_loss(
    features: torch.Tensor, labels: torch.Tensor, temperature: float = 0.1
) -> torch.Tensor:
    """The supervised contrastive loss of Khosla et al. (2020, https://huggingface.co/papers/2004.11362), equation 2: for each
    example, the mean over the others of its class of minus the log-softmax of their cosine among all of the batch.

    Args:
        features: `[batch, size]`, of any length and float type; computed in float32.
        labels: The classes `[batch]`.
        temperature: What cosines are divided by.

    Returns:
        The mean over the examples that have another of their class in the batch; 0 (with a gradient of 0) if none has.

    Raises:
        ValueError: If the shapes don't go together, or the temperature isn't greater than 0.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features {tuple(features.shape)} and labels {tuple(labels.shape)} must be [batch, size] and [batch]."
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be greater than 0.")
    with torch.autocast(features.device.type, enabled=False):
        vectors = nn.functional.normalize(features.float(), dim=-1)
        itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        cosines = (vectors @ vectors.T / temperature).masked_fill(itself, float("-inf"))
        same = (labels[:, None] == labels[None, :]) & ~itself
        others = same.sum(dim=1)
        told = others > 0
        if not told.any():
            return vectors.sum() * 0
        log_shares = cosines - cosines.logsumexp(dim=1, keepdim=True)
        sums = torch.where(same, log_shares, torch.zeros_like(log_shares)).sum(dim=1)
        return -(sums[told] / others[told]).mean()


class ByClass(Sampler[int]):
    """The order of an epoch in which texts of a class stand together, so that a batch has pairs to compare.

    Args:
        labels: The classes of the examples.
        together: Examples of a class that stand side by side; what is left over of a class makes a smaller group.
        seed: Of the order, which is another one in each epoch.
    """

    def __init__(self, labels: Sequence[int], together: int = 4, seed: int = 0) -> None:
        if together < 2:
            raise ValueError(f"together={together!r} must be at least 2.")
        self.labels, self.together, self.seed, self.epoch = torch.as_tensor(labels), together, seed, 0

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loaders, so that a training that goes on sees the order it would have seen."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1  # where nobody calls set_epoch
        groups: list[list[int]] = []
        for label in self.labels.unique():
            rows = (self.labels == label).nonzero().flatten()
            rows = rows[torch.randperm(len(rows), generator=generator)]
            groups += [group.tolist() for group in rows.split(self.together)]
        for number in torch.randperm(len(groups), generator=generator).tolist():
            yield from groups[number]
