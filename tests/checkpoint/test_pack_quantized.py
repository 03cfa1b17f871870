# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The packed base as a checkpoint of its own (compressed-tensors `pack-quantized`), and adapters on it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from peft_ext import AlphaTuningConfig, PeqaConfig, calibrate
from peft_ext.checkpoint.pack_quantized import PackQuantizedWriter, vllm_notice
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.quant.linear import PackedLinear
from tests.cases import adapter_parameters, assert_differs, assert_same, move_adapter, train, tuner_layers
from tests.tiny.folders import save_tiny
from tests.tiny.models import inputs, logits_of, tiny


FORMATS = {
    f"{bits}bit-{'groups' if group_size > 0 else 'channel'}{'-sym' if sym else ''}": {
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
    }
    for bits in (2, 3, 4, 8)
    for group_size in (-1, 8)
    for sym in (False, True)
}
CONTAINERS = [(2, 4), (3, 4), (2, 8), (4, 8)]
BATCHES = [{"input_ids": torch.randint(3, 100, (4, 16), generator=torch.Generator().manual_seed(0))}]
STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
assert "peft_ext" not in sys.modules
print(json.dumps(logits.flatten().tolist()))
"""


def _logits(model, name: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model.eval(), inputs(name))


def _tuned(config: PeqaConfig, name: str = "llama"):
    model = tiny(name)
    if config.init_method == "calibrated":
        calibrate(model, config, BATCHES, progressbar=False)
    model = get_peft_model(model, config).eval()
    move_adapter(model)
    return model


class FloatShapes(TorchDispatchMode):
    """The shapes of all float tensors that operations make outside the meta device."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.device.type != "meta":
                self.shapes.add(tuple(tensor.shape))
        return result


def _codes(model) -> dict[str, int]:
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    return {
        re.sub(r"^base_model\.model\.|\.base_layer$", "", name): layer.fingerprint() for name, layer in packed.items()
    }


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "unloaded"])
@pytest.mark.parametrize("kwargs", FORMATS.values(), ids=FORMATS)
def test_stock_transformers_loads_it(kwargs, merged, tmp_path, fresh_process):
    model = _tuned(PeqaConfig(**kwargs))
    base = model.merge_and_unload() if merged else model.unload()
    base.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == CompressionFormat.pack_quantized.value
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["symmetric"]) == (kwargs["bits"], kwargs["sym"])
    with torch.no_grad():
        expected = base(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.flatten()
    assert_same(torch.tensor(json.loads(fresh_process(STOCK, tmp_path))), expected, tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kwargs", FORMATS.values(), ids=FORMATS)
def test_it_loads_into_packed_layers(kwargs, dtype, tmp_path):
    tiny("llama").to(dtype).save_pretrained(tmp_path / "float")
    base = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "float"), PeqaConfig(**kwargs)).unload()
    base.save_pretrained(tmp_path / "base")
    with FloatShapes() as made:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert _codes(loaded) == _codes(base) and loaded.dtype == dtype
    assert torch.equal(_logits(loaded), _logits(base))
    weights = {tuple(layer.weight.shape) for layer in base.modules() if isinstance(layer, PackedLinear)}
    assert not weights & made.shapes, "a float weight was made"
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), _logits(base))


def test_what_stock_made_floats_of_and_was_changed_since_stays_float_with_a_word(tmp_path):
    base = get_peft_model(tiny("llama"), PeqaConfig(bits=4)).unload()
    base.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["packed_bits"]  # as if somebody else had written it
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    changed = "model.layers.1.mlp.up_proj"
    loaded.get_submodule(changed).weight.data[0, 0] += 1
    with pytest.warns(
        UserWarning, match=f"1 layers of the packed checkpoint, such as '{changed}', have other weights"
    ):
        model = get_peft_model(loaded, PeqaConfig(bits=4))
    assert set(_codes(base)) - set(_codes(model.get_base_model())) == {changed}
    assert type(loaded.get_submodule(changed)) is torch.nn.Linear


