# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Critics that read other layers than the last, with the mean over the text and without."""

from __future__ import annotations

import pytest
import torch

from generation_ext.critic import Critic, CriticLogitsProcessor, critic_generate
from generation_ext.critic.reading import middle
from generation_ext.critic.rollouts import Rollout, encode
from generation_ext.shared_prefix.inner_states import decoder_layers
from generation_ext.shared_prefix.running_states import FedStates, RunningStates, Wanted, same_rows
from peft_ext.language_model import LanguageModel
from tests.generation_ext.critic.reference import (
    PLAIN,
    SlowProcessor,
    build,
    random_critic,
    read_slowly,
    shared,
)
from tests.generation_ext.critic.test_processor import (
    CACHES,
    METHODS,
    PADDED,
    RIGHT_PADDED,
    STRENGTH,
    TOP_K,
    compare,
    generate,
)


READINGS = {
    "paper": PLAIN,
    "last and mean": {"layer": -1},
    "inner": {"layer": 1, "running_mean": False},
    "several": {"layer": [1, 2]},
}


@pytest.mark.parametrize("method", ["greedy", "beams"])
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_against_the_reference(name, reading, method):
    model = shared(name)
    compare(model, [random_critic(model, **READINGS[reading])], **METHODS[method])


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_critics_of_different_layers(name):
    model = shared(name)
    critics = [random_critic(model, seed, **kwargs) for seed, kwargs in enumerate(READINGS.values())]
    compare(model, [*critics, random_critic(model, 9, lora_rank=2)], strengths=[1.0, 2.0, -1.0, 1.5, 1.0])


@pytest.mark.parametrize("reading", READINGS)
def test_critic_generate(reading):
    """Also where sampling takes a token that wasn't tried, and the loop goes on with a pass of its own."""
    model = shared("llama")
    critics = [random_critic(model, **READINGS[reading])]
    for options in ({}, {"do_sample": True, "temperature": 3.0, "top_k": 0}):
        expected = generate(model, [SlowProcessor(model, critics, [STRENGTH], TOP_K)], **options)
        own = {"custom_generate": critic_generate, "critic": critics, "strength": STRENGTH, "critic_top_k": TOP_K}
        found = generate(model, [], **options, **own)
        assert torch.equal(found.sequences, expected.sequences)
        for ours, theirs in zip(found.scores, expected.scores):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "t5", "bloom"])
@pytest.mark.parametrize("method", ["greedy", "beams", "three each"])
def test_the_mean_goes_along_with_the_cache(name, method):
    """No text is encoded a second time."""
    model = shared(name)
    tokens = []
    layer = decoder_layers(LanguageModel(model))[0]
    handle = layer.register_forward_pre_hook(lambda module, args, kwargs: tokens.append(1), with_kwargs=True)
    prompts = RIGHT_PADDED if model.config.is_encoder_decoder else PADDED
    with CriticLogitsProcessor(model, random_critic(model), TOP_K, STRENGTH) as processor:
        output = generate(model, [processor], prompts, **METHODS[method])
    handle.remove()
    assert len(tokens) == 2 * len(output.scores)


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("cache", ["dynamic", "none"])
def test_action_values(name, cache):
    model = shared(name)
    critic = random_critic(model, action_values=True)
    prompts = RIGHT_PADDED if model.config.is_encoder_decoder else PADDED

    class Slow(SlowProcessor):
        def __call__(self, input_ids, scores):
            result = scores.clone()
            for row, ids in enumerate(input_ids.tolist()):
                state = self.state(ids, row)
                best = scores[row].topk(TOP_K).indices
                gain = critic.action_log_values(state, best) - critic.log_value(state)
                result[row, best] += STRENGTH * gain
            return result

        def state(self, ids, row):
            source = self.prompts[row][self.prompts[row] != 0] if self.prompts is not None else None
            if source is not None:
                text = {"input_ids": source[None], "decoder_input_ids": torch.tensor([ids])}
            else:
                start = next(place for place, token in enumerate(ids) if token != 0)
                text = {"input_ids": torch.tensor([ids[start:]])}
            with torch.no_grad():
                output = model(**text, output_hidden_states=True, use_cache=False)
            states = output.hidden_states if source is None else output.decoder_hidden_states
            return read_slowly(model, critic, states)

    slow = Slow(model, [critic], [STRENGTH], TOP_K, False, prompts if name == "t5" else None)
    expected = generate(model, [slow], prompts, **CACHES[cache])
    with CriticLogitsProcessor(model, critic, TOP_K, STRENGTH, mode="action-value") as processor:
        output = generate(model, [processor], prompts, **CACHES[cache])
    assert torch.equal(output.sequences, expected.sequences)
    for ours, theirs in zip(output.scores, expected.scores):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "lfm2"])
