# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A student's pass on a batch, towards a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

import torch
from torch import nn
from torch.nn import functional as F

from peft_ext.distillation.loss import Objective, Sums, Teaching, distillation_loss
from peft_ext.distillation.output_head import OutputHead
from peft_ext.distillation.teacher import chosen, supervised
from peft_ext.examples import IGNORED


class StudentPass(NamedTuple):
    """Sums over the supervised tokens of a batch, how many there are, and what the model returned beside."""

    sums: Sums
    tokens: torch.Tensor
    outputs: Any


def student_pass(
    model: nn.Module,
    inputs: Mapping[str, Any],
    teaching: Optional[Teaching],
    objective: Objective,
    head: Optional[OutputHead],
) -> StudentPass:
    """The objective of a batch.

    Args:
        model: A causal language model, in whatever wrappers.
        inputs: A batch with `labels`, and what else the model takes.
        teaching: The teacher's distributions for the supervised tokens; None where the objective needs none.
        objective: What is minimised.
        head: The model's, see [`output_head`][peft_ext.distillation.output_head.output_head]; None: all logits are made at once.
    """
    labels = inputs["labels"]
    options = {"use_cache": False, **{name: value for name, value in inputs.items() if name != "labels"}}
    found: list[Any] = []

    def loss_of(states: torch.Tensor) -> torch.Tensor:
        # prompt tuning puts states before the text's
        targets = F.pad(labels.to(states.device), (states.shape[1] - labels.shape[1], 0), value=IGNORED)
        kept = supervised(targets)
        parameters = () if head is None else head.parameters()
        read, right = chosen(states[:, :-1], kept), chosen(targets[:, 1:], kept)
        sums = distillation_loss(read, right, teaching, objective, head, parameters)
        found[:] = [sums, kept.sum()]
        return sums.loss

    if head is None:
        outputs = model(**options)
        loss_of(outputs["logits"])
        return StudentPass(found[0], found[1], outputs)
    with head.finished_by(loss_of):
        outputs = model(**options, **head.fewest_logits())
    # as the wrappers returned it, which may have waited for it
    return StudentPass(found[0]._replace(loss=outputs["loss"]), found[1], outputs)
