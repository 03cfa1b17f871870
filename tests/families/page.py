# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The table in `docs/families.md`: read, compared with what became of a family, and rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.conftest import ROOT
from tests.families.life import NOT_HERE, STEPS, YES, Life
from tests.tiny.families import FAMILIES


_MARKS = {YES: "✓", NOT_HERE: "–"}
_HEAD = ("family", "packed", "left float", *STEPS, "file", "stock")
_BEGIN, _END = "<!-- table -->\n", "<!-- end of the table -->\n"


class Page:
    """A page with one table of families between two marks.

    Args:
        path: The page.
        head: Names of the columns.
        families: In the order of the rows.
    """

    def __init__(self, path: Path, head: Sequence[str], families: Sequence[str]) -> None:
        self.path, self.head, self.families = path, head, families

    def rows(self) -> dict[str, str]:
        """The rows, by family."""
        table = self.path.read_text(encoding="utf-8").partition(_BEGIN)[2].partition(_END)[0]
        return {line.split("|")[1].strip(): line for line in table.splitlines()[2:]}

    def write(self, name: str, line: str) -> None:
        """Put a row into the page."""
        page = self.path.read_text(encoding="utf-8")
        before, begin, rest = page.partition(_BEGIN)
        after = rest.partition(_END)[2]
        known = {**self.rows(), name: line}
        rows = [known[family] for family in self.families if family in known]
        lines = [self.line(self.head), self.line(["---"] * len(self.head)), *rows]
        self.path.write_text(
            f"{before}{begin}{''.join(f'{one}{chr(10)}' for one in lines)}{_END}{after}", encoding="utf-8"
        )

    @staticmethod
    def line(cells: Sequence[str]) -> str:
        """Cells as a row."""
        return f"| {' | '.join(cells)} |"


def row(name: str, life: Life) -> str:
    """A family's row; stock transformers has read its bases where they are in a format of its own."""
    stored = sorted({base.stored for base in life.bases})
    theirs = [base.folder.name for base in life.bases if base.stored == "compressed-tensors"]
    stock = "✓" if len(theirs) == len(life.bases) else f"✓ ({', '.join(theirs)})" if theirs else "–"
    outcomes = [life.steps[step].replace(YES, _MARKS[YES]).replace(NOT_HERE, _MARKS[NOT_HERE]) for step in STEPS]
    return Page.line([name, f"{life.share:.0%}", life.left or "–", *outcomes, ", ".join(stored) or "–", stock])


PAGE = Page(ROOT / "docs" / "families.md", _HEAD, list(FAMILIES))
