# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Each promise of docs/guarantees.md names a test, and the test is there."""

import ast
import re

import pytest

from tests.conftest import ROOT


LINES = [
    line
    for line in (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| You may rely on")
]


def functions_of(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split("|")[1].strip()[:60])
def test_a_promise_has_a_test(line):
    named = re.findall(r"`(tests/[^`:]+\.py)::(test_[^`]+)`", line)
    assert named, "no test is named"
    for file, name in named:
        assert name in functions_of(file), f"{file} has no {name}"


def test_there_are_promises():
    assert len(LINES) > 30
