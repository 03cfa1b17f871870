# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Layers that look linear and can't be packed or adapted: left out of "all-linear" with a word, refused where they are named."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_ext import BcqConfig, BottleneckConfig, PeqaConfig, calibrate, report
from peft_ext.quant import replaceable
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.replaceable import acts_linearly, bypassed_layers, foreign_weight
from peft_ext.targets import left_out
from tests.tiny import families
from tests.tiny.models import logits_of, tiny


PEQA = {"bits": 4, "group_size": 16, "init_method": "minmax"}


class Attending(nn.Module):
    """torch's own attention between two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.last = nn.Linear(16, 16)

    def forward(self, features):
        hidden = self.first(features)
        return self.last(self.attention(hidden, hidden, hidden, need_weights=False)[0])


class Scaled(nn.Linear):
    """A subclass of another arithmetic."""

    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A subclass of the same arithmetic, written in its own way."""

    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Coded(torch.Tensor):
    """A weight of another library: codes behind a tensor's face."""

    __module__ = "torchao.quantization"

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes):
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Coded(args[0].codes)
        raise NotImplementedError(f"{func} of Coded")


def holding(layer):
    model = tiny("mlp")
    model.lin0 = layer
    return model


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "jamba"])
def test_dt_proj_is_left_out_and_said(name):
    with pytest.warns(UserWarning, match=r"never called by \w+Mixer"):
        model = get_peft_model(families.build(name), PeqaConfig(**PEQA, task_type="CAUSAL_LM"))
    assert not any("dt_proj" in layer for layer in packed_layers(model))
    model(**families.batch(name, labels=True)).loss.backward()
    without = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not without, without


@pytest.mark.parametrize(
    "config", [PeqaConfig(**PEQA, target_modules=["x_proj", "dt_proj"]), BottleneckConfig(target_modules=["dt_proj"])]
)
def test_dt_proj_is_refused_where_it_is_named(config):
    with pytest.raises(
        ValueError, match=r"dt_proj' is never called: MambaMixer reads .*exclude_modules=\['dt_proj'\]"
    ):
        get_peft_model(families.build("mamba"), config)


