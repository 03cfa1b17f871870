# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`--embeddings` of `peft-ext quantize`, `tune` and `plan`."""

from __future__ import annotations

import json
import shutil

from peft_ext.cli import main
from peft_ext.models import load
from peft_ext.quant.embedding import packed_ends


def widths(folder) -> set[int]:
    return {end.bits for end in packed_ends(load(str(folder))).values()}


def test_quantize_and_export(flags, tmp_path, capsys):
    out = tmp_path / "packed"
    assert main(["quantize", *flags, "--embeddings", "8", "--init_method", "minmax", "--output_dir", str(out)]) == 0
    assert "A packed embedding is written as bcq" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "bcq"
    assert widths(out) == {8}
    assert main(["generate", str(out), "--prompt", "Text", "--max_new_tokens", "2"]) == 0
    assert main(["inspect", str(out)]) == 0
    assert "uniform integers, 8 bits" in capsys.readouterr().out
    assert main(["export", str(out), "--to", "compressed-tensors", "--output_dir", str(tmp_path / "ct")]) != 0
    assert "packed embedding" in capsys.readouterr().err
    assert main(["export", str(out), "--to", "dequantized", "--output_dir", str(tmp_path / "floats")]) == 0
    assert widths(tmp_path / "floats") == set()


def test_tune_from_floats_and_on_a_packed_base(flags, places, tmp_path):
    steps = ["--max_steps", "2", "--use_cpu", "True", "--init_method", "minmax"]
    assert main(["tune", *flags, *steps, "--embeddings", "4", "--output_dir", str(tmp_path / "run")]) == 0
    assert widths(tmp_path / "run" / "base") == {4}
    assert main(["generate", str(tmp_path / "run"), "--prompt", "Text", "--max_new_tokens", "2"]) == 0
    packed = tmp_path / "packed"
    assert main(["quantize", *flags, "--init_method", "minmax", "--output_dir", str(packed)]) == 0
    again = ["tune", *flags, "--model", str(packed), "--max_steps", "2", "--use_cpu", "True"]
    assert main([*again, "--embeddings", "8", "--output_dir", str(tmp_path / "again")]) == 0
    assert widths(tmp_path / "again" / "base") == {8}


def test_plan_counts_them(places, tmp_path, capsys):
    shutil.copy(places / "chat" / "config.json", tmp_path / "config.json")
    small = [
        "plan",
        "--model",
        str(tmp_path / "config.json"),
        "--method",
        "peqa",
        "--max_length",
        "16",
        "--context_length",
        "16",
    ]
    found = []
    for more in ([], ["--embeddings", "8"]):
        assert main([*small, "--json", *more]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] != found[1]


def test_a_width_that_there_is_not(flags, tmp_path, capsys):
    assert main(["quantize", *flags, "--embeddings", "3", "--output_dir", str(tmp_path / "packed")]) != 0
    assert "embeddings=3 is not supported; choose one of (4, 8)" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()
