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
from peft_ext.rows import Row, append_rows, keep_rows, read_json_lines


_FIELDS = ("prompt", "completion", "prompt_ids", "completion_ids", "reward", "control_code", "columns")
_NEEDED = ("prompt", "completion", "prompt_ids", "completion_ids", "reward")


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
        append_rows(self.path, ({name: getattr(rollout, name) for name in _FIELDS} for rollout in rollouts))


def read_rollouts(path: Union[str, Path]) -> list[Rollout]:
    """Roll-outs of a JSON-lines file, or of all those in a folder in the order of their names.

    A last line without its end is what a kill left, and is passed over.

    Raises:
        FileNotFoundError: If there is no such file, or no `.jsonl` file in the folder.
        ValueError: If a line isn't a roll-out; names file and line.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such file, or no .jsonl file in the folder.")
    return [rollout for file in files for rollout in _read(file)]


def _read(file: Path) -> list[Rollout]:
    rows = read_json_lines(file, may_be_torn=True)
    return [_rollout(row, f"{file}, row {number}") for number, row in enumerate(rows, start=1)]


def _rollout(entry: Row, where: str) -> Rollout:
    missing = [name for name in _NEEDED if name not in entry]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}; it is no roll-out that RolloutWriter wrote.")
    for name in ("prompt_ids", "completion_ids"):
        if not isinstance(entry[name], list) or not all(type(token) is int for token in entry[name]):
            raise ValueError(f"{where}: {name} is {entry[name]!r}, not a list of tokens.")
    if not entry["prompt_ids"]:
        raise ValueError(f"{where}: prompt_ids is empty; a roll-out begins with a token.")
    reward = entry["reward"]
    if reward is not None and (not isinstance(reward, (int, float)) or not 0 <= reward <= 1):
        raise ValueError(f"{where}: reward is {reward!r}; it must be in [0, 1], or null to leave the roll-out out.")
    return Rollout(**{name: entry[name] for name in _FIELDS if name in entry})
