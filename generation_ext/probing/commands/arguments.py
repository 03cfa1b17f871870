# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What the commands share: flags that name a language model and the columns of a file of labelled texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Optional

from generation_ext import columns
from generation_ext.columns import read_texts
from peft_ext import command_line


RUN = "run.json"


@dataclass
class ModelArguments(command_line.ModelArguments):
    """Which language model (or encoder), and how much memory it may take."""

    memory_limit: Optional[int] = field(
        default=None, metadata={"help": "Bytes that a pass may take beside the weights; a quarter of what is free."}
    )


@dataclass
class DataArguments(columns.DataArguments):
    """Which labelled texts."""

    label_column: str = field(default="label", metadata={"help": "Column of the classes."})


def labelled(
    path: str, argument: str, columns: Mapping[str, str], args: DataArguments
) -> tuple[list[dict[str, str]], list[Optional[str]]]:
    """Texts and their classes; None where a row has none.

    Raises:
        FileNotFoundError, ValueError: If there is no such file, or a row lacks a column.
    """
    rows, texts = read_texts(path, columns, argument, args.limit)
    labels = [row.get(args.label_column) for row in rows]
    return texts, [None if label is None else str(label) for label in labels]
