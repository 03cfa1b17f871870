# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Cross-entropy and divergence from a teacher, computed over pieces of the tokens, so that no second tensor of tokens times
vocabulary lives.

`(1 - distill) * cross_entropy + distill * temperature**2 * divergence(teacher || student)`, summed over the supervised tokens.
The divergence is TRL's (`GKDTrainer`, `DistillationTrainer`), which leave `temperature**2` out: with it, the weight means the
same at all temperatures (Hinton et al., 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Protocol

import torch
from torch.autograd.function import once_differentiable


# Logits of a piece; four or five tensors of this size (64 MiB in float32) live at a time.
PIECE_NUMBERS = 2**24
# What no probability of a rest falls below, so that its logarithm is finite.
_TINY = 1e-37


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Args:
        distill: Weight of the divergence; the cross-entropy has the rest. 0: cross-entropy alone, 1: divergence alone.
        temperature: Divides both models' logits in the divergence, which is multiplied by its square.
        beta: Which divergence, as in TRL: 0 is KL(teacher || student), 1 is KL(student || teacher), between them the
            generalised Jensen-Shannon divergence to the mixture `beta * teacher + (1 - beta) * student`.

    Raises:
        ValueError: If one is out of its range.
    """

    distill: float = 0.5
    temperature: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        for name in ("distill", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1.")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature} must be above 0.")


class Outcomes(NamedTuple):
    """A teacher's next-token distributions, at the objective's temperature.

    Attributes:
        log_probs: `[tokens, outcomes]`.
        indices: None: outcome i is token i of the vocabulary. Otherwise `[tokens, k]`, the tokens of the first k outcomes;
            if there is one outcome more, it is *any other token*.
    """

    log_probs: torch.Tensor
    indices: Optional[torch.Tensor] = None


class Teaching(Protocol):
    """A teacher's distributions for the supervised tokens of a batch, in order."""

    def __getitem__(self, tokens: slice) -> Outcomes:
        """Those of some of the tokens."""


class Sums(NamedTuple):
    """Over the supervised tokens: what is minimised, and its parts, which have no gradient."""

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    divergence: torch.Tensor


def distillation_loss(
    states: torch.Tensor,
    labels: torch.Tensor,
    teaching: Optional[Teaching],
    objective: Objective,
    head: Optional[Callable[[torch.Tensor], torch.Tensor]] = None,
    head_parameters: tuple[torch.nn.Parameter, ...] = (),
    piece_numbers: int = PIECE_NUMBERS,
) -> Sums:
    """The objective on supervised tokens. Gradients are made in the forward pass, piece by piece.

    Args:
        states: What the student's output head reads for each token, `[tokens, hidden]`; without a `head`, its logits.
        labels: Which token is right, `[tokens]`.
        teaching: The teacher; None where `objective.distill` is 0.
        objective: What is minimised.
        head: Makes logits `[n, vocabulary]` of `n` states.
        head_parameters: What of the head is trained.
        piece_numbers: Logits of a piece.
    """
    vocabulary = states.shape[-1] if head is None else None
    return Sums(
        *_InPieces.apply(states, labels, teaching, objective, head, vocabulary, piece_numbers, *head_parameters)
    )


def divergence(log_teacher: torch.Tensor, log_student: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence over outcomes, `[n]`, and its derivative by the student's log-probabilities, `[n, outcomes]`.

    The derivative is one along which probabilities still sum to 1: a multiple of the student's probabilities may be missing.
    """
    teacher, student = log_teacher.exp(), log_student.exp()
    if beta == 0:
        return _weighted(teacher, log_teacher - log_student).sum(-1), -teacher
    if beta == 1:
        slope = _weighted(student, log_student - log_teacher)
        return slope.sum(-1), slope
    log_mixture = torch.logaddexp(log_teacher + math.log(beta), log_student + math.log1p(-beta))
    slope = (1 - beta) * _weighted(student, log_student - log_mixture)
    return beta * _weighted(teacher, log_teacher - log_mixture).sum(-1) + slope.sum(-1), slope


def _weighted(probabilities: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Their product; what can't happen counts nothing, whatever its value."""
    return torch.where(probabilities > 0, probabilities * values, 0.0)


def _divergence_of_logits(
    log_student: torch.Tensor, outcomes: Outcomes, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence `[n]` of a student's log-probabilities `[n, vocabulary]`, and its gradient by the student's logits."""
    log_teacher, indices = outcomes
    probabilities = log_student.exp()
    if indices is None:
        value, slope = divergence(log_teacher, log_student, beta)
        return value, slope - probabilities.mul_(slope.sum(-1, keepdim=True))
    count = indices.shape[1]
    log_known, known = log_student.gather(1, indices), probabilities.gather(1, indices)
    if log_teacher.shape[1] == count:
        value, slope = divergence(log_teacher, log_known, beta)
        share = torch.zeros_like(slope[:, :1])
    else:
        # as a sum over the others, not as what is missing to 1, of which few digits would be left
        rest = probabilities.scatter_(1, indices, 0.0).sum(-1, keepdim=True).clamp_min_(_TINY)
        value, slope = divergence(log_teacher, torch.cat([log_known, rest.log()], 1), beta)
        share = slope[:, count:] / rest
    total = slope.sum(-1, keepdim=True)
    gradient = probabilities.mul_(share - total)
    return value, gradient.scatter_(1, indices, slope[:, :count] - known * total)


def _piece(
    logits: torch.Tensor, labels: torch.Tensor, outcomes: Optional[Outcomes], objective: Objective
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy and divergence of each token, `[n]`, and the gradient of the objective by the logits."""
    distill, temperature, beta = objective.distill, objective.temperature, objective.beta
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs, places = logits.log_softmax(-1), labels[:, None]
    cross_entropy = -log_probs.gather(1, places)[:, 0]
    if outcomes is None:
        value, gradient = torch.zeros_like(cross_entropy), torch.zeros_like(log_probs)
    else:
        # a teacher may be on another device
        indices = None if outcomes.indices is None else outcomes.indices.to(logits.device)
        outcomes = Outcomes(outcomes.log_probs.to(logits.device, logits.dtype), indices)
        softened = log_probs if temperature == 1 else (logits / temperature).log_softmax(-1)
        value, gradient = _divergence_of_logits(softened, outcomes, beta)
        gradient.mul_(distill * temperature)  # its square, and 1 / temperature from the logits
    if distill < 1:
        gradient.add_(log_probs.exp_(), alpha=1 - distill)
        gradient.scatter_add_(1, places, gradient.new_full(places.shape, distill - 1))
    return cross_entropy, value, gradient


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, labels, teaching, objective, head, vocabulary, piece_numbers, *parameters):
        wanted = [states, *parameters] if any(ctx.needs_input_grad) else []
        gradients = [torch.zeros_like(each) for each in wanted]
        dtype = torch.promote_types(states.dtype, torch.float32)
        cross_entropy, value = (torch.zeros((), dtype=dtype, device=states.device) for _ in range(2))
        start, size = 0, 1 if vocabulary is None else max(1, piece_numbers // vocabulary)
        while start < len(states):
            tokens = slice(start, min(start + size, len(states)))
            with torch.enable_grad():
                inputs = states[tokens].detach().requires_grad_(bool(wanted))
                logits = inputs if head is None else head(inputs)
            outcomes = None if teaching is None else teaching[tokens]
            parts = _piece(logits.detach(), labels[tokens].to(logits.device), outcomes, objective)
            cross_entropy, value = cross_entropy + parts[0].sum(), value + parts[1].sum()
            gradient = parts[2].to(logits.dtype)
            del parts, outcomes
            if wanted and head is None:
                gradients[0][tokens] = gradient
            elif wanted:
                found = torch.autograd.grad(logits, [inputs, *parameters], gradient)
                gradients[0][tokens] = found[0]
                for total, more in zip(gradients[1:], found[1:]):
                    total += more
            # the vocabulary's size is known from the first token's logits
            start, size = tokens.stop, max(1, piece_numbers // logits.shape[-1])
            del logits, gradient, inputs
        ctx.save_for_backward(*gradients)
        loss = (1 - objective.distill) * cross_entropy + objective.distill * objective.temperature**2 * value
        ctx.mark_non_differentiable(cross_entropy, value)
        return loss, cross_entropy, value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor, *_: Any):
        # without dimensions, so that it is taken as it is and the gradients keep their type
        states, *parameters = (each * grad for each in ctx.saved_tensors)
        return states, None, None, None, None, None, None, *parameters
