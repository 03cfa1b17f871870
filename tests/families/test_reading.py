# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Every family is steered and read as by a loop that encodes each text by itself, or refused with a reason.

`PEFT_EXT_WRITE_FAMILIES=1 pytest tests/families/test_reading.py` writes the rows of `docs/reading_families.md` instead of
comparing them.
"""

from __future__ import annotations

import os

import pytest

from tests.conftest import ROOT
from tests.families.page import Page
from tests.families.reading import CHECKS, EQUAL, NOT_THERE, REFUSED, has
from tests.tiny.families import build


FAMILIES = (
    *("llama", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "cohere2", "smollm3", "gpt2", "gptj", "gpt_neox", "opt"),
    *("bloom", "falcon", "mpt", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4", "mamba", "falcon_mamba"),
    *("mamba2", "recurrent_gemma", "jamba", "zamba2", "bamba", "falcon_h1", "qwen3_next", "lfm2", "granite"),
    *("gemma3_vl", "qwen2_5_vl", "llava", "mistral3"),
)
QUICK = ("mamba", "llama4", "deepseek_v3", "gemma3_vl", "qwen3_next")
PAGE = Page(ROOT / "docs" / "reading_families.md", ("family", *CHECKS), FAMILIES)


def outcome(name: str, check: str) -> str:
    """✓, or that it is refused; – where transformers has no such thing; whatever else happens is an error."""
    if not has(build(name), check):
        return NOT_THERE
    try:
        CHECKS[check](build(name))
    except (ValueError, TypeError) as error:
        assert str(error).startswith(("model (", "model is a ")), error
        return REFUSED
    return EQUAL


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FAMILIES])
def test_reading(name):
    row = PAGE.line([name, *(outcome(name, check) for check in CHECKS)])
    if os.environ.get("PEFT_EXT_WRITE_FAMILIES"):
        PAGE.write(name, row)
    assert PAGE.rows().get(name) == row, (
        f"{PAGE.path.name} says otherwise; write it with PEFT_EXT_WRITE_FAMILIES=1:\n{row}"
    )


def test_the_page_has_every_family():
    assert list(PAGE.rows()) == list(FAMILIES)
