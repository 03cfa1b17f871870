# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Roll-outs as JSON lines: written as they are collected, and read again after a kill or for a replay.

One roll-out a line: prompt, completion, prompt_ids, completion_ids, reward, control_code, columns. Hidden states aren't
kept; they are many times larger, and one forward pass gives them again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Optional, Union

from generation_ext.critic.rollouts import Rollout
from peft_ext.file_formats import anything, check_fields, list_of, mapping_of, number, text, whole
from peft_ext.rows import Row, append_rows, keep_rows, read_json_lines


_WAY_OUT = "Take the row out, or mend it."
# A reward is null where the reward function had nothing to say.
FIELDS = {
    "prompt": text(),
    "completion": text(),
    "prompt_ids": list_of(whole(0)),
    "completion_ids": list_of(whole(0)),
    "reward": number(0, 1).or_null(),
    "control_code": text().or_null().or_missing(),
    "columns": mapping_of(anything()).or_missing(),
}


class RolloutWriter:
    """Appends roll-outs to a JSON-lines file. A kill or a full disk costs at most the lines of one call.

    Args:
        path: Made with its folder if need be. If it is there, its whole lines stay and a torn last one is cut off.
        keep: Keep only so many of the lines that are there; None: all.
    """

    def __init__(self, path: Union[str, Path], keep: Optional[int] = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        keep_rows(self.path, keep)

    def write(self, rollouts: Iterable[Rollout]) -> None:
        """Append roll-outs, and wait until the system has them on disk."""
        rows = ({name: getattr(rollout, name) for name in FIELDS} for rollout in rollouts)
        append_rows(self.path, rows, checked=True)


def read_rollouts(path: Union[str, Path]) -> list[Rollout]:
    """Roll-outs of a JSON-lines file, or of all those in a folder in the order of their names.

    A last line without its end is what a kill left, and is passed over.

    Raises:
        FileNotFoundError: If there is no such file, or no `.jsonl` file in the folder.
        ValueError: If a line isn't a roll-out; names file and line.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    missing = next((file for file in files if not file.is_file()), None)
    if not files or missing == path:
        raise FileNotFoundError(f"path={str(path)!r}: there is no such file, or no .jsonl file in the folder.")
    if missing is not None:
        raise FileNotFoundError(f"path={str(path)!r}: {missing.name} is no file.")
    return [rollout for file in files for rollout in _read(file)]


def _read(file: Path) -> list[Rollout]:
    rows = read_json_lines(file, may_be_torn=True)
    return [_rollout(row, f"{file}, row {number}") for number, row in enumerate(rows, start=1)]


def _rollout(entry: Row, where: str) -> Rollout:
    check_fields(entry, FIELDS, where, _WAY_OUT)
    if not entry["prompt_ids"]:
        raise ValueError(f"{where}: prompt_ids is empty; a roll-out begins with a token.")
    return Rollout(**{name: entry[name] for name in FIELDS if name in entry})
