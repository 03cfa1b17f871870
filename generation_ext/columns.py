# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Texts of a user's file: which of its columns are which fields of a task, for the command lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from peft_ext.rows import Row, read_rows


@dataclass
class DataArguments:
    """Which texts."""

    data: Optional[str] = field(default=None, metadata={"help": "Texts: .jsonl or .csv."})
    fields: list[str] = field(
        default_factory=list, metadata={"help": "Columns that are named otherwise, as FIELD=COLUMN."}
    )
    limit: Optional[int] = field(default=None, metadata={"help": "Only so many rows."})


def columns_of(fields: Sequence[str], assignments: Sequence[str]) -> dict[str, str]:
    """Field -> the column that it is in, from `FIELD=COLUMN`s; a field without one has its own name's.

    Raises:
        ValueError: If one is no assignment, or of an unknown field.
    """
    columns = {field: field for field in fields}
    for text in assignments:
        field, sign, column = text.partition("=")
        if not (field and sign and column):
            raise ValueError(f"--fields {text!r}: write FIELD=COLUMN.")
        if field not in columns:
            raise ValueError(f"--fields {text!r}: there is no field {field!r}, only {list(fields)}.")
        columns[field] = column
    return columns


def fields_of(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, str]:
    """A row's fields as texts.

    Raises:
        ValueError: If the row lacks a column; `where` says which row it is.
    """
    missing = [column for column in columns.values() if row.get(column) is None]
    if missing:
        field = next(iter(columns))
        raise ValueError(
            f"{where} has no {missing[0]!r}, only {list(row)}; say with --fields which column is which field of the "
            f"task, as {field}=COLUMN."
        )
    return {field: str(row[column]) for field, column in columns.items()}


def read_texts(
    path: Optional[str], columns: Mapping[str, str], argument: str = "data", limit: Optional[int] = None
) -> tuple[list[Row], list[dict[str, str]]]:
    """The rows of a `.jsonl` or `.csv` file, and the fields of each as texts.

    Args:
        path: What the user passed.
        columns: As [`columns_of`] has them.
        argument: The argument that named the file, for messages.
        limit: Only so many rows.

    Raises:
        ValueError, FileNotFoundError: If there is no such file, or a row lacks a column.
    """
    if not path:
        raise ValueError(f"{argument} is missing: pass --{argument}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1.")
    rows = read_rows(path, argument=argument)[:limit]
    return rows, [fields_of(row, columns, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]
