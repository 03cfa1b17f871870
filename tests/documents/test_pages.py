# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Every block of code in README.md and docs/ runs as it stands (on tiny models under the real ids), and every link leads
somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.documents.pages import OUTPUT, PAGES, ROOT, Block, blocks, commands


# installs and long targets are what CI itself does
_NOT_OURS = ("pip ", "make ", "git ", "cd ", "docker ", "export ")
_RUNNERS = {"peft-ext": ["-m", "peft_ext.cli"], "python": [], "python3": []}
_PARTS = ("How it works", "Use", "Options", "Measured", "Paper against ours", "Limits")
_LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _with_code(page: Path) -> bool:
    return any(block.language in ("python", "bash") and not block.not_run for block in blocks(page))


@pytest.mark.parametrize("page", [page for page in PAGES if _with_code(page)], ids=_name)
def test_blocks_run(page, fresh_process, hub, tmp_path):
    """A page's blocks run from top to bottom, as a reader would paste them: Python in one session, commands in a shell."""
    steps = [step for block in blocks(page) if not block.not_run for step in _steps(block)]
    fresh_process(
        "import ast, os, sys; from tests.documents.run_page import run; os.chdir(sys.argv[1]);"
        "run(sys.argv[2], ast.literal_eval(sys.argv[3]))",
        *(tmp_path, _name(page), repr(steps)),
    )


def _steps(block: Block) -> list[tuple[str, object, int]]:
    if block.language == "python":
        return [("python", block.code, block.line)]
    if block.language != "bash":
        return []
    found = []
    for line in commands(block):
        if line.startswith(_NOT_OURS):
            continue
        words = shlex.split(line, comments=True)
        assert words[0] in _RUNNERS, (
            f"line {block.line}: {words[0]!r} is no command that is run here; say <!-- not run: why -->"
        )
        words = [*_RUNNERS[words[0]], *words[1:]]
        assert words[0] == "-m", f"line {block.line}: only python -m is run here"
        found.append(("command", words[1:], block.line))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if OUTPUT.search(page.read_text())], ids=_name)
def test_outputs_are_of_runs(page):
    """Each fence of output was filled by `outputs.py` from the block before it, which prints and is run."""
    text, found = page.read_text(encoding="utf-8"), [block for block in blocks(page) if block.language]
    for match in OUTPUT.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        before = max((block for block in found if block.line < line), key=lambda block: block.line)
        where = f"{_name(page)}, line {line}"
        assert not before.not_run and ("print" in before.code or before.language == "bash"), where
        assert match["printed"].strip(), f"{where}: run python -m tests.documents.outputs {_name(page)}"
        assert re.fullmatch(r" \d{4}-\d\d-\d\d, [0-9a-f]{7,}\+?", match["stamp"]), where


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page):
    """Relative links name files, and their anchors headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for path, anchor in _LINK.findall(text):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{_name(page)} links to {path}, which isn't there"
        if anchor and target.suffix == ".md":
            assert anchor[1:] in _anchors(target), f"{_name(page)} links to {path}{anchor}, which has no such heading"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=lambda page: page.stem)
def test_a_methods_page_is_whole(page):
    """What it is for, a drawing, an example, options, figures that stand in the results, paper, limits."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert [name for name in headings if name in _PARTS] == list(_PARTS)
    assert "| Take it | Don't |" in text and re.search(r"!\[[^\]]+\]\(\.\./assets/[^)]+\.svg\)", text)
    measured = text.partition("## Measured")[2].partition("\n## ")[0]
    linked = [(page.parent / path).resolve() for path, _ in _LINK.findall(measured)]
    figures = "".join(each.read_text(encoding="utf-8") for each in (*linked, ROOT / "docs" / "results.md"))
    numbers = re.findall(r"(?<![\w-])\d[\d,]*\.\d+", re.sub(r"[A-Z]\w+-[\d.]+B", "", measured))
    assert [number for number in numbers if number not in figures] == []
