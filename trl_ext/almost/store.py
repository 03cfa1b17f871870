# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A run's files: rows as JSON lines that survive a kill, and a manifest for each stage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Optional, Union

from peft_ext.files import append_lines, write_json, written_whole


logger = logging.getLogger(__name__)
Row = dict[str, Any]
_FORMAT = 1


class RowFile:
    """Rows of a JSON-lines file, each with an `"id"` of its own; what was appended stays, whatever happens next.

    A damaged last line, which a kill in the middle of writing leaves, is cut off with a warning that shows it.

    Args:
        path: The file; need not exist, its folder is made.

    Raises:
        ValueError: If a line before the last is no JSON object with an id, or an id occurs twice.
    """

    def __init__(self, path: Union[str, os.PathLike]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[Any, Row] = _read(self.path, repair=True)

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
            append_lines(self.path, (json.dumps(row, ensure_ascii=False) for row in new.values()))
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: {len(new)} new rows of {str(self.path)!r} could not be written. The {len(self)} rows "
                "before them are kept; make room and start the run again, it goes on from there",
            ) from error
        self.rows.update(new)
        return len(new)

    def sort(self, key: Callable[[Row], Any]) -> None:
        """Rewrite the file in an order that doesn't depend on how often the run was interrupted."""
        ordered = sorted(self.rows.values(), key=key)
        if ordered != list(self.rows.values()):
            self.rows = {row["id"]: row for row in ordered}
            write_rows(self.path, ordered)


