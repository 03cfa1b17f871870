# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Pools of generated demonstrations, and the file that keeps them: a line of settings, then a line for each input.

{"format": 2, "settings": {"model": ..., "task": ..., "seed": ..., ...}}
{"index": 0, "example": {"text": ...}, "samples": {"negative": [...], "positive": [...]}}
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from generation_ext.prompts import Example, Task
from peft_ext.file_formats import check_fields, list_of, mapping_of, record, text, whole
from peft_ext.rows import Row, append_rows, read_grown_rows
from peft_ext.runs import differences, plain


_FORMAT = 2
_WAY_OUT = "Choose another file, or take the row out: it is generated again."
HEADER = {"format": whole(), "settings": record({})}
POOL = {"index": whole(0), "example": mapping_of(text()), "samples": mapping_of(list_of(text()))}


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
        chosen = sorted(range(len(order)), key=rank.__getitem__)[:count]
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
        self.settings = plain(settings)
        if self.path is None:
            return
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise FileNotFoundError(f"pool file {str(self.path)!r} is a folder, or lies in one that does not exist.")
        if self.path.is_file() and self.path.stat().st_size:
            self._read(self.path)
        else:
            append_rows(self.path, [{"format": _FORMAT, "settings": self.settings}], checked=True)

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
            row = {"index": index, "example": pool.example, "samples": pool.samples}
            append_rows(self.path, [row], checked=True)

    def _read(self, path: Path) -> None:
        try:
            header, *rows = read_grown_rows(path)
            check_fields(header, HEADER, f"{str(path)!r}, line 1", _WAY_OUT)
            for number, row in enumerate(rows, start=2):
                check_fields(row, POOL, f"{str(path)!r}, row {number}", _WAY_OUT)
                self._take(row, f"{str(path)!r}, row {number}")
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no file of pools, or damaged: {error}") from error
        version = header["format"]
        if version != _FORMAT:
            raise ValueError(
                f"pool file {str(path)!r} has format {version}, this version of peft-ext reads {_FORMAT} (a file of format 1 "
                "doesn't say which adapter's texts it holds); choose another file."
            )
        changes = differences(header["settings"], self.settings)
        if changes:
            raise ValueError(
                f"pool file {str(path)!r} was made with other settings ({', '.join(each.key for each in changes)}); choose "
                "another file, or the same settings."
            )
        read_grown_rows(path, cut=True)  # what a kill left half-written; only of a file that is ours

    def _take(self, row: Row, where: str) -> None:
        pool, labels, samples = Pool(row["example"], row["samples"]), self._labels(), self.settings.get("samples")
        if labels is not None and list(pool.samples) != labels:
            raise ValueError(f"{where}: samples has the labels {list(pool.samples)}, not {labels}. {_WAY_OUT}")
        if samples is not None and any(len(texts) != samples for texts in pool.samples.values()):
            raise ValueError(f"{where}: samples must have {samples} texts of each label. {_WAY_OUT}")
        if row["index"] in self.pools:
            raise ValueError(f"{where}: index {row['index']} occurs twice. {_WAY_OUT}")
        self.pools[row["index"]] = pool

    def _labels(self) -> Optional[list[str]]:
        task = self.settings.get("task")
        labels = task.get("labels") if isinstance(task, dict) else None
        return list(labels) if labels is not None else None