def test_the_checkpoint_is_small_and_densely_packed(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "float")
    base = get_peft_model(tiny("llama"), PeqaConfig(bits=3)).unload()
    base.save_pretrained(tmp_path / "packed")
    saved = load_file(tmp_path / "packed" / "model.safetensors")
    packed = saved["model.layers.0.mlp.gate_proj.weight_packed"]
    assert packed.dtype == torch.int32 and packed.shape == (64, 3)  # 32 codes of 3 bits in three words
    assert "model.layers.0.mlp.gate_proj.weight" not in saved
    floats = load_file(tmp_path / "float" / "model.safetensors")
    assert sum(t.nbytes for t in saved.values()) < 0.55 * sum(t.nbytes for t in floats.values())
    assert not [key for key in saved if "planes" in key or "peqa" in key]


def test_saving_does_not_change_the_model(tmp_path):
    base = get_peft_model(tiny("llama"), PeqaConfig(bits=3)).unload()
    before, codes = _logits(base), _codes(base)
    base.save_pretrained(tmp_path / "one")
    base.save_pretrained(tmp_path / "two")
    assert torch.equal(_logits(base), before) and _codes(base) == codes
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert set(one) == set(two) and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("kwargs", FORMATS.values(), ids=FORMATS)
def test_a_config_on_it_takes_the_codes_over(kwargs, tmp_path):
    base = get_peft_model(tiny("llama"), PeqaConfig(**kwargs)).unload()
    expected, codes = _logits(base), _codes(base)
    base.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = get_peft_model(loaded, PeqaConfig(**kwargs))
    assert _codes(model) == codes
    assert_same(_logits(model), expected)
    losses = train(model, inputs("llama"))
    assert losses[-1] < losses[0] and _codes(model) == codes


@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits, container_bits", CONTAINERS)
def test_wider_containers(bits, container_bits, sym, tmp_path, fresh_process):
    """The same numbers in wider fields: stock transformers computes the same, and our codes come back at their width."""
    config = PeqaConfig(bits=bits, group_size=8, sym=sym)
    base = get_peft_model(tiny("llama"), config).unload()
    codes = _codes(base)
    make_saveable(base, container_bits=container_bits)
    base.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    weights = stored["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["symmetric"]) == (container_bits, sym)
    packed = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.gate_proj.weight_packed"]
    assert packed.shape == (64, 32 * container_bits // 32)
    with torch.no_grad():
        expected = base(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.flatten()
    assert_same(torch.tensor(json.loads(fresh_process(STOCK, tmp_path))), expected, tolerance=1e-4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert _codes(get_peft_model(loaded, config)) == codes
    with pytest.raises(ValueError, match=f"bits={bits}"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), PeqaConfig(bits=8, group_size=8, sym=sym))


def test_layers_of_several_widths_stay_symmetric(tmp_path):
    config = {"bits": 4, "sym": True, "bits_pattern": {"down_proj": 3, "q_proj": 2}}
    base = get_peft_model(tiny("llama"), PeqaConfig(**config)).unload()
    base.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "dequantize" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert_same(_logits(loaded), _logits(base), tolerance=1e-4)
    assert _codes(get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), PeqaConfig(**config))) == _codes(base)


@pytest.mark.parametrize("kwargs, container_bits", [({"bits": 4}, 3), ({"bits": 3}, 5), ({"bits": 3}, 16)])
def test_containers_that_do_not_fit(kwargs, container_bits):
    base = get_peft_model(tiny("llama"), PeqaConfig(**kwargs)).unload()
    with pytest.raises(ValueError, match=f"container_bits={container_bits} can't hold.*choose one of .*4, 8"):
        make_saveable(base, container_bits=container_bits)


def test_containers_are_for_pack_quantized():
    base = get_peft_model(tiny("llama"), AlphaTuningConfig(bits=3)).unload()
    with pytest.raises(ValueError, match="container_bits=4 is for format='pack-quantized'"):
        make_saveable(base, container_bits=4)


def test_codes_wider_than_the_config_says(tmp_path):
    base = get_peft_model(tiny("llama"), PeqaConfig(bits=4)).unload()
    base.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["packed_bits"] = {"model.layers.0.self_attn.q_proj": 2}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="layer 'model.layers.0.self_attn.q_proj': .* codes that 2 bits .*can't"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), PeqaConfig(bits=4))


