# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Bytes per device of tuning and serving a model, from traces on the meta device and the rules of FSDP."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from peft import PeftConfig
from torch import nn
from transformers import PretrainedConfig

from peft_ext.checkpoint.pack_quantized import VLLM_BITS, can_store
from peft_ext.memory.trace import (
    LIVE,
    Generation,
    TrainingStep,
    check_positive,
    empty_model,
    trace_generation,
    trace_training,
)
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.linear import PackedLinear


@dataclass(frozen=True)
class TuningMemory:
    """Bytes of one device in a training step, and the numbers that are trained.

    Attributes:
        weights: The device's share of the parameters, and all buffers.
        gradients: Its share of the gradients, once all are there.
        optimizer: Its share of the optimiser's states.
        activations: The most that forward and backward keep and make, logits and their gradients included.
        gathered: Under FSDP, whole parameters and gradients; see [`gathered_bytes`].
        total: At the worst moment. Gradients come as activations go, so it is less than the sum.
        trained: Trained numbers of the whole model.
        teacher: The weights of a teacher that runs on the device, whole on each.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    total: int
    trained: int
    teacher: int = 0


@dataclass(frozen=True)
class ServingMemory:
    """Bytes of one device that serves. `activations` is None where the engine decides about them."""

    weights: int
    cache: int
    activations: Optional[int]

    @property
    def total(self) -> int:
        """All of it that is known."""
        return self.weights + self.cache + (self.activations or 0)


def tuning_memory(
    config: PretrainedConfig,
    peft_config: Optional[PeftConfig],
    dtype: torch.dtype,
    step: TrainingStep,
    gpus: int = 1,
) -> TuningMemory:
    """What a device needs for training steps.

    Args:
        config: The model's.
        peft_config: The method; None for full fine-tuning.
        dtype: Of the weights that aren't packed, and of the activations. The optimiser's states have their parameters'
            own: adapters are kept in float32, parameters that full fine-tuning trains in `dtype`.
        step: What a step does, per device.
        gpus: Devices among which FSDP divides parameters, gradients and states (FULL_SHARD); 1: no FSDP.

    Raises:
        ValueError: If `gpus` is below 1, or the model can't be planned.
    """
    check_positive(gpus=gpus)
    check_length(config, "max_length", step.max_length)
    model = empty_model(config, dtype, peft_config)
    weights = _weights(model, gpus)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gathered = gathered_bytes(model) if gpus > 1 else 0
    teacher = empty_model(config, dtype) if step.distill == LIVE else None
    trace = trace_training(model, step, teacher)
    of_teacher = 0 if teacher is None else _bytes([*teacher.parameters(), *teacher.buffers()])
    states = sum(sharded_bytes(state, gpus) for state in trace.states)
    moments = [math.ceil(gradients / gpus) + made + gathered for gradients, made in trace.backward.items()]
    # the optimiser works on shards alone, and what it makes is of their size
    moments += [math.ceil((gradients + made) / gpus) for gradients, made in trace.update.items()]
    return TuningMemory(
        weights=weights,
        gradients=sum(sharded_bytes(parameter, gpus) for parameter in trained),
        optimizer=states,
        activations=max(trace.backward.values()),
        gathered=gathered,
        total=weights + states + max(moments) + of_teacher,
        trained=sum(parameter.numel() for parameter in trained),
        teacher=of_teacher,
    )


def serving_memory(
    config: PretrainedConfig, peft_config: Optional[PeftConfig], dtype: torch.dtype, generation: Generation
) -> ServingMemory:
    """What a device needs to generate with transformers and the merged model, packed if the method's base is.

    Args:
        config, peft_config, dtype: As in [`tuning_memory`].
        generation: What is generated at once.

    Raises:
        ValueError: If the model can't be planned.
    """
    check_length(config, "context_length", generation.context_length)
    model = merged_model(config, peft_config, dtype)
    trace = trace_generation(model, generation)
    return ServingMemory(_weights(model, 1), trace.cache, trace.activations)


def vllm_memory(
    config: PretrainedConfig, peft_config: PeftConfig, dtype: torch.dtype, cache: int, gpus: int = 1
) -> Optional[ServingMemory]:
    """What a device needs to serve the merged model with vLLM from a compressed-tensors checkpoint.

    vLLM's kernels read codes of 4 and 8 bits, so narrower ones lie in wider containers. Tensor parallelism divides the
    weights; the cache by heads, so among no more devices than there are key and value heads. None where vLLM can't: for
    formats that compressed-tensors has no room for, and where the devices don't divide the attention heads.

    Args:
        config, peft_config, dtype: As in [`tuning_memory`].
        cache: Bytes of the whole key-value cache, see [`serving_memory`].
        gpus: vLLM's `tensor_parallel_size`.

    Raises:
        ValueError: If `gpus` is below 1, or the model can't be planned.
    """
    check_positive(gpus=gpus)
    model: Any = merged_model(config, peft_config, dtype)
    layers = packed_layers(model)
    text = config.get_text_config()
    if not layers or not can_store(model) or text.num_attention_heads % gpus:
        return None
    inside = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    rest = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in inside)
    widest = max(layer.bits for layer in layers.values())
    packed = sum(_vllm_bytes(layer, dtype, widest) for layer in layers.values())
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return ServingMemory(math.ceil((rest + packed) / gpus), math.ceil(cache / min(gpus, heads)), None)


def merged_model(config: PretrainedConfig, peft_config: Optional[PeftConfig], dtype: torch.dtype) -> nn.Module:
    """The model on the meta device after tuning: packed where the method packs, otherwise as it was before."""
    model: Any = empty_model(config, dtype, peft_config)
    return model if peft_config is None else model.unload()


def check_length(config: PretrainedConfig, name: str, length: int) -> None:
    """Refuse more tokens than a model has positions for.

    Raises:
        ValueError: Names the argument.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(f"{name}={length} is more than the model's max_position_embeddings={longest}; pass less.")


