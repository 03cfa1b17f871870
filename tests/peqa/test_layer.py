# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What only PEQA promises: frozen packed codes, scales as the paper has them, counts, parametrisations."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext import PeqaConfig
from peft_ext.peqa.layer import PeqaLinear
from peft_ext.quant.linear import PackedLinear
from tests.cases import (
    CASES,
    Case,
    adapter_parameters,
    assert_differs,
    assert_same,
    move_adapter,
    over,
    train,
    tuner_layers,
)
from tests.tiny.models import HIDDEN, LAYERS, inputs, logits_of, tiny


PEQA_CASES = [case for case in CASES if case.config_cls is PeqaConfig]
peqa_cases = over(PEQA_CASES)
# q, o: HIDDEN; k, v: HIDDEN / 2; gate, up: 2 * HIDDEN; down: HIDDEN
LLAMA_CHANNELS = LAYERS * (2 * HIDDEN + 2 * HIDDEN // 2 + 2 * 2 * HIDDEN + HIDDEN)


def _packed(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@peqa_cases
def test_layers_hold_codes_and_no_float_weight(case):
    model = case.moved()
    before = dict(case.float_model().named_modules())
    for name, layer in tuner_layers(model.base_model.model).items():
        base = layer.base_layer
        assert isinstance(layer, PeqaLinear) and isinstance(base, PackedLinear)
        zeros = torch.float32 if case.kwargs.get("zero") == "float" else torch.uint8
        assert base.planes.dtype == torch.uint8 and base.zero_point.dtype == zeros
        assert not any(parameter.requires_grad for parameter in base.parameters())
        bits = case.kwargs["bits"]
        rows = -(-layer.out_features // 32) * 32
        assert base.bits == bits and base.planes.nbytes == rows * -(-layer.in_features // 8) * bits
        floats = {p.shape for p in (*layer.parameters(), *layer.buffers()) if p.is_floating_point()}
        assert not floats & {before[name].weight.shape, before[name].weight.t().shape}, (
            "a float copy of the weight is kept"
        )
        group_size = case.kwargs.get("group_size", -1)
        groups = 1 if group_size == -1 else layer.in_features // group_size
        assert base.scale.shape == layer.delta("default").shape == (layer.out_features, groups)


@peqa_cases
def test_forward_is_scale_times_codes_minus_zero_point(case):
    model = case.moved()
    for layer in tuner_layers(model).values():
        base = layer.base_layer
        scale, zero_point = layer.scale_of("default"), base.zero_point.float()
        delta = layer.zero_delta("default")
        assert (delta is not None) == (case.kwargs.get("trained") == "scales+zeros")
        zero_point = zero_point if delta is None else zero_point + delta
        group = layer.in_features // scale.shape[1]
        codes = base.codes().float()
        assert codes.max() <= 2**base.bits - 1
        weight = scale.repeat_interleave(group, 1) * (codes - zero_point.repeat_interleave(group, 1))
        x = torch.randn(2, 3, layer.in_features)
        assert_same(layer(x), nn.functional.linear(x, weight, base.bias), tolerance=1e-5)
        if case.kwargs.get("sym"):
            assert (base.zero_point == 2 ** (base.bits - 1)).all()


@pytest.mark.parametrize(
    ("parametrization", "formula"),
    [
        ("relative", lambda base, delta: base * (1 + delta)),
        ("log", lambda base, delta: base * delta.exp()),
        ("absolute", lambda base, delta: base + delta),
    ],
)
def test_parametrisations(parametrization, formula):
    model = get_peft_model(tiny("mlp"), PeqaConfig(parametrization=parametrization))
    base = {name: layer.scale_of("default").detach().clone() for name, layer in tuner_layers(model).items()}
    move_adapter(model, strength=0.01)
    for name, layer in tuner_layers(model).items():
        assert_same(layer.scale_of("default"), formula(base[name], layer.delta("default")), tolerance=1e-6)


def test_a_file_of_one_parametrisation_loads_as_another(tmp_path):
    """Files hold plain scales, so how they were trained doesn't matter to who reads them."""
    model = get_peft_model(tiny("mlp"), PeqaConfig(parametrization="log")).eval()
    move_adapter(model)
    model.save_pretrained(tmp_path)
    for parametrization in ("relative", "absolute", "log"):
        other = PeftModel.from_pretrained(tiny("mlp"), tmp_path, config=PeqaConfig(parametrization=parametrization))
        with torch.no_grad():
            assert_same(logits_of(other, inputs("mlp")), logits_of(model, inputs("mlp")))


@peqa_cases
def test_the_file_holds_plain_scales_and_fingerprints(case, tmp_path):
    model = case.moved()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, layer in tuner_layers(model.base_model.model).items():
        scale, codes = (saved.pop(f"base_model.model.{name}.{key}") for key in ("peqa_scale", "peqa_codes"))
        assert scale.dtype == torch.float32 and torch.equal(scale, layer.scale_of("default"))
        assert codes.dtype == torch.int64 and codes.shape == (1,) and codes.item() == layer.base_layer.fingerprint()
        if case.kwargs.get("trained") == "scales+zeros":
            saved.pop(f"base_model.model.{name}.peqa_zero_point")  # test_trained_zero_points.py
    assert not [key for key in saved if "peqa" in key]


@pytest.mark.parametrize(("group_size", "per_channel"), [(-1, 1), (16, 2)])
def test_one_number_per_channel_or_group_is_trained(group_size, per_channel, capsys):
    config = PeqaConfig(
        group_size=group_size, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    )
    channels = LLAMA_CHANNELS - LAYERS * HIDDEN  # all of these have HIDDEN inputs; down_proj is left out
    model = get_peft_model(tiny("llama"), config)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == channels * per_channel
    # logical numbers, not bytes: the float model's, and for each channel or group a scale, a zero point and a delta
    assert total == sum(p.numel() for p in tiny("llama").parameters()) + 3 * trainable
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,d} || all params: {total:,d}" in capsys.readouterr().out


def test_the_count_is_the_sum_of_output_channels():
    assert get_peft_model(tiny("llama"), PeqaConfig()).get_nb_trainable_parameters()[0] == LLAMA_CHANNELS


def test_counts_survive_copies_casts_and_loading():
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=3))
    expected = model.get_nb_trainable_parameters()
    model.load_state_dict(model.state_dict())
    assert model.get_nb_trainable_parameters() == expected
    assert model.to(torch.bfloat16).to("cpu").get_nb_trainable_parameters() == expected
    model.requires_grad_(False)
    assert model.get_nb_trainable_parameters() == (0, expected[1])


def test_codes_cannot_be_trained():
    model = get_peft_model(tiny("mlp"), PeqaConfig())
    for layer in _packed(model).values():
        with pytest.raises(RuntimeError, match="[Oo]nly.*floating point"):
            layer.planes.requires_grad_(True)


@peqa_cases
def test_the_same_weights_and_config_give_the_same_codes(case):
    first, second = case.fresh(), case.fresh()
    for one, two in zip(_packed(first).values(), _packed(second).values()):
        assert one.fingerprint() == two.fingerprint() and torch.equal(one.planes, two.planes)
        assert torch.equal(one.scale, two.scale) and torch.equal(one.zero_point, two.zero_point)


def test_fingerprints_tell_codes_and_formats_apart_but_not_scales():
    layers = {
        bits: next(iter(_packed(get_peft_model(tiny("mlp"), PeqaConfig(bits=bits))).values())) for bits in (2, 3, 4, 8)
    }
    assert len({layer.fingerprint() for layer in layers.values()}) == 4
    layer = layers[4]
    before = layer.fingerprint()
    layer.scale.data.mul_(2)
    assert layer.fingerprint() == before
    layer.planes.data[0, 0, 0, 0] ^= 1
    assert layer.fingerprint() != before


@peqa_cases
def test_merge_and_unload_packed(case):
    model = case.moved()
    scales = {
        name: layer.scale_of("default").detach().clone()
        for name, layer in tuner_layers(model.base_model.model).items()
    }
    bases = {name: layer.base_layer for name, layer in tuner_layers(model.base_model.model).items()}
    codes = {name: layer.fingerprint() for name, layer in bases.items()}
    planes = {name: layer.planes.clone() for name, layer in bases.items()}
    merged = model.merge_and_unload()
    assert set(_packed(merged)) == set(scales)
    moved = case.kwargs.get("trained") == "scales+zeros"
    for name, layer in _packed(merged).items():
        assert torch.equal(layer.planes, planes[name]) and torch.equal(layer.scale, scales[name])
        assert (layer.fingerprint() != codes[name]) == moved  # zero points are part of it


@peqa_cases
def test_merge_and_unload_dequantized(case):
    model = case.moved()
    expected = case.logits(model)
    merged = model.merge_and_unload(dequantize=True)
    plain = case.float_model()
    assert not _packed(merged)
    for name, module in plain.named_modules():
        assert type(merged.get_submodule(name)) is type(module), name
    assert {key: value.shape for key, value in merged.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    assert {value.dtype for value in merged.state_dict().values()} == {
        value.dtype for value in plain.state_dict().values()
    }
    plain.load_state_dict(merged.state_dict())
    assert_same(case.logits(plain), expected)
    assert isinstance(next(m for n, m in merged.named_modules() if n in codes_of(case)), (nn.Linear, Conv1D))


def codes_of(case: Case) -> set[str]:
    return set(tuner_layers(case.fresh().base_model.model))


def test_dequantized_in_the_models_dtype():
    model = get_peft_model(tiny("llama", torch.bfloat16), PeqaConfig()).eval()
    merged = model.merge_and_unload(dequantize=True)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_a_second_adapter_of_another_width_is_refused():
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for other in ({"bits": 3}, {"group_size": 16}, {"sym": True}, {"bits_pattern": {"q_proj": 2}}):
        with pytest.raises(
            ValueError, match=r"model\.layers\.0\.self_attn\.q_proj.*" + next(iter(other)).split("_p")[0]
        ):
            model.add_adapter("other", PeqaConfig(**other))
        assert list(model.peft_config) == ["default"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert set(before) == set(model.state_dict())


def test_a_second_adapter_on_new_layers_warns_that_it_changes_their_base():
    model = get_peft_model(tiny("llama"), PeqaConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="1 layers|2 layers"):
        model.add_adapter("other", PeqaConfig(target_modules=["v_proj"]))
    assert not any(p.requires_grad for p in adapter_parameters(model, "other").values())


def test_requires_grad_with_different_targets():
    model = get_peft_model(tiny("llama"), PeqaConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="float so far"):
        model.add_adapter("other", PeqaConfig(target_modules=["v_proj"]))

    def trained() -> set[str]:
        return {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}

    assert trained() == {"q_proj"}
    model.set_adapter("other")
    assert trained() == {"v_proj"}
    model.base_model.set_adapter(["default", "other"])
    assert trained() == {"q_proj", "v_proj"}


def test_an_ordinary_session_warns_about_nothing(tmp_path, recwarn):
    model = get_peft_model(tiny("llama"), PeqaConfig(task_type="CAUSAL_LM"))
    train(model, inputs("llama"))
    model.save_pretrained(tmp_path)
    restored = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    restored.generate(**inputs("llama"), max_new_tokens=2, do_sample=False)
    restored.load_adapter(tmp_path, "default")
    restored.merge_and_unload()
    ours = [str(warning.message) for warning in recwarn if "activation_checkpointing" not in str(warning.message)]
    assert not ours
    with torch.no_grad():
        assert_differs(logits_of(model.eval(), inputs("llama")), logits_of(tiny("llama"), inputs("llama")))
