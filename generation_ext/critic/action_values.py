# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the action-value head learns from, `Q(s, a) = V(s + a)`: the tokens that roll-outs went on with, and, at some of
their states, all likely candidates, tried as the exact processor tries them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from generation_ext.critic.losses import value_loss
from generation_ext.critic.processor import CriticLogitsProcessor
from generation_ext.critic.rollouts import Rollout, frozen
from generation_ext.critic.value import Critic
from generation_ext.shared_prefix.candidates import branch
from generation_ext.shared_prefix.token_tree import padded
from peft_ext.language_model import device_of, inference, start_token


class Tried(NamedTuple):
    """The likeliest next tokens at a state of a roll-out.

    Attributes:
        state: Which of the roll-out's states: 0 is its prompt.
        tokens: `[k]` token ids.
        hidden: `[k, state_size]`, what the critic reads after each of them.
    """

    state: int
    tokens: torch.Tensor
    hidden: torch.Tensor


def try_candidates(
    model: nn.Module, critic: Critic, rollouts: Sequence[Rollout], count: int, seed: int, batch_size: int = 32
) -> list[Tried]:
    """Encode the likeliest next tokens at one state of each roll-out, drawn at random.

    It costs a forward pass of the text up to there and one of `count` tokens.

    Args:
        model: The language model that sampled the roll-outs.
        critic: Its critic, without a LoRA; its values don't matter.
        rollouts: Of any length.
        count: Tokens to try.
        seed: Which states.
        batch_size: Roll-outs per forward pass.

    Returns:
        One for each roll-out, on the CPU.
    """
    same_state = bool(model.config.is_encoder_decoder)  # type: ignore[union-attr]
    generator = random.Random(seed)
    states = [generator.randrange(len(rollout.completion_ids)) for rollout in rollouts]
    order = sorted(range(len(rollouts)), key=lambda row: (states[row], len(rollouts[row].prompt_ids)))
    tried: dict[int, Tried] = {}
    with CriticLogitsProcessor(model, critic, top_k=count) as processor, inference(model):
        for rows in _batches(order, states, batch_size, same_state):
            tries = _Tries(processor)
            inputs = _inputs(model, [rollouts[row] for row in rows], [states[row] for row in rows])
            model.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=1,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=False,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([tries]),
            )
            for row, tokens, hidden in zip(rows, tries.tokens.cpu(), tries.hidden.cpu()):
                tried[row] = Tried(states[row], tokens, hidden)
    return [tried[row] for row in range(len(rollouts))]


def action_value_loss(
    critic: Critic, hidden: torch.Tensor, values: torch.Tensor, batch: dict[str, Any], kind: str
) -> torch.Tensor:
    """How far `Q(s, a)` is from V of the state that follows; only the action-value head has gradients.

    Args:
        critic: Has that head.
        hidden: What the critic reads, `[batch, states, state_size]`.
        values: V of them, `[batch, states]`.
        batch: Has the `actions` and the `mask`, both `[batch, states]`; and perhaps what was `tried`.
        kind: See [`value_loss`].
    """
    with frozen(value for name, value in critic.named_parameters() if not name.startswith("action_")):
        taken = critic.action_logits(hidden[:, :-1], batch["actions"][:, :-1, None]).squeeze(-1)
        loss = value_loss(taken, values[:, 1:], batch["mask"][:, 1:], kind)
        if "tried" in batch:
            tried = batch["tried"]
            rows = torch.arange(len(hidden), device=hidden.device)
            guesses = critic.action_logits(hidden[rows, tried["state"]], tried["tokens"])
            with torch.no_grad():
                exact = critic.value(tried["hidden"])
            loss = loss + value_loss(guesses, exact, torch.ones_like(exact), kind)
    return loss


def stacked(tried: Sequence[Tried]) -> dict[str, torch.Tensor]:
    """What was tried in a batch: `state` `[batch]`, `tokens` `[batch, k]` and `hidden` `[batch, k, state_size]`."""
    return {
        "state": torch.tensor([one.state for one in tried]),
        "tokens": torch.stack([one.tokens for one in tried]),
        "hidden": torch.stack([one.hidden for one in tried]),
    }


class _Tries(LogitsProcessor):
    """Encodes the candidates of `generate`'s first step, and leaves the scores as they are."""

    tokens: torch.Tensor
    hidden: torch.Tensor

    def __init__(self, processor: CriticLogitsProcessor) -> None:
        self.processor = processor

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.tokens, _ = self.processor.candidates(scores)
        prefix = self.processor.prefix(input_ids)
        branches = branch(self.processor.language_model, prefix, self.tokens)
        self.hidden = self.processor.reading(self.processor.critics[0]).of(branches)
        self.processor.recorder.drop()
        return scores


def _batches(order: list[int], states: list[int], size: int, same_state: bool) -> list[list[int]]:
    """Rows in batches, of one state only where decoders' texts can't be padded."""
    batches: list[list[int]] = []
    for row in order:
        if batches and len(batches[-1]) < size and not (same_state and states[batches[-1][0]] != states[row]):
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _inputs(model: Any, rollouts: list[Rollout], states: list[int]) -> dict[str, torch.Tensor]:
    """What `generate` takes to choose the token after each roll-out's state."""
    device = device_of(model)
    texts = [rollout.completion_ids[:state] for rollout, state in zip(rollouts, states)]
    if not model.config.is_encoder_decoder:
        tokens, mask = padded([rollout.prompt_ids + text for rollout, text in zip(rollouts, texts)], 0, "left")
        return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
    tokens, mask = padded([rollout.prompt_ids for rollout in rollouts], 0, "right")
    written = torch.tensor([[start_token(model), *text] for text in texts])
    return {
        "input_ids": tokens.to(device),
        "attention_mask": mask.to(device),
        "decoder_input_ids": written.to(device),
    }
