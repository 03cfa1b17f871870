# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What a tuning of one percent changes isn't rounded away: in memory, merged, in files, in pools, on half-precision bases.

bfloat16 has 8 bits: rounding a tuned scale to it would lose a fifth of such a change.
"""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_ext import AdapterPool, AlphaTuningConfig, PeqaConfig
from peft_ext.quant.conversion import packed_layers
from tests.cases import assert_same, move_adapter, tuner_layers
from tests.checkpoint.foreign_files import compressed_tensors_layer, random_layer, save_foreign
from tests.tiny.models import inputs, logits_of, tiny


CONFIGS = {
    "symmetric": PeqaConfig(bits=4, group_size=16, sym=True),
    "asymmetric": PeqaConfig(bits=4),
    "log": PeqaConfig(bits=3, parametrization="log"),
    "absolute": PeqaConfig(bits=8, sym=True, parametrization="absolute"),
    "first-alphas": AlphaTuningConfig(bits=3),
    "all-alphas": AlphaTuningConfig(bits=2, group_size=16, trained_alphas="all"),
}
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def tuned(model) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of each layer, in float64: the scales under the adapter, computed from its delta, and the base's."""
    after, before = {}, {}
    for name, layer in tuner_layers(model).items():
        base, delta = layer.base_scale().detach().double(), layer.delta("default").detach().double()
        part = base[..., : delta.shape[-1]]
        kind = layer.parametrization["default"]
        new = part + delta if kind == "absolute" else part * (1 + delta if kind == "relative" else delta.exp())
        name = name.removeprefix("base_model.model.")
        before[name], after[name] = base, torch.cat([new, base[..., delta.shape[-1] :]], -1)
    return after, before


def move(model) -> None:
    """About one percent."""
    for layer in tuner_layers(model).values():
        if layer.parametrization["default"] == "absolute":
            layer.delta("default").data.copy_(0.01 * layer.base_scale() * torch.randn_like(layer.base_scale()))
    if all(layer.parametrization["default"] != "absolute" for layer in tuner_layers(model).values()):
        move_adapter(model, strength=0.01)


def check(scales: dict[str, torch.Tensor], expected: tuple[dict, dict]) -> None:
    """Less than one percent of the change is lost (in fact, float32 loses next to nothing)."""
    after, before = expected
    assert scales.keys() == after.keys()
    for name, scale in scales.items():
        change = (after[name] - before[name]).norm()
        assert change > 0.001 * before[name].norm()
        assert (scale.double() - after[name]).norm() < 1e-4 * change, name


def scales_of(model) -> dict[str, torch.Tensor]:
    return {name: layer.scale.detach() for name, layer in packed_layers(model).items()}


@HALVES
@EACH
def test_merged_on_a_half_precision_base(config, dtype, tmp_path):
    model = get_peft_model(tiny("llama", dtype), config).eval()
    move(model)
    expected = tuned(model)
    model.save_pretrained(tmp_path / "adapter")
    base = tiny("llama", dtype)
    restored = PeftModel.from_pretrained(base, tmp_path / "adapter")
    check(
        {n.removeprefix("base_model.model."): m.scale_of("default") for n, m in tuner_layers(restored).items()},
        expected,
    )
    pool = AdapterPool(restored.unload())
    pool.activate(pool.load(tmp_path / "adapter"))
    check(scales_of(pool.model), expected)
    merged = model.merge_and_unload()
    check(scales_of(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    for kind in (dtype, torch.float32, "auto"):
        check(scales_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=kind)), expected)


