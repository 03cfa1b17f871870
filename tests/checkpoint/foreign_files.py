# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Writes checkpoints of others bit by bit from their formats' definitions: slow, and independent of what reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from tests.checkpoint.gptq_files import to_words


class Stored(NamedTuple):
    """What is stored of a layer: codes `[out, in]`, scales and zero points `[out, groups]`, and the width of a code."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    bits: int

    @property
    def weight(self) -> torch.Tensor:
        """The float32 weight that they stand for."""
        groups = self.codes.view(len(self.codes), self.scale.shape[1], -1) - self.zero_point[..., None]
        return (self.scale.float()[..., None] * groups).view(self.codes.shape)


def random_layer(
    layer: nn.Linear, bits: int, group_size: int, sym: bool, dtype: torch.dtype, generator: torch.Generator
) -> Stored:
    """Random codes for a layer; zero points of 0 and of the largest value among them."""
    shape = layer.weight.shape
    groups = 1 if group_size == -1 else shape[1] // group_size
    codes = torch.randint(2**bits, shape, generator=generator)
    zero = torch.randint(2**bits, (shape[0], groups), generator=generator)
    zero = torch.full_like(zero, 2 ** (bits - 1)) if sym else zero
    scale = (0.5 + torch.rand(shape[0], groups, generator=generator)) / 2**bits / 2
    return Stored(codes, scale.to(dtype), zero, bits)


def compressed_tensors_layer(stored: Stored, sym: bool) -> dict[str, torch.Tensor]:
    """The tensors of a layer in compressed-tensors' `pack-quantized`."""
    tensors = {
        "weight_packed": torch.tensor(
            [to_words(row, stored.bits) for row in stored.codes.tolist()], dtype=torch.int32
        ),
        "weight_scale": stored.scale,
        "weight_shape": torch.tensor(stored.codes.shape),
    }
    if not sym:
        columns = [to_words(column, stored.bits) for column in stored.zero_point.t().tolist()]
        tensors["weight_zero_point"] = torch.tensor(columns, dtype=torch.int32).t().contiguous()
    return tensors


def awq_layer(stored: Stored) -> dict[str, torch.Tensor]:
    """The tensors of a layer in AWQ's `gemm`: eight outputs in a word, in the order in which a GPU unpacks halves."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(rows: torch.Tensor) -> torch.Tensor:
        interleaved = [
            [row[8 * word + place] for word in range(len(row) // 8) for place in order] for row in rows.tolist()
        ]
        return torch.tensor([to_words(row, 4) for row in interleaved], dtype=torch.int32)

    return {
        "qweight": words(stored.codes.t()),
        "qzeros": words(stored.zero_point.t()),
        "scales": stored.scale.t().to(torch.float16).contiguous(),
    }


def save_foreign(
    model: PreTrainedModel,
    layers: dict[str, dict[str, torch.Tensor]],
    folder: Path,
    quantization: Optional[dict[str, Any]],
    shards: int = 1,
) -> None:
    """Write a model with these layers' tensors in place of theirs; `quantization` goes into config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    replaced = tuple(f"{name}.weight" for name in layers)
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key not in replaced}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for name, parts in layers.items():
        tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        held = {key: tensors[key].clone().contiguous() for key in names[shard::shards]}
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model.config.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    stored["architectures"] = [type(model).__name__]
    if quantization is not None:
        stored["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(stored))


def edit_quantization(folder: Path, **changes: Any) -> None:
    """Change entries of the quantization config in config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


def replace_tensors(folder: Path, **tensors: Optional[torch.Tensor]) -> None:
    """Put other tensors in place of some; None removes one. Names have `/` for `.`."""
    path = folder / "model.safetensors"
    stored = load_file(path)
    for name, tensor in tensors.items():
        stored.pop(name.replace("/", "."), None)
        if tensor is not None:
            stored[name.replace("/", ".")] = tensor
    save_file(stored, path, metadata={"format": "pt"})


def expected_model(model: PreTrainedModel, layers: dict[str, Stored]) -> PreTrainedModel:
    """The float model with the weights that the layers stand for, in its own dtype."""
    for name, stored in layers.items():
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(stored.weight.to(layer.weight.dtype))
    return model


def groups_in_order(in_features: int, group_size: int) -> torch.Tensor:
    """int32 `[in]`: the group of each input where groups are of neighbours."""
    return torch.tensor([math.floor(position / group_size) for position in range(in_features)], dtype=torch.int32)
