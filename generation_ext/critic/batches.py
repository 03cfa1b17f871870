# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Roll-outs as padded batches, and a critic's values of all their states."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler

from generation_ext.critic.rollouts import Rollout, encode, fill_hidden, without_hidden
from generation_ext.critic.value import Critic


class Values(NamedTuple):
    """A critic's values of roll-outs, on the CPU.

    Attributes:
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
    if not has_lora(critic):
        fill_hidden(model, without_hidden(rollouts, critic.reading(model)), batch_size, critic)
    for start in range(0, len(rollouts), batch_size):
        batch = rollouts[start : start + batch_size]
        hidden = encode(model, batch, critic) if has_lora(critic) else padded_hidden(batch).to(device)
        values[start : start + len(batch), : hidden.shape[1]] = critic.value(hidden).cpu()
    return Values(values * mask, mask, outcomes_of(rollouts))


def outcomes_of(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """`[roll-outs]` rewards.

    Raises:
        ValueError: If a roll-out has none.
    """
    if any(rollout.reward is None for rollout in rollouts):
        raise ValueError("a roll-out has no reward; leave it out.")
    return torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float32)


def has_lora(critic: Critic) -> bool:
    """Whether the critic's hidden states are its own, not the language model's."""
    return bool(critic.config.lora_layers)


def states_mask(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """`[roll-outs, states]` bool: True at the states of a roll-out, which come first in its row."""
    counts = torch.tensor([rollout.states for rollout in rollouts])
    return torch.arange(int(counts.max())) < counts[:, None]


def padded_hidden(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """`[roll-outs, states, state_size]`, zeros after a roll-out's end.

    Raises:
        ValueError: If a roll-out has no hidden states.
    """
    states = []
    for rollout in rollouts:
        if rollout.hidden is None:
            raise ValueError(
                "a roll-out has no hidden states; call fill_hidden(model, rollouts, critic=critic) first."
            )
        states.append(rollout.hidden)
    return nn.utils.rnn.pad_sequence(states, batch_first=True)


def padded_actions(rollouts: Sequence[Rollout], width: int) -> torch.Tensor:
    """`[roll-outs, width]`, the token that follows each state; 0 where none does."""
    actions = torch.zeros(len(rollouts), width, dtype=torch.long)
    for row, rollout in zip(actions, rollouts):
        row[: len(rollout.completion_ids)] = torch.tensor(rollout.completion_ids, dtype=torch.long)
    return actions


class RolloutData(Dataset):
    """An iteration's roll-outs, as a data set whose length is known beforehand; where some roll-outs have no reward, others
    come twice.

    Args:
        length: The number of roll-outs.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.items: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index % len(self.items)]


class EpochOrder(Sampler):
    """A shuffled order that depends on the epoch's number alone, so that a resumed run has the same.

    Args:
        data: What is put in order.
        seed: Another seed, another order.
    """

    def __init__(self, data: RolloutData, seed: int) -> None:
        self.data = data
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        return iter(torch.randperm(len(self.data), generator=generator).tolist())


def seed_of(*numbers: int) -> int:
    """A seed that depends on all the numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")
