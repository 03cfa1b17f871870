# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Pools of generated demonstrations, and the file that keeps them: a line of settings, then a line for each input.

{"format": 1, "settings": {"model": ..., "task": ..., "seed": ..., ...}}
{"index": 0, "example": {"text": ...}, "samples": {"negative": [...], "positive": [...]}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from generation_ext.prompts import Example, Task
from peft_ext.files import append_lines


_FORMAT = 1


class Pool(NamedTuple):
    """What was generated for one input.

    Attributes:
        example: The input's fields.
        samples: For each label the generated texts.
    """

    example: dict[str, str]
    samples: dict[str, list[str]]

    def demonstrations(self, task: Task) -> list[tuple[Example, str]]:
        """All of them as pairs of example and label; empty texts are left out."""
        return [
            (task.generated(self.example, text), label)
            for label, texts in self.samples.items()
            for text in texts
            if text
        ]


def draw(
    candidates: Sequence[tuple[Example, str]], count: int, generator: np.random.Generator, balanced: bool = False
) -> list[tuple[Example, str]]:
    """Draw demonstrations without replacement.

    Args:
        candidates: Pairs of example and label.
        count: How many; fewer if there are fewer.
        generator: Random numbers.
        balanced: As many of each label as possible, the labels that get one more by chance; otherwise uniformly.

    Returns:
        In random order.
    """
    order = generator.permutation(len(candidates))
    if balanced:
        ranks: dict[str, int] = {}
        labels = generator.permutation(sorted({label for _, label in candidates})).tolist()
        rank = []
        for index in order:
            label = candidates[index][1]
            ranks[label] = ranks.get(label, -1) + 1
            rank.append((ranks[label], labels.index(label)))
        chosen = sorted(range(len(order)), key=lambda place: rank[place])[:count]
        order = generator.permutation(order[chosen])
    return [candidates[index] for index in order[:count]]


class PoolFile:
    """Pools on disk, written as they are finished; a run that was killed goes on where it was.

    Args:
        path: The file; None: keep pools in memory only.
        settings: Everything that pools depend on. A file with other settings is refused.

    Raises:
        ValueError: If the file has other settings, or is no such file.
        OSError: If its folder doesn't exist.
    """

    def __init__(self, path: Optional[Union[str, os.PathLike]], settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.pools: dict[int, Pool] = {}
        self.settings = json.loads(json.dumps(settings))
        if self.path is None:
            return
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise FileNotFoundError(f"pool file {str(self.path)!r} is a folder, or lies in one that does not exist.")
        if self.path.is_file() and self.path.stat().st_size:
            self._read()
        else:
            self._append({"format": _FORMAT, "settings": self.settings})

    def get(self, index: int, example: Mapping[str, str]) -> Optional[Pool]:
        """The pool of an input, if it is there.

        Raises:
            ValueError: If it belongs to another input.
        """
        pool = self.pools.get(index)
        if pool is not None and pool.example != dict(example):
            raise ValueError(
                f"pool file {str(self.path)!r}: input {index} was {pool.example}, and is {dict(example)} now; use another "
                "file for other inputs."
            )
        return pool

    def add(self, index: int, pool: Pool) -> None:
        """Keep a pool, on disk too."""
        self.pools[index] = pool
        if self.path is not None:
            self._append({"index": index, "example": pool.example, "samples": pool.samples})

    def _append(self, value: Mapping[str, Any]) -> None:
        append_lines(Path(str(self.path)), [json.dumps(value, ensure_ascii=False)])

    def _read(self) -> None:
        path = self.path
        if path is None:
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            header, *rows = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
            found = header["settings"] if header["format"] == _FORMAT else None
            self.pools = {row["index"]: Pool(row["example"], row["samples"]) for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(path)!r} is no file of pools (or damaged: {error}); choose another.") from error
        if found != self.settings:
            names = [name for name in self.settings if not found or found.get(name) != self.settings[name]]
            raise ValueError(
                f"pool file {str(path)!r} was made with other settings ({', '.join(names) or 'of a later version'}); "
                "choose another file, or the same settings."
            )
        if len(whole) < len(content):  # what a kill left half-written
            with open(path, "r+b") as file:
                file.truncate(len(whole))
