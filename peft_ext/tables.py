# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Figures as text: what the command lines print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first one left-aligned; the first row may be a head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        [row[0].ljust(widths[0]), *[cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]] for row in rows
    ]
    return "\n".join("  " + "  ".join(line) for line in lines)


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what they are, short or long, in two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value:>16}" for name, value in rows)


def figure(value: Optional[float]) -> str:
    """A number; "-" where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def mebibytes(count: int) -> str:
    """A size."""
    return f"{count / 2**20:.2f} MiB"
