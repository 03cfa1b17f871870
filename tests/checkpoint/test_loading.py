# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`load_packed`: others' checkpoints taken over bit for bit, against files written from the formats' definitions."""

from __future__ import annotations

import json

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CompressedTensorsConfig,
)

from peft_ext import PeqaConfig, load_gptq, load_packed
from peft_ext.checkpoint.contents import read_contents
from peft_ext.models import load
from peft_ext.quant.conversion import packed_layers
from tests.cases import assert_same, move_adapter, train
from tests.checkpoint.foreign_files import (
    Stored,
    awq_layer,
    compressed_tensors_layer,
    edit_quantization,
    expected_model,
    groups_in_order,
    random_layer,
    replace_tensors,
    save_foreign,
)
from tests.checkpoint.gptq_files import gptq_layer
from tests.tiny.folders import save_tiny
from tests.tiny.models import inputs, logits_of, tiny
from tests.tiny.tokenizers import tiny_tokenizer


LAYER = "model.layers.1.mlp.down_proj"
ALL = {"targets": ["Linear"]}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model.eval(), inputs("llama")).float()


def weights(bits=4, group_size=16, sym=False, **more) -> dict:
    """compressed-tensors' arguments of a weight."""
    strategy = "channel" if group_size == -1 else "group"
    size = None if group_size == -1 else group_size
    return {"num_bits": bits, "type": "int", "symmetric": sym, "strategy": strategy, "group_size": size, **more}


def formats_of(model, default, others=()) -> dict[str, tuple]:
    """By layer `(bits, group_size, sym)`: the first of `others` whose part the name has, or the default."""
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"]
    return {name: next((form for part, form in others if part in name), default) for name in names}


class Made:
    """A checkpoint of a tiny Llama by somebody else, and what was written: codes, scales and zero points by layer."""

    def __init__(self, folder, write, quantization, formats=None, dtype=torch.float32, model=None, shards=1):
        self.folder, self.dtype = folder, dtype
        model = model or tiny("llama", dtype)
        generator = torch.Generator().manual_seed(1)
        self.formats = formats or formats_of(model, (4, 16, False))
        self.layers: dict[str, Stored] = {
            name: random_layer(model.get_submodule(name), *form, dtype, generator)
            for name, form in self.formats.items()
        }
        tensors = {name: write(stored, self.formats[name][2]) for name, stored in self.layers.items()}
        save_foreign(model, tensors, folder, quantization, shards)

    def expected(self) -> torch.Tensor:
        """Logits of the float32 model with the weights that the files stand for."""
        model = tiny("llama")
        for parameter in model.parameters():  # and not the buffers, which no file has
            parameter.data = parameter.to(self.dtype).float()
        return logits(expected_model(model, self.layers))

    def check(self, model) -> None:
        """Every layer has the very codes, zero points and scales."""
        layers = packed_layers(model)
        assert set(layers) == set(self.layers)
        for name, stored in self.layers.items():
            layer = layers[name]
            assert torch.equal(layer.codes().long(), stored.codes), name
            assert torch.equal(layer.zero_point.long(), stored.zero_point), name
            assert layer.scale.dtype == torch.float32 and torch.equal(layer.scale, stored.scale.float()), name
            assert (layer.bits, layer.sym) == (stored.bits, self.formats[name][2])
        assert not any(parameter.is_meta for parameter in model.parameters())


def tensors(folder, form=(4, 16, False), groups=None, formats=None, ignore=("lm_head",), **kwargs) -> Made:
    """A compressed-tensors checkpoint as llm-compressor writes it."""
    bits, group_size, sym = form
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": groups or {"group_0": {**ALL, "weights": weights(bits, group_size, sym)}},
    }
    formats = formats or formats_of(tiny("llama"), form)
    return Made(folder, compressed_tensors_layer, quantization, formats, **kwargs)


