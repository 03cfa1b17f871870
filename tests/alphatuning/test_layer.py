# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What only AlphaTuning promises: frozen signs, the first alphas trained (or all), initialisations, counts, files."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_ext import AlphaTuningConfig, PeqaConfig, calibrate
from peft_ext.quant.binary import quantize_binary
from peft_ext.quant.error_feedback import quantize_binary_calibrated
from peft_ext.quant.linear import PackedLinear
from tests.cases import CASES, assert_differs, assert_same, move_adapter, over, train, tuner_layers
from tests.tiny.models import HIDDEN, LAYERS, inputs, logits_of, tiny


ALPHA_CASES = [case for case in CASES if case.config_cls is AlphaTuningConfig]
alpha_cases = over(ALPHA_CASES)
LLAMA_CHANNELS = LAYERS * (2 * HIDDEN + 2 * HIDDEN // 2 + 2 * 2 * HIDDEN + HIDDEN)
BATCHES = [
    {"input_ids": torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(seed))} for seed in range(3)
]


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def plane(codes: torch.Tensor, index: int) -> torch.Tensor:
    return ((codes >> index) & 1).float() * 2 - 1


def gradients_of(model: nn.Module, model_inputs) -> dict[str, torch.Tensor]:
    logits_of(model, model_inputs).float().square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@alpha_cases
def test_forward_is_the_sum_of_planes(case):
    for layer in tuner_layers(case.moved()).values():
        base, alpha = layer.base_layer, layer.scale_of("default")
        size = layer.in_features // alpha.shape[1]
        weight = sum(
            alpha[..., p].repeat_interleave(size, 1) * plane(base.codes(), p) for p in range(case.kwargs["bits"])
        )
        x = torch.randn(2, 3, layer.in_features)
        assert_same(layer(x), nn.functional.linear(x, weight, base.bias))


@alpha_cases
def test_codes_and_other_alphas_are_frozen(case):
    model = case.fresh()
    before = {
        name: (layer.fingerprint(), layer.scale.clone(), None if layer.bias is None else layer.bias.clone())
        for name, layer in packed_layers(model).items()
    }
    train(model, case.inputs(), steps=2, lr=0.1)
    for name, layer in packed_layers(model).items():
        codes, scale, bias = before[name]
        assert layer.fingerprint() == codes and torch.equal(layer.scale, scale)
        assert bias is None or torch.equal(layer.bias, bias)
    for layer in tuner_layers(model).values():
        scale, base = layer.scale_of("default"), layer.base_layer.scale
        assert not torch.equal(scale[..., 0], base[..., 0])
        if case.kwargs.get("trained_alphas") != "all":
            assert torch.equal(scale[..., 1:], base[..., 1:])
        elif layer.base_layer.bits > 1:
            assert not torch.equal(scale[..., 1:], base[..., 1:])


@pytest.mark.parametrize("group_size, per_channel", [(-1, 1), (16, 2)])
@pytest.mark.parametrize("trained_alphas, alphas", [("first", 1), ("all", 3)])
def test_counts(trained_alphas, alphas, group_size, per_channel):
    config = AlphaTuningConfig(
        bits=3,
        group_size=group_size,
        trained_alphas=trained_alphas,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"],
    )
    model = get_peft_model(tiny("llama"), config)
    trainable, total = model.get_nb_trainable_parameters()
    groups = (LLAMA_CHANNELS - LAYERS * HIDDEN) * per_channel
    assert trainable == groups * alphas
    assert total == sum(p.numel() for p in tiny("llama").parameters()) + 3 * groups + trainable


