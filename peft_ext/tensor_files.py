# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""safetensors files, in and out: one way to read them, whose errors name the file, and a digest that tells whether a file of
ours holds what was written.

The digest covers names, types, shapes and bytes of all tensors and lies in the header's metadata, `peft_ext_digest`. It is
the sha256 of a list with an entry for each tensor, in the order of their names: name, dtype, shape, and the sha256 of each
8 MiB of its bytes; so several threads compute it, and the order of tensors in the file doesn't matter. Who saves a file
anew without its metadata loses the digest, and then nothing is compared: files of others and earlier ones of ours load as
ever.

`PEFT_EXT_VERIFY_DIGESTS=0` turns the comparison off.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from peft_ext.files import VERIFY_VARIABLE, verifies, written_whole


DIGEST = "peft_ext_digest"
_SCHEME = "sha256-8m:"
# Stands in a file from its writing until its digest is known; such a file is taken for one without.
PLACEHOLDER = {DIGEST: _SCHEME + "0" * 64}
_CHUNK = 8 << 20
_MOST_HEADER = 100_000_000  # safetensors' own limit
PathLike = Union[str, os.PathLike]


class _Header(NamedTuple):
    """A file's header: its tensors (name -> dtype, shape, data_offsets), its metadata, where the data begins."""

    tensors: dict[str, Any]
    metadata: dict[str, str]
    start: int


@contextmanager
def open_tensors(path: PathLike) -> Iterator[Any]:
    """safetensors' `safe_open` for PyTorch, whose errors name the file; the digest isn't looked at.

    Raises:
        ValueError: If the file is truncated, damaged or no safetensors file.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(damaged(path, error)) from error


def read_tensors(path: PathLike, device: str = "cpu") -> dict[str, torch.Tensor]:
    """All tensors of a file, once its digest, if it has one, has been compared.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, or its tensors aren't those that were written; names it.
    """
    check_digest(path)
    with open_tensors(path) as file:
        return {name: file.get_tensor(name).to(device) for name in file.keys()}


def read_arrays(path: PathLike) -> dict[str, np.ndarray]:
    """[`read_tensors`] as numpy's arrays.

    Raises:
        ValueError: Also if a tensor has a type that numpy lacks (bfloat16); names it.
    """
    arrays = {}
    for name, tensor in read_tensors(path).items():
        try:
            arrays[name] = tensor.numpy()
        except TypeError:
            raise ValueError(
                f"{str(path)!r}: {name} is {tensor.dtype}, which no file of ours of arrays holds; save it again."
            ) from None
    return arrays


def write_tensors(path: Path, tensors: Mapping[str, Union[torch.Tensor, np.ndarray]]) -> None:
    """Write tensors, or numpy's arrays (all of one kind), with their digest, whole or not at all."""
    with written_whole(path) as partial:
        metadata = {"format": "pt", **PLACEHOLDER}
        plain = {name: _contiguous(each) for name, each in tensors.items()}
        if any(isinstance(each, np.ndarray) for each in plain.values()):
            safetensors.numpy.save_file(plain, partial, metadata)
        else:
            safetensors.torch.save_file(plain, partial, metadata)
        seal(partial)


