# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""GPTQ checkpoints taken over: codes bit for bit, against files written from the format's definition."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from peft_ext import PeqaConfig, load_gptq
from peft_ext.checkpoint.files import TensorHeader
from peft_ext.checkpoint.gptq import PackedGptqConfig, _GptqLayer
from peft_ext.checkpoint.loading import stored_quantization
from peft_ext.commands.packed_base import is_packed_model
from peft_ext.models import load
from peft_ext.quant.conversion import packed_layers
from tests.cases import assert_same, train
from tests.checkpoint.gptq_files import gptq_layer, save_gptq
from tests.tiny.folders import save_tiny
from tests.tiny.models import inputs, logits_of, tiny


LAYER = "model.layers.1.mlp.down_proj"


def logits(model, name: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model.eval(), inputs(name)).float()


class Made:
    """A GPTQ checkpoint of a tiny model, and what was written: codes, scales and zero points by layer."""

    def __init__(
        self, folder, bits=4, group_size=16, sym=False, version=1, borrow=False, shards=1, name="llama", **more
    ):
        self.folder, self.bits, self.sym = folder, bits, sym
        generator = torch.Generator().manual_seed(bits)
        model, self.layers, tensors = tiny(name), {}, {}
        for key, module in model.named_modules():
            if not isinstance(module, (nn.Linear, Conv1D)) or key == "lm_head":
                continue
            shape = module.weight.shape if isinstance(module, nn.Linear) else module.weight.t().shape
            groups = 1 if group_size == -1 else shape[1] // group_size
            codes = torch.randint(2**bits, shape, generator=generator)
            # zero points of 0 and of the largest value among them
            zero = torch.randint(2**bits, (shape[0], groups), generator=generator)
            zero = torch.full_like(zero, 2 ** (bits - 1)) if sym else zero
            scale = (torch.rand(shape[0], groups, generator=generator) / 2**bits).half()
            self.layers[key] = (codes, scale, zero)
            tensors[key] = gptq_layer(codes, scale, zero, bits, version, borrow)
            if module.bias is not None:
                tensors[key]["bias"] = module.bias.data
        config = {"bits": bits, "group_size": group_size, "sym": sym, "desc_act": False, **more}
        config["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
        save_gptq(model, tensors, folder, shards, **config)

    def edit(self, **changes) -> None:
        """Change entries of the quantization config."""
        path = self.folder / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"].update(changes)
        path.write_text(json.dumps(config))

    def replace(self, **tensors) -> None:
        """Put other tensors in place of a layer's; None removes one."""
        path = self.folder / "model.safetensors"
        stored = load_file(path)
        for part, tensor in tensors.items():
            del stored[f"{LAYER}.{part}"]
            if tensor is not None:
                stored[f"{LAYER}.{part}"] = tensor
        save_file(stored, path, metadata={"format": "pt"})

    def expected(self, name: str = "llama") -> torch.Tensor:
        """Logits of the float model with the weights that the files stand for."""
        model = tiny(name)
        for key, (codes, scale, zero) in self.layers.items():
            groups = codes.view(codes.shape[0], scale.shape[1], -1) - zero[..., None]
            weight = (scale.float()[..., None] * groups).view(codes.shape)
            module = model.get_submodule(key)
            module.weight.data = weight if isinstance(module, nn.Linear) else weight.t()
        return logits(model, name)

    def check(self, model) -> None:
        """Every layer has the very codes, zero points and scales."""
        layers = packed_layers(model)
        assert set(layers) == set(self.layers)
        for key, (codes, scale, zero) in self.layers.items():
            layer = layers[key]
            assert torch.equal(layer.codes().long(), codes), key
            assert torch.equal(layer.zero_point.long(), zero), key
            assert torch.equal(layer.scale, scale.float()), key
            assert (layer.bits, layer.sym) == (self.bits, self.sym)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
def test_codes_bit_for_bit(bits, group_size, version, sym, tmp_path):
    made = Made(tmp_path, bits, group_size, sym, version)
    model = load_gptq(tmp_path, dtype=torch.float32)
    made.check(model)
    assert_same(logits(model), made.expected())
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_that_gptqmodel_borrowed_for(bits, tmp_path):
    """It subtracts one from whole words, so a zero point of 0 takes one from its neighbour; not at 3 bits."""
    made = Made(tmp_path, bits, borrow=bits != 3, meta={"quantizer": ["gptqmodel:2.2.0"]})
    assert any((zero == 0).any() for _, _, zero in made.layers.values())
    made.check(load_gptq(tmp_path))


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    out_features=st.integers(1, 9),
    groups=st.integers(1, 3),
    size=st.integers(1, 23),
    version=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**16),
)
def test_sizes_that_fill_no_word(bits, out_features, groups, size, version, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (out_features, groups * size), generator=generator)
    zero = torch.randint(2**bits, (out_features, groups), generator=generator)
    scale = torch.rand(out_features, groups, generator=generator).half()
    tensors = gptq_layer(codes, scale, zero, bits, version)
    headers = {part: TensorHeader(tuple(tensor.shape), "I32", "") for part, tensor in tensors.items()}
    config = PackedGptqConfig(bits, sym=False, checkpoint_format="gptq" if version == 1 else "gptq_v2")
    layer = _GptqLayer(headers, nn.Linear(groups * size, out_features, bias=False), bits, config)
    for part, tensor in tensors.items():
        layer.register_parameter(
            part, nn.Parameter(tensor.float() if part == "scales" else tensor, requires_grad=False)
        )
    packed = layer.packed("layer")
    assert torch.equal(packed.codes().long(), codes)
    assert torch.equal(packed.zero_point.long(), zero) and torch.equal(packed.scale, scale.float())