@pytest.mark.parametrize(
    "kwargs, container_bits, expected",
    [
        ({"bits": 4}, None, None),
        ({"bits": 4, "group_size": 32, "sym": True}, None, None),
        ({"bits": 8, "sym": True}, None, None),
        ({"bits": 3}, 4, None),
        ({"bits": 3}, None, "takes codes of 4 and 8 bits, not 3 .container_bits=4 stores the same numbers"),
        ({"bits": 8}, None, "at 8 bits it takes no zero points"),
        ({"bits": 2, "group_size": 8}, None, "not 2 .*groups of .32, 64, 128. or whole channels, not 8"),
    ],
)
def test_what_vllm_takes(kwargs, container_bits, expected):
    base = get_peft_model(tiny("llama"), PeqaConfig(**kwargs)).unload()
    notice = vllm_notice(PackQuantizedWriter(base, container_bits).quantization_config)
    assert notice is None if expected is None else re.search(expected, notice)


@pytest.mark.parametrize("kwargs", FORMATS.values(), ids=FORMATS)
def test_the_config_is_what_vllm_reads(kwargs, tmp_path):
    """vLLM validates the weights' arguments with compressed-tensors' schema, which forbids extra fields, and makes
    room for tensors of these names, shapes and types."""
    get_peft_model(tiny("llama"), PeqaConfig(**kwargs)).unload().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    config.pop("dequantize", None)  # transformers' own; vLLM asks for the keys that it knows
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert scheme.targets == ["Linear"] and scheme.input_activations is None and not scheme.weights.dynamic
    assert scheme.weights.strategy == ("channel" if kwargs["group_size"] == -1 else "group")
    assert config["ignore"] == ["lm_head"] and config["format"] == "pack-quantized"
    layer = {
        key.rsplit(".", 1)[1]: tensor
        for key, tensor in load_file(tmp_path / "model.safetensors").items()
        if key.startswith("model.layers.1.mlp.down_proj.")
    }
    groups, bits = 1 if kwargs["group_size"] == -1 else 64 // 8, kwargs["bits"]
    expected = {
        "weight_packed": ((32, 64 * bits // 32), torch.int32),
        "weight_scale": ((32, groups), torch.float32),  # copied into a parameter of the model's dtype
        "weight_shape": ((2,), torch.int64),
    }
    if not kwargs["sym"]:
        expected["weight_zero_point"] = ((32 * bits // 32, groups), torch.int32)
    assert {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in layer.items()} == expected


def test_after_a_forward_too(tmp_path):
    """transformers decompresses the layers at the first forward; the codes must come out the same."""
    base = get_peft_model(tiny("llama"), PeqaConfig(bits=3, group_size=16)).unload()
    codes = _codes(base)
    base.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = _logits(loaded)
    model = get_peft_model(loaded, PeqaConfig(bits=3, group_size=16))
    assert _codes(model) == codes
    assert_same(_logits(model), expected)


def test_any_start_is_taken_over_and_none_rounds_again(tmp_path):
    config = PeqaConfig(bits=3, init_method="calibrated")
    base = get_peft_model(calibrate(tiny("llama"), config, BATCHES, progressbar=False), config).unload()
    codes = _codes(base)
    base.save_pretrained(tmp_path)
    for method in ("minmax", "mse", "calibrated"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert _codes(get_peft_model(loaded, PeqaConfig(bits=3, init_method=method))) == codes


@pytest.mark.parametrize("method", ["minmax", "mse", "calibrated"])
def test_adapter_on_a_packed_base_in_a_fresh_process(method, tmp_path, fresh_process):
    """Base and adapter both come from disk, in a process that has only imported peft_ext."""
    model = _tuned(PeqaConfig(bits=3, group_size=16, init_method=method))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.flatten()
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    code = STOCK.replace('assert "peft_ext" not in sys.modules\n', "").replace(
        "with torch",
        "import peft_ext\nfrom peft import PeftModel\nmodel = PeftModel.from_pretrained(model, "
        "sys.argv[2])\nwith torch",
    )
    logits = fresh_process(code, tmp_path / "base", tmp_path / "adapter")
    assert_same(torch.tensor(json.loads(logits)), expected, tolerance=1e-4)


def test_auto_class_finds_the_packed_base_through_the_adapters_config(tmp_path):
    base = get_peft_model(tiny("llama"), PeqaConfig(bits=3)).unload()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PeqaConfig(bits=3)).eval()
    move_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    restored = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert tuner_layers(restored)
    assert_same(_logits(restored), _logits(model))


def test_several_adapters_and_hot_swap_on_a_packed_base(tmp_path):
    get_peft_model(tiny("llama"), PeqaConfig(bits=4)).unload().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PeqaConfig(bits=4))
    model.add_adapter("other", PeqaConfig(bits=4))
    move_adapter(model), move_adapter(model, "other", seed=1)
    model.save_pretrained(tmp_path / "adapters")
    restored = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapters"
    )
    assert_same(_logits(restored), _logits(model))
    restored.load_adapter(tmp_path / "adapters" / "other", "default")
    model.set_adapter("other")
    assert_same(_logits(restored), _logits(model))
    assert_differs(_logits(restored), _logits(model.unload()))


def test_a_derived_base_and_the_packed_base_take_each_others_adapters(tmp_path):
    """Codes are the same whether derived from the float model or read from the file, so adapters go both ways."""
    config = {"bits": 3, "group_size": 16}
    derived = _tuned(PeqaConfig(**config))
    derived.save_pretrained(tmp_path / "adapter")
    get_peft_model(tiny("llama"), PeqaConfig(**config)).unload().save_pretrained(tmp_path / "base")
    on_packed = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert_same(_logits(on_packed), _logits(derived))
    move_adapter(on_packed, seed=4)
    on_packed.save_pretrained(tmp_path / "back")
    assert_same(_logits(PeftModel.from_pretrained(tiny("llama"), tmp_path / "back")), _logits(on_packed))


def test_merging_an_adapter_into_a_packed_base_and_saving_again(tmp_path):
    get_peft_model(tiny("llama"), PeqaConfig(bits=4)).unload().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PeqaConfig(bits=4))
    move_adapter(model)
    expected = _logits(model)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_same(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_a_dequantized_merge_is_an_ordinary_checkpoint(tmp_path, fresh_process):
    model = _tuned(PeqaConfig(bits=3))
    merged = model.merge_and_unload(dequantize=True)
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    with torch.no_grad():
        expected = merged(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.flatten()
    assert_same(torch.tensor(json.loads(fresh_process(STOCK, tmp_path))), expected)


def test_a_dequantized_merge_of_a_packed_base_is_an_ordinary_checkpoint(tmp_path, fresh_process):
    get_peft_model(tiny("llama"), PeqaConfig(bits=4)).unload().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PeqaConfig(bits=4))
    move_adapter(model)
    merged = model.merge_and_unload(dequantize=True)
    merged.save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        expected = merged(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.flatten()
    assert_same(torch.tensor(json.loads(fresh_process(STOCK, tmp_path / "plain"))), expected)


@pytest.mark.parametrize(
    ("name", "auto", "kwargs"),
    [
        ("opt", AutoModelForCausalLM, {}),
        ("gpt_neox", AutoModelForCausalLM, {"target_modules": ["query_key_value"]}),
        ("t5", AutoModelForSeq2SeqLM, {}),
        ("bert", AutoModelForSequenceClassification, {"target_modules": ["query", "key", "dense"]}),
        ("llama", AutoModelForCausalLM, {"bits_pattern": {"down_proj": 8, "q_proj": 3}}),
        ("llama", AutoModelForCausalLM, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ],
    ids=["opt", "neox-some", "t5", "bert", "llama-bits-pattern", "llama-one-layer"],
)
def test_other_models_and_partly_packed_ones(name, auto, kwargs, tmp_path):
    config = PeqaConfig(bits=4, **kwargs)
    base = get_peft_model(tiny(name), config).unload()
    base.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert_same(_logits(loaded, name), _logits(base, name), tolerance=1e-4)
    again = get_peft_model(auto.from_pretrained(tmp_path), PeqaConfig(bits=4, **kwargs))
    assert _codes(again) == _codes(base)


def test_bfloat16_base(tmp_path):
    base = get_peft_model(tiny("llama", torch.bfloat16), PeqaConfig(bits=4)).unload()
    base.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same(_logits(loaded), _logits(base), tolerance=0.05)
    model = get_peft_model(loaded, PeqaConfig(bits=4))
    assert _codes(model) == _codes(base)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}


@pytest.mark.parametrize("other", [{"bits": 3}, {"bits": 4, "group_size": 16}, {"bits": 4, "sym": True}], ids=str)
def test_a_config_that_does_not_fit_the_codes(other, tmp_path):
    get_peft_model(tiny("llama"), PeqaConfig(bits=4)).unload().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"q_proj.*quantised already.*" + list(other)[-1]):
        get_peft_model(loaded, PeqaConfig(**other))
    assert not tuner_layers(loaded)


def test_loading_onto_another_base_says_which_one_is_needed(tmp_path):
    path = save_tiny("llama", tmp_path / "the-right-base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), PeqaConfig(bits=3))
    move_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    wrong = tiny("llama")
    wrong.model.layers[1].mlp.up_proj.weight.data.mul_(-1)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*the-right-base"):
        PeftModel.from_pretrained(wrong, tmp_path / "adapter")


def test_a_calibrated_adapter_on_the_float_model_asks_for_its_base(tmp_path):
    config = PeqaConfig(bits=3, init_method="calibrated")
    _tuned(config).unload().save_pretrained(tmp_path / "the-packed-base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "the-packed-base")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    plain = tiny("llama")
    with pytest.raises(ValueError, match="still float.*the-packed-base"):
        PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert not tuner_layers(plain)


def test_tuning_some_layers_of_a_compressed_base_keeps_the_others(tmp_path):
    get_peft_model(tiny("llama"), PeqaConfig(bits=4, sym=True)).unload().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    some = get_peft_model(base, PeqaConfig(bits=4, sym=True, target_modules=["q_proj"]))
    assert len(tuner_layers(some)) == 2
    some.unload().save_pretrained(tmp_path / "again")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(_logits(again), expected)


@pytest.mark.parametrize("where", ["subfolder", "variant"])
def test_a_base_in_a_place_of_its_own_is_not_rounded_again(where, tmp_path):
    base = get_peft_model(tiny("llama"), PeqaConfig(bits=3)).unload()
    if where == "subfolder":
        base.save_pretrained(tmp_path / "base")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="base")
    else:
        base.save_pretrained(tmp_path, variant="packed")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, variant="packed")
    assert _codes(get_peft_model(loaded, PeqaConfig(bits=3))) == _codes(base)


def test_the_body_of_a_packed_base_takes_its_codes_over(tmp_path):
    base = get_peft_model(tiny("llama"), PeqaConfig(bits=3, init_method="mse")).unload()
    base.save_pretrained(tmp_path)
    body = get_peft_model(AutoModel.from_pretrained(tmp_path), PeqaConfig(bits=3))
    assert {f"model.{name}": code for name, code in _codes(body).items()} == _codes(base)


def test_floats_that_were_packed_once_are_floats(tmp_path):
    """Dequantised and saved as such: an ordinary float model from then on."""
    get_peft_model(tiny("llama"), PeqaConfig(bits=3)).unload().save_pretrained(tmp_path / "packed")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").dequantize()
    plain.save_pretrained(tmp_path / "plain")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), PeqaConfig(bits=4))
    assert {layer.base_layer.bits for layer in tuner_layers(model).values()} == {4}