@pytest.mark.parametrize("trained_alphas", ["first", "all"])
@pytest.mark.parametrize("group_size", [-1, 8])
def test_gradients_are_those_of_a_sum_of_planes(group_size, trained_alphas):
    """Against plain autograd through the dequantised weight."""
    config = AlphaTuningConfig(
        bits=3, group_size=group_size, trained_alphas=trained_alphas, target_modules=["lin1"], parametrization="log"
    )
    model = get_peft_model(tiny("mlp").double(), config).eval()
    move_adapter(model)
    layer = model.base_model.model.lin1
    x = torch.randn(4, layer.in_features, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    delta = layer.delta("default")
    found, found_x = delta.grad.clone(), x.grad.clone()

    delta.grad = x.grad = None
    alpha, base = layer.scale_of("default"), layer.base_layer
    size = layer.in_features // alpha.shape[1]
    weight = sum(alpha[..., p].repeat_interleave(size, 1) * plane(base.codes(), p).double() for p in range(3))
    nn.functional.linear(x, weight, base.bias).square().sum().backward()
    torch.testing.assert_close(found, delta.grad)
    torch.testing.assert_close(found_x, x.grad)


@pytest.mark.parametrize("init_method", ["greedy", "alternating"])
def test_data_free_initialisations(init_method):
    model = get_peft_model(tiny("llama"), AlphaTuningConfig(bits=3, init_method=init_method))
    floats = dict(tiny("llama").named_modules())
    for name, layer in tuner_layers(model.base_model.model).items():
        codes, alpha = quantize_binary(floats[name].weight, 3, method=init_method)
        assert torch.equal(layer.base_layer.codes(), codes) and torch.equal(layer.base_layer.scale, alpha)


def test_the_first_calibrated_layer_is_calibrated_on_its_own_inputs():
    config = AlphaTuningConfig(bits=2, init_method="calibrated", target_modules=["lin0"])
    model, x = tiny("mlp"), torch.randn(64, 10)
    weight = model.lin0.weight.detach().clone()
    calibrate(model, config, [x], progressbar=False)
    expected = quantize_binary_calibrated(weight, x.t() @ x / len(x), 2, shift=torch.zeros(10, 10))
    assert torch.equal(model.lin0.codes(), expected.codes)
    assert_same(model.lin0.scale, expected.alpha)


def test_calibrated_changes_the_output_least():
    """On the outputs of every layer of a whole model, against the data-free initialisations."""
    errors = {}
    for init_method in ("greedy", "alternating", "calibrated"):
        model, config = tiny("llama"), AlphaTuningConfig(bits=3, init_method=init_method)
        expected = torch.cat([logits_of(tiny("llama"), batch) for batch in BATCHES])
        if init_method == "calibrated":
            calibrate(model, config, BATCHES, progressbar=False)
        model = get_peft_model(model, config)
        with torch.no_grad():
            found = torch.cat([logits_of(model, batch) for batch in BATCHES])
        errors[init_method] = (found - expected).square().mean().item()
    assert errors["calibrated"] < errors["alternating"] < errors["greedy"]


def test_a_calibrated_base_and_its_adapter(tmp_path):
    config = AlphaTuningConfig(bits=2, init_method="calibrated", task_type="CAUSAL_LM")
    model = get_peft_model(calibrate(tiny("llama"), config, BATCHES, progressbar=False), config)
    move_adapter(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="still float. An adapter .* needs the packed base"):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)
    with pytest.raises(ValueError, match="Call peft_ext.calibrate.*init_method='alternating'"):
        get_peft_model(tiny("llama"), config)
    base = calibrate(tiny("llama"), config, BATCHES, progressbar=False)
    restored = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert_same(logits_of(restored, inputs("llama")), logits_of(model.eval(), inputs("llama")))


@alpha_cases
def test_the_file_holds_plain_trained_alphas(case, tmp_path):
    model = case.moved()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, layer in tuner_layers(model.base_model.model).items():
        key = f"base_model.model.{name}.alphatuning_"
        alpha, codes, scale = saved.pop(f"{key}scale"), saved.pop(f"{key}codes"), layer.scale_of("default")
        trained = layer.base_layer.bits if case.kwargs.get("trained_alphas") == "all" else 1
        assert torch.equal(alpha, scale[..., :trained]) and codes.item() == layer.base_layer.fingerprint()
        if trained < layer.base_layer.bits:
            frozen = saved.pop(f"{key}frozen")
            assert frozen.shape == (4,) and (frozen.abs() <= scale[..., trained:].abs().sum()).all()
    assert not [key for key in saved if "alphatuning" in key]


