# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What a benchmark says about its figures: claims with a bound, and rows of the page of results."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from benchmarks.core.run import Run


class Claim(NamedTuple):
    """A figure and what we want of it.

    Attributes:
        name: What is measured; the same at every size, so that a quick figure finds the full-size one.
        value: The figure; None while it isn't measured.
        bound: What it may be at most, or has to be at least.
        unit: Of both, written behind them.
        at_least: Which of the two.
    """

    name: str
    value: Optional[float]
    bound: float
    unit: str = ""
    at_least: bool = False

    @property
    def met(self) -> Optional[bool]:
        """Whether the figure keeps the bound; None while it isn't measured."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def wanted(self) -> str:
        """The bound in words."""
        return f"at {'least' if self.at_least else 'most'} {self.bound:.4g}{self.unit}"

    @property
    def figure(self) -> str:
        """The figure with its unit."""
        return "not measured" if self.value is None else f"{self.value:.4g}{self.unit}"

    @property
    def line(self) -> str:
        """`- name: figure (bound): met / not met`."""
        if self.value is None:
            return f"- {self.name}: not measured ({self.wanted})"
        return f"- {self.name}: {self.figure} ({self.wanted}): {'met' if self.met else '**not met**'}"


class Headline(NamedTuple):
    """A row of docs/results.md: Markdown cells.

    Attributes:
        area: The table that it belongs to, of `benchmarks.page.AREAS`.
        what: What was measured, on what.
        measured: Figures, peers' beside ours.
        wanted: What we wanted; what we didn't get goes through [`unless`].
        page: A link from docs/ to the whole table.
    """

    area: str
    what: str
    measured: str
    wanted: str
    page: str


def unless(met: Optional[bool], text: str) -> str:
    """The text in bold, unless what it wants was met."""
    return text if met else f"**{text}**"


def minus(one: Optional[float], other: Optional[float]) -> Optional[float]:
    """A difference; None while one of the two isn't measured."""
    return None if one is None or other is None else one - other


def spread(values: Sequence[float]) -> str:
    """A mean with its deviation, or a single figure."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.pstdev(values):.1f}"


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first column left-aligned, the others right."""
    lines = ["| " + " | ".join(headers) + " |", "|---|" + "---:|" * (len(headers) - 1)]
    lines += ["| " + " | ".join("-" if cell is None else str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def perplexity_cell(value: float) -> str:
    """A perplexity as tables show it: whole from a thousand on."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def ratio_of(run: Run, part: str, over: Mapping[str, Any], under: Mapping[str, Any]) -> Optional[float]:
    """A figure of one row over that of another, by their keys; None while one of the two isn't measured."""
    above, below = run.find(over), run.find(under)
    return above[part] / below[part] if above and below else None