def awq(folder, group_size=16, zero_point=True, **kwargs) -> Made:
    """An AWQ checkpoint as AutoAWQ writes it."""
    quantization = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": zero_point,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    form = (4, group_size, not zero_point)
    kwargs = {"formats": formats_of(tiny("llama"), form), "dtype": torch.float16, **kwargs}
    return Made(folder, lambda stored, sym: awq_layer(stored), quantization, **kwargs)


def gptq(folder, formats=None, version=1, method="gptq", **kwargs) -> Made:
    """A GPTQ checkpoint; `kwargs` go into its config."""
    model = kwargs.pop("model", None)

    def write(stored, sym):
        return gptq_layer(stored.codes, stored.scale, stored.zero_point, stored.bits, version)

    quantization = {"quant_method": method, "bits": 4, "group_size": 16, "sym": False, **kwargs}
    return Made(folder, write, quantization, formats, torch.float16, model)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
def test_compressed_tensors_bit_for_bit(bits, group_size, sym, tmp_path):
    made = tensors(tmp_path, (bits, group_size, sym), shards=2)
    model = load_packed(tmp_path)
    made.check(model)
    assert_same(logits(model), made.expected())


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
def test_the_weights_are_those_of_stock_transformers(stored, sym, tmp_path):
    made = tensors(tmp_path, (4, 16, sym), dtype=stored)
    model = load_packed(tmp_path)
    made.check(model)
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert not packed_layers(stock)  # others' checkpoints load as ever by plain from_pretrained
    for name, layer in packed_layers(model).items():
        assert torch.equal(layer.weight + 0, stock.get_submodule(name).weight), name


def test_several_groups_of_layers(tmp_path):
    """Other widths, group sizes and symmetry by name, regular expression and class, in this order."""
    groups = {
        "rest": {**ALL, "weights": weights(4, 16)},
        "attention": {"targets": ["re:.*self_attn.*"], "weights": weights(8, -1, True), "format": "pack-quantized"},
        "one": {"targets": ["model.layers.0.self_attn.q_proj"], "weights": weights(2, 8)},
    }
    others = [("0.self_attn.q_proj", (2, 8, False)), ("self_attn", (8, -1, True))]
    made = tensors(tmp_path, groups=groups, formats=formats_of(tiny("llama"), (4, 16, False), others))
    model = load_packed(tmp_path)
    made.check(model)
    assert_same(logits(model), made.expected())
    model.save_pretrained(tmp_path / "saved")
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), made.expected())


def test_layers_that_are_ignored_stay_float(tmp_path):
    formats = formats_of(tiny("llama"), (4, 16, True))
    del formats[LAYER]
    made = tensors(tmp_path, (4, 16, True), formats=formats, ignore=("lm_head", LAYER))
    model = load_packed(tmp_path)
    made.check(model)
    assert type(model.get_submodule(LAYER)) is nn.Linear
    assert_same(logits(model), made.expected())


@pytest.mark.parametrize("order", [groups_in_order(64, 16), torch.full((64,), -1, dtype=torch.int32)])
def test_inputs_in_order(order, tmp_path):
    made = tensors(tmp_path)
    replace_tensors(tmp_path, **{f"{LAYER}.weight_g_idx": order})
    made.check(load_packed(tmp_path))


def test_inputs_ordered_by_activation_are_refused(tmp_path):
    tensors(tmp_path)
    replace_tensors(tmp_path, **{f"{LAYER}.weight_g_idx": groups_in_order(64, 16).flip(0)})
    with pytest.raises(ValueError, match=f"layer '{LAYER}' has its inputs ordered by activation.*actorder='static'"):
        load_packed(tmp_path)


