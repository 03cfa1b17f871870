# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What a `--data` argument names: a file, a folder or a hub data set as rows, and which of them are held out."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, TypeVar

from peft_ext.rows import ROW_SUFFIXES, Row, read_rows


PYTHON_DOCS = "python-docs"
TEXT_SUFFIXES = (".txt", ".md", ".rst")
TEXT = "text"
# With fewer documents than this, whole documents are too coarse a split: the end of each is held out instead.
MIN_DOCUMENTS = 10
_SUFFIXES = (*TEXT_SUFFIXES, *ROW_SUFFIXES)
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
# Texts about the data, not of them.
_ABOUT = re.compile(r"(readme|licen[cs]e|changelog|contributing|notice)\b", re.IGNORECASE)
# As the hub cuts a split into files: train-00000-of-00003.parquet.
_SHARD = re.compile(r"-\d+-of-\d+$")
_T = TypeVar("_T")


class Record(NamedTuple):
    """A row, and where it comes from, for messages; `raw`: it is a whole text file, under `"text"`."""

    row: Row
    where: str
    raw: bool = False


class Records(NamedTuple):
    """Rows to train on, and rows of a validation split; None if the data have none."""

    train: list[Record]
    held_out: Optional[list[Record]]


def load_records(
    data: str,
    *,
    data_config: Optional[str] = None,
    split: Optional[str] = None,
    eval_split: Optional[str] = None,
    argument: str = "data",
) -> Records:
    """The rows that a data argument names.

    Args:
        data: `"python-docs"` (the topics of Python's own help), a `.txt`, `.md` or `.rst` file (one text), a `.jsonl`,
            `.json`, `.csv` or `.parquet` file (rows), a folder of such files, a folder that `save_to_disk` of datasets
            wrote, or the id of a data set on the hub. In a folder, files named after a split (`train.jsonl`,
            `validation.csv`, `train-00000-of-00002.parquet`) are that split; a test split is never touched.
        data_config: Name of the hub data set's configuration, if it has several.
        split: The split to train on; by default `train`, or everything where there are no splits.
        eval_split: The split to hold out; by default `validation` (or `valid`, `val`, `dev`) if there is one.
        argument: What named the data, for messages.

    Raises:
        FileNotFoundError: If there is no such file, folder or data set.
        ValueError: If a file can't be read as what its ending says, or there is no such split.
    """
    path = Path(data).expanduser()
    if data == PYTHON_DOCS:
        splits = {"": _python_docs}
    elif path.is_dir():
        splits = _folder_splits(path, argument)
    elif path.is_file():
        splits = {"": lambda: _read_file(path, argument)}
    else:
        splits = _hub_splits(data, data_config, argument)
    if "" in splits:
        if split or eval_split:
            named = f"split={split!r}" if split else f"eval_split={eval_split!r}"
            raise ValueError(f"{named}: {argument}={data!r} has no splits; leave it out.")
        return Records(splits[""](), None)
    for name in (split or "train", eval_split):
        if name is not None and name not in splits:
            raise ValueError(f"{argument}={data!r} has no split {name!r}, only {sorted(splits)}.")
    if eval_split is None:
        eval_split = next((name for name in _VALIDATION_NAMES if name in splits and name != split), None)
    return Records(splits[split or "train"](), None if eval_split is None else splits[eval_split]())


def hold_out(items: Sequence[_T], share: float, seed: int = 0) -> tuple[list[_T], list[_T]]:
    """Items to train on, and a share of them, at least one, that is held out; the same arguments give the same split.

    Raises:
        ValueError: If the share is out of range, or there are fewer than two items.
    """
    check_share(share)
    if len(items) < 2:
        raise ValueError(f"there is {len(items)} row, and one has to be held out; give more, or --eval_data.")
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    chosen = set(order[: min(max(1, round(share * len(items))), len(items) - 1)])
    parts = ([item for index, item in enumerate(items) if (index in chosen) == held] for held in (False, True))
    return tuple(parts)  # type: ignore[return-value]


def check_share(share: float) -> None:
    """Refuse a share of held-out data that is none."""
    if not 0 < share < 1:
        raise ValueError(f"held_out={share} must be a share between 0 and 1, such as 0.1.")


def _python_docs() -> list[Record]:
    from pydoc_data.topics import topics

    # several topics share a text; it must not lie on both sides of the split
    texts = dict.fromkeys(topics[name] for name in sorted(topics))
    return [Record({TEXT: text}, PYTHON_DOCS, raw=True) for text in texts]


def _folder_splits(folder: Path, argument: str) -> dict[str, Callable[[], list[Record]]]:
    """The splits of a folder, by name; `""` holds all of its files where none is named `train`."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_splits(folder)
    files = sorted(path for path in folder.iterdir() if _is_data(path))
    if not files and (folder / "data").is_dir():  # as data sets lie on the hub
        return _folder_splits(folder / "data", argument)
    if not files:
        endings = f"{', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"
        raise FileNotFoundError(f"{argument}={str(folder)!r}: the folder holds no {endings} file.")
    by_split: dict[str, list[Path]] = {}
    for path in files:
        same = by_split.setdefault(_SHARD.sub("", path.stem), [])
        # one file of a split that lies there in several formats, or all of its shards
        if not same or path.suffix == same[0].suffix:
            same.append(path)
    if "train" not in by_split:
        return {"": lambda: [record for path in files for record in _read_file(path, argument)]}

    def reader(paths: list[Path]) -> Callable[[], list[Record]]:
        return lambda: [record for path in paths for record in _read_file(path, argument)]

    return {name: reader(paths) for name, paths in by_split.items()}


def _is_data(path: Path) -> bool:
    if not path.is_file() or path.suffix not in _SUFFIXES or path.name.startswith("."):
        return False
    return not (path.suffix in TEXT_SUFFIXES and _ABOUT.match(path.name))


def _read_file(path: Path, argument: str) -> list[Record]:
    if path.suffix not in _SUFFIXES:
        endings = f"{', '.join(_SUFFIXES[:-1])} and {_SUFFIXES[-1]}"
        raise ValueError(f"{argument}={str(path)!r}: only {endings} files can be read.")
    if path.suffix in ROW_SUFFIXES:
        rows = read_rows(path, may_be_empty=True)
        return [Record(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    return [Record({TEXT: text}, str(path), raw=True)]


def _saved_splits(folder: Path) -> dict[str, Callable[[], list[Record]]]:
    from datasets import Dataset, load_from_disk

    saved = load_from_disk(str(folder))
    if isinstance(saved, Dataset):
        return {"": _rows_of(saved, str(folder))}
    return {name: _rows_of(saved[name], f"{folder}, {name}") for name in saved}


def _hub_splits(data: str, data_config: Optional[str], argument: str) -> dict[str, Callable[[], list[Record]]]:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", data) or data.endswith(_SUFFIXES):
        raise FileNotFoundError(f"{argument}={data!r}: there is no such file or folder.")
    from datasets import load_dataset

    try:
        dataset = load_dataset(data, data_config)
    except (OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{argument}={data!r} is no file or folder here, and could not be loaded as a hub data set: {error}"
        ) from error
    return {name: _rows_of(dataset[name], f"{data}, {name}") for name in dataset}


def _rows_of(dataset: Any, where: str) -> Callable[[], list[Record]]:
    return lambda: [Record(dict(row), f"{where}, row {number}") for number, row in enumerate(dataset, start=1)]
