# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The critic's loss on the values of a batch of states."""

from __future__ import annotations

from typing import Optional

import torch
from torch import nn


LOSSES = ("squared_error", "cross_entropy")


def value_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    kind: str = "squared_error",
    old_values: Optional[torch.Tensor] = None,
    cliprange: Optional[float] = None,
) -> torch.Tensor:
    """The mean over states of how far `V = sigmoid(logit)` is from its target.

    With `"squared_error"`, `(V - target)^2` in probability space: equation 2 of CriticControl for targets
    `A + V_old`, up to its sum over states. With a `cliprange`, the paper's code takes
    `1/2 max((V - target)^2, (clip(V, V_old - c, V_old + c) - target)^2)`: a state whose value has moved by more than c
    towards its target since the roll-outs were taken isn't moved any further. We leave out its constant 1/2.
    With `"cross_entropy"`, the cross entropy of a soft label, whose gradient doesn't vanish where V is near 0 or 1.

    Args:
        logits, targets, mask, old_values: `[batch, states]`; states where the mask is False don't count.
        kind: One of `LOSSES`.
        cliprange: Of `"squared_error"`; None: don't clip.
    """
    count = mask.sum().clamp(min=1)
    if kind == "cross_entropy":
        each = nn.functional.binary_cross_entropy_with_logits(logits, targets.clamp(0.0, 1.0), reduction="none")
        return (each * mask).sum() / count
    values = torch.sigmoid(logits)
    each = (values - targets).square()
    if cliprange is not None and old_values is not None:
        near = old_values + (values - old_values).clamp(-cliprange, cliprange)
        each = torch.maximum(each, (near - targets).square())
    return (each * mask).sum() / count
