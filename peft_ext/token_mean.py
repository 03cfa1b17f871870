# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A batch's part of the mean loss over all accumulated batches and processes, as transformers' Trainer wants it from a loss
that takes `num_items_in_batch`.

Trainer takes for one whatever has `**kwargs` in its forward: it neither divides such a loss by the accumulation steps nor
leaves it as a mean of its own batch, so that a loss which ignores `num_items_in_batch` comes out multiplied by both.
"""

from __future__ import annotations

from typing import Any

import torch


IGNORED = -100


def items_in(labels: torch.Tensor) -> torch.Tensor:
    """How many labels a loss is on, a tensor."""
    return labels.ne(IGNORED).sum()


def mean_over_all(total: torch.Tensor, count: Any, num_items_in_batch: Any) -> torch.Tensor:
    """A sum of losses over `num_items_in_batch`; where that is None, over the `count` of this batch."""
    items = count if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(items, device=total.device).clamp(min=1)


def share(trainer: Any, total: torch.Tensor, count: Any, num_items_in_batch: Any) -> torch.Tensor:
    """What a trainer's `compute_loss` returns for a sum of losses: DDP averages gradients over processes, while
    `num_items_in_batch` counts all of theirs.

    Args:
        trainer: Its `model_accepts_loss_kwargs` is True, so that the loss isn't divided by the accumulation steps as well.
        total: The sum over this batch's items.
        count: Their number.
        num_items_in_batch: As `compute_loss` is given it; None: in evaluation.
    """
    loss = mean_over_all(total, count, num_items_in_batch)
    if num_items_in_batch is not None and trainer.args.average_tokens_across_devices:
        loss = loss * (trainer.accelerator.num_processes // trainer.get_tp_size())
    return loss


class TokenMeanLoss:
    """For transformers' trainers, in front of one: the model's own loss, a mean over its batch's labels, counts by their
    number, whether or not the model takes `num_items_in_batch`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that Trainer counts

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        trainer: Any = self
        others = trainer.label_smoother is not None or trainer.compute_loss_func is not None  # they take the number
        if num_items_in_batch is None or others or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        labels = inputs["labels"]
        count = items_in(labels[..., 1:] if trainer._loss_shifts_labels else labels)
        mean, outputs = super().compute_loss(model, inputs, True)  # type: ignore[misc]
        loss = share(trainer, mean * count, count, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss
