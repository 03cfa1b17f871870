# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Every script in examples/ runs from beginning to end, on a tiny model in the default one's place."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT


SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_runs(script, fresh_process, hub, tmp_path):
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 60
    environment = {"PEFT_EXT_DEFAULT_MODEL": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    code = "import os, runpy, sys; os.chdir(sys.argv[1]); runpy.run_path(sys.argv[2], run_name='__main__')"
    assert fresh_process(code, tmp_path, script, environments=[environment])