@pytest.mark.parametrize(
    "changes, match",
    [
        (weights(5), r"is 5-bit int per group; only integers of \(2, 3, 4, 8\) bits"),
        (weights(4, 24), "inputs in groups of 24, the last one smaller"),
        (weights(8), r"weight_packed is I32 \[.*; a weight of .* at 8 bits per group has I32"),
        (weights(4, 8), r"weight_scale is F32 \[\d+, \d\]; a weight of"),
        ({**weights(4), "strategy": "tensor", "group_size": None}, "is 4-bit int per tensor"),
    ],
    ids=["bits", "size", "width", "groups", "tensor"],
)
def test_schemes_that_do_not_fit(changes, match, tmp_path):
    tensors(tmp_path)
    edit_quantization(tmp_path, config_groups={"group_0": {**ALL, "weights": changes}})
    with pytest.raises(ValueError, match=f"layer 'model.layers.*{match}"):
        load_packed(tmp_path)


@pytest.mark.parametrize(
    "group, match",
    [
        (
            {"weights": {**weights(8, -1, True), "type": "float"}, "format": "float-quantized"},
            "none of its config_groups",
        ),
        (
            {
                "weights": weights(4),
                "input_activations": {**weights(8, -1, True), "strategy": "token", "dynamic": True},
            },
            "none of its config_groups",
        ),
        ({"weights": weights(4), "targets": ["re:.*nothing.*"]}, "no config_groups of config.json has it"),
    ],
    ids=["fp8", "activations", "targets"],
)
def test_what_is_no_packed_integer(group, match, tmp_path):
    tensors(tmp_path)
    edit_quantization(tmp_path, format="pack-quantized", config_groups={"group_0": {**ALL, **group}})
    with pytest.raises(ValueError, match=match):
        load_packed(tmp_path)


def test_what_a_config_says_besides(tmp_path):
    made = tensors(tmp_path)
    cache = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    edit_quantization(tmp_path, kv_cache_scheme=cache, transform_config={})
    with pytest.warns(UserWarning, match="kv_cache_scheme.*isn't kept"):
        made.check(load_packed(tmp_path))
    edit_quantization(tmp_path, transform_config={"config_groups": {"u": {"type": "hadamard", "apply": []}}})
    with pytest.raises(ValueError, match="rotates weights and activations.*without transforms"):
        load_packed(tmp_path)


@pytest.mark.parametrize("part", ["weight_scale", "weight_zero_point", "weight_shape"])
def test_tensors_that_are_missing(part, tmp_path):
    tensors(tmp_path)
    replace_tensors(tmp_path, **{f"{LAYER}.{part}": None})
    with pytest.raises(ValueError, match=f"layer '{LAYER}': the checkpoint has no {part}"):
        load_packed(tmp_path)


@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("zero_point", [True, False])
def test_awq_bit_for_bit(group_size, zero_point, tmp_path):
    made = awq(tmp_path, group_size, zero_point, shards=2)
    model = load_packed(tmp_path, dtype=torch.float32)
    made.check(model)
    assert_same(logits(model), made.expected())
    half = load_packed(tmp_path)  # in its own float16
    made.check(half)
    stored = made.layers[LAYER]  # as AutoAWQ dequantises it
    groups = stored.codes.view(len(stored.codes), stored.scale.shape[1], -1) - stored.zero_point[..., None]
    expected = (groups.half() * stored.scale.half()[..., None]).view(stored.codes.shape)
    assert torch.equal(half.get_submodule(LAYER).weight + 0, expected)


def test_zero_points_that_are_not_packed(tmp_path):
    """As compressed-tensors stored them before 0.9."""
    made = tensors(tmp_path)
    plain = {
        f"{name}.weight_zero_point": (stored.zero_point - 8).to(torch.int8) for name, stored in made.layers.items()
    }
    replace_tensors(tmp_path, **plain)
    made.check(load_packed(tmp_path))


