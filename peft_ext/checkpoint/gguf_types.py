# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""GGUF's types of tensors: those that the `gguf` package knows, and one that llama.cpp has had for longer than the package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any


class NewerType(IntEnum):
    """Types of llama.cpp's `ggml.h` that gguf 0.19 lacks; the package's own are taken as soon as it has them."""

    Q2_0 = 42


# Weights and bytes of a block. (A fork of llama.cpp uses the number 42 for blocks of 128 in 34 bytes.)
_SIZES = {NewerType.Q2_0: (64, 18)}
# What `general.file_type` says of a file that is mostly of such a type (`llama_ftype` in llama.h).
_FILE_TYPES = {"Q2_0": 41}


def type_named(name: str) -> Any:
    """A member of `gguf.GGMLQuantizationType`, or of [`NewerType`] where the package is older than the type.

    Raises:
        KeyError: If neither has it.
    """
    import gguf

    return NewerType[name] if name not in gguf.GGMLQuantizationType.__members__ else gguf.GGMLQuantizationType[name]


def block_sizes(type_: Any) -> tuple[int, int]:
    """Weights and bytes of a type's block."""
    import gguf

    return _SIZES[type_] if isinstance(type_, NewerType) else gguf.GGML_QUANT_SIZES[type_]


def bytes_of(shape: Sequence[int], type_: Any) -> int:
    """Bytes of a tensor whose rows are whole blocks."""
    weights, nbytes = block_sizes(type_)
    return math.prod(shape) // weights * nbytes


def file_type(name: str) -> int:
    """What llama.cpp calls a file whose weights are mostly of the type `name`."""
    import gguf

    names = ("ALL_F32",) if name == "F32" else (f"MOSTLY_{name}", f"MOSTLY_{name}_M")
    found = next((gguf.LlamaFileType[each] for each in names if each in gguf.LlamaFileType.__members__), None)
    return int(_FILE_TYPES[name] if found is None else found)
