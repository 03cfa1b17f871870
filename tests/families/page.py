# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The table in `docs/families.md`: read, compared with what became of a family, and rewritten."""

from __future__ import annotations

from tests.conftest import ROOT
from tests.families.life import NOT_HERE, STEPS, YES, Life
from tests.tiny.families import FAMILIES


PAGE = ROOT / "docs" / "families.md"
_MARKS = {YES: "✓", NOT_HERE: "–"}
_HEAD = ("family", "packed", "left float", *STEPS, "file", "stock")
_BEGIN, _END = "<!-- table -->\n", "<!-- end of the table -->\n"


def row(name: str, life: Life) -> str:
    """A family's row; stock transformers has read its bases where they are in a format of its own."""
    stored = sorted({base.stored for base in life.bases})
    theirs = [base.folder.name for base in life.bases if base.stored == "compressed-tensors"]
    stock = "✓" if len(theirs) == len(life.bases) else f"✓ ({', '.join(theirs)})" if theirs else "–"
    outcomes = [life.steps[step].replace(YES, _MARKS[YES]).replace(NOT_HERE, _MARKS[NOT_HERE]) for step in STEPS]
    return _line([name, f"{life.share:.0%}", life.left or "–", *outcomes, ", ".join(stored) or "–", stock])


def rows() -> dict[str, str]:
    """The rows of the page, by family."""
    table = PAGE.read_text(encoding="utf-8").partition(_BEGIN)[2].partition(_END)[0]
    return {line.split("|")[1].strip(): line for line in table.splitlines()[2:]}


def write(name: str, line: str) -> None:
    """Put a row into the page, in the order of the families."""
    page = PAGE.read_text(encoding="utf-8")
    before, begin, rest = page.partition(_BEGIN)
    after = rest.partition(_END)[2]
    known = {**rows(), name: line}
    lines = [
        _line(list(_HEAD)),
        _line(["---"] * len(_HEAD)),
        *(known[family] for family in FAMILIES if family in known),
    ]
    PAGE.write_text(f"{before}{begin}{''.join(f'{one}{chr(10)}' for one in lines)}{_END}{after}", encoding="utf-8")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
