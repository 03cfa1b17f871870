# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Every command and verb explains itself, in our own flags first."""

from __future__ import annotations

import importlib
import shutil
import subprocess

import pytest

from peft_ext.cli import COMMANDS, main
from peft_ext.command_line import Command


pytest.importorskip("trl")


def _verbs(command):
    entry = COMMANDS[command]
    module = importlib.import_module(entry.module) if isinstance(entry, Command) else None
    verbs = getattr(module, "COMMANDS", {})
    return [[command, verb] for verb in verbs] + ([[command]] if not verbs or hasattr(module, "main") else [])


WORDS = [words for command in COMMANDS for words in _verbs(command)]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_help(words, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*words, "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: peft-ext {' '.join(words)} " in shown
    assert len(shown.splitlines()) < 250


def test_a_group_lists_its_verbs(capsys):
    assert main(["critic"]) == 0
    assert "usage: peft-ext critic <command>" in capsys.readouterr().out
    assert main(["critic", "fly"]) == 2
    assert "peft-ext critic: error: unknown command 'fly'; choose one of train" in capsys.readouterr().err
    assert main(["tun"]) == 2
    assert "did you mean 'tune'?" in capsys.readouterr().err


def test_help_all_has_what_transformers_and_trl_have(capsys):
    for flag, there in (("--help", False), ("--help_all", True)):
        with pytest.raises(SystemExit):
            main(["tune", flag])
        shown = capsys.readouterr().out
        assert ("--dataloader_num_workers" in shown) == there and "--bits" in shown and "--learning_rate" in shown


def test_old_names_go_on(run_module):
    assert "usage: peft-ext critic train" in run_module("generation_ext.critic", "train", "--help")


def test_results_alone_are_on_stdout_and_may_be_json(capsys, tmp_path):
    assert main(["inspect", "--json", str(tmp_path / "nothing")]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "doesn't exist" in shown.err


def test_completion_knows_commands_verbs_and_flags(tmp_path, capsys):
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)

    def completed(*words):
        line = " ".join(f"'{word}'" for word in words)
        code = f"source {tmp_path / 'script'}; COMP_WORDS=(peft-ext {line}); COMP_CWORD={len(words)}; _peft_ext; "
        done = subprocess.run(
            ["bash", "-c", code + 'echo "${COMPREPLY[*]}"'], capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert completed("tu") == ["tune"]
    assert completed("critic", "") == ["train", "generate", "export", "evaluate"]
    assert "--bits" in completed("tune", "--model", "x", "--b")
    assert "--strength" in completed("critic", "generate", "--st")
    assert "sft" in completed("almost", "s")


def test_a_flag_that_isnt_there_is_told_its_neighbour(capsys):
    assert main(["tune", "--output_dir", "x", "--bit", "4", "--qqq", "1"]) == 2
    shown = capsys.readouterr().err
    assert "there is no flag --bit; did you mean --bits?" in shown and "there is no flag --qqq" in shown
