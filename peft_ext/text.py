# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Text for tuning and for judging: the documents of a `--data` argument, and blocks of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from transformers import PreTrainedTokenizerBase

from peft_ext.data import MIN_DOCUMENTS, PYTHON_DOCS, TEXT, Record, Records, check_share, hold_out, load_records


__all__ = ["PYTHON_DOCS", "TextSplits", "load_text", "split_texts", "text_of", "token_blocks"]


class TextSplits(NamedTuple):
    """Documents to train on, and documents that are held out to judge the result."""

    train: list[str]
    held_out: list[str]


def load_text(
    data: str, *, held_out: float = 0.1, text_field: str = "text", seed: int = 0, data_config: Optional[str] = None
) -> TextSplits:
    """Load documents and split them; the same arguments give the same split.

    Args:
        data: What [`peft_ext.data.load_records`] takes: a text file is one document, and so is each row of a file of
            rows. A folder or data set with splits of its own is used as it is: train, and validation as held-out; a
            test split is never touched.
        held_out: Share that is held out where the data have no validation split, between 0 and 1.
        text_field: The field that holds the text, in rows of files and hub data sets.
        seed: Seed of the choice of held-out documents.
        data_config: Name of the hub data set's configuration, if it has several.

    Raises:
        FileNotFoundError: If there is no such file, folder or data set.
        ValueError: If there is no text, a row has no `text_field`, or `held_out` is out of range.
    """
    check_share(held_out)
    records = load_records(data, data_config=data_config)
    return split_texts(records, data, held_out=held_out, text_field=text_field, seed=seed)


def split_texts(
    records: Records, data: str, *, held_out: float = 0.1, text_field: str = TEXT, seed: int = 0
) -> TextSplits:
    """The documents of records, see [`load_text`]; a share is held out where the records have no validation split."""
    train = _documents(records.train, text_field)
    if records.held_out is None:
        splits = _split(train, held_out, seed)
    else:
        splits = TextSplits(train, _documents(records.held_out, text_field))
    for name, documents in zip(splits._fields, splits):
        if not documents:
            raise ValueError(f"data={data!r} is empty: it has no {name.replace('_', '-')} text.")
    return splits


def text_of(record: Record, text_field: str = TEXT) -> str:
    """The text of a record.

    Raises:
        ValueError: If the row has no such field, or no string in it; names the row.
    """
    row, where, raw = record
    field = TEXT if raw else text_field
    if field not in row:
        raise ValueError(f"{where}: no field {field!r}; pass text_field, one of {sorted(row)}.")
    if not isinstance(row[field], str):
        raise ValueError(f"{where}: field {field!r} is a {type(row[field]).__name__}, not a string.")
    return row[field]


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


def _documents(records: Sequence[Record], text_field: str) -> list[str]:
    """The texts of records that aren't blank."""
    documents = [text_of(record, text_field) for record in records]
    return [document for document in documents if document.strip()]


def _split(documents: list[str], held_out: float, seed: int) -> TextSplits:
    """Hold out whole documents, or the end of each where there are few."""
    if len(documents) < MIN_DOCUMENTS:
        parts = [_cut(document, 1 - held_out) for document in documents]
        return TextSplits([start for start, _ in parts if start], [end for _, end in parts if end])
    return TextSplits(*hold_out(documents, held_out, seed))


def _cut(document: str, share: float) -> tuple[str, str]:
    """Cut a document near `share` of its length, at the end of a line if there is one in the second part."""
    position = int(len(document) * share)
    newline = document.find("\n", position)
    # the rest of a very long line would take the whole held-out part
    if 0 <= newline < (position + len(document)) / 2:
        position = newline + 1
    return document[:position], document[position:]
