# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Roll-outs as padded batches, and a critic's values of all their states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn

from generation_ext.critic.rollouts import Rollout, encode, fill_hidden
from generation_ext.critic.value import Critic


@dataclass
class Values:
    """A critic's values of roll-outs, on the CPU.

    Args:
        values: `[roll-outs, states]` float32; 0 outside the mask.
        mask: `[roll-outs, states]` bool.
        outcomes: `[roll-outs]`, the rewards.
    """

    values: torch.Tensor
    mask: torch.Tensor
    outcomes: torch.Tensor


@torch.no_grad()
def values_of(critic: Critic, model: nn.Module, rollouts: Sequence[Rollout], batch_size: int = 64) -> Values:
    """The value of every state of some roll-outs.

    Args:
        critic: The critic, as it is now.
        model: Its language model, for roll-outs without hidden states, which are filled in; and for a critic with a LoRA.
        rollouts: Each with a reward.
        batch_size: Roll-outs per forward pass.
    """
    mask = states_mask(rollouts)
    values = torch.zeros(mask.shape)
    device = critic.mean.device
    missing = [rollout for rollout in rollouts if rollout.hidden is None]
    if missing and not has_lora(critic):
        fill_hidden(model, missing, batch_size)
    for start in range(0, len(rollouts), batch_size):
        batch = rollouts[start : start + batch_size]
        hidden = encode(model, batch, critic) if has_lora(critic) else padded_hidden(batch).to(device)
        values[start : start + len(batch), : hidden.shape[1]] = critic.value(hidden).cpu()
    outcomes = torch.tensor([float(rollout.reward or 0.0) for rollout in rollouts])
    return Values(values * mask, mask, outcomes)


def has_lora(critic: Critic) -> bool:
    """Whether the critic's hidden states are its own, not the language model's."""
    return bool(critic.config.lora_layers)


def states_mask(rollouts: Sequence[Rollout], width: Optional[int] = None) -> torch.Tensor:
    """`[roll-outs, states]` bool: True at the states of a roll-out, which come first in its row."""
    counts = torch.tensor([rollout.states for rollout in rollouts])
    return torch.arange(width or int(counts.max())) < counts[:, None]


def padded_hidden(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """`[roll-outs, states, hidden_size]`, zeros after a roll-out's end.

    Raises:
        ValueError: If a roll-out has no hidden states.
    """
    states = []
    for rollout in rollouts:
        if rollout.hidden is None:
            raise ValueError("a roll-out has no hidden states; call fill_hidden(model, rollouts) first.")
        states.append(rollout.hidden)
    return nn.utils.rnn.pad_sequence(states, batch_first=True)


def padded_actions(rollouts: Sequence[Rollout], width: int) -> torch.Tensor:
    """`[roll-outs, width]`, the token that follows each state; 0 where none does."""
    actions = torch.zeros(len(rollouts), width, dtype=torch.long)
    for row, rollout in zip(actions, rollouts):
        row[: len(rollout.completion_ids)] = torch.tensor(rollout.completion_ids, dtype=torch.long)
    return actions
