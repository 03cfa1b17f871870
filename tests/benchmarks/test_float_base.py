# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The base of true floats."""

from __future__ import annotations

import pytest
import torch

from benchmarks import float_base
from benchmarks.core import models
from benchmarks.core.run import NotHere
from benchmarks.tuning import tiny_llama


def _on_a_lattice(model):
    """As a file of 4 bits leaves it: 16 values in each group of 32."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            groups = layer.weight.detach().reshape(-1, 32)
            low = groups.amin(-1, keepdim=True)
            step = (groups.amax(-1, keepdim=True) - low) / 15
            layer.weight.data = (low + step * ((groups - low) / step).round()).reshape(layer.weight.shape)
    return model


def test_the_lattice_is_seen():
    torch.manual_seed(0)
    model = tiny_llama()
    assert float_base.on_lattice(model) == 0
    assert float_base.on_lattice(_on_a_lattice(model)) == 1


def test_training_moves_off_the_lattice(smoke, monkeypatch):
    made = float_base.float_model
    monkeypatch.setattr(float_base, "float_model", lambda *arguments: _on_a_lattice(made(*arguments)))
    before, after = (row["result"] for row in smoke("float_base").rows["smollm2"])
    assert before["on_lattice"] == 1
    assert after["on_lattice"] < 1e-3


@pytest.mark.parametrize("bf16", [False, True])
def test_training_learns(bf16, measured):
    run = measured("float_base", "smollm2", bf16=bf16, steps=40, learning_rate=1e-2, batch_size=8)
    before, after = (row["result"]["held_out"] for row in run.rows)
    assert after < 0.3 * before
    assert all(claim.met for claim in float_base.claims(run))


def test_its_name_is_its_folder(tmp_path):
    assert models.named("someone/model", tmp_path) == "someone/model"
    with pytest.raises(NotHere, match="python -m benchmarks float_base"):
        models.named(models.FLOAT_BASE, tmp_path)
    folder = tmp_path / "float_base" / "smollm2.work" / models.FLOAT_BASE
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    assert models.named(models.FLOAT_BASE, tmp_path) == str(folder)


def test_old_speeches_are_left_out(tmp_path):
    with pytest.raises(NotHere, match="sotu"):
        float_base.speeches(tmp_path)
    for year in range(1890, 1921):
        (tmp_path / f"{year}_someone_n.txt").write_text(str(year), encoding="utf-8")
    training, held_out = float_base.speeches(tmp_path)
    assert held_out == ["1900", "1910", "1920"]
    assert sorted(training + held_out) == [str(year) for year in range(1900, 1921)]
