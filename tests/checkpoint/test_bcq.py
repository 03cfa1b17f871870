# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`bcq` checkpoints: written, read and made from float ones by transformers, adapters on top, damage noticed."""

from __future__ import annotations

import json
import logging.handlers

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from peft_ext import AlphaTuningConfig, BcqConfig, PeqaConfig, calibrate
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.packed_module import PackedParameter
from tests.cases import assert_differs, assert_same, move_adapter, train, tuner_layers
from tests.tiny.folders import save_tiny
from tests.tiny.models import inputs, logits_of, tiny


FORMATS = {
    "1bit": {"bits": 1},
    "3bit": {"bits": 3},
    "4bit-groups": {"bits": 4, "group_size": 8},
    "8bit": {"bits": 8},
}
formats = pytest.mark.parametrize("kwargs", FORMATS.values(), ids=FORMATS)
BATCHES = [{"input_ids": torch.randint(3, 100, (4, 16), generator=torch.Generator().manual_seed(0))}]
LAYER = "model.layers.1.self_attn.v_proj"


def logits(model, name: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model.eval(), inputs(name))


def fingerprints(model) -> dict[str, int]:
    return {name: layer.fingerprint() for name, layer in packed_layers(model).items()}


def load(folder, auto=AutoModelForCausalLM, **kwargs):
    """Load, with nothing missing and nothing left over."""
    model, info = auto.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    assert not any(p.device.type == "meta" for p in (*model.parameters(), *model.buffers()))
    return model


@formats
def test_round_trip(kwargs, tmp_path):
    base = get_peft_model(tiny("llama"), AlphaTuningConfig(**kwargs)).unload()
    base.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), logits(base)) and fingerprints(loaded) == fingerprints(base)
    for layer in packed_layers(loaded).values():
        assert isinstance(layer.planes, PackedParameter)
        assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not [name for name, p in loaded.named_parameters() if name.endswith("proj.weight")]
    counted = sum(p.numel() for p in loaded.parameters())
    assert counted == sum(p.numel() for p in base.parameters())  # weights, not bytes
    # and again, from the loaded model
    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits(again), logits(base))


