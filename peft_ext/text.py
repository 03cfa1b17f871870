# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Text for tuning and for judging: reads documents, splits them into train and held-out, cuts them into blocks of
tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from transformers import PreTrainedTokenizerBase

from peft_ext.rows import read_json_lines


PYTHON_DOCS = "python-docs"
# With fewer documents than this, whole documents are too coarse a split: the end of each is held out instead.
_MIN_DOCUMENTS = 10
_SUFFIXES = (".txt", ".jsonl")
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")


class TextSplits(NamedTuple):
    """Documents to train on, and documents that are held out to judge the result."""

    train: list[str]
    held_out: list[str]


def load_text(
    data: str, *, held_out: float = 0.1, text_field: str = "text", seed: int = 0, data_config: Optional[str] = None
) -> TextSplits:
    """Load documents and split them; the same arguments give the same split.

    Args:
        data: `"python-docs"` (the topics of Python's own help, split by topic), a `.txt` file (one document), a
            `.jsonl` file (one document a line), a folder of such files, or the id of a data set on the hub. A folder
            or data set with splits of its own is used as it is: train, and validation as held-out; a test split is
            never touched.
        held_out: Share that is held out where the data have no validation split, between 0 and 1.
        text_field: The field that holds the text, in JSON lines and hub data sets.
        seed: Seed of the choice of held-out documents.
        data_config: Name of the hub data set's configuration, if it has several.

    Raises:
        FileNotFoundError: If there is no such file, folder or data set.
        ValueError: If there is no text, a line is not a JSON object with `text_field`, or `held_out` is out of range.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} must be a share between 0 and 1, such as 0.1.")
    if data == PYTHON_DOCS:
        train, validation = _python_docs(), None
    else:
        path = Path(data).expanduser()
        if path.is_dir():
            train, validation = _read_folder(path, text_field)
        elif path.is_file():
            train, validation = _read_file(path, text_field), None
        else:
            train, validation = _load_hub(data, data_config, text_field)
    splits = _split(train, held_out, seed, data) if validation is None else TextSplits(train, validation)
    for name, documents in zip(splits._fields, splits):
        if not documents:
            raise ValueError(f"data={data!r} is empty: it has no {name.replace('_', '-')} text.")
    return splits


def token_blocks(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], block_size: int, *, name: str = "text"
) -> torch.Tensor:
    """Join documents by the end-of-sequence token and cut them into blocks of equal length; a rest is dropped.

    Args:
        tokenizer: The model's tokenizer.
        texts: Documents.
        block_size: Tokens per block, at least 2.
        name: What the text is, for messages.

    Returns:
        Token ids, int64 `[blocks, block_size]`.

    Raises:
        ValueError: If the text is shorter than one block.
    """
    if block_size < 2:
        raise ValueError(f"block_size={block_size} must be at least 2: one token to see and one to predict.")
    # verbose=False: a document longer than the model's context is no fault here, as it is cut
    documents = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for index, document in enumerate(documents):
        tokens += (separator if index else []) + document
    count = len(tokens) // block_size
    if count == 0:
        raise ValueError(
            f"the {name} has {len(tokens)} tokens, less than one block of block_size={block_size}; "
            "give more text or a smaller block_size."
        )
    return torch.tensor(tokens[: count * block_size], dtype=torch.long).view(count, block_size)


def _python_docs() -> list[str]:
    from pydoc_data.topics import topics

    # several topics share a text; it must not lie on both sides of the split
    return list(dict.fromkeys(topics[name] for name in sorted(topics)))


def _read_folder(folder: Path, text_field: str) -> tuple[list[str], Optional[list[str]]]:
    """Documents of a folder: its train and validation files if it has them, or else all of its files."""
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    if not files:
        raise FileNotFoundError(f"data={str(folder)!r}: the folder holds no .txt or .jsonl file.")
    by_stem = {path.stem: path for path in reversed(files)}
    if "train" not in by_stem:
        return [document for path in files for document in _read_file(path, text_field)], None
    train = _read_file(by_stem["train"], text_field)
    for stem in _VALIDATION_NAMES:
        if stem in by_stem:
            return train, _read_file(by_stem[stem], text_field)
    return train, None


def _read_file(path: Path, text_field: str) -> list[str]:
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"data={str(path)!r}: only .txt and .jsonl files can be read.")
    if path.suffix == ".jsonl":
        return _documents(read_json_lines(path), str(path), text_field)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    return [text] if text.strip() else []


def _documents(rows: Iterable[Mapping[str, Any]], where: str, text_field: str) -> list[str]:
    """The texts of rows that aren't blank."""
    documents = []
    for number, row in enumerate(rows, start=1):
        if text_field not in row:
            raise ValueError(f"{where}, row {number}: no field {text_field!r}; pass text_field, one of {sorted(row)}.")
        if not isinstance(row[text_field], str):
            kind = type(row[text_field]).__name__
            raise ValueError(f"{where}, row {number}: field {text_field!r} is a {kind}, not a string.")
        documents.append(row[text_field])
    return [document for document in documents if document.strip()]


def _load_hub(data: str, data_config: Optional[str], text_field: str) -> tuple[list[str], Optional[list[str]]]:
    """The train and validation texts of a hub data set."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", data) or data.endswith((*_SUFFIXES, ".json")):
        raise FileNotFoundError(f"data={data!r}: there is no such file or folder.")
    from datasets import load_dataset

    try:
        dataset = load_dataset(data, data_config)
    except (OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(
            f"data={data!r} is no file or folder here, and could not be loaded as a hub data set: {error}"
        ) from error
    if "train" not in dataset:
        raise ValueError(f"data={data!r} has no split 'train', only {sorted(dataset)}.")
    held_out = next((name for name in _VALIDATION_NAMES if name in dataset), None)
    texts = [_documents(dataset[split], f"{data}, {split}", text_field) for split in ("train", held_out) if split]
    return texts[0], None if held_out is None else texts[1]


def _split(documents: list[str], held_out: float, seed: int, data: str) -> TextSplits:
    """Hold out whole documents, or the end of each where there are few."""
    if len(documents) < _MIN_DOCUMENTS:
        parts = [_cut(document, 1 - held_out) for document in documents]
        return TextSplits([start for start, _ in parts if start], [end for _, end in parts if end])
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    count = min(max(1, round(held_out * len(documents))), len(documents) - 1)
    chosen = set(order[:count])
    return TextSplits(
        [document for index, document in enumerate(documents) if index not in chosen],
        [document for index, document in enumerate(documents) if index in chosen],
    )


def _cut(document: str, share: float) -> tuple[str, str]:
    """Cut a document near `share` of its length, at the end of a line if there is one in the second part."""
    position = int(len(document) * share)
    newline = document.find("\n", position)
    # the rest of a very long line would take the whole held-out part
    if 0 <= newline < (position + len(document)) / 2:
        position = newline + 1
    return document[:position], document[position:]
