# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Generators and their ranks, and a generator of few bits."""

from __future__ import annotations

import logging

import pytest

from tests.tiny.folders import save_long_model
from trl_ext.almost.writing.generators import Generator, parse_generators
from trl_ext.almost.writing.loading import load_backend, load_speaker


def test_generators_and_their_ranks(caplog):
    generators = parse_generators(["prompt=faithful,shots=3", {"shots": 1, "bits": 2}, Generator(shots=1, rank=1)])
    assert (
        [each.rank for each in generators] == [0, 1, 1]
        and generators[1].bits == 2
        and generators[0].prompt == "faithful"
    )
    for bad, message in (
        (["shots=1"], "at least two ranks"),
        ([{"rank": 0}, {"rank": 0, "shots": 1}], "at least two ranks"),
        (["shots=1", "shots=2", "shots=1"], "0 and 2 are the same"),
        (["shots=1", "bits=5"], "generator 1: bits=5"),
        (["shots=1", "shots=20"], "generator 1: shots=20"),
        (["shots=1", {"size": 3}], "generator 1 has a field 'size'"),
        (["shots=1", "few"], "must look like"),
        (["shots=1", "prompt=rude"], "prompt='rude'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_generators(bad)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        parse_generators(["shots=1", "shots=5"])
    assert "hhh 1-shot ranks above the model, hhh 5-shot" in caplog.text


def test_a_model_of_few_bits_is_another_speaker(tmp_path):
    import torch

    folder = str(save_long_model(tmp_path / "model"))
    plain, _ = load_speaker(folder)
    backend = load_backend(folder, bits=2, batch_size=3)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        difference = (plain(ids).logits - backend.model(ids).logits).abs().max()
    assert difference > 1e-3 and backend.batch_size == 3
    with pytest.raises(ValueError, match="backend='vllm' takes a hub id"):
        load_backend(folder, bits=2, backend="vllm")
    with pytest.raises(ValueError, match="device='cpu': vLLM chooses its devices by itself"):
        load_backend(folder, backend="vllm", device="cpu")
    with pytest.raises(ValueError, match="device='cuda:7' can't be used here"):
        load_backend(folder, device="cuda:7")
    with pytest.raises(ValueError, match="backend='other'"):
        load_backend(folder, backend="other")
