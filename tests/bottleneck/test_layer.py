# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What only bottleneck adapters promise: where they sit, what they compute, how they start; the contract is tested in
tests/scale_tuning."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel

from peft_ext import BottleneckConfig, PeqaConfig
from peft_ext.bottleneck.targets import TARGET_MODULES
from tests.cases import adapter_parameters, assert_differs, assert_same, move_adapter, tuner_layers
from tests.tiny.models import LAYERS, inputs, logits_of, tiny


PER_LAYER = {("t5", "houlsby"): 5, ("t5", "pfeiffer"): 2, ("mt5", "houlsby"): 5, ("mt5", "pfeiffer"): 2}
PER_LAYER |= {(name, "houlsby"): 5 for name in ("bart", "mbart")} | {
    (name, "pfeiffer"): 2 for name in ("bart", "mbart")
}


def _logits(model, name: str, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model, inputs(name), **kwargs)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", TARGET_MODULES)
def test_default_targets(family, placement):
    """Two (one) for each block of every known family: decoders' cross-attention makes it three."""
    layers = dict.fromkeys(
        ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"), 2
    )
    config = AutoConfig.for_model(family)
    for name, value in layers.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if hasattr(config, "attention_types"):
        config.attention_types, config.attention_layers = [[["global"], 2]], ["global"] * 2
    with torch.device("meta"):
        model = get_peft_model(AutoModel.from_config(config), BottleneckConfig(placement=placement, bottleneck_dim=2))
    names = tuner_layers(model)
    expected = PER_LAYER.get((family, placement), 2 if placement == "houlsby" else 1)
    assert len(names) == 2 * expected, sorted(names)
    size = getattr(config, "hidden_size", None) or config.d_model
    assert {layer.out_features for layer in names.values()} == {size}, "not all of them end a sub-layer"


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_computes_what_the_paper_says(activation):
    """Figure 2 of Houlsby et al.: y + up(f(down(y))) on each sub-layer's output, before the residual is added."""
    model = get_peft_model(tiny("llama"), BottleneckConfig(bottleneck_dim=3, non_linearity=activation)).eval()
    move_adapter(model)
    reference = tiny("llama")
    function = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "tanh": torch.tanh}[activation]
    parameters = adapter_parameters(model)
    for number, block in enumerate(reference.model.layers):
        for sub_layer, inner in ((block.self_attn, "self_attn.o_proj"), (block.mlp, "mlp.down_proj")):
            prefix = f"base_model.model.model.layers.{number}.{inner}.bottleneck"
            down, up = (
                [parameters[f"{prefix}_{part}.default.{kind}"] for kind in ("weight", "bias")]
                for part in ("down", "up")
            )

            def adapt(module, args, output, down=down, up=up):
                y = output[0] if isinstance(output, tuple) else output
                y = y + function(y @ down[0].T + down[1]) @ up[0].T + up[1]
                return (y, *output[1:]) if isinstance(output, tuple) else y

            sub_layer.register_forward_hook(adapt)
    assert_same(_logits(model, "llama"), _logits(reference, "llama"))
    assert_differs(_logits(model, "llama"), _logits(tiny("llama"), "llama"))


def test_starts_as_the_model_was_to_the_bit():
    for name in ("llama", "gpt2", "gpt_neox", "opt", "t5", "bert"):
        model = get_peft_model(tiny(name), BottleneckConfig()).eval()
        assert torch.equal(_logits(model, name), _logits(tiny(name), name)), name


def test_the_papers_start():
    model = get_peft_model(tiny("llama"), BottleneckConfig(bottleneck_dim=64, init_method="houlsby")).eval()
    for name, parameter in adapter_parameters(model).items():
        assert parameter.abs().max() <= 0.02
        assert parameter.std().item() == pytest.approx(0.0088, rel=0.1) if "weight" in name else not parameter.any()
    assert_same(_logits(model, "llama"), _logits(tiny("llama"), "llama"), tolerance=0.02)
    assert not torch.equal(_logits(model, "llama"), _logits(tiny("llama"), "llama"))


def test_width():
    for kwargs, width in (
        ({"bottleneck_dim": 5}, 5),
        ({"reduction_factor": 4}, 8),
        ({"reduction_factor": 99}, 1),
        ({}, 2),
    ):
        model = get_peft_model(tiny("llama"), BottleneckConfig(**kwargs))
        assert {layer.adapter("default")[0].out_features for layer in tuner_layers(model).values()} == {width}
        assert model.get_nb_trainable_parameters()[0] == 2 * LAYERS * (2 * 32 * width + width + 32)