def test_scales_of_a_type_that_is_not_read(tmp_path):
    made = tensors(tmp_path)
    replace_tensors(tmp_path, **{f"{LAYER}.weight_scale": made.layers[LAYER].scale.to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=f"layer '{LAYER}': weight_scale is F8_E4M3"):
        load_packed(tmp_path)


def test_awq_layers_that_are_not_converted(tmp_path):
    formats = formats_of(tiny("llama"), (4, 16, False))
    del formats[LAYER]
    made = awq(tmp_path, formats=formats)
    edit_quantization(tmp_path, modules_to_not_convert=["down_proj"])
    model = load_packed(tmp_path)
    made.check(model)
    assert type(model.get_submodule(LAYER)) is nn.Linear


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"version": "gemv"}, "version='gemv' of AWQ is a layout that is unknown here; 'gemm' can be read"),
        ({"version": "GEMV_fast"}, "version='gemv_fast'"),
        ({"version": None, "backend": "llm-awq"}, "version='llm-awq'"),
        ({"bits": 8}, "bits=8 is not supported"),
        ({"group_size": 24}, "in groups of 24, the last one smaller"),
        ({"group_size": 8}, r"qzeros is I32 \[\d+, 4\]; a weight of .* in \d+ groups has"),
    ],
)
def test_awq_configs_that_do_not_fit(changes, match, tmp_path):
    awq(tmp_path)
    edit_quantization(tmp_path, **changes)
    with pytest.raises(ValueError, match=match):
        load_packed(tmp_path)


@pytest.mark.parametrize("part, match", [("qzeros", "no qzeros"), ("scales", "no scales")])
def test_awq_tensors_that_are_missing(part, match, tmp_path):
    awq(tmp_path)
    replace_tensors(tmp_path, **{f"{LAYER}.{part}": None})
    with pytest.raises(ValueError, match=f"layer '{LAYER}': the checkpoint has {match}"):
        load_packed(tmp_path)


def test_awq_with_scaled_activations(tmp_path):
    awq(tmp_path)
    replace_tensors(tmp_path, **{"model.layers.0.mlp.act.scales": torch.ones(64)})
    with pytest.raises(ValueError, match="scales an activation .'model.layers.0.mlp.act.scales'.*GPTQ"):
        load_packed(tmp_path)