def test_an_earlier_adapter_with_dt_proj_is_loaded(tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr("peft_ext.targets.bypassed_layers", lambda model: {})
        model = get_peft_model(families.build("mamba"), PeqaConfig(**PEQA))
        model.save_pretrained(tmp_path / "adapter")
        model.unload().save_pretrained(tmp_path / "base")
    base = type(families.build("mamba")).from_pretrained(tmp_path / "base")
    assert any("dt_proj" in name for name in packed_layers(base))
    PeftModel.from_pretrained(base, tmp_path / "adapter")
    # a new one tunes the others
    fresh = get_peft_model(type(base).from_pretrained(tmp_path / "base"), PeqaConfig(**PEQA))
    assert not any("dt_proj" in name for name, value in fresh.named_parameters() if value.requires_grad)


def test_kernels_that_read_weights_count_where_they_are_installed(monkeypatch):
    model = families.build("mamba")
    assert {name.rpartition(".")[2] for name in bypassed_layers(model)} == {"dt_proj"}
    monkeypatch.setattr(replaceable.importlib.util, "find_spec", lambda name: name)
    assert {name.rpartition(".")[2] for name in bypassed_layers(model)} == {"dt_proj", "x_proj", "out_proj"}


@pytest.mark.parametrize("name", ["llama", "bloom", "deberta", "t5", "gpt2", "falcon", "whisper", "llava"])
def test_layers_that_are_called_are_not_left_out(name):
    assert not left_out(families.build(name))


def test_torchs_attention_keeps_its_output_layer():
    model = Attending().eval()
    with pytest.warns(UserWarning, match=r"attention.out_proj \(never called by MultiheadAttention\)"):
        model = get_peft_model(model, PeqaConfig(**PEQA))
    assert set(packed_layers(model)) == {"base_model.model.first.base_layer", "base_model.model.last.base_layer"}
    features = torch.randn(2, 3, 16)
    with torch.no_grad():
        before = model(features)
        for key, value in model.named_parameters():
            if "delta" in key:
                value.fill_(0.1)
        assert not torch.allclose(model(features), before)
        tuned = model(features)
        torch.testing.assert_close(model.merge_and_unload()(features), tuned)
    with pytest.raises(ValueError, match="attention.out_proj' is never called: MultiheadAttention"):
        get_peft_model(Attending(), PeqaConfig(**PEQA, target_modules=["first", "out_proj"]))


def test_torchs_encoder_layer_bypasses_all_of_its_layers():
    assert set(bypassed_layers(nn.TransformerEncoderLayer(16, 2, 16))) == {"self_attn.out_proj", "linear1", "linear2"}


def test_routers_that_return_several_tensors_are_left_out_and_refused():
    for name in ("llama4", "phimoe"):
        model = get_peft_model(families.build(name), PeqaConfig(**PEQA))
        assert sum(part.reason == "router" for part in report(model).left.values()) == 2
        with torch.no_grad():
            model(**families.batch(name))
        with pytest.raises(ValueError, match=r"router' is a \w+Router, whose forward computes something else"):
            get_peft_model(families.build(name), PeqaConfig(**PEQA, target_modules=["router"]))


def test_subclasses_count_by_what_they_compute():
    assert acts_linearly(Renamed(8, 4)) and acts_linearly(Renamed(8, 4, bias=False).bfloat16())
    assert not acts_linearly(Scaled(8, 4))
    assert acts_linearly(families.build("falcon").transformer.h[0].mlp.dense_h_to_4h)
    with pytest.warns(UserWarning, match=r"lin0 \(computes something else, a Scaled\)"):
        model = get_peft_model(holding(Scaled(10, 32)), PeqaConfig(bits=4, init_method="minmax"))
    assert len(packed_layers(model)) == 2


def test_a_subclass_is_taken_back_from_a_checkpoint_that_stock_made_floats_of(tmp_path):
    model = get_peft_model(families.build("falcon"), PeqaConfig(**PEQA)).unload().eval()
    model.save_pretrained(tmp_path)
    count, batch = len(packed_layers(model)), families.batch("falcon")
    floats = type(model).from_pretrained(tmp_path).dequantize()
    assert not packed_layers(floats)
    again = get_peft_model(floats, PeqaConfig(**PEQA))
    assert len(packed_layers(again)) == count
    with torch.no_grad():
        torch.testing.assert_close(logits_of(again, batch), logits_of(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "spoil, found",
    [
        (
            lambda layer: setattr(layer, "weight", nn.Parameter(Coded(torch.zeros(32, 10)), requires_grad=False)),
            "torchao's Coded",
        ),
        (lambda layer: setattr(type(layer), "__module__", "optimum.quanto.nn.qlinear"), "optimum-quanto's Foreign"),
        (lambda layer: setattr(type(layer), "__module__", "bitsandbytes.nn.modules"), "bitsandbytes's Foreign"),
        (
            lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), False)),
            "a Foreign of float8_e4m3fn",
        ),
        (
            lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.data.to(torch.int8), False)),
            "a Foreign of int8",
        ),
        (lambda layer: setattr(layer, "weight", None), "a Foreign without a float weight"),
    ],
)
@pytest.mark.parametrize("targets", ["all-linear", ["lin0", "lin1"]])
def test_weights_of_other_libraries_are_refused(spoil, found, targets):
    class Foreign(nn.Linear):
        pass

    layer = Foreign(10, 32)
    spoil(layer)
    model = holding(layer)
    config = PeqaConfig(bits=4, init_method="minmax", target_modules=targets)
    with pytest.raises(
        ValueError, match=f"layer 'lin0' is {found}: its weight is quantised already.*Load the float model"
    ):
        get_peft_model(model, config)
    assert not packed_layers(model)
    with pytest.raises(ValueError, match="quantised already"):
        calibrate(model, PeqaConfig(bits=4, init_method="calibrated", target_modules=targets), [torch.randn(4, 10)])


