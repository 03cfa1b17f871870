# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


# In the name of what is being written.
_PARTIAL = "-partial-"


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place if the block succeeds; for a file or a folder."""
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}{_PARTIAL}", dir=target.parent))
    try:
        yield partial / target.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(partial / target.name, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written in a folder."""
    for path in folder.glob(f".*{_PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def check_writable(target: Path, argument: str) -> None:
    """Refuse, before any long work, a file that can't be written.

    Raises:
        OSError: Names the argument and the file.
    """
    if target.is_dir():
        raise IsADirectoryError(f"{argument}={str(target)!r} is a folder; pass a file.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{argument}={str(target)!r}: the folder {str(target.parent)!r} does not exist.")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"{argument}={str(target)!r} can't be written: no permission.")


def check_folder_writable(folder: Path, argument: str) -> None:
    """Refuse, before any long work, a folder that can't be made.

    Raises:
        PermissionError: Names the argument and the folder.
    """
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise PermissionError(f"{argument}={str(folder)!r} can't be written: {error}") from error


def write_json(target: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with written_whole(target) as path:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, way_out: str = "download or save it again") -> dict[str, Any]:
    """An object out of a JSON file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it isn't UTF-8, no JSON, nested too deeply or no object; names it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{str(path)!r} is nested too deeply to be a file of ours; {way_out}.") from None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON ({error}); {way_out}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} holds a {type(value).__name__} where an object is expected; {way_out}.")
    return value
