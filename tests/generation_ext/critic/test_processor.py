# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import gc
import weakref

import pytest
import torch
import transformers

from generation_ext.critic import Critic, CriticLogitsProcessor, backbone
from tests.generation_ext.critic.models import (
    ENCODER_DECODERS,
    EXPANDED,
    TREES,
    SlowProcessor,
    build,
    random_critic,
    shared,
)
from tests.tiny_models import HIDDEN, VOCAB, tiny


TOP_K, STRENGTH = 5, 3.0
PADDED = torch.tensor([[0, 0, 0, 5, 17, 40, 8], [9, 3, 77, 4, 61, 12, 30], [0, 33, 90, 21, 6, 50, 7]])
RIGHT_PADDED = torch.tensor([[5, 17, 40, 8, 0, 0, 0], [9, 3, 77, 4, 61, 12, 30], [33, 90, 21, 6, 50, 7, 0]])
METHODS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 0},
    "nucleus": {"do_sample": True, "top_p": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True, "top_k": 0},
    "three each": {"num_return_sequences": 3, "do_sample": True, "top_k": 0},
}
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}


def generate(model, processors, input_ids=PADDED, **kwargs):
    torch.manual_seed(3)
    return model.generate(
        input_ids=input_ids,
        attention_mask=(input_ids != 0).long(),
        logits_processor=processors,
        max_new_tokens=kwargs.pop("max_new_tokens", 7),
        return_dict_in_generate=True,
        output_scores=True,
        **kwargs,
    )


def compare(model, critics, input_ids=None, strengths=None, mask_others=False, **kwargs):
    """Generate with the processor and with the reference; both must say the same, and not what the model says
    alone."""
    if input_ids is None:  # an encoder is padded at the end: BART counts positions from the first slot
        input_ids = RIGHT_PADDED if model.config.is_encoder_decoder else PADDED
    strengths = strengths or [STRENGTH] * len(critics)
    prompts = input_ids if model.config.is_encoder_decoder else None
    slow = SlowProcessor(model, critics, strengths, TOP_K, mask_others, prompts)
    with CriticLogitsProcessor(model, critics, TOP_K, strengths, mask_others=mask_others) as processor:
        fast = generate(model, [processor], input_ids, **kwargs)
    expected = generate(model, [slow], input_ids, **kwargs)
    assert torch.equal(fast.sequences, expected.sequences)
    for ours, theirs in zip(fast.scores, expected.scores):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    alone = generate(model, [], input_ids, **kwargs)
    assert alone.sequences.shape != fast.sequences.shape or not torch.equal(alone.sequences, fast.sequences)
    return fast


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3"])
def test_against_the_reference(name, method):
    model = shared(name)
    compare(model, [random_critic(model)], **METHODS[method])


@pytest.mark.parametrize("name", [*TREES, *EXPANDED, *ENCODER_DECODERS, "lora", "peqa"])
@pytest.mark.parametrize("cache", CACHES)
def test_caches(name, cache):
    model = shared(name)
    compare(model, [random_critic(model)], **CACHES[cache])
