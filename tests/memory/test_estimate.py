# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Bytes per device: against real models and checkpoints, against FSDP's own shards, and by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.checkpoint.pack_quantized import compress
from peft_ext.memory.estimate import (
    gathered_bytes,
    serving_memory,
    sharded_bytes,
    tuning_memory,
    vllm_memory,
)
from peft_ext.memory.trace import Generation, TrainingStep, empty_model
from peft_ext.quant.conversion import packed_layers
from tests.tiny.models import tiny


STEP = TrainingStep(per_device_train_batch_size=2, max_length=16)
GENERATION = Generation(batch_size=2, context_length=16)
METHODS = {
    "peqa": lambda: PeqaConfig(bits=3, group_size=8),
    "alphatuning": lambda: AlphaTuningConfig(bits=2, init_method="greedy"),
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear"),
    "full": lambda: None,
}


def _bytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_are_those_of_the_real_model(name, method, dtype):
    real = tiny(name, dtype)
    if METHODS[method]() is not None:
        real = get_peft_model(real, METHODS[method]())
    found = tuning_memory(tiny(name).config, METHODS[method](), dtype, STEP)
    trained = [parameter for parameter in real.parameters() if parameter.requires_grad]
    # rotations stay float32 in a model that is loaded in bfloat16
    assert found.weights == _bytes([*real.parameters(), *tiny(name).buffers()])
    assert found.gradients == _bytes(trained) and found.optimizer == 2 * _bytes(trained)
    assert found.trained == sum(parameter.numel() for parameter in trained)
    assert found.gathered == 0
    held = found.weights + found.optimizer
    assert held + max(found.gradients, found.activations) <= found.total
    assert found.total <= held + found.gradients + found.activations


@pytest.mark.parametrize("method", METHODS)
def test_more_devices(method):
    found = {
        gpus: tuning_memory(tiny("llama").config, METHODS[method](), torch.float32, STEP, gpus) for gpus in (1, 4)
    }
    for column in ("weights", "gradients", "optimizer"):
        assert getattr(found[1], column) / 4 <= getattr(found[4], column) < getattr(found[1], column)
    assert found[4].activations == found[1].activations and found[4].trained == found[1].trained
    assert found[4].gathered > 0


SHARDS = """
import json, sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from peft import get_peft_model
import peft_ext
from peft_ext.memory.estimate import sharded_bytes
from tests.tiny.models import tiny

world = int(sys.argv[1])
dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
mesh = dist.init_device_mesh("cpu", (world,))
model = get_peft_model(tiny("llama"), peft_ext.PeqaConfig(bits=3, group_size=8))
ours = {name: sharded_bytes(parameter, world) for name, parameter in model.named_parameters()}
for block in model.get_base_model().model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
theirs = {name: parameter.to_local().untyped_storage().nbytes() for name, parameter in model.named_parameters()}
print(json.dumps([ours, theirs]))
"""


@pytest.mark.parametrize("world", [2, 3, 8])
def test_shards_are_fsdps(world, fresh_process):
    import json

    ours, theirs = json.loads(fresh_process(SHARDS, world).splitlines()[-1])
    assert len(ours) > 40 and ours == theirs


def test_shards_by_hand():
    assert sharded_bytes(torch.empty(10, 3), 1) == 120
    assert sharded_bytes(torch.empty(10, 3), 4) == 3 * 3 * 4
    assert sharded_bytes(torch.empty(2, 3, dtype=torch.uint8), 8) == 3
    assert sharded_bytes(torch.empty(0, 3), 8) == 0


@pytest.mark.parametrize("method", ["peqa", "full"])
def test_gathered_by_hand(method):
    real = tiny("llama")
    block, root = real.model.layers[0], [real.model.embed_tokens.weight, real.lm_head.weight, real.model.norm.weight]
    if method == "full":
        # root and block with their gradients, and the block that is fetched meanwhile
        expected = 2 * _bytes(root) + 3 * _bytes(block.parameters())
    else:
        real = get_peft_model(real, METHODS["peqa"]())
        scales = [parameter for parameter in block.parameters() if parameter.requires_grad]
        expected = _bytes(root) + 2 * _bytes(block.parameters()) + _bytes(scales)
    assert gathered_bytes(empty_model(tiny("llama").config, torch.float32, METHODS[method]())) == expected


