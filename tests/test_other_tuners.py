# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""PEFT's other tuners on a packed base, against the same adapters on the dequantised one."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from peft import (
    AdaLoraConfig,
    C3AConfig,
    FourierFTConfig,
    GraloraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    RandLoraConfig,
    ShiraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn

from peft_ext import AlphaTuningConfig, BottleneckConfig, PeqaConfig
from peft_ext.quant.conversion import dequantize_layers, packed_layers
from tests.cases import assert_differs, assert_same, train
from tests.tiny.models import inputs, logits_of, tiny


FORMATS = {"integers": PeqaConfig, "binary": AlphaTuningConfig}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def packed(model: str, number_format: str = "integers", bits: int = 3, **kwargs: Any) -> nn.Module:
    """A packed base without any adapter."""
    return get_peft_model(tiny(model), FORMATS[number_format](bits=bits, **kwargs)).unload()


def on(base: nn.Module, config: peft.PeftConfig, seed: int = 0) -> PeftModel:
    """A base with an adapter away from the identity."""
    torch.manual_seed(seed)
    config.target_modules = config.target_modules or TARGETS["gpt2" if hasattr(base, "transformer") else "llama"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT reads the layout off the layer
        model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def logits(model: nn.Module, name: str, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model, inputs(name), **kwargs)


def lora(**kwargs: Any) -> LoraConfig:
    return LoraConfig(r=4, **kwargs)


OTHER_TUNERS = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "rslora": lambda: lora(use_rslora=True),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "ia3": lambda: IA3Config(feedforward_modules=[]),
    "adalora": lambda: AdaLoraConfig(total_step=10),
    "vera": lambda: VeraConfig(r=4),
    "randlora": lambda: RandLoraConfig(r=4),
    "vblora": lambda: VBLoRAConfig(num_vectors=8, vector_length=8),
    "fourierft": lambda: FourierFTConfig(n_frequency=10),
    "bottleneck": lambda: BottleneckConfig(bottleneck_dim=4),
    # these take no Conv1D
    "oft": lambda: OFTConfig(oft_block_size=4),
    "hra": lambda: HRAConfig(r=4),
    "loha": lambda: LoHaConfig(r=4),
    "lokr": lambda: LoKrConfig(r=4),
    "miss": lambda: MissConfig(r=4),
    "shira": lambda: ShiraConfig(r=2),
    "c3a": lambda: C3AConfig(block_size=8),
    "gralora": lambda: GraloraConfig(r=4, gralora_k=2),
}
TAKE_CONV1D = list(OTHER_TUNERS)[:11]
tuners = pytest.mark.parametrize("tuner", OTHER_TUNERS)
formats = pytest.mark.parametrize("number_format", FORMATS)


@tuners
@formats
def test_computes_what_it_computes_on_the_float_weights(tuner, number_format):
    base = packed("llama", number_format)
    model = on(base, OTHER_TUNERS[tuner]())
    plain = on(dequantize_layers(packed("llama", number_format)), OTHER_TUNERS[tuner]())
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
    assert_same(logits(model, "llama"), logits(plain, "llama"))
    with model.disable_adapter():
        without = logits(model, "llama")
    assert torch.equal(without, logits(packed("llama", number_format), "llama"))
    assert_differs(logits(model, "llama"), without)


@pytest.mark.parametrize("tuner", TAKE_CONV1D)
@formats
def test_conv1d(tuner, number_format):
    model = on(packed("gpt2", number_format), OTHER_TUNERS[tuner]())
    plain = on(dequantize_layers(packed("gpt2", number_format)), OTHER_TUNERS[tuner]())
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
    assert_same(logits(model, "gpt2"), logits(plain, "gpt2"))


@tuners
@formats
def test_trains_and_comes_back_from_disk(tuner, number_format, tmp_path):
    model = on(packed("llama", number_format), OTHER_TUNERS[tuner]())
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    losses = train(model, inputs("llama"), steps=4)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert name not in before or torch.equal(parameter, before[name]), f"{name} was trained, too"
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(packed("llama", number_format), tmp_path).eval()
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


