# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What mkdocs does to a page: links that leave docs/ go to the repository's file, and set-ups of tests stay hidden."""

from __future__ import annotations

import re


_OUTSIDE = re.compile(r"\]\((?:\.\./)+((?:benchmarks|examples|notebooks|CONTRIBUTING|CHANGELOG|trl_ext)[^)]*)\)")


def on_page_markdown(markdown, page, config, files):
    """Without a repository's address (`repo_url`), what leaves the site is named rather than linked."""
    del page, files
    text = re.sub(r"<!--.*?-->\n?", "", markdown, flags=re.DOTALL)
    if config.repo_url:
        return _OUTSIDE.sub(rf"]({config.repo_url.rstrip('/')}/blob/main/\1)", text)
    return re.sub(r"\[([^\]]*)" + _OUTSIDE.pattern, lambda link: f"{link[1]} (`{link[2].split('#')[0]}`)", text)
