# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What can go wrong with a saved folder: one damage at a time, chosen by a seeded generator.

Works on bytes, without torch or safetensors: a file that would end the process that wrote it can be made, too.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Optional

import numpy as np


LINK = "a link to the same file outside"


class Damage(NamedTuple):
    """What was done to a folder.

    Attributes:
        what: In words.
        file: The file, relative to the folder.
        fields: What an error may name instead of the file: fields, tensors.
        payload: Whether the file is still well-formed and its numbers alone are others, as in an edited file.
        path: Where in a JSON file, as keys.
        outside: Whether the folder now refers to a file that isn't in it, which a link may and an index may not.
    """

    what: str
    file: str
    fields: tuple[str, ...] = ()
    payload: bool = False
    path: tuple = ()
    outside: bool = False


class Unfit(Exception):
    """The kind of damage doesn't fit the file; another is chosen."""


class Room(NamedTuple):
    """Where files outside the folder go, and a file that a pickle makes if somebody loads it."""

    outside: Path
    marker: str


def damage(
    folder: Path, random: Random, skip: tuple[str, ...] = (), outside: Path = Path("/tmp"), marker: str = "ran"
) -> Damage:
    """Damage a folder in one place.

    Args:
        folder: Changed in place.
        random: Chooses file and damage.
        skip: Parts of names of files that stay as they are.
        outside: A folder, made if need be, that links and indices point to.
        marker: A path that a pickle makes if somebody loads it.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if not any(part in str(path.relative_to(folder)) for part in skip)]
    weights = [4 if path.suffix == ".safetensors" else 2 for path in files]
    while True:
        (path,) = random.choices(files, weights)
        own = _OF_ENDING.get(path.suffix, _BYTES)
        kind = random.choice(own if random.random() < 0.75 else _BYTES)
        before = path.read_bytes()
        try:
            what, fields, more = _result(kind(path, random, Room(outside, marker)))
        except Unfit:
            continue
        if path.is_file() and not path.is_symlink() and path.read_bytes() == before:
            continue
        return Damage(what, str(path.relative_to(folder)), fields, **more)


def _result(given: Any) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    if isinstance(given, str):
        return given, (), {}
    what, fields, *more = given
    return what, tuple(fields), more[0] if more else {}


# ---- any file


def _truncated(path: Path, random: Random, room: Room) -> str:
    content = path.read_bytes()
    size = random.randrange(len(content)) if content else 0
    path.write_bytes(content[:size])
    return f"cut off after {size} of {len(content)} bytes"


def _flipped(path: Path, random: Random, room: Room) -> Any:
    content = bytearray(path.read_bytes())
    if not content:
        raise Unfit
    places = [random.randrange(len(content)) for _ in range(random.choice((1, 1, 1, 8)))]
    for place in places:
        content[place] ^= 1 << random.randrange(8)
    path.write_bytes(content)
    # in a text, another letter is an edit
    return f"bits flipped in bytes {places}", (), {"payload": True}


def _not_utf8(path: Path, random: Random, room: Room) -> str:
    content = bytearray(path.read_bytes())
    place = random.randrange(len(content) + 1)
    content[place:place] = random.choice((b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\x00"))
    path.write_bytes(content)
    return f"bytes that are no UTF-8 at {place}"


def _emptied(path: Path, random: Random, room: Room) -> str:
    path.write_bytes(b"")
    return "an empty file"


def _removed(path: Path, random: Random, room: Room) -> str:
    path.unlink()
    return "the file removed"


def _a_folder(path: Path, random: Random, room: Room) -> str:
    path.unlink()
    path.mkdir()
    return "a folder in its place"


def _link_outside(path: Path, random: Random, room: Room) -> Any:
    room.outside.mkdir(exist_ok=True)
    shutil.move(path, room.outside / path.name)
    path.symlink_to(room.outside / path.name)
    return LINK


def _link_to_nowhere(path: Path, random: Random, room: Room) -> str:
    path.unlink()
    path.symlink_to(random.choice(("/nowhere/at/all", path.name)))
    return f"a link to {os.readlink(path)}"


def _appended(path: Path, random: Random, room: Room) -> str:
    with open(path, "ab") as file:
        file.write(bytes(random.randrange(256) for _ in range(random.choice((1, 8, 100)))))
    return "bytes appended"


def _pickle(path: Path, random: Random, room: Room) -> str:
    path.write_bytes(f"cos\nsystem\n(S'touch {room.marker}'\ntR.".encode())
    if path.name == "adapter_model.safetensors" and random.random() < 0.7:
        path.rename(path.with_suffix(".bin"))
        return "a pickle that runs a command, as .bin"
    return "a pickle that runs a command"


_BYTES: list[Callable[[Path, Random, Room], Any]] = [
    _truncated,
    _truncated,
    _flipped,
    _not_utf8,
    _emptied,
    _removed,
    _a_folder,
    _link_outside,
    _link_to_nowhere,
    _appended,
    _pickle,
]


# ---- JSON

_DEEP = "@@deep@@"


def _json_field(path: Path, random: Random, room: Room) -> Any:
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        raise Unfit from None
    value, what, where, payload = _changed(value, random, room)
    path.write_text(_dumped(value, indent=2) + "\n", encoding="utf-8")
    more = {"payload": payload, "path": where, "outside": "outside the folder" in what}
    return f"{'.'.join(map(str, where)) or 'everything'}: {what}", _names(where), more


def _json_top(path: Path, random: Random, room: Room) -> str:
    text = random.choice(("[]", "{}", "null", "3", '"x"', "NaN", "[" * 10_000 + "]" * 10_000, '{"a":' * 10_000))
    path.write_text(text, encoding="utf-8")
    return f"{text[:12]} in place of everything"


def _json_encoding(path: Path, random: Random, room: Room) -> str:
    text = path.read_text(encoding="utf-8")
    how = random.choice(("utf-16", "utf-8-sig", "utf-32"))
    path.write_bytes(text.encode(how))
    return f"written as {how}"


def _lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().split(b"\n")
    if len(lines) < 2:
        raise Unfit
    return lines[:-1]


def _row_field(path: Path, random: Random, room: Room) -> Any:
    lines = _lines(path)
    place = random.randrange(len(lines))
    try:
        row = json.loads(lines[place])
    except ValueError:
        raise Unfit from None
    row, what, where, payload = _changed(row, random, room)
    lines[place] = _dumped(row, ensure_ascii=False).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")
    more = {"payload": payload, "path": where}
    return f"line {place + 1}, {'.'.join(map(str, where)) or 'everything'}: {what}", _names(where), more


def _row_order(path: Path, random: Random, room: Room) -> Any:
    lines = _lines(path)
    place, other = random.randrange(len(lines)), random.randrange(len(lines))
    how = random.choice(("removed", "twice", "swapped", "blank", "cut", "no object"))
    if how == "removed":
        del lines[place]
    elif how == "twice":
        lines.insert(other, lines[place])
    elif how == "swapped":
        lines[place], lines[other] = lines[other], lines[place]
    elif how == "blank":
        lines.insert(place, b"")
    elif how == "cut":
        lines[place] = lines[place][: random.randrange(max(1, len(lines[place])))]
    else:
        lines[place] = random.choice((b"[]", b"3", b"null", b"{}", b'"x"', b"[" * 10_000))
    path.write_bytes(b"\n".join(lines) + b"\n")
    return f"line {place + 1}: {how}"


def _changed(value: Any, random: Random, room: Room) -> tuple[Any, str, tuple, bool]:
    """One field of a JSON value changed; what was done, where, and whether the result is what a person could have written
    in the same place."""
    places = list(_places(value))
    where = random.choice(places)
    value = copy.deepcopy(value)
    if not where:
        if not isinstance(value, dict):
            raise Unfit
        name = random.choice(("unknown_field", "__class__", "weights"))
        value[name] = random.choice((1, None, [1], {"a": 1}))
        return value, "a field added", (name,), False
    parent = value
    for key in where[:-1]:
        parent = parent[key]
    key, old = where[-1], parent[where[-1]]
    kind = random.choice(_FIELD_KINDS)
    if kind == "removed":
        del parent[key]
        return value, "removed", where, False
    if kind == "renamed":
        if not isinstance(parent, dict):
            raise Unfit
        parent[f"{key}_"] = parent.pop(key)
        return value, "renamed", where, False
    if kind == "outside":
        if not (isinstance(old, str) and old.endswith((".safetensors", ".json", ".jsonl", ".npy"))):
            raise Unfit
        parent[key] = random.choice(("../outside/", f"{room.outside}/", "/nowhere/")) + old
        return value, f"{parent[key]!r}, outside the folder", where, False
    new, payload = _other(old, kind, random)
    if isinstance(new, type(old)) and new == old:
        raise Unfit
    parent[key] = new
    return value, f"{kind}: {str(new)[:40]!r} for {str(old)[:40]!r}", where, payload


_FIELD_KINDS = ("removed",) * 3 + ("type",) * 4
_FIELD_KINDS += (
    "renamed",
    "NaN",
    "infinite",
    "negative",
    "huge",
    "fraction",
    "zero",
    "deep",
    "empty",
    "longer",
    "swap",
    "outside",
)


def _other(old: Any, kind: str, random: Random) -> tuple[Any, bool]:
    number = isinstance(old, (int, float)) and not isinstance(old, bool)
    if kind == "type":
        choices: list[Any] = [None, True, "0.5", 1, 0.5, [], {}, [old], {"a": old}, "x"]
        if number:
            choices += [str(old)] * 3
        if isinstance(old, list):
            choices += ["".join(map(str, old)), dict(enumerate(old))]
        return random.choice([each for each in choices if type(each) is not type(old)]), False
    if kind == "deep":
        return _DEEP, False
    if kind == "empty" and isinstance(old, (str, list, dict)):
        return type(old)(), False
    if kind == "longer" and isinstance(old, (str, list)) and old:
        return old * random.choice((2, 1000)), isinstance(old, str)
    if kind == "swap" and isinstance(old, list) and len(old) > 1:
        first, second = random.sample(range(len(old)), 2)
        new = list(old)
        new[first], new[second] = new[second], new[first]
        return new, True
    if kind == "swap" and isinstance(old, dict) and len(old) > 1:
        first, second = random.sample(sorted(old), 2)
        return {**old, first: old[second], second: old[first]}, True
    if number:
        made = {
            "NaN": (float("nan"), False),
            "infinite": (random.choice((float("inf"), float("-inf"))), False),
            "negative": (-old if old else -1, True),
            "huge": (random.choice((2**31, 2**63, 10**30, 1e300)), True),
            "fraction": (old + 0.5, True),
            "zero": (0, True),
        }
        if kind in made:
            return made[kind]
    if isinstance(old, bool) and kind in ("negative", "zero"):
        return not old, True
    raise Unfit


def _places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in list(items)[:40]:
        yield from _places(below, (*at, key))


def _names(where: tuple) -> list[str]:
    return [str(key) for key in where if not isinstance(key, int)]


def _dumped(value: Any, **options: Any) -> str:
    return json.dumps(value, **options).replace(f'"{_DEEP}"', "[" * 10_000 + "]" * 10_000)


# ---- safetensors

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def array(self) -> np.ndarray:
        if self.dtype not in _NUMPY:
            raise Unfit
        return np.frombuffer(self.data, _NUMPY[self.dtype]).reshape(self.shape).copy()

    def holding(self, array: np.ndarray, dtype: Optional[str] = None) -> Tensor:
        dtype = dtype or self.dtype
        with np.errstate(all="ignore"):
            return Tensor(dtype, array.shape, np.ascontiguousarray(array).astype(_NUMPY[dtype]).tobytes())


Tensors = dict[str, Tensor]


def read_safetensors(path: Path) -> tuple[Tensors, Optional[dict[str, str]]]:
    """Tensors and metadata."""
    content = path.read_bytes()
    header, payload = _header(content)
    metadata = header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), payload[start:end])
    return tensors, metadata


def write_safetensors(path: Path, tensors: Tensors, metadata: Optional[dict[str, str]]) -> None:
    """In the layout of the library: widest types first."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset, payload = 0, []
    for name, tensor in sorted(tensors.items(), key=lambda item: (-_SIZES.get(item[1].dtype, 1), item[0])):
        end = offset + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        payload.append(tensor.data)
        offset = end
    path.write_bytes(_file(header, b"".join(payload)))


