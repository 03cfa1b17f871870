# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Every command of every command line explains itself."""

from __future__ import annotations

import importlib

import pytest


pytest.importorskip("trl")

PROGRAMS = ("peft_ext.cli", *(f"{name}.__main__" for name in (
    "peft_ext.ood", "generation_ext.critic", "generation_ext.granularity", "generation_ext.probing",
)))  # fmt: skip
COMMANDS = [(name, command) for name in PROGRAMS for command in importlib.import_module(name).COMMANDS]


@pytest.mark.parametrize(("program", "command"), COMMANDS)
def test_help(program, command, capsys):
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(program).main([command, "--help"])
    assert exit_.value.code == 0
    assert "usage:" in capsys.readouterr().out