def read_rows(path: Union[str, os.PathLike]) -> list[Row]:
    """The rows of a finished file.

    Raises:
        FileNotFoundError: If it isn't there.
        ValueError: If a line is damaged; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} isn't there; run the stage that writes it first.")
    return list(_read(path, repair=False).values())


def write_rows(path: Union[str, os.PathLike], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of rows, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def open_alone(path: Optional[str], config: Any) -> Path:
    """The output file of a stage that runs by itself, once its config is beside it (`<name>.config.json`).

    Args:
        path: What the user passed.
        config: A dataclass or a mapping.

    Raises:
        ValueError: If there is no path, or the file was begun with another config; names what differs.
    """
    if not path:
        raise ValueError("output_file is missing: pass --output_file, the .jsonl file to write.")
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    values = _plain(dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config)  # type: ignore[arg-type]
    beside = target.with_suffix(".config.json")
    if beside.is_file():
        changes = differences(json.loads(beside.read_text(encoding="utf-8")), values)
        if changes:
            listed = "; ".join(f"{key}: was {old}, is {new}" for key, old, new in changes)
            raise ValueError(f"{str(target)!r} was begun with another config ({listed}); use another file.")
    else:
        write_json(beside, values)
    return target


class Run:
    """A run directory: its files, and what each stage was made from.

    `manifest/<stage>.json` holds a stage's config, the hashes of its inputs and outputs, and its counts.

    Args:
        folder: Made when a stage begins.
    """

    def __init__(self, folder: Union[str, os.PathLike]) -> None:
        self.folder = Path(folder)

    def path(self, name: str) -> Path:
        """Where a file or folder of the run lies."""
        return self.folder / name

    def manifest(self, stage: str) -> Optional[dict[str, Any]]:
        """What is known of a stage; None if it has never begun."""
        path = self._manifest(stage)
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is damaged ({error}); delete it, and the stage goes on.") from error
        if value.get("format") != _FORMAT:
            raise ValueError(f"{str(path)!r} was written by another version; use a new run directory.")
        return value

    def check(self, stage: str, config: Mapping[str, Any]) -> None:
        """Check that a stage, if it has begun, had this config.

        Raises:
            ValueError: Names every key that differs, with both values, and a new directory.
        """
        known = self.manifest(stage)
        if known is None:
            return
        changes = differences(known["config"], _plain(config))
        if changes:
            lines = "\n".join(f"  {stage}.{key}: was {old}, is {new}" for key, old, new in changes)
            raise ValueError(
                f"the run in {str(self.folder)!r} was made with another config:\n{lines}\nA run keeps one config, since "
                "its rows would be a mixture otherwise. Go back to the old values, or start a new run: "
                f"run_dir={str(self._other_folder())!r}"
            )

    def begin(self, stage: str, config: Mapping[str, Any], inputs: Iterable[str] = ()) -> bool:
        """Whether a stage has to run; writes down what it runs from.

        Args:
            stage: Its name.
            config: All that its output depends on, besides its inputs.
            inputs: Names of files and folders in the run directory.

        Returns:
            False if it has finished from the same inputs.

        Raises:
            ValueError: If it began with another config, or from inputs that have changed since.
        """
        self.check(stage, config)
        known, hashes = self.manifest(stage), {name: digest(self.path(name)) for name in inputs}
        if known is not None:
            changed = [name for name, value in hashes.items() if known["inputs"].get(name) != value]
            if changed:
                raise ValueError(
                    f"stage {stage!r} in {str(self.folder)!r} began from other inputs: {', '.join(changed)} changed since. "
                    f"Put them back, or start a new run: run_dir={str(self._other_folder())!r}"
                )
            if known["done"] and all(self.path(name).exists() for name in known["outputs"]):
                return False
        begun = {"config": _plain(config), "inputs": hashes, "outputs": {}, "counts": {}, "done": False}
        self._write(stage, {**begun, "seconds": self._spent(stage, known)})
        return True

    def finish(
        self, stage: str, outputs: Iterable[str], counts: Optional[Mapping[str, Any]] = None, seconds: float = 0.0
    ) -> None:
        """Write down that a stage is done.

        Args:
            stage: One that has begun.
            outputs: Names of what it wrote.
            counts: What to tell of it.
            seconds: How long its last, uninterrupted part took; what came before it is added.
        """
        known = self.manifest(stage)
        if known is None:
            raise ValueError(f"stage={stage!r} has not begun.")
        hashes = {name: digest(self.path(name)) for name in outputs}
        self._write(
            stage,
            {
                **known,
                "outputs": hashes,
                "counts": _plain(counts or {}),
                "seconds": known.get("seconds", 0.0) + seconds,
                "done": True,
            },
        )

    def _spent(self, stage: str, known: Optional[dict[str, Any]]) -> float:
        """How long a stage ran before it was interrupted: until the newest file of the run, as stages run one by one."""
        if known is None or known["done"]:
            return 0.0
        newest = max(path.stat().st_mtime for path in self.folder.rglob("*") if path.is_file())
        return known.get("seconds", 0.0) + newest - self._manifest(stage).stat().st_mtime

    def _manifest(self, stage: str) -> Path:
        return self.folder / "manifest" / f"{stage}.json"

    def _write(self, stage: str, value: dict[str, Any]) -> None:
        self._manifest(stage).parent.mkdir(parents=True, exist_ok=True)
        write_json(self._manifest(stage), {"format": _FORMAT, "stage": stage, **value})

    def _other_folder(self) -> Path:
        number = 2
        while (other := self.folder.with_name(f"{self.folder.name}-{number}")).exists():
            number += 1
        return other


def digest(path: Path) -> str:
    """sha256 of a file, or of a folder's files and their names.

    Raises:
        FileNotFoundError: If there is neither.
    """
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} isn't there; run the stage that writes it first.")
    hash_ = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            hash_.update(f"{file.relative_to(path)}\0".encode() if path.is_dir() else b"")
            with open(file, "rb") as content:
                while block := content.read(1 << 20):
                    hash_.update(block)
    return hash_.hexdigest()


def differences(old: Any, new: Any, at: str = "") -> list[tuple[str, str, str]]:
    """Where two configs differ: dotted key, old value, new value, both as JSON; `"not set"` for a missing one."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in dict.fromkeys([*old, *new]):
            below = f"{at}.{key}" if at else str(key)
            if key not in old or key not in new:
                shown = [json.dumps(side[key]) if key in side else "not set" for side in (old, new)]
                found.append((below, shown[0], shown[1]))
            else:
                found += differences(old[key], new[key], below)
        return found
    return [] if old == new else [(at, json.dumps(old), json.dumps(new))]


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))


def _read(path: Path, repair: bool) -> dict[Any, Row]:
    """Rows by their ids; with `repair`, a damaged last line is cut off the file."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    lines = content.split(b"\n")
    rows: dict[Any, Row] = {}
    start = 0
    for number, line in enumerate(lines, start=1):
        is_last = start + len(line) + 1 >= len(content)
        if line.strip():
            try:
                row = _row(line, whole=number < len(lines))
            except ValueError as error:
                if not (repair and is_last):
                    raise ValueError(f"{path}, line {number} {error}; the file is damaged.") from None
                logger.warning(
                    "%s: the last line is damaged (a kill while it was written?) and is dropped; its row is made again. It "
                    "was: %r",
                    path,
                    line[:200].decode("utf-8", errors="replace"),
                )
                os.truncate(path, start)
                break
            if row["id"] in rows:
                raise ValueError(f"{path}, line {number}: id {row['id']!r} occurs twice; the file is damaged.")
            rows[row["id"]] = row
        start += len(line) + 1
    return rows


def _row(line: bytes, whole: bool) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"is no JSON ({error})") from error
    if not isinstance(row, dict) or "id" not in row:
        raise ValueError("is no object with an id")
    if not whole:
        raise ValueError("has no end")
    return row
