# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The scripts of the stages that write texts, one after the other, on a tiny model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from peft_ext.rows import read_rows, write_rows
from tests.tiny.folders import save_long_model
from trl_ext import scripts
from trl_ext.almost.data import comparisons, responses
from trl_ext.scripts import almost_feedback, almost_queries, almost_self_play


def test_stage_after_stage(tmp_path, capsys):
    model = ["--model_name_or_path", str(save_long_model(tmp_path / "base")), "--batch_size", "4"]
    queries, answers, talks = tmp_path / "queries.jsonl", tmp_path / "run", tmp_path / "talks.jsonl"
    flags = [*model, "--output_file", str(queries), "--max_new_tokens", "12", "--shots", "1", "--min_chars", "0"]
    almost_queries.main([*flags, "--count", "8", "--rouge_threshold", "1.0"])
    assert "accepted: 8" in capsys.readouterr().out and len(read_rows(queries)) == 8
    with pytest.raises(ValueError, match="count: was 8, is 9"):
        almost_queries.main([*flags, "--count", "9", "--rouge_threshold", "1.0"])

    filters = ["--heuristic_filter", "False", "--length_aware", "False", "--heldout_share", "0.2"]
    flags = [*model, "--queries_file", str(queries), "--output_dir", str(answers), "--max_new_tokens", "8", *filters]
    almost_feedback.main([*flags, "--generators", "prompt=hhh,shots=1", "shots=0"])
    assert "responses: 16" in capsys.readouterr().out
    pairs = read_rows(answers / "comparisons.jsonl")
    assert pairs and all(pair["rungs"] == [0, 1] for pair in pairs)

    flags = [*model, "--queries_file", str(queries), "--output_file", str(talks), "--max_new_tokens", "8"]
    almost_self_play.main([*flags, "--samples", "1", "--shots", "0", "--max_turns", "1", "--count", "3"])
    assert "conversations: 3" in capsys.readouterr().out and len(read_rows(talks)) == 3
    with pytest.raises(ValueError, match="reward_model is missing"):
        almost_self_play.main([*flags, "--samples", "2"])


def test_generators_by_their_name_of_before(tmp_path, monkeypatch):
    """--ladder, a YAML that says ladder, and a folder that was begun by that name."""
    write_rows(tmp_path / "q.jsonl", [{"id": 0, "query": "Why?"}])
    taken = []
    monkeypatch.setattr(responses, "run", lambda config, queries, path: taken.append(config.generators))
    monkeypatch.setattr(comparisons, "run", lambda config, generators, *rest: {"generators": len(generators)})
    flags = ["--queries_file", str(tmp_path / "q.jsonl"), "--output_dir", str(tmp_path)]
    almost_feedback.main([*flags, "--ladder", "shots=1", "shots=0"])
    (tmp_path / "old.yaml").write_text("ladder: [shots=1, shots=0]")
    almost_feedback.main([*flags, "--config", str(tmp_path / "old.yaml")])
    settings = (tmp_path / "responses.config.json").read_text()
    (tmp_path / "responses.config.json").write_text(settings.replace('"generators"', '"ladder"'))
    almost_feedback.main([*flags, "--generators", "shots=1", "shots=0"])
    assert taken == [["shots=1", "shots=0"]] * 3
    with pytest.raises(ValueError, match='generators: was .*"shots=0".*, is .*"shots=2"'):
        almost_feedback.main([*flags, "--generators", "shots=1", "shots=2"])


SCRIPTS = sorted(path.stem for path in Path(scripts.__file__).parent.glob("almost*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_in_a_line_what_is_wrong_and_is_imported_once(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.delitem(sys.modules, f"trl_ext.scripts.{name}", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"trl_ext.scripts.{name}", run_name="__main__", alter_sys=True)
    assert ended.value.code == 2 and f"trl_ext.scripts.{name}" not in sys.modules
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"peft-ext {name.replace('_', ' ', 1)}: error: ") and "is missing: pass --" in line


@pytest.mark.parametrize("script", [almost_queries, almost_feedback, almost_self_play])
def test_what_is_missing_is_said(script):
    with pytest.raises(ValueError, match="is missing: pass --"):
        script.main([])
