# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the tracker counts, against counts by hand and against what autograd keeps of real tensors."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.memory.trace import empty_model
from peft_ext.memory.tracker import ACTIVATIONS, GRADIENTS, WEIGHTS, AllocationTracker, FusedAttention
from tests.tiny.models import tiny


METHODS = {
    "peqa": lambda: PeqaConfig(bits=4),
    "peqa-groups": lambda: PeqaConfig(bits=3, group_size=8),
    "alphatuning": lambda: AlphaTuningConfig(bits=2, init_method="greedy"),
    "lora": lambda: LoraConfig(target_modules="all-linear"),
    "full": lambda: None,
}


def test_peak_and_what_is_left():
    with AllocationTracker() as tracker:
        x = torch.zeros(100, device="meta")
        y = (x * 2).add(1)  # the product lives until the sum is there
        y.mul_(3).view(10, 10).t()
    assert tracker.live == {ACTIVATIONS: 800} and tracker.peaks == {0: 1200}
    del x, y
    assert tracker.live[ACTIVATIONS] == 0


def test_peaks_by_gradients():
    weights = torch.nn.Parameter(torch.zeros(10, 10, device="meta"))
    with AllocationTracker() as tracker:
        tracker.assign([weights, weights.view(100)], WEIGHTS)
        weights.register_post_accumulate_grad_hook(lambda p: tracker.assign([p.grad], GRADIENTS))
        weights.sum().backward()
    assert tracker.live == {WEIGHTS: 400, GRADIENTS: 400, ACTIVATIONS: 0}
    peaks = tracker.take_peaks()
    assert peaks[0] >= 408  # sum and its gradient, and a gradient that isn't yet known for one
    assert peaks[400] <= 8
    assert tracker.peaks == {}
    weights.grad = None
    assert tracker.live[GRADIENTS] == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_forward_leaves_what_autograd_keeps(name, method):
    """The reference: storages that autograd keeps of a forward of the real model, counted by its own hooks."""
    real, config = tiny(name), tiny(name).config
    batch = torch.ones(3, 8, dtype=torch.long)
    if METHODS[method]() is not None:
        real = get_peft_model(real, METHODS[method]())
    own = {tensor.untyped_storage().data_ptr() for tensor in [*real.parameters(), *real.buffers(), batch]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = real.eval()(input_ids=batch, labels=batch, use_cache=False).loss
    expected = sum(storage.nbytes() for storage in kept.values())
    model, tokens = empty_model(config, torch.float32, METHODS[method]()), batch.to("meta")
    with AllocationTracker():
        model(input_ids=tokens)  # makes the tables that unpacking keeps
    with AllocationTracker() as tracker, FusedAttention():
        tracker.assign([*model.parameters(), *model.buffers(), tokens], WEIGHTS)
        loss = model.eval()(input_ids=tokens, labels=tokens, use_cache=False).loss
        held = tracker.live[ACTIVATIONS]
    assert loss.requires_grad
    # besides: integers (shifted labels, positions), the loss, and the masks' few bytes
    assert expected <= held <= expected + 2048


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_makes_what_a_cpu_makes(key_heads, mask):
    """The shapes and gradients of torch's own; and no matrix of scores, which would be the largest by far."""
    length = 256
    masks = {None: None, "bool": torch.ones(2, 1, length, length, dtype=torch.bool, device="meta")}
    masks["float"] = torch.zeros(2, 1, length, length, device="meta")
    with AllocationTracker() as tracker, FusedAttention():
        query = torch.zeros(2, 4, length, 8, device="meta", requires_grad=True)
        key, value = (torch.zeros(2, key_heads, length, 8, device="meta", requires_grad=True) for _ in range(2))
        tracker.take_peaks()
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=masks[mask], enable_gqa=key_heads == 2)
        y.sum().backward()
    assert y.shape == query.shape and key.grad.shape == value.grad.shape == key.shape
    scores = 2 * 4 * length * length * 4
    assert max(tracker.peaks.values()) < scores + (0 if mask is None else scores // 4)


def test_attention_with_dropout_makes_its_scores():
    with AllocationTracker() as tracker, FusedAttention():
        q = torch.zeros(2, 4, 64, 8, device="meta", requires_grad=True)
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.1, is_causal=True)
    assert max(tracker.peaks.values()) > 2 * 4 * 64 * 64 * 4


def test_questions_about_the_data():
    with AllocationTracker():
        flags = torch.zeros(3, device="meta", dtype=torch.bool)
        assert flags.all() and not flags.any()
        with pytest.raises(RuntimeError, match="meta"):
            torch.zeros(3, device="meta").sum().item()