MAKERS = {"tensors": tensors, "awq": awq, "gptq": gptq}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_no_float_weight_is_made(make, tmp_path, float_weights):
    make(tmp_path)
    float_weights.clear()
    load_packed(tmp_path)
    assert not float_weights


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_tuning_saving_and_merging(make, tmp_path):
    """An adapter on another's base: trained, saved, loaded onto it again, merged, saved as ours."""
    made = make(tmp_path / "base")
    config = PeqaConfig(bits=4, group_size=16, task_type="CAUSAL_LM")
    model = get_peft_model(load_packed(tmp_path / "base", dtype=torch.float32), config)
    losses = train(model, inputs("llama"))
    assert losses[-1] < losses[0]
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    restored = PeftModel.from_pretrained(load_packed(tmp_path / "base", dtype=torch.float32), tmp_path / "adapter")
    assert_same(logits(restored), expected)
    restored.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same(logits(merged), expected)
    for name, layer in packed_layers(merged).items():
        assert torch.equal(layer.codes().long(), made.layers[name].codes)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_classifier_on_the_body(make, tmp_path):
    """Config overrides reach the config, as with from_pretrained; and so does `peft_ext.models.load`."""
    made = make(tmp_path)
    model = load_packed(tmp_path, AutoModelForSequenceClassification, num_labels=5, attn_implementation="eager")
    made.check(model)
    assert model.score.out_features == 5 and model.config.num_labels == 5
    assert model.config._attn_implementation == "eager"
    for kind in ("classifier", "encoder", "causal"):
        loaded = load(str(tmp_path), kind=kind)
        assert len(packed_layers(loaded)) == len(made.layers)
    assert load(str(tmp_path), kind="classifier", num_labels=3).score.out_features == 3
    body = load_packed(tmp_path, AutoModel)
    assert set(packed_layers(body)) == {name.removeprefix("model.") for name in made.layers}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_packed_head_although_the_config_says_tied(make, tmp_path):
    model = tiny("llama", torch.float16)
    model.resize_token_embeddings(104, mean_resizing=False)  # AWQ's words hold eight
    model.config.tie_word_embeddings = True
    formats = {**formats_of(model, (4, 16, False)), "lm_head": (4, 16, False)}
    kwargs = {"ignore": ()} if make is tensors else {}
    made = make(tmp_path / "base", formats=formats, model=model, **kwargs)
    loaded = load_packed(tmp_path / "base", dtype=torch.float32)
    made.check(loaded)
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight.float())
    loaded.save_pretrained(tmp_path / "saved")
    made.check(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    # as a classifier it has no such head
    classifier = load_packed(tmp_path / "base", AutoModelForSequenceClassification, dtype=torch.float32)
    assert len(packed_layers(classifier)) == len(made.layers) - 1


def test_gptq_layers_of_other_formats_and_float_ones(tmp_path):
    """GPTQModel's `dynamic`: the first pattern counts; with "-:" a layer is float."""
    formats = formats_of(tiny("llama"), (4, 16, False), [("up_proj", (8, -1, True)), ("q_proj", (2, 8, False))])
    del formats[LAYER]
    dynamic = {
        r"-:.*layers\.1\.mlp\.down_proj": {},
        r"+:.*up_proj": {"bits": 8, "group_size": -1, "sym": True},
        r".*q_proj": {"bits": 2, "group_size": 8},
        r"+:.*": {"bits": 4},
    }
    made = gptq(tmp_path, formats, dynamic=dynamic)
    model = load_packed(tmp_path, dtype=torch.float32)
    made.check(model)
    assert type(model.get_submodule(LAYER)) is nn.Linear


@pytest.mark.parametrize(
    "packing, version",
    [
        ("auto_round:auto_gptq", 1),
        ("auto_round:gptq:exllamav2", 1),
        ("auto_round:gptqmodel", 2),
        ("auto_round:exllamav2", 2),
        ("auto_round", 2),
    ],
)
def test_auto_round_in_the_manner_of_gptq(packing, version, tmp_path):
    formats = formats_of(tiny("llama"), (4, 16, False), [("1.mlp.down_proj", (8, 32, True))])
    extra = {LAYER: {"bits": 8, "group_size": 32, "sym": True}, "lm_head": {"bits": 16}}
    more = {"packing_format": packing, "extra_config": extra, "data_type": "int", "act_bits": 16}
    gptq(tmp_path, formats, version, "auto-round", **more).check(load_packed(tmp_path))


def test_auto_round_in_the_manner_of_awq(tmp_path):
    made = awq(tmp_path)
    edit_quantization(tmp_path, quant_method="auto-round", packing_format="auto_round:auto_awq", sym=False)
    made.check(load_packed(tmp_path))


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"packing_format": "auto_round:ark"}, "packing_format='auto_round:ark' of AutoRound.*'auto_round:auto_gptq'"),
        ({"data_type": "mx_fp"}, "data_type='mx_fp'"),
        ({"act_bits": 8}, "act_bits=8"),
    ],
)
def test_auto_round_that_can_not_be_read(changes, match, tmp_path):
    gptq(tmp_path, method="auto-round")
    edit_quantization(tmp_path, **changes)
    with pytest.raises(ValueError, match=match):
        load_packed(tmp_path)


@pytest.mark.parametrize("form", [{"sym": True}, {}], ids=["sym", "asym"])
def test_ours(form, tmp_path):
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4, group_size=16, **form)).unload()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert_same(logits(load_packed(tmp_path)), expected)
    assert len(packed_layers(load_packed(str(tmp_path)))) == len(packed_layers(model))


def test_what_is_not_packed_or_of_another_method(tmp_path):
    save_tiny("llama", tmp_path)
    with pytest.raises(ValueError, match="is not packed.*Load it with from_pretrained"):
        load_packed(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="packed as 'bitsandbytes', which can't be read.*AWQ"):
        load_packed(tmp_path)
    with pytest.raises(OSError):
        load_packed("nothing/there")