def test_quantos_layers_are_refused():
    quanto = pytest.importorskip("optimum.quanto")
    for freeze in (False, True):
        model = tiny("llama")
        quanto.quantize(model, weights=quanto.qint4)
        if freeze:
            quanto.freeze(model)
        with pytest.raises(ValueError, match="is optimum-quanto's QLinear"):
            get_peft_model(model, PeqaConfig(**PEQA))


def test_torchaos_layers_are_refused():
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny("llama")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"is torchao's \w+"):
        get_peft_model(model, PeqaConfig(**PEQA))


def test_bitsandbytes_layers_are_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for layer in (bitsandbytes.nn.Linear4bit(10, 32), bitsandbytes.nn.Linear8bitLt(10, 32, has_fp16_weights=False)):
        with pytest.raises(ValueError, match=r"is bitsandbytes's Linear"):
            get_peft_model(holding(layer), PeqaConfig(bits=4, init_method="minmax"))


@pytest.mark.parametrize(
    "task_type, heads", [("SEQ_CLS", ["classifier"]), ("TOKEN_CLS", ["score"]), ("QUESTION_ANS", ["qa_outputs"])]
)
def test_heads_that_are_trained_in_full_are_not_packed(task_type, heads):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(16, 16)
            self.add_module(heads[0], nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2)))

        def forward(self, features):
            return getattr(self, heads[0])(self.body(features))

    config = PeqaConfig(**{**PEQA, "init_method": "calibrated"}, task_type=task_type)
    assert set(packed_layers(calibrate(Model(), config, [torch.randn(4, 16)], progressbar=False))) == {"body"}


@pytest.mark.parametrize("name", ["roberta", "electra", "distilbert", "mpnet", "bert"])
def test_classifiers_go_through_their_life(name, tmp_path):
    """Heads of several layers, and distilbert's pre_classifier, which PEFT takes for one."""
    config = PeqaConfig(**{**PEQA, "init_method": "calibrated"}, task_type="SEQ_CLS")
    batch = families.batch(name)
    model = get_peft_model(calibrate(families.build(name), config, [batch], progressbar=False), config)
    model(**families.batch(name, labels=True)).loss.backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.05)
        expected = model.eval()(**batch).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected)
        merged.save_pretrained(tmp_path)
        torch.testing.assert_close(type(merged).from_pretrained(tmp_path)(**batch).logits, expected)


def test_bcq_at_load_leaves_routers(tmp_path):
    families.build("phimoe").save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = type(families.build("phimoe")).from_pretrained(
            tmp_path, quantization_config=BcqConfig(bits=4, group_size=16)
        )
    assert packed_layers(model) and not any("router" in name for name in packed_layers(model))
    with torch.no_grad():
        model(**families.batch("phimoe"))


def test_rwkv_must_not_rescale_its_weights():
    model = families.build("rwkv")
    model.config.rescale_every = 6
    with pytest.raises(ValueError, match=r"rescale_every=6.*from_pretrained\(..., rescale_every=0\)"):
        get_peft_model(model, PeqaConfig(**PEQA))


def test_llama4_is_stored_where_its_experts_are_found(tmp_path):
    """With compressed-tensors transformers would look for one module an expert, and begin with random ones."""
    model = get_peft_model(families.build("llama4"), PeqaConfig(**PEQA, sym=True)).unload().eval()
    model.save_pretrained(tmp_path)
    batch = families.batch("llama4")
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(type(model).from_pretrained(tmp_path), batch), logits_of(model, batch), rtol=1e-4, atol=1e-4
        )


def test_our_own_layers_are_nobodys():
    model = get_peft_model(tiny("llama"), PeqaConfig(**PEQA))
    layer = next(module for module in model.modules() if isinstance(module, PackedLinear))
    assert foreign_weight(layer) is None and foreign_weight(nn.Linear(4, 4)) is None and acts_linearly(layer)
    assert foreign_weight(nn.Linear(4, 4, device="meta")) is None