@pytest.mark.parametrize(
    "name, auto, kwargs",
    [
        ("gpt2", AutoModelForCausalLM, {}),
        ("opt", AutoModelForCausalLM, {}),
        ("gpt_neox", AutoModelForCausalLM, {"target_modules": ["query_key_value"]}),
        ("t5", AutoModelForSeq2SeqLM, {}),
        ("bert", AutoModelForSequenceClassification, {}),
        ("llama", AutoModelForCausalLM, {"bits_pattern": {"down_proj": 2, "q_proj": 4}}),
        ("llama", AutoModelForCausalLM, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
        ("llama", AutoModelForCausalLM, {"group_size": 32}),  # the whole channel in some layers
    ],
)
def test_models_and_partly_packed_ones(name, auto, kwargs, tmp_path):
    base = get_peft_model(tiny(name), AlphaTuningConfig(bits=3, **kwargs)).unload()
    base.save_pretrained(tmp_path)
    loaded = load(tmp_path, auto)
    assert torch.equal(logits(loaded, name), logits(base, name))
    assert fingerprints(loaded) == fingerprints(base)
    config = AlphaTuningConfig(bits=3, **kwargs)
    model = get_peft_model(load(tmp_path, auto), config)
    assert torch.equal(logits(model, name), logits(base, name))
    losses = train(model, inputs(name))
    assert losses[-1] < losses[0]


def test_the_model_without_its_head_and_back(tmp_path):
    base = get_peft_model(tiny("llama"), AlphaTuningConfig(bits=3)).unload()
    base.save_pretrained(tmp_path / "whole")
    body = AutoModel.from_pretrained(tmp_path / "whole")
    assert len(packed_layers(body)) == len(packed_layers(base))
    batch = inputs("llama")
    with torch.no_grad():
        expected = base.model(**batch).last_hidden_state
        assert torch.equal(body(**batch).last_hidden_state, expected)
        body.save_pretrained(tmp_path / "body")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
        assert torch.equal(again.model.eval()(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("number_format", ["binary", "uniform"])
def test_a_float_checkpoint_is_quantised_while_it_is_loaded(name, number_format, tmp_path):
    path = save_tiny(name, tmp_path / "float")
    config = BcqConfig(bits=3, number_format=number_format)
    loaded = load(path, quantization_config=config)
    tuner = AlphaTuningConfig if number_format == "binary" else PeqaConfig
    expected = get_peft_model(tiny(name), tuner(bits=3)).unload()
    assert fingerprints(loaded) == fingerprints(expected) and torch.equal(logits(loaded, name), logits(expected, name))
    loaded.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed"), name), logits(expected, name))


def test_only_the_named_modules_are_quantised_while_loading(tmp_path):
    path = save_tiny("llama", tmp_path)
    config = BcqConfig(
        bits=4, group_size=16, modules_to_not_convert=["down_proj"], bits_pattern={"model.layers.0.mlp.up_proj": 2}
    )
    layers = packed_layers(load(path, quantization_config=config))
    assert len(layers) == 12 and not [name for name in layers if "down_proj" in name or "lm_head" in name]
    assert {layer.bits for name, layer in layers.items() if name == "model.layers.0.mlp.up_proj"} == {2}
    assert {layer.group_size for layer in layers.values()} == {16}


def test_shards(tmp_path):
    """Loading goes from file to file; a weight's tensors may stand in different ones."""
    path = save_tiny("llama", tmp_path / "float")
    tiny("llama").save_pretrained(tmp_path / "float", max_shard_size="20KB")
    loaded = load(path, quantization_config=BcqConfig(bits=3))
    loaded.save_pretrained(tmp_path / "packed", max_shard_size="10KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 3
    assert torch.equal(logits(load(tmp_path / "packed")), logits(loaded))


def test_no_float_weight_is_made(tmp_path, float_weights):
    """Nothing of a weight's full size in float exists at any time while a packed checkpoint is loaded."""
    get_peft_model(tiny("llama"), AlphaTuningConfig(bits=3)).unload().save_pretrained(tmp_path)
    float_weights.clear()
    load(tmp_path)
    assert not float_weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype, tmp_path):
    base = get_peft_model(tiny("llama"), AlphaTuningConfig(bits=3)).unload()
    base.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=dtype)
    layer = packed_layers(loaded)[LAYER]
    assert layer.compute_dtype == dtype and layer.scale.dtype == torch.float32
    assert loaded.lm_head.weight.dtype == dtype
    assert_same(logits(loaded), logits(base), tolerance=0.05)


def test_adapters_on_top_in_a_fresh_process(tmp_path, fresh_process):
    config = AlphaTuningConfig(bits=2, init_method="calibrated", task_type="CAUSAL_LM")
    base = calibrate(tiny("llama"), config, BATCHES, progressbar=False)
    get_peft_model(base, config).unload().save_pretrained(tmp_path / "base")
    loaded = load(tmp_path / "base")
    model = get_peft_model(loaded, config)
    move_adapter(model)
    assert_differs(logits(model), logits(load(tmp_path / "base")))
    model.save_pretrained(tmp_path / "adapter")
    code = """
import json, sys
import torch
import peft_ext
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
batch = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
with torch.no_grad():
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base")
    one = PeftModel.from_pretrained(base, sys.argv[1] + "/adapter")(**batch).logits
    two = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1] + "/adapter")(**batch).logits
assert torch.equal(one, two)
print(json.dumps(one.flatten().tolist()))
"""
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.flatten()
    assert_same(torch.tensor(json.loads(fresh_process(code, tmp_path))), expected)
    # merged, the adapter is part of the checkpoint
    expected = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_same(logits(load(tmp_path / "merged")), expected)


def test_an_adapter_trains_on_it_with_trainer(tmp_path):
    path = save_tiny("llama", tmp_path / "float")
    model = load(path, quantization_config=BcqConfig(bits=3))
    model = get_peft_model(model, AlphaTuningConfig(bits=3, task_type="CAUSAL_LM"))
    data = [{"input_ids": row, "labels": row} for row in BATCHES[0]["input_ids"]]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=3, learning_rate=1e-2, report_to="none", logging_steps=1, use_cpu=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_what_compressed_tensors_has_no_room_for_is_stored_here(tmp_path):
    """Conv1D layers of integers; an adapter goes on top like on any packed base."""
    model = get_peft_model(tiny("gpt2"), PeqaConfig(bits=4, group_size=16, task_type="CAUSAL_LM"))
    move_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, "gpt2")
    model.unload().save_pretrained(tmp_path / "base")
    stored = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "bcq" and stored["number_format"] == "uniform"
    restored = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(restored, "gpt2"), expected)