def test_adapters_of_first_and_of_all_alphas_on_one_base(tmp_path):
    config = AlphaTuningConfig(bits=3, task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama"), config, "first")
    model.add_adapter("all", AlphaTuningConfig(bits=3, trained_alphas="all", task_type="CAUSAL_LM"))
    for seed, name in enumerate(("first", "all")):
        move_adapter(model, name, seed=seed)
    model.eval()
    alone, batch = {}, inputs("llama")
    with torch.no_grad():
        for name in ("first", "all"):
            model.set_adapter(name)
            alone[name] = logits_of(model, batch)
        assert_differs(alone["first"], alone["all"])
        names = ["first", "all"] * len(batch["input_ids"])
        names = names[: len(batch["input_ids"])]
        mixed = logits_of(model, batch, adapter_names=names)
        for index, name in enumerate(names):
            assert_same(mixed[index], alone[name][index])
        model.save_pretrained(tmp_path)
        restored = PeftModel.from_pretrained(tiny("llama"), tmp_path / "all")
        assert_same(logits_of(restored, batch), alone["all"])
        restored.load_adapter(tmp_path / "first", "first")
        restored.set_adapter("first")
        assert_same(logits_of(restored, batch), alone["first"])
        # a weighted sum of both kinds trains all alphas
        model.add_weighted_adapter(["first", "all"], [1.0, 0.5], "sum")
    for layer in tuner_layers(model).values():
        base = layer.base_scale()
        expected = base + (layer.scale_of("first") - base) + 0.5 * (layer.scale_of("all") - base)
        assert_same(layer.scale_of("sum").detach(), expected.detach())


def test_a_base_whose_frozen_alphas_were_tuned_is_another_one(tmp_path):
    first = get_peft_model(tiny("llama"), AlphaTuningConfig(bits=3, task_type="CAUSAL_LM"))
    move_adapter(first)
    first.save_pretrained(tmp_path / "first")
    for trained, fits in (("first", True), ("all", False)):
        config = AlphaTuningConfig(bits=3, trained_alphas=trained, task_type="CAUSAL_LM")
        other = get_peft_model(tiny("llama"), config)
        move_adapter(other)
        merged = other.merge_and_unload()
        if fits:
            restored = PeftModel.from_pretrained(merged, tmp_path / "first")
            with torch.no_grad():
                assert_same(logits_of(restored, inputs("llama")), logits_of(first.eval(), inputs("llama")))
        else:
            with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.*other alphas"):
                PeftModel.from_pretrained(merged, tmp_path / "first")


def test_a_base_in_another_dtype_is_the_same_one(tmp_path):
    model = get_peft_model(tiny("llama"), AlphaTuningConfig(bits=3, task_type="CAUSAL_LM"))
    move_adapter(model)
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        base = get_peft_model(tiny("llama"), AlphaTuningConfig(bits=3, task_type="CAUSAL_LM")).unload().to(dtype)
        restored = PeftModel.from_pretrained(base, tmp_path)
        with torch.no_grad():
            found, expected = logits_of(restored, inputs("llama")), logits_of(model.eval(), inputs("llama"))
        assert_same(found, expected, tolerance=0.05)


def test_alphas_of_zero_stay_zero(tmp_path):
    """A pruned channel has no alphas; its adapter must survive the file."""
    float_model = tiny("mlp")
    with torch.no_grad():
        float_model.lin0.weight[3] = 0
    model = get_peft_model(float_model, AlphaTuningConfig(bits=2, target_modules=["lin0"]))
    assert (model.base_model.model.lin0.base_layer.scale[3] == 0).all()
    train(model, inputs("mlp"))
    model.save_pretrained(tmp_path)
    twin = tiny("mlp")
    with torch.no_grad():
        twin.lin0.weight[3] = 0
    restored = PeftModel.from_pretrained(twin, tmp_path)
    with torch.no_grad():
        assert_same(logits_of(restored, inputs("mlp")), logits_of(model.eval(), inputs("mlp")))


@pytest.mark.parametrize("bits", [0, 5, 9, -1, 2.5, "4"])
def test_bits(bits):
    with pytest.raises(ValueError, match=f"bits={bits!r} is not supported; choose one of \\(1, 2, 3, 4, 8\\)"):
        AlphaTuningConfig(bits=bits)


@pytest.mark.parametrize(
    "field, value", [("trained_alphas", "second"), ("init_method", "minmax"), ("parametrization", "x")]
)
def test_choices(field, value):
    with pytest.raises(ValueError, match=f"{field}='{value}' is unknown; choose one of"):
        AlphaTuningConfig(**{field: value})


@pytest.mark.parametrize(
    "base, adapter", [(PeqaConfig, AlphaTuningConfig), (AlphaTuningConfig, PeqaConfig)], ids=["peqa", "alphatuning"]
)
def test_a_base_in_the_other_format(base, adapter):
    packed = get_peft_model(tiny("llama"), base(bits=3)).unload()
    with pytest.raises(ValueError, match=f"q_proj.*quantised already to .*{adapter.__name__} tunes"):
        get_peft_model(packed, adapter(bits=3))


@pytest.mark.parametrize("other, match", [({"bits": 2}, "bits=3"), ({"bits": 3, "group_size": 8}, "group_size=16")])
def test_a_base_in_another_width(other, match):
    packed = get_peft_model(tiny("llama"), AlphaTuningConfig(bits=3, group_size=16)).unload()
    with pytest.raises(ValueError, match=f"never rounded again: pass .*{match}"):
        get_peft_model(packed, AlphaTuningConfig(**{"group_size": 16, **other}))


def test_a_group_size_that_does_not_divide():
    with pytest.raises(ValueError, match="layer '.*': group_size=24 does not divide in_features=32"):
        get_peft_model(tiny("llama"), AlphaTuningConfig(group_size=24))


def tampered(folder, change) -> None:
    from safetensors.torch import save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


KEY = "base_model.model.model.layers.1.self_attn.v_proj.alphatuning_"


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda tensors: tensors[f"{KEY}codes"].add_(1), "layers.1.self_attn.v_proj.*other integer codes"),
        (lambda tensors: tensors.pop(f"{KEY}codes"), "fingerprint"),
        (lambda tensors: tensors.pop(f"{KEY}frozen"), "nothing that identifies the frozen"),
        (lambda tensors: tensors[f"{KEY}frozen"].add_(0.1), "other alphas beside the first"),
        (lambda tensors: tensors[f"{KEY}scale"].fill_(float("nan")), "NaN or infinity"),
        (
            lambda tensors: tensors.update({f"{KEY}scale": torch.ones(16, 1, 3)}),
            r"\(16, 1, 3\), expected \(16, 1, 1\)",
        ),
    ],
)
def test_tampered_file(change, match, tmp_path):
    get_peft_model(tiny("llama"), AlphaTuningConfig(bits=3, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    tampered(tmp_path, change)
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)