@pytest.mark.parametrize("config_cls", [PeqaConfig, AlphaTuningConfig])
def test_a_dequantized_merge_is_an_ordinary_model(config_cls, tmp_path):
    get_peft_model(tiny("llama"), config_cls(bits=3)).unload().save_pretrained(tmp_path)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), config_cls(bits=3))
    merged = model.merge_and_unload(dequantize=True)
    assert merged.half().dtype == torch.float16
    data = [{"input_ids": row, "labels": row} for row in BATCHES[0]["input_ids"]]
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=1, report_to="none", use_cpu=True)
    Trainer(model=merged.float(), args=arguments, train_dataset=data)
    # transformers' own way
    packed = get_peft_model(tiny("llama"), config_cls(bits=3)).merge_and_unload()
    expected = _logits(packed)
    assert_same(_logits(packed.dequantize()), expected)


@pytest.mark.parametrize("config_cls", [PeqaConfig, AlphaTuningConfig])
def test_a_packed_output_layer_is_untied(config_cls, tmp_path):
    from transformers import LlamaForCausalLM

    config = tiny("llama").config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    base = get_peft_model(model, config_cls(bits=4, target_modules=["q_proj", "lm_head"])).unload()
    base.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(_logits(loaded), _logits(base), tolerance=1e-4)


@pytest.mark.parametrize("config_cls", [PeqaConfig, AlphaTuningConfig])
def test_experts_that_transformers_merges(config_cls, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        max_position_embeddings=64,
    )
    base = get_peft_model(MixtralForCausalLM(config).eval(), config_cls(bits=4)).unload()
    base.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(_logits(loaded), _logits(base), tolerance=1e-4)
