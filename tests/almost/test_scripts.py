# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The scripts of the stages that write texts, one after the other, on a tiny model."""

from __future__ import annotations

import pytest

from tests.tiny.folders import save_long_model
from trl_ext.almost.store import read_rows
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
    almost_feedback.main([*flags, "--ladder", "prompt=hhh,shots=1", "shots=0"])
    assert "responses: 16" in capsys.readouterr().out
    pairs = read_rows(answers / "comparisons.jsonl")
    assert pairs and all(pair["rungs"] == [0, 1] for pair in pairs)

    flags = [*model, "--queries_file", str(queries), "--output_file", str(talks), "--max_new_tokens", "8"]
    almost_self_play.main([*flags, "--samples", "1", "--shots", "0", "--max_turns", "1", "--count", "3"])
    assert "conversations: 3" in capsys.readouterr().out and len(read_rows(talks)) == 3
    with pytest.raises(ValueError, match="reward_model is missing"):
        almost_self_play.main([*flags, "--samples", "2"])


@pytest.mark.parametrize("script", [almost_queries, almost_feedback, almost_self_play])
def test_what_is_missing_is_said(script):
    with pytest.raises(ValueError, match="is missing: pass --"):
        script.main([])
