# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Rows of JSON-lines and CSV files, for the command lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_ext.files import written_whole


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl or .csv file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has another ending, is empty, or a line is no object; names the line.
    """
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    elif path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                rows.append(_object(line, f"{path}, line {number}"))
    else:
        raise ValueError(f"{path}: must end in .jsonl or .csv.")
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a .jsonl or .csv file, whole or not at all; all rows have the same fields."""
    with written_whole(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


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


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no object.")
    return value
