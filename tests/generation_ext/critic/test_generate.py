# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import functools

import pytest
import torch
import transformers

from generation_ext.critic import CriticLogitsProcessor, backbone, critic_generate
from tests.generation_ext.critic.models import ENCODER_DECODERS, EXPANDED, TREES, build, random_critic, shared
from tests.generation_ext.critic.test_processor import PADDED, RIGHT_PADDED, generate
from tests.tiny_models import tiny


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
    for ours, theirs in zip(output.scores, expected.scores):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
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