def test_read(name):
    """After each token, of texts that are padded at either end."""
    model = build(name)
    critic = random_critic(model)
    ids = torch.tensor([[9, 3, 77, 4, 61], [33, 90, 21, 6, 50]])
    left = torch.nn.functional.pad(ids, (2, 0))
    right = torch.nn.functional.pad(ids, (0, 2))
    with torch.no_grad():
        found = critic.read(model, ids)
        for padded, place in ((left, slice(2, None)), (right, slice(0, 5))):
            again = critic.read(model, padded, (padded != 0).long())[:, place]
            torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-4)
        for row in range(2):
            for length in (1, 3, 5):
                states = model(ids[row : row + 1, :length], output_hidden_states=True, use_cache=False).hidden_states
                torch.testing.assert_close(
                    found[row, length - 1], read_slowly(model, critic, states), rtol=1e-4, atol=1e-4
                )


def test_roll_outs_are_read_as_texts_are():
    """Prompt and continuation alike."""
    model = shared("llama")
    critic = random_critic(model)
    rollouts = [Rollout("", "", [5, 6, 7], [9, 3]), Rollout("", "", [8], [4, 61, 12, 30])]
    with torch.no_grad():
        states = encode(model, rollouts, critic)
        for row, rollout in zip(states, rollouts):
            whole = critic.read(model, torch.tensor([rollout.prompt_ids + rollout.completion_ids]))[0]
            own = whole[len(rollout.prompt_ids) - 1 :]
            torch.testing.assert_close(row[: rollout.states], own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "found"), [(1, [1]), (-2, [1]), (2, None), (-1, None), (None, None), ([2, 1], [1, 2]), ("auto", [1])]
)
def test_layers(layer, found):
    critic = Critic.for_model(shared("llama"), layer=layer)
    assert critic.config.layers == found and critic.config.choose_layer == (layer == "auto")
    assert critic.state_size == 64 * len(found or [2])
    assert middle(30) == 18


@pytest.mark.parametrize("layer", [0, 3, -3, [], [1, 1], [1, -2], "first", 1.0, True, [None]])
def test_no_such_layer(layer):
    with pytest.raises(ValueError, match="layer="):
        Critic.for_model(shared("llama"), layer=layer)


def test_a_critic_of_an_earlier_version_reads_the_last_state():
    critic = Critic(Critic.config_class(hidden_size=32))
    assert critic.reading(shared("llama")).plain and critic.state_size == 32


def test_saved_and_loaded(tmp_path):
    model = shared("llama")
    critic = random_critic(model, layer=[1, 2])
    critic.save_pretrained(tmp_path)
    loaded = Critic.from_pretrained(tmp_path)
    states = critic.read(model, PADDED[1:2])
    assert loaded.config.layers == [1, 2] and loaded.config.running_mean
    torch.testing.assert_close(loaded.value(loaded.read(model, PADDED[1:2])), critic.value(states))


def fed(states, length, before=None):
    wanted = Wanted(frozenset([1]), frozenset([1]))
    return FedStates.of(wanted, {1: states}, None, length, before, lambda: None)


def test_drafts_that_are_thrown_away_are_not_in_the_mean():
    states = torch.randn(1, 9, 4)
    text = torch.arange(9)[None]
    first = fed(states[:, :5], 5)
    first.at_end_of(text[:, :5], 5)
    drafted = fed(torch.cat([states[:, 5:6], torch.randn(1, 3, 4)], dim=1), 9, first)
    assert drafted.at_end_of(text[:, :6], 6) is not None
    found = fed(states[:, 6:8], 8, drafted).at_end_of(text[:, :8], 8)
    torch.testing.assert_close(found.mean(1), states[:, :8].mean(dim=1))
    torch.testing.assert_close(found.states[1], states[:, 7])


def test_long_prompts_are_kept_as_sums():
    states = torch.randn(2, 300, 4)
    found = fed(states, 300)
    assert found.states[1].shape[1] < 100
    for length in (300, 280):
        running = found.at_end_of(torch.zeros(2, length), length)
        torch.testing.assert_close(running.mean(1), states[:, :length].mean(dim=1))
    assert found.at_end_of(torch.zeros(2, 10), 10) is None


def test_an_earlier_text_in_the_cache_that_was_not_seen():
    unseen = fed(torch.randn(1, 3, 4), 8)
    assert unseen.at_end_of(torch.zeros(1, 8), 8) is None
    assert fed(torch.randn(1, 1, 4), 9, unseen).at_end_of(torch.zeros(1, 9), 9) is None
    assert unseen.at_end_of(torch.zeros(1, 3), 8) is not None, "virtual tokens come before"


def test_rows_in_another_order():
    known = torch.tensor([[1, 2], [3, 4], [1, 2]])
    assert same_rows(known, known[[1, 1, 0]], lambda: None).tolist() == [1, 1, 2]
    assert same_rows(known, known[[2, 1, 1]], lambda: torch.tensor([0, 1, 1])).tolist() == [0, 1, 1]
    assert same_rows(known, torch.tensor([[5, 6]]), lambda: None) is None
    both = RunningStates({1: torch.eye(3)}, {1: torch.eye(3)}, torch.tensor([1.0, 2.0, 3.0])).rows(
        torch.tensor([2, 0])
    )
    assert both.mean(1).tolist() == [[0, 0, pytest.approx(1 / 3)], [1, 0, 0]]