def test_shards(tmp_path):
    made = Made(tmp_path, shards=4)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    made.check(load_gptq(tmp_path))


def test_conv1d(tmp_path):
    made = Made(tmp_path, name="gpt2", sym=True)
    model = load_gptq(tmp_path, dtype=torch.float32)
    made.check(model)
    assert_same(logits(model, "gpt2"), made.expected("gpt2"))
    assert all(layer.conv1d for layer in packed_layers(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_scales_are_not_rounded(dtype, tmp_path):
    made = Made(tmp_path)
    model = load_gptq(tmp_path, dtype=dtype)
    made.check(model)
    assert model.lm_head.weight.dtype == packed_layers(model)[LAYER].compute_dtype


def test_no_float_weight_is_made(tmp_path, float_weights):
    Made(tmp_path)
    float_weights.clear()
    load_gptq(tmp_path)
    assert not float_weights


def test_tuning_saving_and_merging(tmp_path, fresh_process):
    """An adapter on the GPTQ base: trained, saved, loaded onto it again, merged into a checkpoint for stock transformers."""
    made = Made(tmp_path / "gptq", sym=True)
    config = PeqaConfig(bits=4, group_size=16, sym=True, task_type="CAUSAL_LM")
    model = get_peft_model(load_gptq(tmp_path / "gptq", dtype=torch.float32), config)
    assert_same(logits(model), made.expected())
    losses = train(model, inputs("llama"))
    assert losses[-1] < losses[0]
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    restored = PeftModel.from_pretrained(load_gptq(tmp_path / "gptq", dtype=torch.float32), tmp_path / "adapter")
    assert_same(logits(restored), expected)
    merged = restored.merge_and_unload()
    for name, layer in packed_layers(merged).items():
        assert torch.equal(layer.codes().long(), made.layers[name][0])
    merged.save_pretrained(tmp_path / "merged")
    code = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.flatten().tolist()))
