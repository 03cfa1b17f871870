# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Parametrises every test that asks for `case` over the table of tuner cases."""

from __future__ import annotations

from tests.cases import CASES


def pytest_generate_tests(metafunc):
    """A test takes `case` for the whole table; one that needs fewer rows has a mark of its own (`tests.cases.over`)."""
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "case" in metafunc.fixturenames and not any(names == "case" for names in own):
        metafunc.parametrize("case", CASES, ids=[case.name for case in CASES])