@pytest.mark.parametrize("tuner", [name for name in OTHER_TUNERS if name != "bottleneck"])  # it refuses every merge
def test_a_merge_is_refused_and_changes_nothing(tuner):
    model = on(packed("llama"), OTHER_TUNERS[tuner]())
    before = logits(model, "llama")
    for safe_merge in (False, True):
        with pytest.raises(TypeError, match="never rounded again.*dequantize_layers"):
            model.merge_and_unload(safe_merge=safe_merge)
    assert torch.equal(logits(model, "llama"), before)


def test_the_way_out_of_a_refused_merge(tmp_path):
    """What the message says: the saved adapter on the dequantised base."""
    for name in ("llama", "gpt2"):
        model = on(packed(name), lora())
        expected = logits(model, name)
        model.save_pretrained(tmp_path / name)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            plain = PeftModel.from_pretrained(dequantize_layers(model.unload()), tmp_path / name)
        assert_same(logits(plain.merge_and_unload(), name), expected)


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_2"])
def test_an_initialisation_that_changes_the_base_is_refused(start):
    with pytest.raises(TypeError, match="no initialisation can change them"):
        on(packed("llama"), lora(init_lora_weights=start))


@formats
def test_unload_gives_the_packed_base(number_format):
    for tuner in OTHER_TUNERS.values():
        base = packed("llama", number_format)
        before, layers = logits(base, "llama"), packed_layers(base)
        unloaded = on(base, tuner()).unload()
        assert torch.equal(logits(unloaded, "llama"), before)
        assert packed_layers(unloaded) == layers


def test_all_linear_means_every_packed_layer():
    for name in TARGETS:
        base = packed(name)
        layers = set(packed_layers(base))
        model = on(base, lora(target_modules="all-linear"))
        assert model.peft_config["default"].target_modules == layers


def test_several_adapters_in_one_batch():
    model = on(packed("llama"), lora())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj", "q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.normal_(std=0.1)
    rows = [logits(model, "llama")[0]]
    with model.disable_adapter():
        rows.append(logits(model, "llama")[1])
    model.set_adapter("other")
    rows.append(logits(model, "llama")[2])
    assert_same(logits(model, "llama", adapter_names=["default", "__base__", "other"]), torch.stack(rows))
    model.delete_adapter("default")
    assert torch.equal(logits(model, "llama")[2], rows[2])


def test_on_a_checkpoint_that_was_reloaded(tmp_path):
    from transformers import AutoModelForCausalLM

    base = packed("llama", "binary")
    model = on(base, lora())
    expected = logits(model, "llama")
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert packed_layers(again)
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "adapter"), "llama"), expected)


def test_on_merged_scales():
    """A PEQA adapter merged into the base, LoRA on top."""
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=3))
    train(model, inputs("llama"))
    merged = model.merge_and_unload()
    model = on(merged, lora())
    with model.disable_adapter():
        base = logits(model, "llama")
    plain = dequantize_layers(copy.deepcopy(model.unload()))
    assert_same(base, logits(plain, "llama"))
    assert train(on(merged, lora()), inputs("llama"))[-1] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = on(packed("llama").to(dtype), lora(use_dora=True))
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert logits(model, "llama").dtype == dtype
    plain = on(packed("llama"), lora(use_dora=True))
    assert_same(logits(model, "llama"), logits(plain, "llama"), tolerance=0.05)


@pytest.mark.parametrize("dora", [False, True])
def test_compiles_in_one_graph(dora):
    model = on(packed("llama"), lora(use_dora=dora))
    expected = logits(model, "llama")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(logits(compiled, "llama"), expected)


def test_injection_unpacks_nothing(monkeypatch):
    """PEFT asks a layer's weight for dtype and device many times."""
    base = packed("llama")
    unpacked = []
    monkeypatch.setattr("peft_ext.quant.packed_module.unpack", lambda *args: unpacked.append(args))
    get_peft_model(base, lora(target_modules="all-linear"))
    assert not unpacked
