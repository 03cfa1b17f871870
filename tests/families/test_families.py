# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Every family of models goes through the life of a packed base and its adapter, and its row on the page says what came of it.

`PEFT_EXT_WRITE_FAMILIES=1 pytest tests/families` writes the rows instead of comparing them; `-s` prints them.
"""

from __future__ import annotations

import os
import re

import pytest

from tests.families import page
from tests.families.life import REFUSED, YES, check_stock, live
from tests.tiny.families import FAMILIES


# The others are `slow`. Llama, GPT-2, BERT, T5 and their like have tests of their own in tests/scale_tuning.
QUICK = ("falcon", "mamba", "roberta", "gemma3_vl")
# What may be refused, and the words.
REFUSALS = {"pool": r"modules_to_save=\[.*\], which the pool has no room for; load it through PeftModel"}
_FAMILIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _FAMILIES)
def test_life(name, tmp_path, fresh_process):
    life = live(name, tmp_path)
    check_stock(fresh_process, life.bases)
    refused = [step for step, outcome in life.steps.items() if outcome == REFUSED]
    assert len(refused) == len(life.words)
    for step, words in zip(refused, life.words):
        assert re.search(REFUSALS.get(step, "nothing is to be refused here"), words), f"{step} of {name}: {words}"
    assert all(
        life.steps[step].startswith(YES) for step in ("inject", "calibrate", "base", "train", "save, load", "merge")
    )
    line = page.row(name, life)
    print(line)
    if os.environ.get("PEFT_EXT_WRITE_FAMILIES"):
        page.PAGE.write(name, line)
    assert page.PAGE.rows().get(name) == line, (
        f"docs/families.md says otherwise; write it with PEFT_EXT_WRITE_FAMILIES=1:\n{line}"
    )


def test_the_page_has_every_family():
    assert list(page.PAGE.rows()) == list(FAMILIES)
    assert len(FAMILIES) >= 50
