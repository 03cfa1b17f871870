# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import pytest
import torch
import transformers

from generation_ext.critic import CriticLogitsProcessor, backbone, critic_generate
from tests.generation_ext.critic.reference import ENCODER_DECODERS, EXPANDED, TREES, build, random_critic, shared
from tests.generation_ext.critic.test_processor import PADDED, RIGHT_PADDED, generate
from tests.tiny.models import tiny


STRENGTH = 3.0
METHODS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 0},
    "nucleus": {"do_sample": True, "top_p": 0.8, "top_k": 20},
    "three each": {"num_return_sequences": 3, "do_sample": True, "top_k": 4},
}
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}}


def compare(model, critics, input_ids=None, **kwargs):
    """The loop and the processor give the same; returns the loop's output and how many forward passes it took."""
    if input_ids is None:
        input_ids = RIGHT_PADDED if model.config.is_encoder_decoder else PADDED
    options = {"top_k": 5, "strength": STRENGTH, "mask_others": kwargs.pop("mask_others", False)}
    with CriticLogitsProcessor(model, critics, **options) as processor:
        expected = generate(model, [processor], input_ids, **kwargs)
    passes = []
    handle = backbone(model).register_forward_hook(lambda module, args, output: passes.append(output))
    with CriticLogitsProcessor(model, critics, **options) as processor:
        output = generate(model, [processor], input_ids, custom_generate=critic_generate, **kwargs)
    handle.remove()
    assert torch.equal(output.sequences, expected.sequences)
    end = kwargs.get("eos_token_id", 2)
    prompt = output.sequences.shape[1] - len(output.scores)
    for step, (ours, theirs) in enumerate(zip(output.scores, expected.scores)):
        going = ~(output.sequences[:, prompt : prompt + step] == end).any(dim=1)  # what ended has any scores
        torch.testing.assert_close(ours[going], theirs[going], rtol=1e-3, atol=1e-3)
    ordinary = sum(not type(one).__name__ == "_Answer" for one in passes)
    return output, ordinary


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_same_as_the_processor(name, method):
    compare(shared(name), [random_critic(shared(name))], **METHODS[method])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", [*TREES, *EXPANDED, *ENCODER_DECODERS, "lora", "peqa"])
def test_one_forward_pass_per_step(name, cache):
    if (name, cache) == ("gpt_neo", "static"):
        pytest.skip("transformers' own local attention is wrong on a static cache")
    model = shared(name)
    output, passes = compare(model, [random_critic(model)], mask_others=True, **CACHES[cache])
    # the prompt, and one for each token: the last token's candidates are tried, too
    assert passes == 1 + len(output.scores)


@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_a_token_that_is_no_candidate_costs_a_pass_more(name):
    model = shared(name)
    output, passes = compare(model, [random_critic(model)], do_sample=True, temperature=3.0, top_k=0)
    steps = len(output.scores)
    assert 1 + steps < passes <= 2 * steps


@pytest.mark.parametrize("name", ["llama", "mistral", "lfm2", "t5"])
def test_end_of_text_in_the_middle_of_a_batch(name):
    model = shared(name)
    critics = [random_critic(model)]
    prompt = 1 if name == "t5" else PADDED.shape[1]
    end = int(compare(model, critics, mask_others=True)[0].sequences[1, prompt + 2])
    output, passes = compare(model, critics, mask_others=True, eos_token_id=end, max_new_tokens=9)
    new = output.sequences[:, prompt:]
    stop = int((new[1] == end).nonzero()[0])
    assert stop <= 2 and (new[1, stop + 1 :] == 0).all()
    assert passes == 1 + new.shape[1]


@pytest.mark.parametrize("others", [[], [6]])
def test_critics_with_a_lora(others):
    model = shared("llama")
    critics = [random_critic(model, lora_rank=2), *(random_critic(model, seed) for seed in others)]
    compare(model, critics)


