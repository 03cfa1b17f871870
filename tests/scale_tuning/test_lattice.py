# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`init_method="lattice"`: layers that are integers already are taken over, the others rounded, and the report says which."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_ext import PeqaConfig, report
from peft_ext.quant.conversion import packed_layers
from tests.quant.test_lattice import released
from tests.tiny.models import inputs, logits_of, tiny


def on_lattices(model: nn.Module, leave: str = "") -> dict[str, torch.Tensor]:
    """Give a model's layers the weights of a release; returns them."""
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and "layers" in name and not (leave and leave in name):
            weight = released(4, 32, torch.bfloat16, rows=layer.out_features, columns=layer.in_features)
            layer.weight.data = weights[name] = weight.float()
    return weights


def test_a_release_is_taken_over(tmp_path):
    model = tiny("llama")
    weights, x = on_lattices(model), inputs("llama")
    before = logits_of(model, x)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lattice.*")
        tuned = get_peft_model(model, PeqaConfig(init_method="lattice", task_type="CAUSAL_LM"))
    config = tuned.peft_config["default"]
    assert (config.bits, config.group_size, config.sym) == (4, 32, True)
    layers = packed_layers(tuned.get_base_model())
    assert len(weights) == len(layers) and {part.origin for part in report(tuned).packed.values()} == {"lattice"}
    assert "4 bits in groups of 32 (uniform integers), lattice" in str(report(tuned))
    torch.testing.assert_close(logits_of(tuned, x), before, rtol=0.02, atol=0.02)
    tuned.save_pretrained(tmp_path)
    fresh = tiny("llama")
    on_lattices(fresh)
    again = PeftModel.from_pretrained(fresh, tmp_path)  # the same integers are found, or it would be refused
    assert torch.equal(logits_of(again, x), logits_of(tuned, x))


def test_what_lies_on_none_is_rounded_and_said():
    model = tiny("llama")
    weights = on_lattices(model, leave="down_proj")
    with pytest.warns(UserWarning, match=rf"{len(weights)} of {len(weights) + 2} layers lie on a lattice .*down_proj"):
        tuned = get_peft_model(model, PeqaConfig(init_method="lattice", task_type="CAUSAL_LM"))
    origins = {name: part.origin for name, part in report(tuned).packed.items()}
    assert {origin for name, origin in origins.items() if "down_proj" in name} == {"minmax"}
    assert {origin for name, origin in origins.items() if "down_proj" not in name} == {"lattice"}


def test_the_config_s_format_is_kept():
    model = tiny("llama")
    on_lattices(model)
    with pytest.warns(UserWarning, match=r"0 of 14 layers lie on a lattice"):
        tuned = get_peft_model(model, PeqaConfig(bits=3, init_method="lattice", task_type="CAUSAL_LM"))
    assert {part.format.bits for part in report(tuned).packed.values()} == {3}
