# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import pytest
import torch

from generation_ext.critic.advantages import discounted_outcomes, generalized_advantages, terminal_rewards
from generation_ext.critic.losses import value_loss


LENGTHS = (5, 1, 3)
MASK = torch.tensor([[number < length for number in range(5)] for length in LENGTHS])


def slow_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Equation 2's inner sum, written out."""
    end = len(values)
    following = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(end)]
    return [sum((gamma * lam) ** i * deltas[t + i] for i in range(end - t)) for t in range(end)]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_advantages_equal_the_double_loop(gamma, lam):
    rewards, values = torch.randn(3, 5), torch.rand(3, 5)
    advantages = generalized_advantages(rewards, values, MASK, gamma, lam)
    for row, length in enumerate(LENGTHS):
        slow = slow_advantages(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        torch.testing.assert_close(advantages[row, :length], torch.tensor(slow))
        assert (advantages[row, length:] == 0).all()


def test_targets_of_a_terminal_reward_are_the_reward():
    outcomes = torch.tensor([0.3, 1.0, 0.0])
    values = torch.rand(3, 5)
    targets = generalized_advantages(terminal_rewards(outcomes, MASK), values, MASK) + values
    torch.testing.assert_close(targets[MASK], outcomes[:, None].expand(3, 5)[MASK])


def test_targets_of_lambda_zero_are_the_next_values():
    outcomes, values = torch.tensor([0.3, 1.0, 0.0]), torch.rand(3, 5)
    targets = generalized_advantages(terminal_rewards(outcomes, MASK), values, MASK, lam=0.0) + values
    torch.testing.assert_close(targets[0], torch.cat([values[0, 1:], outcomes[:1]]))
    torch.testing.assert_close(targets[2, :3], torch.cat([values[2, 1:3], outcomes[2:]]))


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_targets_stay_probabilities(lam):
    outcomes, values = torch.tensor([0.0, 1.0, 0.5]), torch.rand(3, 5)
    rewards = terminal_rewards(outcomes, MASK)
    targets = (generalized_advantages(rewards, values, MASK, 0.9, lam) + values)[MASK]
    assert targets.min() >= -1e-6 and targets.max() <= 1 + 1e-6


def test_terminal_rewards():
    rewards = terminal_rewards(torch.tensor([0.3, 1.0, 0.5]), MASK)
    assert rewards.nonzero().tolist() == [[0, 4], [1, 0], [2, 2]]
    assert rewards.sum(dim=1).tolist() == pytest.approx([0.3, 1.0, 0.5])


def test_discounted_outcomes_are_the_targets_of_a_perfect_critic():
    outcomes = torch.tensor([0.3, 1.0, 0.5])
    values = discounted_outcomes(outcomes, MASK, 0.9)
    assert values[0].tolist() == pytest.approx([0.3 * 0.9**left for left in (4, 3, 2, 1, 0)])
    advantages = generalized_advantages(terminal_rewards(outcomes, MASK), values, MASK, 0.9, 0.7)
    torch.testing.assert_close(advantages, torch.zeros(3, 5), atol=1e-6, rtol=0)


def test_squared_error_is_the_mean_of_squared_advantages():
    logits, outcomes = torch.randn(3, 5), torch.tensor([0.3, 1.0, 0.5])
    values = torch.sigmoid(logits)
    advantages = generalized_advantages(terminal_rewards(outcomes, MASK), values, MASK, 0.9, 0.8)
    loss = value_loss(logits, advantages + values, MASK)
    torch.testing.assert_close(loss, (advantages[MASK] ** 2).mean())


@pytest.mark.parametrize("kind", ["squared_error", "cross_entropy"])
def test_padding_has_neither_loss_nor_gradient(kind):
    logits = torch.randn(3, 5, requires_grad=True)
    targets = torch.rand(3, 5)
    value_loss(logits, targets, MASK, kind).backward()
    assert (logits.grad[~MASK] == 0).all() and (logits.grad[MASK] != 0).all()
    disturbed = torch.where(MASK, logits.detach(), torch.tensor(50.0))
    torch.testing.assert_close(value_loss(disturbed, targets, MASK, kind), value_loss(logits, targets, MASK, kind))


def test_cross_entropy_is_least_at_the_target():
    targets = torch.tensor([[0.2, 0.9]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    logits = torch.logit(targets).requires_grad_()
    value_loss(logits, targets, mask, "cross_entropy").backward()
    torch.testing.assert_close(logits.grad, torch.zeros(1, 2), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    "old, now, target, moves",
    [
        (0.5, 0.6, 0.9, True),  # within the range
        (0.5, 0.8, 0.9, False),  # moved far towards its target already
        (0.5, 0.8, 0.1, True),  # moved far from its target: back
        (0.5, 0.2, 0.1, False),
        (0.5, 0.2, 0.9, True),
        (0.5, 0.95, 0.6, True),  # shot over its target
    ],
)
def test_gradient_of_the_clipped_loss(old, now, target, moves):
    def grad(cliprange):
        logits = torch.logit(torch.tensor([[now]])).requires_grad_()
        mask = torch.ones(1, 1, dtype=torch.bool)
        loss = value_loss(logits, torch.tensor([[target]]), mask, "squared_error", torch.tensor([[old]]), cliprange)
        loss.backward()
        return logits.grad.item(), loss.item()

    slope, loss = grad(0.2)
    near = min(max(now, old - 0.2), old + 0.2)
    assert loss == pytest.approx(max((now - target) ** 2, (near - target) ** 2), rel=1e-5)
    assert slope == pytest.approx(2 * (now - target) * now * (1 - now) if moves else 0.0, rel=1e-4)
    assert grad(None)[0] == pytest.approx(2 * (now - target) * now * (1 - now), rel=1e-4)