def test_several_group_sizes(tmp_path):
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4, group_size=16, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="share one packed base"):
        model.add_adapter("other", PeqaConfig(bits=3, group_size=8, target_modules=["v_proj"]))
    base = model.unload()
    base.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(base))
    with pytest.raises(ValueError, match="format='pack-quantized' holds.*pass format='bcq'"):
        make_saveable(base, "pack-quantized")
    with pytest.raises(ValueError, match="format='gguf' is unknown"):
        make_saveable(base, "gguf")


def test_uniform_integers_on_demand(tmp_path):
    base = get_peft_model(tiny("llama"), PeqaConfig(bits=3, sym=True)).unload()
    make_saveable(base, "bcq")
    base.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), logits(base))
    assert get_peft_model(loaded, PeqaConfig(bits=3, sym=True)).get_nb_trainable_parameters()[0] > 0


def test_dequantize(tmp_path):
    base = get_peft_model(tiny("llama"), AlphaTuningConfig(bits=3)).unload()
    base.save_pretrained(tmp_path / "packed")
    expected = logits(base)
    plain = load(tmp_path / "packed").dequantize()
    assert not packed_layers(plain)
    assert_same(logits(plain), expected)
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert_same(logits(load(tmp_path / "plain")), expected)


@pytest.mark.parametrize("bits", [0, 9, 5, -1, 2.5])
def test_bits(bits):
    with pytest.raises(
        ValueError, match=f"bits(={bits} is not supported; choose one of| is {bits}; it must be a whole)"
    ):
        BcqConfig(bits=bits)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"init_method": "calibrated"}, "init_method='calibrated'.*peft_ext.calibrate"),
        ({"number_format": "ternary"}, "number_format='ternary'.*binary"),
        ({"number_format": "uniform", "bits": 1}, "bits=1"),
        ({"group_size": 0}, "group_size=0"),
        ({"quant_method": "gptq"}, "quant_method='gptq'"),
        ({"bits_pattern": {"x": 7}}, "bits=7"),
    ],
)
def test_bad_configs(kwargs, match):
    with pytest.raises(ValueError, match=match):
        BcqConfig(**kwargs)


def test_a_group_size_that_does_not_divide(tmp_path):
    path = save_tiny("llama", tmp_path)
    with pytest.raises(ValueError, match="layer 'model.layers.0.*': group_size=24 does not divide in_features"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=BcqConfig(group_size=24))


def test_nothing_to_quantise(tmp_path):
    path = save_tiny("llama", tmp_path)
    with pytest.raises(ValueError, match="modules_to_not_convert=.*leaves no linear layer"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=BcqConfig(modules_to_not_convert=["model"]))


def test_a_float_weight_that_is_not_finite(tmp_path):
    model = tiny("llama")
    model.get_submodule(LAYER).weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    handler = logging.handlers.BufferingHandler(1000)
    logging.getLogger("transformers").addHandler(handler)
    logging.getLogger("transformers").setLevel(logging.WARNING)  # tests/conftest.py takes it back
    try:
        # transformers collects what goes wrong into a report, then stops
        with pytest.raises(RuntimeError, match="report"):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BcqConfig())
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    report = "\n".join(record.getMessage() for record in handler.buffer)
    assert f"layer '{LAYER}': the weight has NaN or infinity" in report


