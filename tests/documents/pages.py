# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The blocks of code in README.md and docs/, in the order in which a page has them.

A fence under `<!-- output -->` is what the block before it printed, see `outputs.py`.

A page's Python blocks are one program. What a reader needn't see stands in a comment before a block:

    <!-- setup
    model = ...
    -->

and a block that can't run here says why: `<!-- not run: needs a GPU -->`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parent.parent.parent
# READMEs of other folders are indexes without code
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_PART = re.compile(
    r"<!-- not run: (?P<reason>[^\n]+) -->"
    r"|<!-- setup\n(?P<setup>.*?)-->"
    r"|^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.DOTALL | re.MULTILINE,
)
# What a block printed, and when: date and commit.
OUTPUT = re.compile(r"^<!-- output(?P<stamp>[^\n]*) -->\n```\n(?P<printed>.*?)```\n", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of code: its line in the page, its language and text, and why it isn't run."""

    line: int
    language: str
    code: str
    not_run: str | None = None


def blocks(page: Path) -> list[Block]:
    """All blocks of a page; a setup's language is `python`."""
    text, found, reason = page.read_text(encoding="utf-8"), [], None
    for part in _PART.finditer(text):
        line = text.count("\n", 0, part.start()) + 2
        if part["reason"]:
            reason = part["reason"]
        elif part["setup"] is not None:
            found.append(Block(line, "python", part["setup"]))
        else:
            indent = len(part["indent"])
            code = "".join(row[indent:] if row.strip() else row for row in part["code"].splitlines(keepends=True))
            found.append(Block(line, part["language"], code, reason))
            reason = None
    return found


def commands(block: Block) -> list[str]:
    """The command lines of a shell block: continued lines joined, prompts, comments and empty lines gone."""
    joined = block.code.replace("\\\n", " ")
    lines = (line.strip().removeprefix("$ ") for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith("#")]
