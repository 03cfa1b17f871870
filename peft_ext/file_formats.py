# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Descriptions of file formats that reading and writing share: what fields a JSON file has, what tensors a safetensors
file, their types and ranges.

A description is a value: a [`JsonFormat`] of [`Field`]s, or [`Tensor`]s by name, whose sizes may be letters that stand for
the same number throughout. `docs/file_formats.md` is made from them. An error names the file, the field, its value, what it
must be, and the way out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch

from peft_ext.files import read_json, write_json


SAVE_AGAIN = "The file is damaged or was changed; save it again."
FLOATS = ("F16", "BF16", "F32", "F64")
# How safetensors writes types.
_TORCH_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}
_NUMPY_NAMES = {"f": "F", "i": "I", "u": "U"}


class _Problem(NamedTuple):
    """What is wrong: where within the field, the value there, and what it must be."""

    at: str
    value: Any
    must_be: str


@dataclass(frozen=True)
class Field:
    """A value of a JSON file.

    Args:
        kind: What it must be, in words.
        find: Finds what is wrong with a value that isn't null; None if nothing is.
        null: Whether it may be null.
        missing: Whether it may be left out, as earlier versions did.
        note: What it is for, for the documentation.
    """

    kind: str
    find: Callable[[Any], Optional[_Problem]]
    null: bool = False
    missing: bool = False
    note: str = ""

    @property
    def words(self) -> str:
        """What it must be, null included."""
        return f"{self.kind}, or null" if self.null else self.kind

    def problem(self, value: Any) -> Optional[_Problem]:
        """What is wrong with a value, or None."""
        if value is None:
            return None if self.null else _Problem("", value, self.words)
        found = self.find(value)
        return found and (found._replace(must_be=self.words) if not found.at else found)

    def or_null(self) -> Field:
        """The same, or null."""
        return replace(self, null=True)

    def or_missing(self) -> Field:
        """The same, or left out."""
        return replace(self, missing=True)

    def means(self, note: str) -> Field:
        """The same with a note for the documentation."""
        return replace(self, note=note)


def _of(kind: str, fits: Callable[[Any], bool]) -> Field:
    return Field(kind, lambda value: None if fits(value) else _Problem("", value, kind))


def whole(least: Optional[int] = None, most: Optional[int] = None) -> Field:
    """A whole number; true and 1.0 are none."""
    return _of(f"a whole number{_range(least, most)}", lambda v: type(v) is int and _within(v, least, most))


def one_number_of(*choices: int) -> Field:
    """One of some whole numbers."""
    shown = ", ".join(map(str, choices))
    return _of(f"one of {shown}" if len(choices) > 1 else shown, lambda v: type(v) is int and v in choices)


