# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint's files hold, read from their headers alone, and what a model calls it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from peft_ext.file_formats import JsonFormat, check_fields, mapping_of, record, text
from peft_ext.files import read_json, verifies, write_json
from peft_ext.quant.experts import future_layers, merges_experts, unfuse_experts, unfused_experts
from peft_ext.tensor_files import DIGEST, open_tensors, read_header


# In the metadata of an index of ours: its shards' digests.
SHARDS = "peft_ext_digests"
INDEX = JsonFormat(
    SAFE_WEIGHTS_INDEX_NAME,
    {
        "metadata": record({}).means("such as the size of all tensors"),
        "weight_map": mapping_of(text(empty=False)).means("which file has a tensor; inside the folder"),
    },
    way_out="Download or save the checkpoint again.",
)


class TensorHeader(NamedTuple):
    """A stored tensor: its shape, its dtype as safetensors writes it (`"F32"`, `"U8"`), and the file that has it."""

    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def nbytes(self) -> int:
        width = re.match(r"[A-Z]+(\d+)", self.dtype)  # F32, BF16, U8, F8_E4M3; BOOL has a byte
        return math.prod(self.shape) * (int(width[1]) // 8 if width else 1)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index names, or all.

    Raises:
        FileNotFoundError: If the index names a file that isn't there.
        ValueError: If the index is damaged, or names a file outside of the folder.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = sorted(set(read_index(index).values()))
    check_shards_there(index, names)
    return [folder / name for name in names]


def check_config(path: Path) -> None:
    """Refuse a model's config.json that is damaged where transformers wouldn't say so in a sentence.

    Raises:
        ValueError: If it is no JSON object, or its quantization_config is none; names it.
    """
    check_fields(read_json(path), {"quantization_config": record({}).or_null().or_missing()}, f"{str(path)!r}")


def read_index(path: Path) -> dict[str, str]:
    """The files that an index of shards names, by tensor.

    Raises:
        ValueError: If it is damaged, names a file outside of its folder, or a shard is of another save; names it.
    """
    index = INDEX.read(path)
    names: dict[str, str] = index["weight_map"]
    for tensor, name in names.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(
                f"{str(path)!r}: weight_map[{tensor!r}] is {name!r}, a file outside of the folder, which no checkpoint that was "
                "saved has; download it again from where you trust it."
            )
    _check_shards(path, (index.get("metadata") or {}).get(SHARDS))
    return names


def seal_index(path: Path) -> None:
    """Write the shards' digests into their index, since shards of two saves may have the same shapes."""
    index = read_json(path)
    found = {name: read_header(path.parent / name).metadata.get(DIGEST) for name in set(index["weight_map"].values())}
    index["metadata"] = {**(index.get("metadata") or {}), SHARDS: {name: each for name, each in found.items() if each}}
    write_json(path, index)


def _check_shards(path: Path, stored: Any) -> None:
    """Compare the digests in shards' headers with those in their index; a shard without one is another tool's."""
    for name, digest in stored.items() if isinstance(stored, dict) and verifies() else ():
        shard = path.parent / name
        found = read_header(shard).metadata.get(DIGEST) if shard.is_file() else None
        if found is not None and found != digest:
            raise ValueError(
                f"{str(shard)!r} isn't the shard that was saved with {path.name}: it is of another save. Copy or save the whole "
                "folder again."
            )


def check_shards_there(index: Path, names: Iterable[str]) -> None:
    """Refuse an index that names files which aren't there.

    Raises:
        FileNotFoundError: Names the folder, the file and the index.
    """
    for name in sorted(names):
        if not (index.parent / name).is_file():
            raise FileNotFoundError(
                f"{str(index.parent)!r} lacks {name}, which its index names ({index.name}); download or save it again."
            )


def read_headers(files: Iterable[Union[str, PathLike]]) -> dict[str, TensorHeader]:
    """All tensors of some safetensors files, by name.

    Raises:
        ValueError: If a file is damaged; names it.
    """
    headers: dict[str, TensorHeader] = {}
    for path in map(str, files):
        with open_tensors(path) as file:
            for key in file.keys():
                part = file.get_slice(key)
                headers[key] = TensorHeader(tuple(part.get_shape()), part.get_dtype(), path)
    return headers


def read_tensor(header: TensorHeader, key: str) -> torch.Tensor:
    """A stored tensor, read from its file alone."""
    with open_tensors(header.file) as file:
        return file.get_tensor(key)


def tensors_of(headers: Mapping[str, TensorHeader], layer: str, parts: Iterable[str]) -> dict[str, TensorHeader]:
    """Those parts of a layer that are stored, such as `"planes"`."""
    return {part: headers[f"{layer}.{part}"] for part in parts if f"{layer}.{part}" in headers}


def stored_layers(headers: Iterable[str], tensor: str) -> list[str]:
    """The layers that have a tensor of that name, such as `"planes"`; layer 2 before layer 10."""
    names = [key.removesuffix(f".{tensor}") for key in headers if key.endswith(f".{tensor}")]
    return sorted(names, key=dot_natural_key)


def names_in_model(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The model's layers that a checkpoint has packed, mapped to their names in its files; as the loader renames keys."""
    return _renamed(model, stored, dict.fromkeys(name for name, _ in model.named_modules()))


def unfuse_stored(model: PreTrainedModel, stored: Iterable[str]) -> None:
    """Unfuse, in place, the experts of which a checkpoint has packed layers; `stored`: the layers that it has packed.

    Where a family's checkpoints keep every expert apart, those of the other blocks are unfused as well: transformers would
    look for all of them or none.
    """
    future = future_layers(model)
    if not future or not (found := _renamed(model, stored, dict.fromkeys(future))):
        return
    apart = any(merges_experts(entry) for entry in get_model_conversion_mapping(model))
    prefixes = set(future.values()) if apart else {future[name] for name in found}
    unfuse_experts(model, lambda name: future[name] in prefixes)


def without_merging(conversions: list[WeightTransform], model: PreTrainedModel) -> list[WeightTransform]:
    """transformers' conversions for a model, less those that would fuse experts that are unfused there."""
    if not unfused_experts(model):
        return conversions
    return [entry for entry in conversions if not merges_experts(entry)]


def _renamed(model: PreTrainedModel, stored: Iterable[str], layers: dict[str, Any]) -> dict[str, str]:
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    keys, found = {f"{name}.weight": name for name in layers}, {}
    for name in stored:
        for some in ([], converters):  # experts that are unfused keep their names
            key, _ = rename_source_key(f"{name}.weight", renamings, some, model.base_model_prefix, keys)
            if key in keys:
                found[keys[key]] = name
                break
    return found
