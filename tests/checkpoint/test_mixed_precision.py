# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Bases whose attention is packed integers and whose MLP is FP8 or W8A8, as llm-compressor makes them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from peft_ext import AlphaTuningConfig, PeqaConfig, load_packed
from peft_ext.checkpoint.mixed_precision import kept_as_floats, kept_layers
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.models import load
from peft_ext.quant.conversion import dequantize_layers, packed_layers
from tests.cases import adapter_parameters, assert_differs, assert_same, move_adapter, train
from tests.checkpoint.test_loading import logits, weights
from tests.tiny.models import inputs, tiny


ATTENTION, MLP = 8, 6
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
TOKENS = {"strategy": "token", "dynamic": True}
OTHERS = {
    "fp8-weights": {"weights": FP8},
    "fp8": {"weights": FP8, "input_activations": {**FP8, **TOKENS}},
    "w8a8": {"weights": INT8, "input_activations": {**INT8, **TOKENS}},
}
CONFIG = {"bits": 4, "group_size": 16}


def save_mixed(folder, other: str, sym: bool = True, dtype: torch.dtype = torch.float32) -> None:
    """As llm-compressor does: schemes, smallest and largest weights, compress, save."""
    model = tiny("llama", dtype)
    groups = {
        "attention": {"targets": ["re:.*self_attn.*"], "weights": weights(4, 16, sym)},
        "mlp": {"targets": ["re:.*mlp.*"], **OTHERS[other]},
    }
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        rows = module.weight.detach().float().view(*module.weight_scale.shape, -1)
        scale, zero_point = calculate_qparams(rows.amin(-1), rows.amax(-1), scheme.weights)
        module.weight_scale.data = scale.to(dtype)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero_point.to(module.weight_zero_point.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def tensor_types(folder) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_slice(key).get_dtype() for key in file.keys()}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_the_whole_way(other, sym, tmp_path):
    """Loaded, tuned, saved, loaded again, merged, saved and loaded: the integers packed, the others as they were."""
    save_mixed(tmp_path / "base", other, sym)
    base = load_packed(tmp_path / "base")
    assert len(packed_layers(base)) == ATTENTION and len(kept_layers(base)) == MLP
    start = logits(base)
    if sym:  # zero points can't be loaded by stock transformers
        assert_same(start, logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")))
    with pytest.warns(UserWarning, match="packed 8 of 15 linear layers; left:.*stored in another format"):
        model = get_peft_model(base, PeqaConfig(**CONFIG, sym=sym, task_type="CAUSAL_LM"))
    assert_same(logits(model), start)
    losses = train(model, inputs("llama"))
    assert losses[-1] < losses[0]
    assert all(name in adapter_parameters(model) for name, p in model.named_parameters() if p.requires_grad)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    restored = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_same(logits(restored), expected)
    assert_same(logits(load(str(tmp_path / "adapter"))), expected)
    merged = restored.merge_and_unload()
    assert_same(logits(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    before, after = tensor_types(tmp_path / "base"), tensor_types(tmp_path / "merged")
    assert {key: kind for key, kind in after.items() if "mlp" in key} == {
        key: kind for key, kind in before.items() if "mlp" in key
    }
    for reload in (AutoModelForCausalLM.from_pretrained, load_packed):
        again = reload(tmp_path / "merged")
        assert len(packed_layers(again)) == ATTENTION and len(kept_layers(again)) == MLP
        assert_same(logits(again), expected)


def test_stock_transformers_loads_a_symmetric_merge(tmp_path, fresh_process):
    save_mixed(tmp_path / "base", "fp8")
    model = get_peft_model(load_packed(tmp_path / "base"), PeqaConfig(**CONFIG, sym=True))
    move_adapter(model)
    merged = model.merge_and_unload().eval()  # before any forward pass has decompressed the others
    merged.save_pretrained(tmp_path / "merged")
    code = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.flatten().tolist()))
assert "peft_ext" not in sys.modules
"""
    with torch.no_grad():
        expected = merged(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.flatten()
    assert_same(torch.tensor(json.loads(fresh_process(code, tmp_path / "merged"))), expected, tolerance=1e-4)


def test_a_base_that_stock_transformers_has_loaded(tmp_path):
    """As today by plain from_pretrained; `merge_and_unload()` raised after the training."""
    save_mixed(tmp_path / "base", "fp8")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not packed_layers(stock)
    start = logits(stock)
    model = get_peft_model(stock, PeqaConfig(**CONFIG, sym=True, target_modules=["q_proj", "v_proj"]))
    assert_same(logits(model), start)
    train(model, inputs("llama"))
    expected = logits(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert len(packed_layers(again)) == ATTENTION  # those that weren't tuned as well
    assert_same(logits(again), expected)


@pytest.mark.parametrize("other", ["fp8", "w8a8"])
def test_the_gradient_goes_through_rounded_inputs(other, tmp_path):
    """compressed-tensors rounds without one: what lies below would learn from the residual stream alone."""
    save_mixed(tmp_path / "base", other)
    batch = inputs("llama")

    def gradients(model) -> torch.Tensor:
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return torch.cat([p.grad.flatten() for p in adapter_parameters(model).values()])

    config = PeqaConfig(**CONFIG, sym=True, target_modules=["v_proj"])
    found = gradients(get_peft_model(load_packed(tmp_path / "base"), config))
    exact = get_peft_model(load_packed(tmp_path / "base"), copy.deepcopy(config))
    logits(exact)  # decompressed now
    for layer in kept_layers(exact).values():
        layer.quantization_enabled = False
    expected = gradients(exact)  # without rounding
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.99
    cut = get_peft_model(load_packed(tmp_path / "base"), copy.deepcopy(config))
    for layer in kept_layers(cut).values():
        layer.forward = layer.rounded_forward
    assert_differs(gradients(cut), expected, at_least=0.05)


def test_lora_on_such_a_base(tmp_path):
    save_mixed(tmp_path / "base", "w8a8")
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_packed(tmp_path / "base"), config)
    losses = train(model, inputs("llama"))
    assert losses[-1] < losses[0]
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert_same(logits(PeftModel.from_pretrained(load_packed(tmp_path / "base"), tmp_path / "adapter")), expected)


def test_bfloat16(tmp_path):
    save_mixed(tmp_path / "base", "fp8", dtype=torch.bfloat16)
    model = load_packed(tmp_path / "base")
    logits(model)  # its FP8 layers are decompressed, to bfloat16, and stored again exactly
    model.save_pretrained(tmp_path / "saved")
    with (
        safe_open(tmp_path / "base" / "model.safetensors", "pt") as before,
        safe_open(tmp_path / "saved" / "model.safetensors", "pt") as after,
    ):
        for key in before.keys():
            if "mlp" in key:
                assert torch.equal(before.get_tensor(key).float(), after.get_tensor(key).float()), key


def test_what_has_no_room_is_refused_before_training(tmp_path):
    save_mixed(tmp_path / "base", "fp8")
    model = load_packed(tmp_path / "base")
    with pytest.raises(
        ValueError, match="'model.layers.0.mlp.gate_proj'.*kept as it is.*beside 'lm_head'.*PeqaConfig"
    ):
        get_peft_model(model, AlphaTuningConfig(bits=4, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="layer 'model.layers.0.mlp.up_proj' is 8-bit float per channel"):
        get_peft_model(model, PeqaConfig(**CONFIG, sym=True, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="format='bcq' holds packed and float layers.*'pack-quantized'"):
        make_saveable(model, "bcq")


def test_a_dequantized_merge_keeps_the_others(tmp_path):
    save_mixed(tmp_path / "base", "w8a8")
    model = get_peft_model(load_packed(tmp_path / "base"), PeqaConfig(**CONFIG, sym=True))
    move_adapter(model)
    expected = logits(model)
    merged = model.merge_and_unload(dequantize=True)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not packed_layers(again) and len(kept_layers(again)) == MLP
    assert type(again.model.layers[0].self_attn.q_proj) is nn.Linear
    assert_same(logits(again), expected)


@pytest.mark.parametrize("run_before", [False, True])
def test_export_to_floats_leaves_nothing_compressed(run_before, tmp_path):
    save_mixed(tmp_path / "base", "fp8-weights")
    model = load_packed(tmp_path / "base")
    expected = logits(load_packed(tmp_path / "base"))
    if run_before:
        logits(model)
    kept_as_floats(model)
    make_saveable(dequantize_layers(model))
    assert_same(logits(model), expected)
    model.save_pretrained(tmp_path / "floats")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "floats")
    assert not kept_layers(again) and not hasattr(again.config, "quantization_config")
    assert_same(logits(again), expected)


def test_wider_containers(tmp_path):
    save_mixed(tmp_path / "base", "fp8")
    model = load_packed(tmp_path / "base")
    expected = logits(model)
    make_saveable(model, container_bits=8)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert {layer.bits for layer in packed_layers(again).values()} == {4}
    assert_same(logits(again), expected)
    with pytest.raises(ValueError, match="container_bits=2 can't hold the codes of layer"):
        make_saveable(model, container_bits=2)
