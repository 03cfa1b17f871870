# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Runs the Python of model cards as it stands."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path


def printed_by_card(text: str, folder: Path) -> str:
    """What a card's only block of Python prints, executed in a folder.

    Args:
        text: The card.
        folder: Made if need be.
    """
    (code,) = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    folder.mkdir(exist_ok=True)
    printed = io.StringIO()
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "model card", "exec"), {"__name__": "card"})
    finally:
        os.chdir(before)
    return printed.getvalue().strip()
