# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Features on disk: a `.npy` file that is filled row by row, whole or not there, and what it was made with.

<name>.npy            float32 [texts, hidden], once it is finished
<name>.npy.json       the settings that it was made with
<name>.npy.partial    while it is being filled
<name>.npy.done       uint8 [texts], which rows of it are filled
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_ext.runs import differences, plain, read_settings, write_settings


class FeatureFile:
    """Features that are computed into a file.

    Args:
        path: The `.npy` file.
        shape: `(texts, hidden)`.
        settings: Everything that the features depend on.

    Raises:
        ValueError: If the path doesn't end in .npy, or what lies there was made with other settings.
        FileNotFoundError: If its folder doesn't exist.
    """

    def __init__(self, path: Path, shape: tuple[int, int], settings: Mapping[str, Any]) -> None:
        if path.suffix != ".npy":
            raise ValueError(f"output={str(path)!r} must end in .npy.")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"output={str(path)!r}: the folder {str(path.parent)!r} does not exist.")
        self.path, self.shape = path, shape
        self._settings_file, self._partial, self._done_file = (
            path.with_name(path.name + ending) for ending in (".json", ".partial", ".done")
        )
        self._check(plain(settings))
        self.finished = path.is_file()
        if not self.finished:
            self._open()

    def mark(self, rows: Sequence[int]) -> None:
        """Rows are filled, and a kill loses them no more."""
        self.features.flush()
        self.done[rows] = 1
        self._done.flush()

    def finish(self) -> None:
        """Put the file in its place."""
        self.features.flush()
        del self.features, self.done, self._done
        os.replace(self._partial, self.path)
        self._done_file.unlink()
        self.finished = True

    def read(self) -> np.ndarray:
        """The finished features, mapped read-only."""
        return np.load(self.path, mmap_mode="r" if self.shape[0] else None, allow_pickle=False)

    def _check(self, settings: dict[str, Any]) -> None:
        if not self._settings_file.is_file():
            if self.path.exists():
                raise ValueError(f"output={str(self.path)!r} exists and was not made by this; choose another file.")
            write_settings(self._settings_file, settings)
            return
        stored = read_settings(self._settings_file)
        changes = differences(stored, settings)
        if changes:
            raise ValueError(
                f"output={str(self.path)!r} holds features of other {', '.join(each.key for each in changes)}; choose another "
                "file, or delete it with its .json file. (Files of earlier versions don't tell adapters apart and have to "
                "be made again.)"
            )

    def _open(self) -> None:
        whole = self._partial.is_file() and self._done_file.is_file()
        whole = whole and self._done_file.stat().st_size == self.shape[0]
        if not self.shape[0]:  # nothing can be mapped
            np.save(self.path, np.zeros(self.shape, np.float32))
            self.finished = True
            return
        if not whole:
            np.lib.format.open_memmap(self._partial, mode="w+", dtype=np.float32, shape=self.shape).flush()
            self._done_file.write_bytes(bytes(self.shape[0]))
        self.features = np.lib.format.open_memmap(self._partial, mode="r+")
        self._done = np.memmap(self._done_file, dtype=np.uint8, mode="r+")
        self.done = self._done.view(bool)


def digest_of_texts(texts: Sequence[str]) -> str:
    """What tells lists of texts apart."""
    state = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "big") + data)
    return state.hexdigest()
