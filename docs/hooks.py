# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What mkdocs does to a page: links that leave docs/ go to the repository's file, set-ups of tests stay hidden, and outputs say
what they are."""

from __future__ import annotations

import re
from pathlib import Path


_OUTSIDE = re.compile(
    r"\]\((?:\.\./)+((?:benchmarks|examples|notebooks|CONTRIBUTING|CHANGELOG|SECURITY|trl_ext)[^)]*)\)"
)
_OUTPUT = re.compile(r"^<!-- output (?P<date>[^,\n]+), (?P<commit>[0-9a-f]+)[^\n]* -->$", re.MULTILINE)
_ADDRESS = re.compile(r'^Repository = "([^"]+)"', re.MULTILINE)


def repository() -> str:
    """The project's address, from `[project.urls]` of pyproject.toml; empty where none is set."""
    found = _ADDRESS.search((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    return found[1].rstrip("/") if found else ""


def on_config(config):
    """The repository's address has one home."""
    config.repo_url = config.repo_url or repository() or None
    return config


def on_page_markdown(markdown, page, config, files):
    """Without a repository's address (`repo_url`), what leaves the site is named rather than linked."""
    del page, files
    markdown = _OUTPUT.sub(r'<span class="output">Printed on \g<date>, by \g<commit>:</span>\n', markdown)
    text = re.sub(r"<!--.*?-->\n?", "", markdown, flags=re.DOTALL)
    if config.repo_url:
        return _OUTSIDE.sub(rf"]({config.repo_url.rstrip('/')}/blob/main/\1)", text)
    return re.sub(r"\[([^\]]*)" + _OUTSIDE.pattern, lambda link: f"{link[1]} (`{link[2].split('#')[0]}`)", text)