@pytest.fixture
def packed(tmp_path):
    get_peft_model(tiny("llama"), AlphaTuningConfig(bits=3, group_size=16)).unload().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "change, match",
    [
        ({"bits": 2}, "holds binary coding of 3 bits.*says binary coding of 2 bits"),
        ({"group_size": -1}, "in 2 groups per channel.*in 1;"),
        ({"number_format": "uniform", "init_method": None}, "holds binary coding.*says uniform integers"),
    ],
)
def test_planes_and_config_that_disagree(change, match, packed):
    path = packed / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"layer 'model.layers.*{match}"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_an_unknown_format_version(packed):
    path = packed / "config.json"
    config = json.loads(path.read_text())
    assert config["quantization_config"]["format_version"] == 1
    config["quantization_config"]["format_version"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format_version=2 of bcq is unknown.*reads 1.*pip install -U peft-ext"):
        AutoModelForCausalLM.from_pretrained(packed)


@pytest.mark.parametrize(
    "part, shape, match",
    [
        (
            "planes",
            (1, 5, 3, 32),
            "scales of shape|planes has the shape .1, 5, 3, 32.; it must be .1, 4, 3, 32., of a weight of .16, 32.",
        ),
        ("planes", (2, 4, 3, 32), r"scales of shape \[16, 2, 3\] don't belong to planes of shape \[2, 4, 3, 32\]"),
        ("scale", (16, 2, 4), "scales of shape .16, 2, 4. don't belong"),
        ("scale", (16, 2), "scales of shape .16, 2. don't belong"),
        ("planes", (4, 3, 32), "damaged planes"),
    ],
)
def test_tensors_of_wrong_shapes(part, shape, match, packed):
    path = packed / "model.safetensors"
    tensors = load_file(path)
    key = f"{LAYER}.{part}"
    tensors[key] = torch.zeros(shape, dtype=tensors[key].dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"layer '{LAYER}': .*({match})"):
        AutoModelForCausalLM.from_pretrained(packed)


@pytest.mark.parametrize("left", [0.99, 0.5, 0.0])
def test_a_truncated_shard(left, packed):
    path = packed / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content))])
    with pytest.raises((ValueError, OSError), match="model.safetensors"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_a_layer_without_scales(packed):
    path = packed / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"{LAYER}.scale"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"layer '{LAYER}': the checkpoint has no scales"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_another_architecture(packed):
    tensors = {f"nobody.{key}": tensor for key, tensor in load_file(packed / "model.safetensors").items()}
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="packed layers .'nobody.*are not in LlamaForCausalLM"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_an_adapter_of_another_format_on_it(packed):
    with pytest.raises(ValueError, match="quantised already to binary coding, but PeqaConfig tunes uniform integers"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(packed), PeqaConfig(bits=3, group_size=16))
    loaded = AutoModelForCausalLM.from_pretrained(packed)
    with pytest.raises(ValueError, match="pass bits=3"):
        get_peft_model(loaded, AlphaTuningConfig(bits=4, group_size=16))
    assert not tuner_layers(loaded)


@pytest.mark.parametrize("targets", [r".*language_model.*\.(q_proj|up_proj)", "all-linear"])
def test_a_model_whose_keys_are_renamed(targets, tmp_path):
    """Files of vision-language models keep their old names; a layer that isn't found would be random."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()
    base = get_peft_model(model, AlphaTuningConfig(bits=3, target_modules=targets)).unload()
    base.save_pretrained(tmp_path)
    loaded, info = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert fingerprints(loaded) == fingerprints(base)


def test_offloaded_layers_run_and_are_refused_as_targets(tmp_path):
    from accelerate import cpu_offload

    base = get_peft_model(tiny("llama"), AlphaTuningConfig(bits=3)).unload()
    base.save_pretrained(tmp_path / "base")
    expected = logits(base)
    assert_same(logits(cpu_offload(base)), expected)
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=devices, offload_folder=tmp_path / "offload"
    )
    assert_same(logits(loaded), expected)
    with pytest.raises(ValueError, match="layers.1.*is offloaded.*without offload"):
        get_peft_model(loaded, AlphaTuningConfig(bits=3))


def test_patterns_are_names_or_expressions(tmp_path):
    path = save_tiny("llama", tmp_path)
    config = BcqConfig(bits=4, bits_pattern={"q_proj": 2}, group_size_pattern={r".*\.mlp\..*": 16})
    layers = packed_layers(load(path, quantization_config=config))
    assert {layer.bits for name, layer in layers.items() if name.endswith("q_proj")} == {2}
    assert {layer.group_size for name, layer in layers.items() if ".mlp." in name} == {16}
    assert {layer.group_size for name, layer in layers.items() if ".mlp." not in name} == {-1}
    for pattern in ({"bits_pattern": {"queries": 2}}, {"group_size_pattern": {"queries": 16}}):
        with pytest.raises(ValueError, match=f"{next(iter(pattern))} has 'queries', which matches no layer"):
            AutoModelForCausalLM.from_pretrained(path, quantization_config=BcqConfig(bits=4, **pattern))
