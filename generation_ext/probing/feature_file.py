# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Features on disk: a `.npy` file that is filled row by row, whole or not there, and what it was made with.

<name>.npy            float32 [texts, hidden], once it is finished
<name>.npy.json       the settings that it was made with, and its sha256 once it is finished
<name>.npy.partial    while it is being filled
<name>.npy.done       uint32 [texts], the crc32 of each row of it that is filled, 0 of the others
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_ext.files import allocate, file_digest, held, written_whole
from peft_ext.runs import differences, plain, read_settings, write_settings
from peft_ext.tensor_files import verifies


_DIGEST = "sha256"


class FeatureFile:
    """Features that are computed into a file.

    Args:
        path: The `.npy` file.
        shape: `(texts, hidden)`.
        settings: Everything that the features depend on.

    Raises:
        ValueError: If the path doesn't end in .npy, or what lies there was made with other settings.
        FileNotFoundError: If its folder doesn't exist.
        BlockingIOError: If another process fills the file.
        OSError: If the disk has no room for it; names the file and the bytes.
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
        self._settings = plain(settings)
        self._digest: Any = None
        self._check(self._settings)
        self.finished = path.is_file()
        if self.finished:
            self._done_file.unlink(missing_ok=True)  # of a kill within `finish`
        else:
            self._open()

    def mark(self, rows: Sequence[int]) -> None:
        """Rows are filled, and a kill loses them no more."""
        self.features.flush()
        for row in rows:
            self._checks[row] = _check_of(self.features[row])
        self._checks.flush()
        self.done[rows] = True

    def finish(self) -> None:
        """Put the file in its place."""
        self.features.flush()
        self._unmap()
        self._digest = file_digest(self._partial)
        write_settings(self._settings_file, {**self._settings, _DIGEST: self._digest})
        os.replace(self._partial, self.path)
        self._done_file.unlink()
        self.finished = True
        self.close()

    def close(self) -> None:
        """Let go of the file, filled or not; another process may go on with it."""
        self._unmap()
        self._held.close()

    def _unmap(self) -> None:
        for name in ("features", "done", "_checks"):
            self.__dict__.pop(name, None)

    def read(self) -> np.ndarray:
        """The finished features, mapped read-only, once their digest, if there is one, has been compared.

        Raises:
            ValueError: If the file is damaged; names it and the way out.
        """
        again = "Put it back; or delete it with its .json file, and the features are computed again."
        if self._digest is not None and verifies() and file_digest(self.path) != self._digest:
            raise ValueError(
                f"output={str(self.path)!r} isn't the file that was written: it is damaged, or was changed. {again}"
            )
        try:
            features = np.load(self.path, mmap_mode="r" if self.shape[0] else None, allow_pickle=False)
        except Exception as error:  # numpy's readers raise whatever a damaged header makes them trip over
            raise ValueError(
                f"output={str(self.path)!r} is no .npy file that can be read ({error}). {again}"
            ) from error
        if features.shape != self.shape or features.dtype != np.float32:
            found = f"{features.dtype} {list(features.shape)}"
            raise ValueError(f"output={str(self.path)!r} holds {found}, not float32 {list(self.shape)}. {again}")
        return features

    def _check(self, settings: dict[str, Any]) -> None:
        if not self._settings_file.is_file():
            if self.path.exists():
                raise ValueError(f"output={str(self.path)!r} exists and was not made by this; choose another file.")
            write_settings(self._settings_file, settings)
            return
        stored = read_settings(self._settings_file) or {}
        self._digest = stored.pop(_DIGEST, None)
        changes = differences(stored, settings)
        if changes:
            raise ValueError(
                f"output={str(self.path)!r} holds features of other {', '.join(each.key for each in changes)}; choose another "
                "file, or delete it with its .json file. (Files of earlier versions don't tell adapters apart and have to "
                "be made again.)"
            )

    def _open(self) -> None:
        """Hold the partial file against other processes, and map it and what is known of its rows."""
        self._held = contextlib.ExitStack()
        if not self.shape[0]:  # nothing can be mapped
            with written_whole(self.path) as path, open(path, "wb") as file:  # np.save adds an ending
                np.save(file, np.zeros(self.shape, np.float32))
            self.finished = True
            return
        if self._partial.is_file():
            self._held.enter_context(held(self._partial, "output"))
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": self.shape},
        )
        start, count = header.getvalue(), self.shape[0]
        size = len(start) + 4 * count * self.shape[1]
        before = None
        if _has_size(self._done_file, count):  # an earlier version's: which rows are filled, and no more
            flags = np.fromfile(self._done_file, dtype=np.uint8)
            before = flags == 1 if flags.max() <= 1 else None
        whole = before is not None or _has_size(self._done_file, 4 * count)
        if whole and _has_size(self._partial, size) and _starts_with(self._partial, start):
            allocate(self._partial, size, keep=True)  # an earlier version's has holes
        else:
            # the record first: it must not tell of rows of an older file
            self._done_file.unlink(missing_ok=True)
            allocate(self._partial, size)
            with open(self._partial, "r+b") as file:
                file.write(start)
            before = np.zeros(count, bool)
            self._held.enter_context(held(self._partial, "output"))
        if before is not None:
            allocate(self._done_file, 4 * count)
        self.features = np.lib.format.open_memmap(self._partial, mode="r+")
        self._checks = np.memmap(self._done_file, dtype="<u4", mode="r+")
        self.done = np.zeros(count, bool)
        if before is not None:
            self.mark(np.flatnonzero(before).tolist())
        for row in np.flatnonzero(self._checks):
            # a row that is damaged is computed again
            self.done[row] = self._checks[row] == _check_of(self.features[row])


def _check_of(row: np.ndarray) -> int:
    return zlib.crc32(row.tobytes()) or 1


def _starts_with(path: Path, content: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(content)) == content


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def digest_of_texts(texts: Sequence[str]) -> str:
    """What tells lists of texts apart."""
    state = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "big") + data)
    return state.hexdigest()