assert "peft_ext" not in sys.modules
"""
    with torch.no_grad():
        expected = merged(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.flatten()
    assert_same(torch.tensor(json.loads(fresh_process(code, tmp_path / "merged"))), expected, tolerance=1e-4)


def test_the_loaded_model_is_saved_as_compressed_tensors(tmp_path):
    made = Made(tmp_path / "gptq", bits=3)
    load_gptq(tmp_path / "gptq", dtype=torch.float32).save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(logits(loaded), made.expected(), tolerance=1e-4)
    made.check(get_peft_model(loaded, PeqaConfig(bits=3, group_size=16)).unload())


@pytest.mark.parametrize(
    "other, way_out",
    [({"bits": 3}, "bits=4"), ({"group_size": -1}, "group_size=16"), ({"sym": False}, "sym=True")],
    ids=["bits", "group_size", "sym"],
)
def test_a_config_that_does_not_fit(other, way_out, tmp_path):
    Made(tmp_path, sym=True)
    with pytest.raises(ValueError, match=f"quantised already.*pass {way_out}"):
        get_peft_model(load_gptq(tmp_path), PeqaConfig(**{"bits": 4, "group_size": 16, "sym": True, **other}))


def test_a_config_in_a_file_of_its_own_and_no_g_idx(tmp_path):
    made = Made(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    stored = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    del stored["quant_method"], stored["checkpoint_format"]  # as early AutoGPTQ wrote it
    (tmp_path / "quantize_config.json").write_text(json.dumps(stored))
    made.replace(g_idx=None)
    made.check(load_gptq(tmp_path))
    assert is_packed_model(str(tmp_path))


def test_the_zero_biases_of_autogptq_are_dropped_and_others_kept(tmp_path):
    made = Made(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    for name in made.layers:
        stored[f"{name}.bias"] = torch.zeros(made.layers[name][0].shape[0], dtype=torch.float16)
    stored[f"{LAYER}.bias"][3] = 1.5
    save_file(stored, path, metadata={"format": "pt"})
    layers = packed_layers(load_gptq(tmp_path))
    assert [name for name, layer in layers.items() if layer.bias is not None] == [LAYER]
    assert layers[LAYER].bias[3] == 1.5


def test_layers_of_other_widths(tmp_path):
    """`dynamic` of GPTQModel: what the tensors say counts."""
    made = Made(tmp_path)
    codes = torch.randint(256, (32, 64))
    scale, zero = torch.rand(32, 1).half(), torch.randint(256, (32, 1))
    made.replace(**gptq_layer(codes, scale, zero, 8))
    with pytest.raises(ValueError, match=f"layer '{LAYER}': qweight is I32"):
        load_gptq(tmp_path)
    made.edit(dynamic={r"+:.*\.1\.mlp\.down_proj": {"bits": 8, "group_size": -1}})
    layer = packed_layers(load_gptq(tmp_path))[LAYER]
    assert torch.equal(layer.codes().long(), codes) and torch.equal(layer.zero_point.long(), zero)
    config = PeqaConfig()  # each layer's own
    tuned = get_peft_model(load_gptq(tmp_path), config)
    assert config.bits == "base" and config.group_size is None
    assert packed_layers(tuned.unload())[LAYER].bits == 8


def test_the_command_line_takes_it(tmp_path):
    made = Made(tmp_path)
    made.check(load(str(tmp_path)))
    save_tiny("llama", tmp_path / "float")
    assert stored_quantization(str(tmp_path / "float")) is None and not packed_layers(load(str(tmp_path / "float")))


def test_groups_ordered_by_activation_are_refused(tmp_path):
    made = Made(tmp_path)
    made.replace(g_idx=(torch.arange(64) // 16).flip(0).to(torch.int32))
    made.edit(desc_act=True)
    with pytest.raises(ValueError, match=f"layer '{LAYER}' has its inputs ordered by activation.*desc_act=False"):
        load_gptq(tmp_path)


def test_groups_of_unequal_sizes_are_refused(tmp_path):
    made = Made(tmp_path)
    made.edit(group_size=24)
    path = tmp_path / "model.safetensors"
    stored = {key: tensor for key, tensor in load_file(path).items() if not key.endswith("g_idx")}
    kept = {key: tensor[: 3 if "down_proj" in key else 2] for key, tensor in stored.items() if key.endswith("qzeros")}
    kept |= {key: tensor[: 3 if "down_proj" in key else 2] for key, tensor in stored.items() if key.endswith("scales")}
    save_file(
        {key: tensor.contiguous() for key, tensor in {**stored, **kept}.items()}, path, metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match="layer .* has (64|32) inputs in (3|2) groups of unequal sizes"):
        load_gptq(tmp_path)


def test_per_channel_the_order_does_not_matter(tmp_path):
    made = Made(tmp_path, group_size=-1, desc_act=True)
    made.check(load_gptq(tmp_path))


def test_groups_in_order_despite_desc_act(tmp_path):
    made = Made(tmp_path, desc_act=True)
    made.check(load_gptq(tmp_path))


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is a layout that is unknown.*gptq_v2"),
        ({"checkpoint_format": "gptq_v3"}, "checkpoint_format='gptq_v3'"),
        ({"bits": 5}, "bits=5 is not supported"),
        ({"pack_dtype": "int8"}, "pack_dtype='int8'"),
        ({"bits": 8}, "layer 'model.layers.*': qweight is I32.*at 8 bits"),
        ({"group_size": 8}, "in 8 groups has"),
        ({"group_size": 24}, "in 3 groups has"),
        ({"quant_method": "hqq"}, "is packed as 'hqq', which can't be read.*GPTQ.*from_pretrained"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_configs_that_do_not_fit(changes, match, tmp_path):
    Made(tmp_path).edit(**changes)
    with pytest.raises(ValueError, match=match):
        load_gptq(tmp_path)


@pytest.mark.parametrize(
    "tensors, match",
    [
        ({"qweight": torch.zeros(8, 31, dtype=torch.int32)}, r"qweight is I32 \[8, 31\]; a weight of \[32, 64\]"),
        ({"qweight": torch.zeros(8, 32, dtype=torch.int64)}, r"qweight is I64"),
        ({"qzeros": torch.zeros(4, 5, dtype=torch.int32)}, r"qzeros is I32 \[4, 5\].*I32 \[4, 4\]"),
        ({"scales": torch.zeros(5, 32, dtype=torch.float16)}, r"scales is F16 \[5, 32\]"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, r"g_idx is I32 \[63\]"),
        ({"scales": None}, "the checkpoint has no scales"),
        ({"qzeros": None}, "the checkpoint has no qzeros"),
    ],
)
def test_tensors_that_do_not_fit(tensors, match, tmp_path):
    Made(tmp_path).replace(**tensors)
    with pytest.raises(ValueError, match=f"layer '{LAYER}': {match}"):
        load_gptq(tmp_path)


def test_a_truncated_shard(tmp_path):
    Made(tmp_path, shards=2)
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="00002-of-00002.safetensors' is truncated"):
        load_gptq(tmp_path)


def test_layers_that_the_model_does_not_have(tmp_path):
    path = tmp_path / "model.safetensors"
    Made(tmp_path)
    save_file({f"other.{key}": tensor for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="'other.model.layers.*is no linear layer of LlamaForCausalLM"):
        load_gptq(tmp_path)


def test_a_float_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="is not packed.*from_pretrained"):
        load_gptq(save_tiny("llama", tmp_path))


def test_transformers_own_gptq_is_left_alone():
    from transformers import GPTQConfig
    from transformers.quantizers import auto

    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is GPTQConfig
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"].__module__.startswith("transformers.")
