# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Writes GPTQ checkpoints bit by bit from the format's definition: slow, and independent of what reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel


def to_words(values: list[int], bits: int) -> list[int]:
    """Values one after the other, lowest bits first, in int32 words."""
    stream = sum(value << (bits * position) for position, value in enumerate(values))
    words = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(math.ceil(len(values) * bits / 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def gptq_layer(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bits: int,
    version: int = 1,
    borrow: bool = False,
) -> dict[str, torch.Tensor]:
    """The tensors of a layer.

    Args:
        codes: `[out, in]`.
        scale, zero_point: `[out, groups]`.
        borrow: Subtract version 1's one from whole words, as GPTQModel does, instead of from each zero point.
    """
    in_features, groups = codes.shape[1], scale.shape[1]
    zeros = zero_point.t().tolist()
    if version == 1 and not borrow:
        zeros = [[(zero - 1) % 2**bits for zero in row] for row in zeros]
    qzeros = torch.tensor([to_words(row, bits) for row in zeros], dtype=torch.int32)
    if version == 1 and borrow:
        qzeros -= int("1".rjust(bits, "0") * (32 // bits), 2)
    return {
        "qweight": torch.tensor([to_words(row, bits) for row in codes.tolist()], dtype=torch.int32).t().contiguous(),
        "qzeros": qzeros,
        "scales": scale.t().to(torch.float16).contiguous(),
        "g_idx": torch.tensor(
            [position * groups // in_features for position in range(in_features)], dtype=torch.int32
        ),
    }


def save_gptq(
    model: PreTrainedModel, layers: dict[str, dict[str, torch.Tensor]], folder: Path, shards: int = 1, **config
) -> None:
    """Write a model with these layers as GPTQ's; `config` goes into config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    names = tuple(f"{name}." for name in layers)
    tensors = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(names)}
    for name, parts in layers.items():
        tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        held = dict(list(tensors.items())[shard::shards])  # a layer's tensors lie in different files
        save_file(
            {key: tensor.clone().contiguous() for key, tensor in held.items()},
            folder / file,
            metadata={"format": "pt"},
        )
        weight_map.update(dict.fromkeys(held, file))
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model.config.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    stored["architectures"] = [type(model).__name__]
    if config:
        stored["quantization_config"] = {"quant_method": "gptq", **config}
    (folder / "config.json").write_text(json.dumps(stored))
