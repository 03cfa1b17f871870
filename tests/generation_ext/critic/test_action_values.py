# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import pytest
import torch

from generation_ext.critic import Critic
from generation_ext.critic.action_values import action_value_loss, stacked, try_candidates
from generation_ext.critic.batches import padded_actions, padded_hidden, states_mask
from generation_ext.critic.rollouts import Rollout, fill_hidden
from tests.generation_ext.critic.reference import ENCODER_DECODERS, random_critic, read_slowly, shared
from tests.tiny.models import HIDDEN


K = 5
# prompt and continuation of several lengths
TEXTS = [
    ([5, 17, 40, 8], [33, 90, 21]),
    ([9], [12, 13, 60, 61, 88, 7]),
    ([33, 90, 21, 6, 50], [2]),
    ([12, 13], [44, 45, 46, 47]),
    ([70, 71, 72], [20, 21, 22, 23, 24]),
]


def rollouts() -> list[Rollout]:
    return [Rollout("", "", prompt, completion, reward=0.5) for prompt, completion in TEXTS]


@torch.no_grad()
def after(model, critic, prompt: list[int], written: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a critic reads and logits after a text, without a cache or padding."""
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        output = model(
            input_ids=torch.tensor([prompt]),
            decoder_input_ids=torch.tensor([[start, *written]]),
            output_hidden_states=True,
            use_cache=False,
        )
        return read_slowly(model, critic, output.decoder_hidden_states), output.logits[0, -1]
    output = model(input_ids=torch.tensor([prompt + written]), output_hidden_states=True, use_cache=False)
    return read_slowly(model, critic, output.hidden_states), output.logits[0, -1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "bloom", *ENCODER_DECODERS])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_candidates_are_the_likeliest_tokens_and_their_states_those_of_the_whole_text(name, batch_size):
    model = shared(name)
    critic = Critic.for_model(model, action_values=True)
    tried = try_candidates(model, critic, rollouts(), K, seed=3, batch_size=batch_size)
    for one, (prompt, completion) in zip(tried, TEXTS):
        assert 0 <= one.state < len(completion)
        written = completion[: one.state]
        _, logits = after(model, critic, prompt, written)
        assert one.tokens.tolist() == logits.topk(K).indices.tolist()
        for token, hidden in zip(one.tokens.tolist(), one.hidden):
            torch.testing.assert_close(
                hidden, after(model, critic, prompt, [*written, token])[0], atol=1e-4, rtol=1e-4
            )


def test_states_depend_on_the_seed_alone():
    model = shared("llama")
    critic = Critic.for_model(model, action_values=True)
    many = [Rollout("", "", [5, 6], [7] * 6) for _ in range(40)]
    states = [[one.state for one in try_candidates(model, critic, many, 2, seed, size)]
              for seed, size in ((1, 40), (1, 16), (2, 40))]  # fmt: skip
    assert states[0] == states[1] != states[2]
    assert set(states[0]) == set(range(6))


def test_the_model_is_left_as_it_was():
    model = shared("llama")
    model.train()
    try:
        try_candidates(model, Critic.for_model(model, action_values=True), rollouts(), K, seed=0)
        assert model.training and not model.model._forward_hooks
    finally:
        model.eval()


@pytest.mark.parametrize("kind", ["squared_error", "cross_entropy"])
def test_loss_against_loops(kind):
    model = shared("llama")
    critic = random_critic(model, action_values=True)
    texts = rollouts()
    fill_hidden(model, texts, critic=critic)
    tried = try_candidates(model, critic, texts, K, seed=3)
    hidden, mask = padded_hidden(texts), states_mask(texts)
    batch = {"actions": padded_actions(texts, mask.shape[1]), "mask": mask, "tried": stacked(tried)}
    loss = action_value_loss(critic, hidden, critic.value(hidden).detach(), batch, kind)

    def distance(state: torch.Tensor, token: int, following: torch.Tensor) -> torch.Tensor:
        guess = critic.action_log_values(state, torch.tensor([token])).exp()[0]
        exact = critic.value(following)
        if kind == "squared_error":
            return (guess - exact).square()
        return -(exact * guess.log() + (1 - exact) * (1 - guess).log())

    taken = [distance(text.hidden[state], token, text.hidden[state + 1])
             for text in texts for state, token in enumerate(text.completion_ids)]  # fmt: skip
    others = [distance(text.hidden[one.state], token, hidden)
              for text, one in zip(texts, tried) for token, hidden in zip(one.tokens.tolist(), one.hidden)]  # fmt: skip
    torch.testing.assert_close(loss, torch.stack(taken).mean() + torch.stack(others).mean())
    loss.backward()
    trained = {name for name, value in critic.named_parameters() if value.grad is not None and value.grad.any()}
    assert trained and all(name.startswith("action_") for name in trained)


def test_stacked_shapes():
    model = shared("llama")
    batch = stacked(try_candidates(model, Critic.for_model(model, action_values=True), rollouts(), K, seed=0))
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    assert shapes == {"state": (5,), "tokens": (5, K), "hidden": (5, K, 2 * HIDDEN)}