def test_a_quantization_config_of_the_caller_s_own(tmp_path):
    """Who asks stock transformers for floats gets them."""
    tensors(tmp_path)
    config = CompressedTensorsConfig(dequantize=True)
    with pytest.raises(ValueError, match="quantization_config is the checkpoint's own.*from_pretrained"):
        load_packed(tmp_path, quantization_config=config)
    assert not packed_layers(load(str(tmp_path), quantization_config=config))


def test_a_config_and_a_device_map_of_the_caller_s_own(tmp_path):
    made = awq(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.attention_dropout = 0.25
    model = load_packed(tmp_path, config=config, device_map="cpu")
    made.check(model)
    assert model.config.attention_dropout == 0.25 and config.quantization_config["quant_method"] == "awq"


def test_its_first_name():
    assert load_gptq is load_packed


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_auto_classes_find_the_packed_base_through_the_adapter_s_config(task_type, make, tmp_path):
    made = make(tmp_path / "base")
    config = PeqaConfig(bits=4, group_size=16, task_type=task_type)
    model = get_peft_model(load_packed(tmp_path / "base", dtype=torch.float32), config)
    move_adapter(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32, is_trainable=True)
    assert_same(logits(loaded), expected)
    assert any(parameter.requires_grad for parameter in loaded.parameters()) and loaded.active_adapter == "default"
    made.check(loaded.unload())
    assert_same(logits(load(str(tmp_path / "adapter"), dtype="float32")), expected)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_auto_classes_of_other_kinds(make, tmp_path):
    make(tmp_path / "base")
    config = PeqaConfig(bits=4, group_size=16, task_type="SEQ_CLS")
    base = load_packed(tmp_path / "base", AutoModelForSequenceClassification, dtype=torch.float32, num_labels=3)
    model = get_peft_model(base, config)
    move_adapter(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    found = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter", dtype=torch.float32, num_labels=3
    )
    assert_same(logits(found), expected)
    with pytest.raises(ValueError, match="Expected target PEFT class"):  # PEFT's own check
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_an_encoder_decoder(tmp_path):
    model = tiny("t5")
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"]
    made = tensors(tmp_path / "base", formats=dict.fromkeys(names, (4, 16, False)), model=model)
    config = PeqaConfig(bits=4, group_size=16, task_type="SEQ_2_SEQ_LM")
    tuned = get_peft_model(load(str(tmp_path / "base"), kind="seq2seq"), config)
    move_adapter(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = logits_of(tuned.eval(), inputs("t5"))
        loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
        assert_same(logits_of(loaded, inputs("t5")), expected)
    made.check(loaded.unload())
    assert len(packed_layers(load(str(tmp_path / "base"), kind="auto"))) == len(names)


@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
def test_another_method_s_adapter_goes_packed_where_stock_transformers_can_not_load_the_base(sym, tmp_path):
    made = tensors(tmp_path / "base", (4, 16, sym))
    config = LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(load_packed(tmp_path / "base"), config)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_same(logits(loaded), expected)
    assert len(packed_layers(loaded)) == len(made.layers)
    edit_quantization(tmp_path / "base", dequantize=True)  # now it can
    stock = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_same(logits(stock), expected)
    assert not packed_layers(stock)


def test_bases_that_only_their_own_class_knows_go_peft_s_own_way(tmp_path):
    """No config that AutoConfig reads: as models of other libraries, or of one's own."""
    save_tiny("llama", tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    del config["model_type"]
    path.write_text(json.dumps(config))
    assert_same(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_contents(make, tmp_path):
    made = make(tmp_path)
    found = read_contents(tmp_path)
    assert {layer.name: (layer.bits, layer.group_size, layer.shape) for layer in found.layers} == {
        name: (stored.bits, 16, tuple(stored.codes.shape)) for name, stored in made.layers.items()
    }
