# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Damaged folders of every kind are refused by name or answer as before: 40 of each here, 10,000 by `make fuzz`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.faults import fuzz, mutations


pytestmark = pytest.mark.slow
EACH = 40


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory and time are Linux'")
@pytest.mark.parametrize("half", [0, 1])
def test_damaged_folders(half, tmp_path):
    pytest.importorskip("sklearn", reason="one of the kinds is a PALPClassifier's")
    kinds = fuzz.kinds()[half::2]
    command = [sys.executable, "-m", "tests.faults.fuzz", "--per_kind", str(EACH), "--kinds", *kinds]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--cases", str(tmp_path / "cases.jsonl")], cwd=fuzz.ROOT, env=environment, check=True)
    cases = fuzz.read_cases(tmp_path / "cases.jsonl")
    assert len(cases) == EACH * len(kinds)
    assert not fuzz.failures(cases), "\n".join(map(str, fuzz.failures(cases)))
    nameless, refused = fuzz.nameless(cases)
    assert len(nameless) <= fuzz.NAMELESS_SHARE * refused, "\n".join(map(str, nameless))


def test_a_case_is_made_again_by_its_seed(tmp_path):
    from random import Random

    found = []
    for _ in range(2):
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        (folder / "settings.json").write_text('{"a": [1, 2, {"b": 0.5}], "c": "text"}')
        (folder / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
        tensors = {"x": mutations.Tensor("F32", (2, 1), bytes(range(8)))}
        mutations.write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
        assert mutations.read_safetensors(folder / "model.safetensors") == (tensors, {"format": "pt"})
        random = Random("kind/7")
        done = mutations.damage(folder, random, outside=tmp_path / "outside")
        content = [path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()]
        found.append((done, content))
    assert found[0] == found[1]