def test_merging_is_refused_and_changes_nothing():
    model = get_peft_model(tiny("llama"), BottleneckConfig()).eval()
    move_adapter(model)
    before = _logits(model, "llama")
    layer = next(iter(tuner_layers(model).values()))
    for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with pytest.raises(ValueError, match=r"can't be merged.*non-linearity.*unload\(\)"):
            merge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert torch.equal(_logits(model, "llama"), before)
    assert torch.equal(_logits(model.unload(), "llama"), _logits(tiny("llama"), "llama"))


def test_on_a_packed_base(tmp_path):
    packed = get_peft_model(tiny("llama"), PeqaConfig(bits=3)).unload()
    base = _logits(packed, "llama")
    model = get_peft_model(packed, BottleneckConfig(bottleneck_dim=4)).eval()
    assert torch.equal(_logits(model, "llama"), base)
    move_adapter(model)
    expected = _logits(model, "llama")
    assert_differs(expected, base)
    logits_of(model, inputs("llama")).square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(model).values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(get_peft_model(tiny("llama"), PeqaConfig(bits=3)).unload(), tmp_path)
    assert_same(_logits(again, "llama"), expected)


def test_weighted_adapters_of_different_widths_and_layers():
    model = get_peft_model(tiny("llama"), BottleneckConfig(bottleneck_dim=2, target_modules=["o_proj"]), "a")
    model.add_adapter("b", BottleneckConfig(bottleneck_dim=3, target_modules=["o_proj", "down_proj"]))
    for name in ("a", "b"):
        move_adapter(model, name, seed=len(name))
    model.add_weighted_adapter(["a", "b"], [2.0, -1.0], "sum")
    model.eval()
    for name, layer in tuner_layers(model).items():
        y = torch.randn(3, 32)
        expected = 2 * layer.change(y, "a") - layer.change(y, "b") if "o_proj" in name else -layer.change(y, "b")
        assert_same(layer.change(y, "sum"), expected, tolerance=1e-5)
    model.add_adapter("gelu", BottleneckConfig(bottleneck_dim=2, target_modules=["o_proj"], non_linearity="gelu"))
    with pytest.raises(ValueError, match="different non-linearities.*relu.*gelu"):
        model.add_weighted_adapter(["a", "gelu"], [1.0, 1.0], "mixture")
    assert "mixture" not in model.peft_config


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"bottleneck_dim": 0}, ValueError, "bottleneck_dim=0.*at least 1"),
        ({"bottleneck_dim": 2.5}, TypeError, "bottleneck_dim=2.5"),
        ({"reduction_factor": -1}, ValueError, "reduction_factor=-1"),
        ({"reduction_factor": True}, TypeError, "reduction_factor=True"),
        ({"bottleneck_dim": 4, "reduction_factor": 4}, ValueError, "pass one of them"),
        ({"placement": "mam"}, ValueError, "placement='mam'.*houlsby.*pfeiffer"),
        ({"non_linearity": "rule"}, ValueError, "non_linearity='rule'.*relu"),
        ({"init_method": "bert"}, ValueError, "init_method='bert'.*identity"),
        ({"layers_pattern": "h"}, ValueError, "layers_to_transform"),
        ({"target_modules": ".*o", "layers_to_transform": [0]}, ValueError, "target_modules.*str"),
        ({"width": 3}, TypeError, "width"),
    ],
)
def test_bad_config(kwargs, error, match):
    with pytest.raises(error, match=match):
        BottleneckConfig(**kwargs)


def test_bad_targets_change_nothing():
    model = tiny("llama")
    for targets, match in (
        (["o_proj", "embed_tokens"], "embed_tokens.*Embedding.*not supported"),
        (["mlp"], "mlp.*MLP.*not supported"),
        (["nothing_like_this"], "nothing_like_this.*not found"),
    ):
        with pytest.raises(ValueError, match=match):
            get_peft_model(model, BottleneckConfig(target_modules=targets))
        assert not tuner_layers(model)


def test_a_family_that_is_not_known():
    with pytest.raises(ValueError, match="placement='houlsby' is not known for models.*target_modules"):
        get_peft_model(tiny("mlp"), BottleneckConfig())
    with pytest.raises(ValueError, match="layers_to_transform.*pfeiffer.*'bert'.*regular expression"):
        get_peft_model(tiny("bert"), BottleneckConfig(placement="pfeiffer", layers_to_transform=[1]))


def test_every_field_is_documented():
    for field in dataclasses.fields(BottleneckConfig):
        if field.name in PeftConfig.__dataclass_fields__:
            continue
        assert f"        {field.name} (" in BottleneckConfig.__doc__ and field.metadata["help"], field.name


def test_config_round_trip(tmp_path):
    config = BottleneckConfig(reduction_factor=8, placement="pfeiffer", non_linearity="silu", target_modules=["fc2"])
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"
    assert PeftConfig.from_pretrained(tmp_path) == config
