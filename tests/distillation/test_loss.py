# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The loss in pieces against the obvious formula, and a few outcomes with a rest against the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft_ext.distillation.loss import Objective, Outcomes, distillation_loss


TOKENS, WIDTH, WORDS = 7, 5, 11
OBJECTIVES = [
    Objective(0.5),
    Objective(1.0),
    Objective(0.0),
    Objective(0.3, temperature=2.0),
    Objective(0.7, temperature=0.5, beta=1.0),
    Objective(0.5, beta=0.25),
]


class Teacher:
    """Distributions that are there already, on the most likely tokens and the rest where a number is given."""

    def __init__(self, logits: torch.Tensor, temperature: float, top_k: int = 0) -> None:
        log_probs = (logits / temperature).log_softmax(-1)
        self.indices = None
        if top_k:
            log_probs, self.indices, others = *log_probs.topk(top_k), log_probs
            if top_k < logits.shape[-1]:
                rest = others.scatter(1, self.indices, -torch.inf).logsumexp(-1, keepdim=True)
                log_probs = torch.cat([log_probs, rest], 1)
        self.log_probs = log_probs

    def __getitem__(self, tokens: slice) -> Outcomes:
        return Outcomes(self.log_probs[tokens], None if self.indices is None else self.indices[tokens])


@pytest.fixture
def case():
    torch.manual_seed(0)
    states = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(WIDTH, WORDS).double()
    return states, head, torch.randint(WORDS, (TOKENS,)), 2 * torch.randn(TOKENS, WORDS, dtype=torch.float64)


def obvious(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor, objective: Objective) -> torch.Tensor:
    temperature, beta = objective.temperature, objective.beta
    student, teacher = (logits / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    if beta == 0:
        value = F.kl_div(student, teacher, reduction="sum", log_target=True)
    elif beta == 1:
        value = F.kl_div(teacher, student, reduction="sum", log_target=True)
    else:
        value = beta * F.kl_div(mixture, teacher, reduction="sum", log_target=True)
        value = value + (1 - beta) * F.kl_div(mixture, student, reduction="sum", log_target=True)
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
    return (1 - objective.distill) * cross_entropy + objective.distill * temperature**2 * value


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("pieces", [1, 3 * WORDS, 10**6])
def test_pieces_are_the_obvious_formula(case, objective, pieces):
    states, head, labels, logits = case
    teacher = Teacher(logits, objective.temperature) if objective.distill else None
    found = distillation_loss(states, labels, teacher, objective, head, tuple(head.parameters()), pieces)
    expected = obvious(head(states), labels, logits, objective)
    torch.testing.assert_close(found.loss, expected)
    wanted = [states, *head.parameters()]
    for one, other in zip(torch.autograd.grad(3 * found.loss, wanted), torch.autograd.grad(3 * expected, wanted)):
        torch.testing.assert_close(one, other)
    # of logits that are there, and of what has no gradient
    given = head(states).detach().requires_grad_()
    of_logits = distillation_loss(given, labels, teacher, objective, piece_numbers=pieces)
    (gradient,) = torch.autograd.grad(of_logits.loss, given)
    (whole,) = torch.autograd.grad(obvious(given, labels, logits, objective), given)
    torch.testing.assert_close(gradient, whole)
    assert not found.cross_entropy.requires_grad and not found.divergence.requires_grad
    torch.testing.assert_close(found.cross_entropy, F.cross_entropy(head(states), labels, reduction="sum"))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("top_k", [0, 1, 4, WORDS])
def test_gradients(case, objective, top_k):
    states, head, labels, logits = case
    teacher = Teacher(logits, objective.temperature, top_k)
    torch.autograd.gradcheck(
        lambda states, *parameters: (
            distillation_loss(states, labels, teacher, objective, head, parameters, 2 * WORDS).loss
        ),
        (states, *head.parameters()),
    )


@pytest.mark.parametrize("objective", [each for each in OBJECTIVES if each.distill])
def test_the_most_likely_tokens_and_the_rest(case, objective):
    """All tokens are the full divergence; fewer with their rest a lower bound, 0 where the student is the teacher."""
    states, head, labels, logits = case
    full = distillation_loss(states, labels, Teacher(logits, objective.temperature), objective, head)
    values = []
    for top_k in (1, 2, 4, 8, WORDS):
        teacher = Teacher(logits, objective.temperature, top_k)
        values.append(distillation_loss(states, labels, teacher, objective, head).divergence)
        itself = distillation_loss(logits, labels, teacher, objective)
        torch.testing.assert_close(itself.divergence, torch.zeros_like(itself.divergence))
    torch.testing.assert_close(values[-1], full.divergence)
    assert all(0 < less <= more + 1e-12 for less, more in zip(values, values[1:]))


def test_a_rest_of_no_mass_and_tokens_that_cannot_come_stay_finite():
    logits = torch.tensor([[200.0, 0.0, -3.0, 1.0], [0.0, 5.0, -torch.inf, 1.0]])
    student = torch.tensor([[150.0, 1.0, 2.0, -500.0], [0.0, 1.0, 2.0, 3.0]], requires_grad=True)
    for beta in (0.0, 0.5):
        for top_k in (0, 2, 4):
            teacher = Teacher(logits, 1.0, top_k)
            found = distillation_loss(student, torch.tensor([0, 1]), teacher, Objective(0.5, beta=beta))
            (gradient,) = torch.autograd.grad(found.loss, student)
            assert found.loss.isfinite() and gradient.isfinite().all()


def test_memory_is_that_of_a_piece():
    """On the meta device: nothing of the size of tokens times vocabulary lives beside the states' gradient."""
    from peft_ext.memory.tracker import AllocationTracker

    tokens, width, words, piece = 512, 8, 4096, 16
    with torch.device("meta"):
        states = torch.empty(tokens, width, requires_grad=True)
        head, labels = nn.Linear(width, words, bias=False), torch.empty(tokens, dtype=torch.long)
        indices, log_probs = torch.empty(tokens, 64, dtype=torch.long), torch.empty(tokens, 65)

    class Kept:
        def __getitem__(self, part):
            return Outcomes(log_probs[part], indices[part])

    head.requires_grad_(False)
    with AllocationTracker() as tracker:
        distillation_loss(states, labels, Kept(), Objective(), head, piece_numbers=piece * words).loss.backward()
    assert max(tracker.peaks.values()) < 10 * 4 * piece * words < 4 * tokens * words


@pytest.mark.parametrize("wrong", [{"distill": 1.5}, {"distill": -0.1}, {"temperature": 0.0}, {"beta": 2.0}])
def test_values_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Objective(**wrong)