def sharded_bytes(tensor: torch.Tensor, devices: int) -> int:
    """What a device holds of a tensor that FSDP divides along its first dimension; the shards have the same size, so
    some are padded."""
    if devices == 1 or not tensor.nelement():
        return tensor.nbytes
    return math.ceil(tensor.shape[0] / devices) * (tensor.nbytes // tensor.shape[0])


def gathered_bytes(model: nn.Module) -> int:
    """Whole parameters and gradients that a device holds beside its shards while FSDP works.

    Each block is wrapped by itself, as accelerate does (`TRANSFORMER_BASED_WRAP`): at the peak the block at work is
    there with its gradients, and the next one's parameters are fetched meanwhile. What lies outside of the blocks
    (embeddings, head, last norm) belongs to the root, which stays whole from forward to backward.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    root = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    largest = max(blocks, key=lambda block: _bytes(block.parameters()), default=None)
    block = [] if largest is None else list(largest.parameters())
    fetched = min(len(blocks), 2) * _bytes(block)
    return _bytes(root) + fetched + _bytes(parameter for parameter in [*root, *block] if parameter.requires_grad)


def _weights(model: nn.Module, devices: int) -> int:
    parameters = sum(sharded_bytes(parameter, devices) for parameter in model.parameters())
    return parameters + _bytes(model.buffers())


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _vllm_bytes(layer: PackedLinear, dtype: torch.dtype, widest: int) -> int:
    # layers of several widths lie in containers of one, the widest's
    container = next(bits for bits in VLLM_BITS if bits >= widest)
    zero_points = 0 if layer.sym or layer.zero_point is None else layer.zero_point.nelement() * container
    codes = layer.in_features * layer.out_features * container
    bias = 0 if layer.bias is None else layer.bias.nbytes
    return math.ceil((codes + zero_points) / 8) + layer.scale.nelement() * dtype.itemsize + bias
