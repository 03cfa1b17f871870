# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A GGUF's header: its values and where its tensors lie, without reading what lies behind it (of arrays, such as the
vocabulary, nothing is kept: reading one takes a second)."""

from __future__ import annotations

import math
import os
import re
import struct
from bisect import bisect_right
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Optional

import numpy as np


# Type -> layout of a value; 8 is a string, 9 an array.
_LAYOUTS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
# Of a tensor; more would be another file's.
_MOST_DIMENSIONS = 8
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


class GgufTensor(NamedTuple):
    """A tensor of the file: its name, its shape as torch counts, its type in `gguf.GGMLQuantizationType`, and where it is."""

    name: str
    shape: tuple[int, ...]
    type: Any
    start: int
    nbytes: int


class GgufHeader(NamedTuple):
    """What a GGUF says of itself: values that are numbers or texts, by key, and its tensors by name."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def data(self, tensor: GgufTensor) -> np.ndarray:
        """A tensor's bytes, mapped: uint8 `[..., bytes of a row]`."""
        rows = tensor.shape[:-1]
        mapped = np.memmap(self.path, np.uint8, "r", tensor.start, (tensor.nbytes,))
        return mapped.reshape(*rows, tensor.nbytes // max(1, math.prod(rows)))


def read_text(path: Path, key: str) -> Optional[str]:
    """The text under a key, such as `"general.license"`; None if there is none.

    Raises:
        OSError: If the file can't be read.
        ValueError: If it is no GGUF.
    """
    with path.open("rb") as file:
        found = _values(file, path, until=key)[0].get(key)
    return found if isinstance(found, str) else None


def read_header(path: Path) -> GgufHeader:
    """The whole header.

    Raises:
        OSError: If the file can't be read.
        ValueError: If it is no GGUF, one part of several, or ends before its last tensor does; names it and the way out.
        ImportError: If the `gguf` package is missing, which knows the types' sizes.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("reading a GGUF needs: pip install 'peft-ext[cli]' (or gguf)") from error
    size = os.path.getsize(path)
    with path.open("rb") as file:
        values, count = _values(file, path)
        check_whole(path, values)
        listed = [_tensor_info(file) for _ in range(count)]
        alignment = values.get("general.alignment", _ALIGNMENT)
        start = -(-file.tell() // alignment) * alignment
    tensors, offsets = {}, sorted(offset for *_, offset in listed)
    for name, shape, number, offset in listed:
        try:
            kind = gguf.GGMLQuantizationType(number)
            nbytes = math.prod(gguf.quant_shape_to_byte_shape(shape, kind)) if shape else 0
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r}: tensor {name!r} {list(shape)} of type {number} can't be read by gguf {_version(gguf)} "
                f"({error}). Update it (pip install -U gguf), or use a file in another quantisation."
            ) from None
        following = offsets[bisect_right(offsets, offset) :]
        if following and offset + nbytes > following[0]:
            raise ValueError(
                f"{str(path)!r}: tensor {name!r} {list(shape)} of type {kind.name} would reach into the next one: its blocks "
                "have another size than llama.cpp's, as in files of its forks. Use a file that llama.cpp itself reads."
            )
        if start + offset + nbytes > size:
            raise ValueError(
                f"{str(path)!r} ends before its tensor {name!r} does ({size:,} of at least {start + offset + nbytes:,} bytes): "
                "it is truncated. Download or copy it again."
            )
        tensors[name] = GgufTensor(name, shape, kind, start + offset, nbytes)
    return GgufHeader(path, values, tensors)


def check_whole(path: Path, values: dict[str, Any]) -> None:
    """Refuse one part of a split model, which nobody reads here.

    Raises:
        ValueError: Names the file, the number of parts and what joins them.
    """
    named, count = _SPLIT.search(path.name), values.get("split.count", 1)
    parts = max(count if isinstance(count, int) else 1, int(named[2]) if named else 1)
    if parts > 1:
        raise ValueError(
            f"{str(path)!r} is one of {parts} parts of a model; join them first: llama-gguf-split --merge <the first part> "
            "<the whole>.gguf, and name the whole."
        )


def _version(module: Any) -> str:
    from importlib.metadata import version

    return version(module.__name__)


def _values(file: BinaryIO, path: Path, until: Optional[str] = None) -> tuple[dict[str, Any], int]:
    """The values of a header, all or as far as a key, and the number of tensors; the file stands behind what was read."""
    magic, _, tensors, count = _unpack(file, "4sIQQ")
    if magic != b"GGUF":
        raise ValueError(f"{str(path)!r} is no GGUF.")
    values = {}
    for _ in range(count):
        name = _text(file)
        (kind,) = _unpack(file, "I")
        value = _value(file, kind)
        if value is not None:
            values[name] = value
        if name == until:
            break
    return values, tensors


def _tensor_info(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name = _text(file)
    (dimensions,) = _unpack(file, "I")
    if dimensions > _MOST_DIMENSIONS:
        raise ValueError(f"the GGUF's tensor {name!r} has {dimensions} dimensions; the file is damaged.")
    # llama.cpp counts the other way round
    shape = tuple(reversed(_unpack(file, f"{dimensions}Q")))
    return (name, shape, *_unpack(file, "IQ"))


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    layout = f"<{layout}"
    content = file.read(struct.calcsize(layout))
    if len(content) < struct.calcsize(layout):
        raise ValueError(f"{file.name!r} ends in its header: it is truncated. Download or copy it again.")
    return struct.unpack(layout, content)


def _text(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    left = os.fstat(file.fileno()).st_size - file.tell()
    if length > left:
        raise ValueError(f"{file.name!r} ends in its header: it is truncated. Download or copy it again.")
    return file.read(length).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> Any:
    """The value of a type that comes next; None of an array, which is passed over."""
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        inner, count = _unpack(file, "IQ")
        if inner in _LAYOUTS:
            file.seek(count * struct.calcsize(_LAYOUTS[inner]), 1)
        else:
            for _ in range(count):
                _skip(file, inner)
        return None
    if kind in _LAYOUTS:
        return _unpack(file, _LAYOUTS[kind])[0]
    raise ValueError(
        f"{file.name!r} has a value of type {kind}, which is unknown; the file is damaged, or of a later format."
    )


def _skip(file: BinaryIO, kind: int) -> None:
    if kind == _STRING:
        file.seek(_unpack(file, "Q")[0], 1)
    else:
        _value(file, kind)