def _header(content: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _file(header: Any, payload: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + payload


def _any(names: Iterable[str], random: Random) -> str:
    names = sorted(names)
    if not names:
        raise Unfit
    return random.choice(names)


def _tensor_list(path: Path, random: Random, room: Room) -> Any:
    """Tensors removed, added, renamed, swapped."""
    tensors, metadata = read_safetensors(path)
    name = _any(tensors, random)
    how = random.choice(("removed", "removed", "added", "renamed", "swapped", "swapped", "all removed"))
    fields, payload = [name], False
    if how == "removed":
        del tensors[name]
    elif how == "all removed":
        tensors, fields = {}, sorted(tensors)
    elif how == "added":
        new = random.choice(("unknown", f"{name}_", name.replace("0", "7"), "model.layers.99.mlp.down_proj.weight"))
        if new in tensors:
            raise Unfit
        tensors[new] = tensors[name]
        fields = [new]
    elif how == "renamed":
        new = random.choice((f"{name}_", name[:-1], name.replace("0", "9").replace("1", "8"), name.upper(), "x"))
        if new in tensors:
            raise Unfit
        tensors[new] = tensors.pop(name)
        fields = [name, new]
    else:
        alike = [
            other
            for other in sorted(tensors)
            if other != name and tensors[other][:2] == tensors[name][:2] and tensors[other].data != tensors[name].data
        ]
        if not alike:
            raise Unfit
        second = random.choice(alike)
        tensors[name], tensors[second] = tensors[second], tensors[name]
        fields, payload = [name, second], True
    write_safetensors(path, tensors, metadata)
    other = fields[-1] if how in ("added", "renamed", "swapped") else ""
    return f"{name}: {how} {other}".strip(), fields, {"payload": payload}


def _tensor_values(path: Path, random: Random, room: Room) -> Any:
    """Other numbers of the same shape and type."""
    tensors, metadata = read_safetensors(path)
    name = _any(tensors, random)
    old = tensors[name]
    array = old.array
    if not array.size:
        raise Unfit
    flat = array.reshape(-1)
    place = random.randrange(flat.size)
    floats = array.dtype.kind == "f"
    how = random.choice(
        ("negated", "zeroed", "NaN", "one NaN", "infinite", "huge", "one changed", "rolled", "row twice")
    )
    with np.errstate(all="ignore"):
        if how == "negated":
            array = -array
        elif how == "zeroed":
            array = np.zeros_like(array)
        elif how == "one changed":
            flat[place] = flat[place] * 2 + 1
        elif how == "rolled":
            array = np.roll(array, 1)
        elif how == "row twice":
            if array.ndim == 0 or len(array) < 2:
                raise Unfit
            array[0] = array[-1]
        elif how == "huge":
            array = (
                np.full_like(array, 3e38 if array.dtype.itemsize >= 4 else 6e4) if floats else ~np.zeros_like(array)
            )
        elif floats:
            value = np.inf if how == "infinite" else np.nan
            if how == "one NaN":
                flat[place] = value
            else:
                array = np.full_like(array, value)
        else:
            array = np.full_like(array, np.iinfo(array.dtype).max)
    tensors[name] = old.holding(array)
    write_safetensors(path, tensors, metadata)
    return f"{name}: {how}", [name], {"payload": True}


def _tensor_bits(path: Path, random: Random, room: Room) -> Any:
    """Bits of the numbers flipped."""
    content = bytearray(path.read_bytes())
    header, payload = _header(bytes(content))
    tensors, _ = read_safetensors(path)
    name = _any(tensors, random)
    start, end = header[name]["data_offsets"]
    if end <= start:
        raise Unfit
    place = len(content) - len(payload) + random.randrange(start, end)
    content[place] ^= 1 << random.randrange(8)
    path.write_bytes(content)
    return f"{name}: a bit flipped", [name], {"payload": True}


def _tensor_form(path: Path, random: Random, room: Room) -> Any:
    """Another dtype, or another shape."""
    tensors, metadata = read_safetensors(path)
    name = _any(tensors, random)
    old = tensors[name]
    payload = False
    how = random.choice(
        ("cast", "cast", "relabelled", "broadcasts", "broadcasts", "transposed", "flat", "longer", "leading", "scalar")
    )
    if how == "cast":
        dtype = random.choice([each for each in _NUMPY if each != old.dtype])
        with np.errstate(all="ignore"):
            tensors[name] = old.holding(np.nan_to_num(old.array), dtype)
        how = f"cast to {dtype}"
    elif how == "relabelled":
        alike = [each for each in _SIZES if _SIZES[each] == _SIZES.get(old.dtype) and each != old.dtype]
        if not alike:
            raise Unfit
        tensors[name] = old._replace(dtype=random.choice(alike))
        payload = {old.dtype, tensors[name].dtype} <= {"F16", "BF16", "F32", "F64"}
        how = f"bytes taken for {tensors[name].dtype}"
    else:
        array = old.array
        if how == "broadcasts":
            wide = [axis for axis, size in enumerate(array.shape) if size > 1]
            if not wide:
                raise Unfit
            array = np.take(array, [0], random.choice(wide))
        elif how == "scalar":
            if array.ndim == 0 or not array.size:
                raise Unfit
            array = array.reshape(-1)[:1].reshape(random.choice(((), (1,))))
        elif how == "transposed":
            array = array.reshape(array.shape[::-1])
        elif how == "flat":
            array = array.reshape(-1)
        elif how == "leading":
            array = array[None]
        else:
            if array.ndim == 0:
                raise Unfit
            array = np.concatenate([array, array[:1]])
        if array.shape == old.shape:
            raise Unfit
        tensors[name] = old.holding(array)
        how = f"{how}: {list(array.shape)} for {list(old.shape)}"
    write_safetensors(path, tensors, metadata)
    return f"{name}: {how}", [name], {"payload": payload}


def _header_lies(path: Path, random: Random, room: Room) -> Any:
    """A header that doesn't fit what follows."""
    content = path.read_bytes()
    header, payload = _header(content)
    names = sorted(name for name in header if name != "__metadata__")
    name, other = _any(names, random), _any(names, random)
    how = random.choice(
        (
            "length",
            "length",
            "overlap",
            "beyond",
            "backwards",
            "negative",
            "huge shape",
            "dtype",
            "field",
            "json",
            "deep",
        )
    )
    if how == "length":
        size = random.choice((0, 1, len(content), 2**31, 2**40, 2**63, 2**64 - 1, len(content) - len(payload) - 9))
        path.write_bytes(struct.pack("<Q", size) + content[8:])
        return f"header length {size}"
    entry = header[name]
    if how == "overlap":
        if name == other or header[other]["data_offsets"] == entry["data_offsets"]:
            raise Unfit
        entry["data_offsets"] = list(header[other]["data_offsets"])
    elif how == "beyond":
        entry["data_offsets"] = [at + random.choice((1, len(payload), 2**40)) for at in entry["data_offsets"]]
    elif how == "backwards":
        entry["data_offsets"] = entry["data_offsets"][::-1]
    elif how == "negative":
        entry[random.choice(("shape", "data_offsets"))] = [-1, -1]
    elif how == "huge shape":
        entry["shape"] = random.choice(([2**40, 2**40], [2**62], [0], [1] * 200, [2**31] * 4))
    elif how == "dtype":
        entry["dtype"] = random.choice(("F31", "", 3, None, "F8_E4M3", "F4", "C64", "BOOL"))
    elif how == "field":
        if random.random() < 0.5:
            del entry[random.choice(("dtype", "shape", "data_offsets"))]
        else:
            header[name] = random.choice((None, [], 1, {}))
    elif how == "json":
        path.write_bytes(_file(random.choice((b"[]", b"null", b"{", b"\xff\xfe{}", b"{}", b'{"a":1}')), payload))
        return "another header"
    else:
        path.write_bytes(_file(b'{"a":' * 10_000 + b"1" + b"}" * 10_000, payload))
        return "a header 10,000 deep"
    path.write_bytes(_file(header, payload))
    return f"{name}: {how} in the header", [name]


def _metadata(path: Path, random: Random, room: Room) -> Any:
    """The header's free texts."""
    header, payload = _header(path.read_bytes())
    metadata = header.get("__metadata__")
    how = random.choice(("type", "other", "field", "long"))
    if how == "type":
        header["__metadata__"] = random.choice((3, None, [], "x", {"format": 3}, {"a": {"b": "c"}}))
    elif how == "field":
        header["__metadata__"] = {**(metadata or {}), random.choice(("x", "digest", "")): "y"}
    elif how == "long":
        header["__metadata__"] = {**(metadata or {}), "x": "y" * 10**6}
    else:
        if not metadata:
            raise Unfit
        key = random.choice(sorted(metadata))
        header["__metadata__"][key] = random.choice(("", "0" * 64, "pt", "tf", "np", metadata[key][:-1]))
    path.write_bytes(_file(header, payload))
    return f"metadata: {how}", ["metadata", *(metadata or {})]


# ---- npy


def _npy(path: Path, random: Random, room: Room) -> Any:
    content = path.read_bytes()
    if content[:6] != b"\x93NUMPY":
        raise Unfit
    (size,) = struct.unpack("<H", content[8:10])
    header, payload = ast.literal_eval(content[10 : 10 + size].decode()), content[10 + size :]
    how = random.choice(("shape", "dtype", "pickle", "field", "order", "length", "values", "values", "NaN", "version"))
    if how == "values":
        place = random.randrange(len(payload))
        return_value = bytes([payload[place] ^ (1 << random.randrange(8))])
        path.write_bytes(content[: 10 + size] + payload[:place] + return_value + payload[place + 1 :])
        return "a bit of the numbers flipped", (), {"payload": True}
    if how == "NaN":
        place = random.randrange(len(payload) // 4) * 4
        path.write_bytes(
            content[: 10 + size] + payload[:place] + struct.pack("<f", float("nan")) + payload[place + 4 :]
        )
        return "a NaN among the numbers", (), {"payload": True}
    if how == "length":
        path.write_bytes(content[:8] + struct.pack("<H", random.choice((0, 1, 65535))) + content[10:])
        return "header length"
    if how == "version":
        path.write_bytes(content[:6] + bytes((random.choice((0, 2, 3, 9)), 0)) + content[8:])
        return "another version"
    if how == "shape":
        rows, width = header["shape"]
        header["shape"] = random.choice(
            ((rows * width,), (width, rows), (rows - 1, width), (2**40, width), (1, width), (-1, width), ())
        )
    elif how == "dtype":
        header["descr"] = random.choice(("<i4", ">f4", "<f8", "<f2", "|b1", "<U1", "V4", "nonsense"))
    elif how == "pickle":
        header["descr"], payload = "|O", f"cos\nsystem\n(S'touch {room.marker}'\ntR.".encode()
    elif how == "order":
        header["fortran_order"] = True
    else:
        del header[random.choice(sorted(header))]
    text = repr(header).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    path.write_bytes(content[:8] + struct.pack("<H", len(text)) + text + payload)
    return f"{how}: {header}", ["shape", "descr"]


_JSON: list[Callable[[Path, Random, Room], Any]] = [_json_field] * 10 + [_json_top, _json_encoding]
_ROWS: list[Callable[[Path, Random, Room], Any]] = [_row_field] * 6 + [_row_order] * 3
_TENSORS: list[Callable[[Path, Random, Room], Any]] = [_tensor_list] * 3 + [_tensor_values] * 3 + [_tensor_form] * 3
_TENSORS += [_tensor_bits, _header_lies, _header_lies, _metadata]
_OF_ENDING = {".json": _JSON, ".jsonl": _ROWS, ".safetensors": _TENSORS, ".npy": [_npy], ".partial": [_npy]}