@pytest.mark.parametrize("cache", ["dynamic", "static", "bare"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "lfm2"])
def test_the_cache_is_the_one_that_ordinary_steps_fill(name, cache):
    """Whoever goes on with the returned cache sees the same; a user's own cache is filled in place."""
    model = shared(name)
    make = {
        "dynamic": lambda: transformers.DynamicCache(config=model.config),
        "static": lambda: transformers.StaticCache(config=model.config, max_cache_len=20),
        "bare": lambda: transformers.DynamicCache(),
    }[cache]
    if (name, cache) == ("lfm2", "bare"):
        pytest.skip("its convolutions need a cache that was made for them")
    states = []
    for custom in (None, critic_generate):
        used = make()
        with CriticLogitsProcessor(model, random_critic(model), 5, STRENGTH) as processor:
            output = generate(model, [processor], PADDED[1:2], custom_generate=custom, cache=used)
        assert output.cache is used
        with torch.no_grad():
            logits = model(output.sequences[:, -1:], cache=used, use_cache=True).logits
        states.append((output.sequences, logits, int(used.get_seq_length())))
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][2] == states[1][2] == output.sequences.shape[1]
    torch.testing.assert_close(states[0][1], states[1][1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampled", [False, True])
def test_the_text_is_not_copied_at_every_step(sampled):
    """The cache lies in one piece of memory with free slots behind it, and in a larger one once that is full."""
    model = shared("llama")
    cache = transformers.DynamicCache(config=model.config)
    places = []

    class Look(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            places.append({layer.values.untyped_storage().data_ptr() for layer in cache.layers})
            return torch.zeros(len(input_ids), dtype=torch.bool)

    kwargs = {"do_sample": sampled, "top_k": 4 if sampled else None, "max_new_tokens": 100, "eos_token_id": None}
    with CriticLogitsProcessor(model, random_critic(model), 5, STRENGTH) as processor:
        expected = generate(model, [processor], **kwargs)
        output = generate(
            model, [processor], custom_generate=critic_generate, cache=cache, stopping_criteria=[Look()], **kwargs
        )
    assert torch.equal(output.sequences, expected.sequences)
    moves = [step for step in range(100) if step == 0 or places[step] != places[step - 1]]
    assert all(len(place) == 1 for place in places)
    assert len(moves) == 2 and moves[1] > 60


@pytest.mark.parametrize("sampled", [False, True])
def test_a_critic_stands_where_a_processor_would(sampled):
    """Before temperature and the like, after generate's penalties."""
    model, critic = shared("llama"), random_critic(shared("llama"))
    kwargs = {
        "repetition_penalty": 1.5,
        "do_sample": sampled,
        **({"temperature": 0.7, "top_p": 0.9} if sampled else {}),
    }
    with CriticLogitsProcessor(model, critic, 4, STRENGTH) as processor:
        expected = generate(model, [processor], **kwargs)
    output = generate(
        model, [], custom_generate=critic_generate, critic=critic, strength=STRENGTH, critic_top_k=4, **kwargs
    )
    assert torch.equal(output.sequences, expected.sequences)
    for ours, theirs in zip(output.scores, expected.scores):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert not backbone(model)._forward_hooks


def test_what_is_returned():
    model, critic = shared("llama"), random_critic(shared("llama"))
    kwargs = {"custom_generate": critic_generate, "critic": critic, "max_new_tokens": 4}
    full = model.generate(PADDED[1:2], return_dict_in_generate=True, output_scores=True, output_logits=True, **kwargs)
    plain = model.generate(PADDED[1:2], **kwargs)
    assert torch.equal(full.sequences, plain)
    assert isinstance(full, transformers.generation.GenerateDecoderOnlyOutput)
    with torch.no_grad():
        logits = model(plain).logits[0, -5:-1]
    torch.testing.assert_close(torch.cat(full.logits), logits, rtol=1e-3, atol=1e-3)
    assert model.generate(PADDED[1:2], return_dict_in_generate=True, **kwargs).scores is None


def test_a_peft_model():
    model = shared("lora")
    critic = random_critic(model)
    with CriticLogitsProcessor(model, critic) as processor:
        expected = model.generate(input_ids=PADDED[1:2], logits_processor=[processor], max_new_tokens=6)
    output = model.generate(input_ids=PADDED[1:2], custom_generate=critic_generate, critic=critic, max_new_tokens=6)
    assert torch.equal(output, expected)


def test_streamer_and_stopping_criteria():
    model, critic = shared("llama"), random_critic(shared("llama"))

    class Streamer:
        tokens, ended = [], False

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.ended = True

    class Three(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= PADDED.shape[1] + 3)

    streamer = Streamer()
    output = model.generate(
        PADDED[1:2],
        custom_generate=critic_generate,
        streamer=streamer,
        critic=critic,
        max_new_tokens=8,
        stopping_criteria=[Three()],
    )
    assert streamer.tokens == output[0].tolist() and streamer.ended
    assert output.shape[1] == PADDED.shape[1] + 3


def test_scaled_and_capped_logits():
    """What a model does after its backbone is done here, too."""
    model = build("gemma3")
    model.config.final_logit_softcapping = 2.0
    output, _ = compare(model, [random_critic(model)], mask_others=True)
    assert max(float(logits[torch.isfinite(logits)].abs().max()) for logits in output.scores) > 2.0
    alone = model.generate(PADDED[1:2], max_new_tokens=2, return_dict_in_generate=True, output_scores=True)
    assert float(alone.scores[1].abs().max()) <= 2.0


def test_the_model_is_left_as_it_was():
    model = build("llama")
    module = backbone(model)
    generate(model, [], custom_generate=critic_generate, critic=random_critic(model))
    assert "forward" not in vars(module)
    assert not module._forward_hooks

    class Stop(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generate(model, [Stop()], custom_generate=critic_generate, critic=random_critic(model))
    assert not module._forward_hooks


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 2}, "num_beams=2.*without custom_generate"),
        ({"use_cache": False}, "use_cache=False"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_refuses_other_ways_of_decoding(kwargs, message):
    model = build("llama")
    model.set_attn_implementation("eager")  # attentions are refused by us, not by sdpa
    with pytest.raises(ValueError, match=message):
        generate(model, [], custom_generate=critic_generate, critic=random_critic(model), **kwargs)


def test_refuses_critics():
    model, critic = shared("llama"), random_critic(shared("llama"), action_values=True)
    with pytest.raises(ValueError, match="0 CriticLogitsProcessors.*critic="):
        generate(model, [], custom_generate=critic_generate)
    with pytest.raises(ValueError, match="pass it to generate"):
        critic_generate(model, PADDED)
    with CriticLogitsProcessor(model, critic) as one, CriticLogitsProcessor(model, critic) as other:
        with pytest.raises(ValueError, match="2 CriticLogitsProcessors"):
            generate(model, [one, other], custom_generate=critic_generate)
        with pytest.raises(ValueError, match="both"):
            generate(model, [one], custom_generate=critic_generate, critic=critic)
    with CriticLogitsProcessor(model, critic, mode="action-value") as processor:
        with pytest.raises(ValueError, match="action-value"):
            generate(model, [processor], custom_generate=critic_generate)
    other = tiny("llama")
    with CriticLogitsProcessor(other, random_critic(other)) as processor:
        with pytest.raises(ValueError, match="another model"):
            generate(model, [processor], custom_generate=critic_generate)