@pytest.mark.parametrize("method", METHODS)
def test_serving_weights(method):
    served = serving_memory(tiny("llama").config, METHODS[method](), torch.float32, GENERATION)
    real = tiny("llama")
    if METHODS[method]() is not None:
        real = get_peft_model(real, METHODS[method]()).merge_and_unload()
    assert served.weights == _bytes([*real.parameters(), *real.buffers()])
    assert served.total == served.weights + served.cache + served.activations


@pytest.mark.parametrize("bits, container", [(2, 4), (3, 4), (4, 4), (8, 8)])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 8])
def test_vllm_holds_what_compressed_tensors_stores(bits, container, sym, group_size):
    peft_config = PeqaConfig(bits=bits, sym=sym, group_size=group_size)
    real = get_peft_model(tiny("llama"), peft_config).unload()
    layers = packed_layers(real)
    inside = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    expected = _bytes(p for p in real.parameters() if id(p) not in inside)
    for layer in layers.values():
        tensors = compress(layer, container, sym)
        expected += _bytes(tensor for name, tensor in tensors.items() if name != "weight_shape")
    found = vllm_memory(tiny("llama").config, peft_config, torch.float32, cache=1000)
    assert found.weights == expected and found.cache == 1000
    assert found.activations is None and found.total == expected + 1000
    parallel = vllm_memory(tiny("llama").config, peft_config, torch.float32, cache=1000, gpus=4)
    assert parallel.weights == math.ceil(expected / 4) and parallel.cache == 500  # two heads of keys and values


def test_what_vllm_cannot_serve():
    def found(name, peft_config, gpus=1):
        return vllm_memory(tiny(name).config, peft_config, torch.float32, 1000, gpus)

    assert found("llama", PeqaConfig()) is not None
    assert found("llama", AlphaTuningConfig(init_method="greedy")) is None
    assert found("llama", LoraConfig(target_modules="all-linear")) is None
    assert found("gpt2", PeqaConfig()) is None  # Conv1D
    assert found("llama", PeqaConfig(), gpus=3) is None  # four attention heads


def test_bad_numbers():
    config = tiny("llama").config
    with pytest.raises(ValueError, match="gpus=0 must be at least 1"):
        tuning_memory(config, None, torch.float32, STEP, gpus=0)
    with pytest.raises(ValueError, match="gpus=-1 must be at least 1"):
        vllm_memory(config, PeqaConfig(), torch.float32, 1000, gpus=-1)
    with pytest.raises(ValueError, match="max_length=65 is more than the model's max_position_embeddings=64"):
        tuning_memory(config, None, torch.float32, TrainingStep(max_length=65))
    with pytest.raises(ValueError, match="context_length=65 is more than"):
        serving_memory(config, None, torch.float32, Generation(context_length=65))
    with pytest.raises(ValueError, match="layers.0.*group_size=24 does not divide"):
        tuning_memory(config, PeqaConfig(group_size=24), torch.float32, STEP)


@pytest.mark.parametrize("teacher", ["cached", "live"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_distillation_in_pieces(name, teacher):
    """Logits on disk cost next to nothing, and the batch's logits in float32 go; a live teacher's weights are there whole."""
    config, method = tiny(name).config, METHODS["peqa"]()
    config.vocab_size = 5000
    step = TrainingStep(per_device_train_batch_size=8, max_length=16)
    own, towards = (
        tuning_memory(config, method, torch.float32, each) for each in (step, replace(step, distill=teacher))
    )
    teachers = tuning_memory(config, None, torch.float32, step).weights if teacher == "live" else 0
    assert towards.teacher == teachers and own.teacher == 0
    assert towards.weights == own.weights and towards.optimizer == own.optimizer


def test_a_step_towards_logits_on_disk_takes_less_than_loras():
    """At a billion parameters: beside LoRA by the model's own loss, and beside LoRA without one batch's logits."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    step = TrainingStep(per_device_train_batch_size=4, max_length=1024)
    cached = replace(step, distill="cached")
    peqa, lora = PeqaConfig(bits=4), LoraConfig(r=8, target_modules="all-linear")
    towards = tuning_memory(config, peqa, torch.bfloat16, cached)
    assert towards.total < 0.7 * tuning_memory(config, lora, torch.bfloat16, step).total
    assert towards.total < 0.8 * tuning_memory(config, lora, torch.bfloat16, cached).total
    with pytest.raises(ValueError, match="distill='disk' is unknown"):
        TrainingStep(distill="disk")