@HALVES
@EACH
def test_a_cast_leaves_scales_as_they_are(config, dtype):
    """After loading, after injection, after merging: what a cast is about are the activations."""
    model = get_peft_model(get_peft_model(tiny("llama"), config).unload().to(dtype), config).eval()
    move(model)
    expected = tuned(model)
    check(scales_of(model.merge_and_unload().to(dtype)), expected)
    model = get_peft_model(tiny("llama"), config).to(dtype).eval()  # its deltas are of half precision, too
    move(model)
    expected = tuned(model)
    for name, layer in tuner_layers(model).items():
        scale = layer.scale_of("default").double()
        name = name.removeprefix("base_model.model.")
        assert (scale - expected[0][name]).norm() < 1e-3 * (expected[0][name] - expected[1][name]).norm()
    logits = logits_of(model, inputs("llama"))
    merged = model.merge_and_unload()
    check(scales_of(merged), expected)
    assert logits.dtype == dtype
    assert_same(logits_of(merged, inputs("llama")), logits, tolerance=1e-2)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_base_that_stores_bfloat16_scales(autocast, tmp_path):
    """As llm-compressor writes it, loaded by stock transformers' own quantizer."""
    float_model, generator = tiny("llama", torch.bfloat16), torch.Generator().manual_seed(0)
    linear = {name: layer for name, layer in float_model.named_modules() if name.endswith("_proj")}
    stored = {name: random_layer(layer, 4, 16, True, torch.bfloat16, generator) for name, layer in linear.items()}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    layers = {name: compressed_tensors_layer(one, sym=True) for name, one in stored.items()}
    save_foreign(float_model, layers, tmp_path / "base", quantization)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = get_peft_model(base, PeqaConfig(), autocast_adapter_dtype=autocast).eval()
    move(model)
    assert {p.dtype for layer in tuner_layers(model).values() for p in [layer.delta("default")]} == {
        torch.float32 if autocast else torch.bfloat16
    }
    expected = tuned(model)
    model.save_pretrained(tmp_path / "adapter")
    pool = AdapterPool(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16))
    pool.activate(pool.load(tmp_path / "adapter"))
    check(scales_of(pool.model), expected)
    model.merge_adapter()
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    check(scales_of(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    check(scales_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_a_sum_of_half_precision_adapters():
    model = get_peft_model(tiny("llama", torch.bfloat16), PeqaConfig(bits=4), autocast_adapter_dtype=False)
    move(model)
    model.add_adapter("zero", PeqaConfig(bits=4))
    model.add_weighted_adapter(["default", "zero"], [1.0, 1.0], "sum")
    for layer in tuner_layers(model).values():
        change = layer.delta("default").double()
        assert (layer.delta("sum").double() - change).norm() < 0.01 * change.norm()


STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file, save_file
for folder in json.loads(sys.argv[1]):
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        with torch.no_grad():
            logits = model(**load_file(folder + "/batch.safetensors")).logits
        save_file({"logits": logits}, folder + f"/{dtype}.safetensors")
assert "peft_ext" not in sys.modules
"""


def test_stock_transformers_reads_float32_scales(fresh_process, tmp_path):
    """Of a bfloat16 model; in float32 it computes the tuned numbers, in bfloat16 rounded ones."""
    folders, expected = {}, {}
    for sym in (True, False):
        folder = tmp_path / f"sym-{sym}"
        model = get_peft_model(tiny("llama", torch.bfloat16), PeqaConfig(bits=4, group_size=16, sym=sym)).eval()
        move(model)
        merged = model.merge_and_unload()
        merged.save_pretrained(folder)
        save_file(inputs("llama"), folder / "batch.safetensors")
        stored = load_file(folder / "model.safetensors")
        assert {t.dtype for key, t in stored.items() if key.endswith("weight_scale")} == {torch.float32}
        folders[sym] = str(folder)
        with torch.no_grad():
            ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            expected[sym] = logits_of(ours, inputs("llama"))
    fresh_process(STOCK, json.dumps(list(folders.values())))
    for sym, folder in folders.items():
        found = {
            dtype: load_file(f"{folder}/torch.{dtype}.safetensors")["logits"] for dtype in ("float32", "bfloat16")
        }
        assert_same(found["float32"], expected[sym], tolerance=1e-5)
        assert_same(found["bfloat16"], expected[sym], tolerance=0.1)