def number(least: Optional[float] = None, most: Optional[float] = None, above: Optional[float] = None) -> Field:
    """A finite number, whole or not; true is none."""
    greater = f" greater than {above}{'' if most is None else f' and at most {most}'}"
    words = f"a finite number{_range(least, most) if above is None else greater}"

    def fits(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
            return False
        return _within(value, least, most) and (above is None or value > above)

    return _of(words, fits)


def text(*choices: str, empty: bool = True) -> Field:
    """A text, one of those given if any are."""
    if choices:
        shown = ", ".join(map(repr, choices))
        return _of(f"one of {shown}" if len(choices) > 1 else shown, lambda v: isinstance(v, str) and v in choices)
    return _of("a text" if empty else "a text that isn't empty", lambda v: isinstance(v, str) and (empty or bool(v)))


def truth() -> Field:
    """true or false."""
    return _of("true or false", lambda v: type(v) is bool)


def one_of(*fields: Field) -> Field:
    """What fits one of several descriptions."""
    kind = " or ".join(each.kind for each in fields)
    return _of(kind, lambda v: any(each.problem(v) is None for each in fields))


def list_of(item: Field, least: int = 0, length: Optional[int] = None) -> Field:
    """A list whose items fit a description.

    Args:
        item: The description.
        least: Items that it must have.
        length: Items that it has exactly.
    """
    many = f"{length} items" if length is not None else f"at least {least} items" if least else ""
    kind = f"a list{f' of {many}' if many else ''}, each {item.words}"

    def find(value: Any) -> Optional[_Problem]:
        if not isinstance(value, list) or len(value) < least or (length is not None and len(value) != length):
            return _Problem("", value, kind)
        return _first((f"[{index}]", each, item) for index, each in enumerate(value))

    return Field(kind, find)


def mapping_of(item: Field) -> Field:
    """An object whose values fit a description, whatever their names."""
    kind = f"an object, each value {item.words}"

    def find(value: Any) -> Optional[_Problem]:
        if not isinstance(value, dict):
            return _Problem("", value, kind)
        return _first((f"[{name!r}]", each, item) for name, each in value.items())

    return Field(kind, find)


def record(fields: Mapping[str, Field]) -> Field:
    """An object with certain fields, and perhaps others."""
    kind = f"an object with {', '.join(fields)}" if fields else "an object"

    def find(value: Any) -> Optional[_Problem]:
        if not isinstance(value, dict):
            return _Problem("", value, kind)
        return _problem_of(value, fields, dot=".")

    return Field(kind, find)


def anything() -> Field:
    """Whatever JSON holds."""
    return Field("anything", lambda value: None, null=True)


@dataclass(frozen=True)
class JsonFormat:
    """A JSON file of ours: an object with described fields, and perhaps others.

    Args:
        name: What the file is called; in errors of writing and in the documentation.
        fields: By name.
        format: What its field `format` must hold; None: it has none.
        way_out: The last sentence of an error of reading.
    """

    name: str
    fields: Mapping[str, Field]
    format: Optional[int] = None
    way_out: str = SAVE_AGAIN

    def read(self, path: Path) -> dict[str, Any]:
        """What a file holds, checked.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: Names the file, the field, its value, and the way out.
        """
        value = read_json(path)
        self.check(value, path)
        return value

    def check(self, value: Mapping[str, Any], path: Union[Path, str]) -> None:
        """Check what was read from a file; raises as [`read`]."""
        if self.format is not None and (type(value.get("format")) is not int or value["format"] != self.format):
            found = value.get("format", "missing")
            later = type(found) is int and found > self.format
            way_out = "It was written by a later version: pip install -U peft-ext." if later else self.way_out
            raise ValueError(f"{str(path)!r}: format is {_short(found)}; this version reads {self.format}. {way_out}")
        check_fields(value, self.fields, f"{str(path)!r}", self.way_out)

    def write(self, path: Path, value: Mapping[str, Any]) -> None:
        """Write a file, whole or not at all.

        Raises:
            ValueError: If a value isn't what reading takes; names it.
        """
        whole_value = value if self.format is None else {"format": self.format, **value}
        self.check_written(whole_value)
        write_json(path, whole_value)

    def check_written(self, value: Mapping[str, Any]) -> None:
        """Check what is to be written; raises as [`write`]."""
        check_fields(value, self.fields, f"{self.name} can't be written", "Set it, then save again.")

    def table(self) -> str:
        """The fields as a table in Markdown."""
        version = {} if self.format is None else {"format": one_number_of(self.format)}
        return field_table({**version, **self.fields})


def check_fields(value: Mapping[str, Any], fields: Mapping[str, Field], where: str, way_out: str = SAVE_AGAIN) -> None:
    """Check the fields of an object.

    Args:
        value: The object.
        fields: By name.
        where: What has them, such as a file's name in quotes.
        way_out: A sentence.

    Raises:
        ValueError: Names `where`, the field, its value, what it must be, and the way out.
    """
    found = _problem_of(value, fields)
    if found is not None:
        is_ = "is missing" if found.value is _MISSING else f"is {_short(found.value)}"
        raise ValueError(f"{where}: {found.at} {is_}; it must be {found.must_be}. {way_out}")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a safetensors file. Floats must be finite.

    Args:
        dtypes: As safetensors writes them, such as `"F32"`; what we write first.
        shape: Numbers, or letters that stand for one number throughout a file.
        optional: Whether it may be left out.
        least, most: Its range.
        note: What it is for, for the documentation.
    """

    dtypes: Sequence[str]
    shape: Sequence[Union[int, str]]
    optional: bool = False
    least: Optional[float] = None
    most: Optional[float] = None
    note: str = field(default="", compare=False)

    @property
    def kind(self) -> str:
        """Its types in words."""
        return "a float (F16, BF16, F32 or F64)" if tuple(self.dtypes) == FLOATS else " or ".join(self.dtypes)

    def problem(self, value: Any, sizes: dict[str, int], header_only: bool = False) -> Optional[str]:
        """What is wrong with a tensor, or None; adds the sizes that it settles to `sizes`.

        Args:
            value: An array, a tensor, or what has a `shape` and a `dtype` as safetensors writes it.
            sizes: By letter, those that are known.
            header_only: Look at type and shape alone.
        """
        found = dtype_name(value)
        if found not in self.dtypes:
            return f"is {found}; it must be {self.kind}"
        shape, known = tuple(value.shape), dict(sizes)
        if 0 in shape:
            return f"has the shape {list(shape)}, and no numbers"
        fits = len(shape) == len(self.shape)
        for size, expected in zip(shape, self.shape):
            fits = fits and size == (known.setdefault(expected, size) if isinstance(expected, str) else expected)
        if not fits:
            expected_shape = [sizes.get(size, size) if isinstance(size, str) else size for size in self.shape]
            shown = ", ".join(map(str, expected_shape))
            return f"has the shape {list(shape)}; it must be [{shown}]"
        sizes.update(known)
        return None if header_only else values_problem(value, self.least, self.most)


def check_tensors(
    found: Mapping[str, Any],
    described: Mapping[str, Tensor],
    where: str,
    sizes: Optional[Mapping[str, int]] = None,
    way_out: str = SAVE_AGAIN,
    others: bool = False,
) -> dict[str, int]:
    """Check the tensors of a file, or of a part of one.

    Args:
        found: By name, see [`Tensor.problem`].
        described: By name.
        where: What has them, such as a file's name in quotes.
        sizes: By letter, those that are known.
        way_out: A sentence.
        others: Whether there may be tensors that aren't described.

    Returns:
        The sizes by letter.

    Raises:
        ValueError: Names `where`, the tensor, what it is, what it must be, and the way out.
    """
    known = dict(sizes or {})
    missing = [name for name, each in described.items() if name not in found and not each.optional]
    if missing:
        raise ValueError(
            f"{where}: {missing[0]}{_said(described[missing[0]])} is missing{_so_many(missing)}. {way_out}"
        )
    strange = sorted(set(found) - set(described))
    if strange and not others:
        raise ValueError(f"{where}: {strange[0]} belongs to nothing there{_so_many(strange)}. {way_out}")
    for name, each in described.items():
        problem = each.problem(found[name], known) if name in found else None
        if problem:
            raise ValueError(f"{where}: {name}{_said(each)} {problem}. {way_out}")
    return known


def values_problem(value: Any, least: Optional[float] = None, most: Optional[float] = None) -> Optional[str]:
    """What is wrong with the numbers of a tensor or array: some aren't finite or out of a range; None if nothing."""
    if not math.prod(value.shape):
        return None
    tensor = value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(np.asarray(value))
    if tensor.is_floating_point() or tensor.is_complex():
        # one number tells, without a tensor of the same size
        if not math.isfinite(
            float(tensor.double().sum() if tensor.dtype == torch.float64 else tensor.float().abs().amax())
        ):
            if not bool(torch.isfinite(tensor).all()):
                return "has NaN or infinity"
    if least is None and most is None:
        return None
    low, high = float(tensor.amin()), float(tensor.amax())
    if not _within(low, least, None) or not _within(high, None, most):
        shown = low if not _within(low, least, None) else high
        return f"has the value {shown:.6g}; its values must be{_range(least, most) or ' finite'}"
    return None


def dtype_name(value: Any) -> str:
    """A tensor's or an array's type as safetensors writes it."""
    dtype = value.dtype
    if isinstance(dtype, str):
        return dtype
    if isinstance(dtype, torch.dtype):
        return _TORCH_NAMES.get(dtype, str(dtype))
    if dtype.kind == "b":
        return "BOOL"
    return f"{_NUMPY_NAMES[dtype.kind]}{8 * dtype.itemsize}" if dtype.kind in _NUMPY_NAMES else str(dtype)


def field_table(fields: Mapping[str, Field]) -> str:
    """Described fields as a table in Markdown."""
    rows = [
        (f"`{name}`", each.words + (" (may be missing)" if each.missing else ""), each.note)
        for name, each in fields.items()
    ]
    return _table(("Field", "Type and range", ""), rows)


def tensor_table(described: Mapping[str, Tensor]) -> str:
    """Described tensors as a table in Markdown."""
    rows = []
    for name, each in described.items():
        kind = f"{each.kind} `[{', '.join(map(str, each.shape))}]`{_range(each.least, each.most)}"
        rows.append((f"`{name}`", kind + (" (may be missing)" if each.optional else ""), each.note))
    return _table(("Tensor", "Type and shape", ""), rows)


_MISSING = object()


def _problem_of(value: Mapping[str, Any], fields: Mapping[str, Field], dot: str = "") -> Optional[_Problem]:
    missing = [name for name, each in fields.items() if name not in value and not each.missing]
    if missing:
        return _Problem(f"{dot}{missing[0]}", _MISSING, fields[missing[0]].words)
    return _first((f"{dot}{name}", value[name], each) for name, each in fields.items() if name in value)


def _first(parts: Iterable[tuple[str, Any, Field]]) -> Optional[_Problem]:
    for at, value, each in parts:
        found = each.problem(value)
        if found is not None:
            return found._replace(at=at + found.at)
    return None


def _within(value: float, least: Optional[float], most: Optional[float]) -> bool:
    return (least is None or value >= least) and (most is None or value <= most)


def _is_finite(value: Union[int, float]) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float reaches
        return False


def _range(least: Optional[float], most: Optional[float]) -> str:
    if least is not None and most is not None:
        return f" from {least:g} to {most:g}"
    if least is not None:
        return f" of at least {least:g}"
    return "" if most is None else f" of at most {most:g}"


def _short(value: Any) -> str:
    try:
        shown = repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        return "an enormous number"
    return shown if len(shown) <= 80 else f"{shown[:60]}... ({len(shown)} characters)"


def _said(described: Tensor) -> str:
    return f" ({described.note})" if described.note else ""


def _so_many(names: list[str]) -> str:
    return f" ({len(names)} such tensors)" if len(names) > 1 else ""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [" | ".join(row) for row in (head, ("---",) * len(head), *rows)]
    return "\n".join(f"| {line} |".replace("  |", " |") for line in lines)
