# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Training steps and generation without weights: what options change, and which models can't be traced."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig

from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.memory.trace import Generation, TrainingStep, empty_model, trace_generation, trace_training
from peft_ext.memory.tracker import AllocationTracker
from peft_ext.quant import packing
from tests.tiny.models import HEADS, HIDDEN, LAYERS, tiny


STEP = TrainingStep(per_device_train_batch_size=2, max_length=32)


def _trace(name="llama", peft_config=None, **changes):
    step = TrainingStep(**{**vars(STEP), **changes})
    return trace_training(empty_model(tiny(name).config, torch.float32, peft_config), step)


def _worst(trace):
    return max(gradients + activations for gradients, activations in trace.backward.items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("method", [lambda: PeqaConfig(bits=3, group_size=8), lambda: None])
def test_models(name, method):
    model = empty_model(tiny(name).config, torch.float32, method())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    trace = trace_training(model, STEP)
    assert sum(state.nbytes for state in trace.states) == 2 * trained
    assert max(trace.backward) <= trained == max(trace.update)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_options_of_a_step():
    plain = _trace()
    trained = sum(p.nbytes for p in tiny("llama").parameters())
    assert _worst(_trace(gradient_checkpointing=True)) < _worst(plain)
    assert _trace(optim="sgd").states == []
    assert _worst(_trace(optim="sgd")) == _worst(plain)
    # gradients of the backward before stay, and are added to; the loss alone is as large as without
    assert trained < _worst(_trace(gradient_accumulation_steps=2)) - _worst(plain) + max(plain.backward)
    assert set(_trace(gradient_accumulation_steps=2).backward) >= set(plain.backward)
    assert _worst(_trace(gradient_accumulation_steps=5)) == _worst(_trace(gradient_accumulation_steps=2))
    # all but what doesn't grow with the rows: masks, rotations
    assert _worst(_trace(per_device_train_batch_size=4)) > 1.9 * _worst(_trace(peft_config=LoraConfig(r=1)))


@pytest.mark.parametrize("method", [PeqaConfig, AlphaTuningConfig])
def test_the_second_plan_is_the_first(method):
    """Whatever unpacking has cached by then."""
    packing._cached_spread_table.cache_clear()
    packing._cached_sign_table.cache_clear()
    assert _trace(peft_config=method()).backward == _trace(peft_config=method()).backward


def test_checkpointing_keeps_fused_attention():
    """The blocks that the backward runs again make no matrix of scores either."""
    long = {"gradient_checkpointing": True, "per_device_train_batch_size": 4, "max_length": 512}
    config = tiny("llama").config
    config.max_position_embeddings = 512
    trace = trace_training(empty_model(config, torch.float32, PeqaConfig()), TrainingStep(**long))
    assert _worst(trace) < 4 * HEADS * 512 * 512 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache(dtype):
    model = empty_model(tiny("llama").config, dtype)
    trace = trace_generation(model, Generation(batch_size=3, context_length=20))
    key_heads, head_dim = HEADS // 2, HIDDEN // HEADS
    assert trace.cache == 2 * LAYERS * key_heads * head_dim * 3 * 20 * dtype.itemsize
    assert trace.activations > 3 * 20 * HIDDEN * dtype.itemsize


def test_generation_computes_the_last_logits_only():
    config = tiny("llama").config
    config.vocab_size = 50_000
    trace = trace_generation(empty_model(config, torch.float32), Generation(context_length=60))
    assert trace.activations < 60 * 50_000 * 4 / 10


def test_a_packed_checkpoint_stands_for_its_float_model():
    from peft import get_peft_model

    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4)).unload()
    config = model.config
    assert config.quantization_config is not None
    assert _worst(_trace(peft_config=PeqaConfig(bits=4))) == _worst(
        trace_training(empty_model(config, torch.float32, PeqaConfig(bits=4)), STEP)
    )
    assert config.quantization_config is not None


@pytest.mark.parametrize("name", ["t5"])
def test_other_models_than_causal_ones(name):
    with pytest.raises(ValueError, match="model_type='t5' is no causal language model's"):
        empty_model(tiny(name).config, torch.float32)


def test_a_model_that_looks_at_its_data():
    model = empty_model(tiny("llama").config, torch.float32, PeqaConfig())
    model.register_forward_pre_hook(lambda *args: torch.zeros(1, device="meta").sum().item())
    for trace in (lambda: trace_training(model, STEP), lambda: trace_generation(model, Generation())):
        with pytest.raises(ValueError, match="LlamaForCausalLM can't be planned: it doesn't run on PyTorch's meta"):
            trace()
    with AllocationTracker() as tracker:  # the modes are off again
        pass
    assert not tracker.live


def test_a_model_without_a_cache():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(ValueError, match="BertLMHeadModel keeps no cache"):
        trace_generation(empty_model(config, torch.float32), Generation(context_length=8))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (TrainingStep, {"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1"),
        (TrainingStep, {"max_length": 0}, "max_length=0"),
        (TrainingStep, {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        (TrainingStep, {"optim": "adam"}, "optim='adam' is unknown; choose one of"),
        (Generation, {"batch_size": 0}, "batch_size=0"),
        (Generation, {"context_length": 1}, "context_length=1"),
    ],
)
def test_bad_numbers(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