def seal(path: PathLike) -> None:
    """Give a file that has just been written its digest: in the place of [`PLACEHOLDER`] if its metadata have that, else the
    file is written anew, whole or not at all."""
    header = read_header(path)
    digest = _SCHEME + _digest(path, header)
    # sorted, since safetensors writes metadata in any order, and the same tensors are to be the same bytes
    metadata = dict(sorted({**header.metadata, DIGEST: digest}.items()))
    text = json.dumps({"__metadata__": metadata, **header.tensors}, separators=(",", ":"), ensure_ascii=False).encode()
    room = header.start - 8
    if header.metadata.get(DIGEST) == PLACEHOLDER[DIGEST] and len(text) <= room:
        with open(path, "r+b") as file:
            file.seek(8)
            file.write(text.ljust(room))
        return
    text += b" " * (-len(text) % 8)
    with written_whole(Path(path)) as partial, open(path, "rb") as old, open(partial, "wb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        old.seek(header.start)
        shutil.copyfileobj(old, new, _CHUNK)


def check_digest(path: PathLike) -> None:
    """Compare a file with its digest; of a file without one, nothing is read but its header.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file isn't what was written, or can't be read; names it and the way out.
    """
    header = read_header(path)
    with open_tensors(path):  # what only the library sees, such as bytes that no tensor has
        pass
    stored = header.metadata.get(DIGEST)
    if stored is None or stored == PLACEHOLDER[DIGEST] or not verifies():
        return
    if not isinstance(stored, str) or not stored.startswith(_SCHEME):
        raise ValueError(
            f"{str(path)!r}: {DIGEST} is {stored!r}, of a kind that this version doesn't know; pip install -U peft-ext, or set "
            f"{VERIFY_VARIABLE}=0 to load the file unchecked."
        )
    if _SCHEME + _digest(path, header) != stored:
        raise ValueError(
            f"{str(path)!r}: the tensors aren't those that were written ({DIGEST} in its metadata tells); the file is damaged "
            f"or was changed. Download or save it again, or set {VERIFY_VARIABLE}=0 to load it as it is."
        )


def carries_digest(path: PathLike) -> bool:
    """Whether a file has a digest."""
    return read_header(path).metadata.get(DIGEST, PLACEHOLDER[DIGEST]) != PLACEHOLDER[DIGEST]


def read_header(path: PathLike) -> _Header:
    """A file's header.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, damaged or no safetensors file; names it.
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _MOST_HEADER:
                raise ValueError("the header is too long")
            text = file.read(size)
            length = file.seek(0, os.SEEK_END)
        if len(text) < size:
            raise ValueError("the header is cut off")
        tensors = json.loads(text.decode("utf-8"))
        metadata = tensors.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(each, str) for each in metadata.values()):
            raise ValueError("the header's metadata are no texts")
        if not all(_is_entry(each) for each in tensors.values()):
            raise ValueError("the header's entries are no tensors")
        end = 8 + size + max((each["data_offsets"][1] for each in tensors.values()), default=0)
        if length != end:
            raise ValueError(f"it has {length} bytes, its header tells of {end}")
    except FileNotFoundError:
        raise
    except RecursionError:
        raise ValueError(damaged(path, "the header is nested")) from None
    except (ValueError, AttributeError, OSError, TypeError) as error:
        raise ValueError(damaged(path, error)) from error
    return _Header(tensors, metadata, 8 + size)


def _is_entry(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("dtype"), str)
        and _are_sizes(value.get("shape"))
        and _are_sizes(value.get("data_offsets"))
        and len(value["data_offsets"]) == 2
        and value["data_offsets"][0] <= value["data_offsets"][1]
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _digest(path: PathLike, header: _Header) -> str:
    """The digest of a file's tensors, as hexadecimal digits."""
    pieces, counts = [], {}
    for name in sorted(header.tensors):
        start, end = header.tensors[name]["data_offsets"]
        counts[name] = math.ceil((end - start) / _CHUNK)
        pieces += [(header.start + at, min(_CHUNK, end - at)) for at in range(start, end, _CHUNK)]
    hashes = iter(_hashes(path, pieces))
    listed = [
        [name, header.tensors[name]["dtype"], header.tensors[name]["shape"], [next(hashes) for _ in range(count)]]
        for name, count in counts.items()
    ]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _hashes(path: PathLike, pieces: list[tuple[int, int]]) -> list[str]:
    """sha256 of some places of a file, each an offset and a length."""
    parts: list[list[tuple[int, int]]] = [[]]
    room = _CHUNK
    for piece in pieces:  # small tensors together, a thread has enough to do then
        if piece[1] > room:
            parts.append([])
            room = _CHUNK
        parts[-1].append(piece)
        room -= piece[1]
    if len(parts) == 1:
        return _hashes_of_part(path, parts[0])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return [each for part in threads.map(lambda part: _hashes_of_part(path, part), parts) for each in part]


def _hashes_of_part(path: PathLike, pieces: list[tuple[int, int]]) -> list[str]:
    found = []
    with open(path, "rb", buffering=0) as file:
        for start, length in pieces:
            buffer = bytearray(length)
            view, done = memoryview(buffer), 0
            file.seek(start)
            while done < length:
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(damaged(path, "it ends within a tensor"))
                done += count
            found.append(hashlib.sha256(view).hexdigest())
    return found


def _contiguous(tensor: Any) -> Any:
    if isinstance(tensor, np.ndarray):  # numpy would give a single number a dimension
        return tensor if tensor.flags.c_contiguous else np.ascontiguousarray(tensor)
    return tensor.contiguous()


def damaged(path: PathLike, error: Union[str, Exception]) -> str:
    """The message of a file that can't be read; `error`: why."""
    return f"{os.fspath(path)!r} is truncated, damaged or no safetensors file ({error}); download or save it again."
