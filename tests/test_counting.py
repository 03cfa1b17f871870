# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Counts of weights are counts of weights; what sizes memory by `numel()` is told bytes."""

from __future__ import annotations

import pytest
from accelerate.utils import compute_module_sizes
from peft import PeftMixedModel, get_peft_model

from peft_ext import AlphaTuningConfig, PeqaConfig
from peft_ext.quant.conversion import packed_layers
from tests.tiny.models import tiny


@pytest.mark.parametrize("config", [PeqaConfig(bits=3), AlphaTuningConfig(bits=2)], ids=["peqa", "alphatuning"])
def test_weights_are_counted_and_bytes_told(config):
    plain = tiny("llama").num_parameters()
    base = get_peft_model(tiny("llama"), config).unload()
    layers = packed_layers(base).values()
    beside = sum(
        layer.scale.numel() + (0 if layer.zero_point is None else layer.zero_point.numel()) for layer in layers
    )
    assert base.num_parameters() == plain + beside
    assert base.num_parameters(only_trainable=True) < plain
    assert all(layer.planes.numel() == layer.planes.nbytes for layer in layers)
    assert compute_module_sizes(base)[""] == sum(p.nbytes for p in base.parameters()) + sum(
        b.nbytes for b in base.buffers()
    )


def test_mixed_models_too():
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=3))
    assert hasattr(PeftMixedModel.get_nb_trainable_parameters, "__wrapped__")
    assert model.get_nb_trainable_parameters()[1] > tiny("llama").num_parameters()
