# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Rows of JSON-lines, JSON, CSV and Parquet files: complete ones, and ones that grow and survive a kill.

A file is split at the byte `\\n` alone and each line decoded afterwards: JSON strings may hold U+2028, U+2029 or U+0085
unescaped, which `str.splitlines` takes for ends of lines.

Rows that a run appends and reads again carry a check, the crc32 of the row and of the check before it, so that a row that is
damaged, edited, missing, doubled or moved is found. Readers compare it and take it off; rows without one are taken as they
are.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from peft_ext.file_formats import Field, check_fields
from peft_ext.files import written_whole


logger = logging.getLogger(__name__)
ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
CHECK = "peft_ext_check"
Row = dict[str, Any]
PathLike = Union[str, os.PathLike]


def read_rows(
    path: PathLike,
    may_be_empty: bool = False,
    argument: Optional[str] = None,
    fields: Optional[Mapping[str, Field]] = None,
) -> list[Row]:
    """The rows of a complete `.jsonl`, `.json`, `.csv` or `.parquet` file, such as a user's data or what a finished stage
    has written.

    Args:
        path: The file. A `.json` file holds a list of objects (or JSON lines).
        may_be_empty: Whether it may have no rows.
        argument: What named it, for messages.
        fields: What every row has, and perhaps others.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has another ending, has no rows, a line is no object, or a field isn't what it must be; names file,
            line and field.
        ImportError: If a `.parquet` file needs pyarrow, which is missing.
    """
    path = Path(path)
    if path.suffix not in ROW_SUFFIXES:
        raise ValueError(f"{path}: must end in {', '.join(ROW_SUFFIXES[:-1])} or {ROW_SUFFIXES[-1]}.")
    _check_there(path, argument)
    readers = {".csv": _read_csv, ".json": _read_json, ".parquet": _read_parquet}
    rows = readers.get(path.suffix, read_json_lines)(path)
    if not rows and not may_be_empty:
        raise ValueError(f"{path} has no rows.")
    _check_rows(rows, fields, path)
    return rows


def read_json_lines(path: PathLike, argument: Optional[str] = None, may_be_torn: bool = False) -> list[Row]:
    """The rows of a complete file of JSON lines, whatever its ending.

    Args:
        path: The file.
        argument: What named it, for messages.
        may_be_torn: Pass over a last line without its end, as a kill leaves it, with a warning.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is no object; names file and line.
    """
    path = Path(path)
    _check_there(path, argument)
    chain, rows = _Chain(), []
    for line in _lines(path):
        if may_be_torn and not line.ended:
            logger.warning(
                "%s: line %d has no end (a kill while it was written?) and is passed over.", path, line.number
            )
            continue
        rows.append(chain.opened(_parsed(line, path), path, line))
    return rows


def read_lines(path: PathLike, argument: Optional[str] = None) -> list[str]:
    """The lines of a text file that aren't blank, without their ends.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is no UTF-8; names file and line.
    """
    path = Path(path)
    _check_there(path, argument)
    return [_decoded(line, path).removesuffix("\r") for line in _lines(path)]


