# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""One text out of a GGUF's header, without reading what lies behind it (the vocabulary alone takes a second)."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO, Optional


# Type -> bytes of a value; 8 is a string, 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def read_text(path: Path, key: str) -> Optional[str]:
    """The text under a key, such as `"general.license"`; None if there is none.

    Raises:
        OSError: If the file can't be read.
        ValueError: If it is no GGUF.
    """
    with path.open("rb") as file:
        magic, _, _, count = _unpack(file, "<4sIQQ")
        if magic != b"GGUF":
            raise ValueError(f"{str(path)!r} is no GGUF.")
        for _ in range(count):
            name = _text(file)
            (kind,) = _unpack(file, "<I")
            if name == key and kind == _STRING:
                return _text(file)
            _skip(file, kind)
    return None


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    content = file.read(struct.calcsize(layout))
    if len(content) < struct.calcsize(layout):
        raise ValueError("the GGUF ends in its header.")
    return struct.unpack(layout, content)


def _text(file: BinaryIO) -> str:
    (length,) = _unpack(file, "<Q")
    return file.read(length).decode("utf-8", "replace")


def _skip(file: BinaryIO, kind: int) -> None:
    if kind == _STRING:
        file.seek(_unpack(file, "<Q")[0], 1)
    elif kind == _ARRAY:
        inner, count = _unpack(file, "<IQ")
        if inner in _SIZES:
            file.seek(count * _SIZES[inner], 1)
        else:
            for _ in range(count):
                _skip(file, inner)
    elif kind in _SIZES:
        file.seek(_SIZES[kind], 1)
    else:
        raise ValueError(f"the GGUF has a value of type {kind}, which is unknown.")