def write_rows(path: PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a `.csv` file, or JSON lines, whole or not at all; its folder is made. Rows of CSV have the same fields."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            rows = list(rows)
            writer = csv.DictWriter(file, list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json_line(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def read_grown_rows(
    path: PathLike, cut: bool = False, skip_damaged: bool = False, key: Optional[str] = None
) -> list[Row]:
    """The rows of a JSON-lines file that a process appends to; none if the file isn't there.

    A last line that is damaged or has no end, as a kill leaves it, doesn't count.

    Args:
        path: The file.
        cut: Take such a last line off the file, with a warning that shows it; for the process that appends.
        skip_damaged: Pass over other damaged lines, too.
        key: A field that every row has, and no two rows share.

    Raises:
        ValueError: If a line before the last is no object, or lacks the key, or a key occurs twice; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        return []
    rows: list[Row] = []
    keys: set[Any] = set()
    chain = _Chain()
    for line in _lines(path):
        try:
            if not line.ended:
                raise ValueError("the line has no end")
            row = chain.opened(_parsed(line, path), path, line)
            if key is not None and key not in row:
                raise ValueError(f"{path}, line {line.number} is no object with an {key!r}.")
        except ValueError as error:
            if line.last:
                if cut:
                    _cut_torn(path, line)
                break
            if skip_damaged:
                continue
            raise ValueError(f"{error} The file is damaged.") from None
        if key is not None and not isinstance(row[key], (str, int)):
            raise ValueError(
                f"{path}, line {line.number}: {key} is {row[key]!r}, no text or number; the file is damaged."
            )
        if key is not None and row[key] in keys:
            raise ValueError(f"{path}, line {line.number}: {key} {row[key]!r} occurs twice; the file is damaged.")
        rows.append(row)
        if key is not None:
            keys.add(row[key])
    return rows


def append_rows(path: PathLike, rows: Iterable[Mapping[str, Any]], checked: bool = False) -> None:
    """Append rows as JSON lines, all or none of them, and wait until the system has them on disk.

    Args:
        path: The file.
        rows: The rows.
        checked: Give each row its check. One process appends to such a file at a time.

    Raises:
        OSError: If they can't be written, as on a full disk; the file is as it was.
    """
    path = Path(path)
    if checked:
        rows = _Chain(_last_check(path)).closed(rows)
    data = "".join(json_line(row) + "\n" for row in rows).encode("utf-8")
    size = path.stat().st_size if path.is_file() else 0
    try:
        with open(path, "ab", buffering=0) as file:
            while data:
                data = data[os.write(file.fileno(), data) :]
            os.fsync(file.fileno())
    except OSError:
        if path.is_file() and path.stat().st_size > size:
            os.truncate(path, size)
        raise


def keep_rows(path: PathLike, count: Optional[int]) -> None:
    """Cut a file off after its first `count` whole rows; None: after its last whole line."""
    path = Path(path)
    if path.is_file():
        size, rows = 0, 0
        for line in path.read_bytes().split(b"\n")[:-1]:
            if rows == count:
                break
            size += len(line) + 1
            rows += bool(line.strip())
        os.truncate(path, size)


def json_line(row: Mapping[str, Any]) -> str:
    """A row as JSON, without the line's end."""
    return json.dumps(row, ensure_ascii=False)


class RowFile:
    """Rows of a JSON-lines file, told apart by their `id`; what was appended stays, whatever happens next.

    A damaged last line, which a kill in the middle of writing leaves, is cut off with a warning that shows it.

    Args:
        path: The file; need not exist, its folder is made.
        fields: What every row has, and perhaps others.

    Raises:
        ValueError: If a line before the last is no JSON object with an id, or one occurs twice, or a row isn't what was
            written.
    """

    def __init__(self, path: PathLike, fields: Optional[Mapping[str, Field]] = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_grown_rows(self.path, cut=True, key="id")
        _check_rows(rows, fields, self.path)
        self.rows: dict[Any, Row] = {row["id"]: row for row in rows}

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, key: Any) -> bool:
        return key in self.rows

    def append(self, rows: Iterable[Row]) -> int:
        """Append rows that aren't there yet, and wait until the system has them on disk.

        Returns:
            How many were new.

        Raises:
            OSError: If the disk is full; the rows of earlier calls stay, and none of this call's does.
        """
        new = {row["id"]: row for row in rows if row["id"] not in self.rows}
        if not new:
            return 0
        try:
            append_rows(self.path, new.values(), checked=True)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: {len(new)} new rows of {str(self.path)!r} could not be written. The {len(self)} rows "
                "before them are kept; make room and start the run again, it goes on from there",
            ) from error
        self.rows.update(new)
        return len(new)

    def sort(self, key: Callable[[Row], Any]) -> None:
        """Rewrite the file, which is complete, in an order that doesn't depend on how often the run was interrupted, and
        without checks."""
        ordered = sorted(self.rows.values(), key=key)
        if ordered != list(self.rows.values()) or _last_check(self.path):
            self.rows = {row["id"]: row for row in ordered}
            write_rows(self.path, ordered)


class _Chain:
    """Rows and their checks, one after the other; `last`: the check before them."""

    def __init__(self, last: str = "") -> None:
        self.last = last

    def closed(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
        """Rows with their checks."""
        for row in rows:
            self.last = self._check(row)
            yield {**row, CHECK: self.last}

    def opened(self, row: Row, path: Path, line: _Line) -> Row:
        """A row without its check, which is compared."""
        if CHECK not in row:
            self.last = ""
            return row
        stored = row.pop(CHECK)
        self.last = self._check(row)
        if stored != self.last:
            raise ValueError(
                f"{path}, line {line.number} isn't what was written there ({CHECK} tells): it was damaged, edited or moved, or a "
                f"line before it is missing. Put it back; to keep an edit, take {CHECK} out of all lines."
            )
        return row

    def _check(self, row: Mapping[str, Any]) -> str:
        return f"{zlib.crc32((self.last + json_line(row)).encode('utf-8', 'surrogatepass')):08x}"


class _Line(NamedTuple):
    """A line that isn't blank: its number from 1, where it starts, whether it ends with `\\n`, whether it is the last."""

    content: bytes
    number: int
    start: int
    ended: bool
    last: bool


def _lines(path: Path) -> Iterator[_Line]:
    content = path.read_bytes()
    pieces = content.split(b"\n")
    start = 0
    for number, piece in enumerate(pieces, start=1):
        end = start + len(piece) + 1
        if piece.strip():
            yield _Line(piece, number, start, ended=number < len(pieces), last=end >= len(content))
        start = end


def _last_check(path: Path) -> str:
    """The check of a file's last row; empty if it has none."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        end, block = file.seek(0, os.SEEK_END), 1 << 12
        while True:
            start = max(0, end - block)
            file.seek(start)
            lines = file.read(end - start).rstrip().split(b"\n")
            if len(lines) > 1 or not start:
                break
            block *= 8
    try:
        row = json.loads(lines[-1] or b"{}")
    except (ValueError, RecursionError):  # what reads the file says so
        return ""
    return str(row.get(CHECK, "")) if isinstance(row, dict) else ""


def _read_csv(path: Path) -> list[Row]:
    limit = csv.field_size_limit(2**31 - 1)  # a conversation may be longer than the module's 128 KiB
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows: list[Row] = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV: {error}.") from None
    finally:
        csv.field_size_limit(limit)
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise ValueError(f"{path}, row {number} has more fields than the head names; quote what holds a comma.")
    return rows


def _read_json(path: Path) -> list[Row]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}.") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply.") from None
    except ValueError:
        return read_json_lines(path)  # which many call .json
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number} is no object; a .json file holds a list of objects.")
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("a .parquet file needs: pip install pyarrow (it comes with 'peft-ext[cli]')") from error
    try:
        return parquet.read_table(path).to_pylist()
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {error}") from None


def _check_rows(rows: Iterable[Row], fields: Optional[Mapping[str, Field]], path: Path) -> None:
    if fields is not None:
        for number, row in enumerate(rows, start=1):
            check_fields(row, fields, f"{path}, row {number}")


def _check_there(path: Path, argument: Optional[str]) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{argument + '=' if argument else ''}{str(path)!r}: there is no such file.")


def _decoded(line: _Line, path: Path) -> str:
    try:
        # a byte-order mark, which editors on Windows put first
        return line.content.decode("utf-8-sig" if line.number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {line.number} is not UTF-8: {error}.") from None


def _parsed(line: _Line, path: Path) -> Row:
    where = f"{path}, line {line.number}"
    text = _decoded(line, path)
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no object.")
    return value


def _cut_torn(path: Path, line: _Line) -> None:
    logger.warning(
        "%s: the last line is damaged (a kill while it was written?) and is dropped; its row is made again. It was: %r",
        path,
        line.content[:200].decode("utf-8", errors="replace"),
    )
    os.truncate(path, line.start)
