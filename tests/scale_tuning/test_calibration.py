# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Calibration: each layer on the inputs that it will see, whatever the model does with its batch."""

from __future__ import annotations

import weakref

import pytest
import torch
from peft import get_peft_model

from peft_ext import AlphaTuningConfig, PeqaConfig, calibrate, report
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.error_feedback import quantize_calibrated
from peft_ext.quant.linear import PackedLinear
from peft_ext.scale_tuning import calibration
from peft_ext.scale_tuning import model as tuner_model
from tests.cases import train
from tests.tiny.models import LAYERS, inputs, logits_of, tiny


BATCHES = [
    {"input_ids": torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(seed))} for seed in range(3)
]


def test_calibrated_initialisation():
    """Quantised in place on the data, taken over as it is, and closer to the float model on it than rounding."""
    batch = {"input_ids": torch.cat([batch["input_ids"] for batch in BATCHES])}
    config = PeqaConfig(bits=3, init_method="calibrated")
    model = tiny("llama")
    with torch.no_grad():
        exact = logits_of(model, batch)
    calibrated = calibrate(model, config, BATCHES, progressbar=False)
    assert calibrated is model and len(packed_layers(model)) == 7 * LAYERS
    codes = {name: layer.fingerprint() for name, layer in packed_layers(model).items()}
    peft_model = get_peft_model(calibrated, config).eval()
    assert {
        n.removesuffix(".base_layer"): p.fingerprint() for n, p in packed_layers(peft_model.base_model.model).items()
    } == codes
    rounded = get_peft_model(tiny("llama"), PeqaConfig(bits=3)).eval()
    with torch.no_grad():
        errors = [(logits_of(m, batch) - exact).square().mean() for m in (peft_model, rounded)]
    assert errors[0] < 0.8 * errors[1]
    losses = train(peft_model, batch)
    assert losses[-1] < losses[0]


def test_calibration_is_deterministic_and_takes_any_batches():
    config = PeqaConfig(bits=3, group_size=16, init_method="calibrated")
    runs = [
        calibrate(tiny("llama"), config, batches, progressbar=False)
        for batches in (BATCHES, iter(BATCHES), [batch["input_ids"] for batch in BATCHES])
    ]
    prints = [[layer.fingerprint() for layer in packed_layers(model).values()] for model in runs]
    assert prints[0] == prints[1] == prints[2]
    mlp = calibrate(tiny("mlp"), PeqaConfig(init_method="calibrated"), [torch.randn(8, 10)], progressbar=False)
    assert len(packed_layers(mlp)) == 3


def test_error_feedback_alone_is_a_method_of_its_own():
    """`"gptq"`: what `"calibrated"` was before it swept over the codes. It asks for data, and says what it is."""
    model, config = tiny("mlp"), PeqaConfig(bits=2, init_method="gptq")
    with pytest.raises(ValueError, match="init_method='gptq' needs data"):
        get_peft_model(model, config)
    x, weight = torch.randn(64, 10), model.get_submodule("lin0").weight.detach().clone()
    model = calibrate(model, config, [x], progressbar=False)
    layer = model.get_submodule("lin0")
    expected = quantize_calibrated(weight, x.t() @ x / 64, 2, sweeps=0)
    swept = quantize_calibrated(weight, x.t() @ x / 64, 2)
    assert torch.equal(layer.codes(), expected.codes) and not torch.equal(layer.codes(), swept.codes)
    assert report(model).packed["lin0"].origin == "gptq"
    get_peft_model(model, config)
    with pytest.raises(ValueError, match="init_method='gptq' is unknown"):
        AlphaTuningConfig(init_method="gptq")


def test_tokens_of_extreme_energy_count_less():
    """One token a thousand times the others' size: it decides error feedback alone, but not what is calibrated."""
    torch.manual_seed(0)
    x = torch.randn(64, 10)
    x[3] *= 1000
    usual, weight = x[torch.arange(64) != 3], tiny("mlp").get_submodule("lin0").weight.detach().clone()
    gaps = {}
    for init_method in ("gptq", "calibrated"):
        config = PeqaConfig(bits=3, init_method=init_method)
        layer = calibrate(tiny("mlp"), config, [x], progressbar=False).get_submodule("lin0")
        gaps[init_method] = (usual @ (layer.dequantize() - weight).t()).square().sum()
    assert gaps["calibrated"] < 0.7 * gaps["gptq"]
    # by hand: at most 8 medians each, shares that sum to 1
    energy = x.square().sum(1)
    share = (8 * energy.median() / energy).clamp(max=1)
    found = calibration._moments(x, None, limited=True)
    torch.testing.assert_close(found.hessian, (x.t() * (share / share.sum())) @ x, rtol=1e-4, atol=1e-4)
    assert (energy > 8 * energy.median()).sum() == 1


def test_calibration_is_the_slow_way_done_at_once():
    """Layer by layer, with the inputs of the float model and those through the packed layers computed anew."""
    config = PeqaConfig(bits=3, init_method="calibrated")
    x, float_model = torch.randn(64, 10), tiny("mlp")
    calibrated = calibrate(tiny("mlp"), config, list(x.split(16)), progressbar=False)
    packed = tiny("mlp")
    for name in packed_layers(calibrated):
        float_input, arrived = (_input_of(name, model, x) for model in (float_model, packed))
        expected = quantize_calibrated(
            float_model.get_submodule(name).weight,
            arrived.t() @ arrived,
            bits=3,
            shift=(float_input - arrived).t() @ arrived,
        )
        layer = calibrated.get_submodule(name)
        assert torch.equal(layer.codes(), expected.codes), name
        torch.testing.assert_close(layer.scale.data, expected.scale)
        packed.set_submodule(name, layer)


def _input_of(name, model, x):
    inputs = []
    with model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0])), torch.no_grad():
        model(x)
    return inputs[0]


def test_calibration_of_layers_that_see_picked_rows():
    """Rows that a model picks out of the batch can't be told apart; the layer is calibrated on all of them."""

    class Picks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)

        def forward(self, x):
            x = self.first(x)
            return self.second(x[: len(x) // 2 + 1])

    config = PeqaConfig(bits=4, init_method="calibrated", target_modules=["first", "second"])
    calibrated = calibrate(Picks(), config, [torch.randn(32, 8)], progressbar=False)
    assert set(packed_layers(calibrated)) == {"first", "second"}


def test_calibration_of_a_model_whose_batch_comes_second():
    """The copies of the batch can't be told apart by the first dimension, whatever its size is by chance."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))

    class TimeFirst(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x.transpose(0, 1))

    config = PeqaConfig(bits=3, init_method="calibrated", target_modules=["0", "2"])
    x = torch.randn(6, 12, 8)  # 12 steps of time: as many as samples, twice
    weight = model[0].weight.detach().clone()
    calibrated = calibrate(TimeFirst(), config, [x], progressbar=False)
    rows = torch.cat([x, x]).reshape(-1, 8)
    expected = quantize_calibrated(weight, rows.t() @ rows, 3)
    assert torch.equal(calibrated.inner[0].codes(), expected.codes)


def test_calibration_of_an_encoder_decoder_takes_training_batches():
    batch = inputs("t5")
    labels = batch["decoder_input_ids"]
    batches = [{"input_ids": batch["input_ids"], "labels": labels}]
    config = PeqaConfig(bits=4, init_method="calibrated")
    calibrated = calibrate(tiny("t5"), config, batches, progressbar=False)
    model = tiny("t5")
    explicit = {"input_ids": batch["input_ids"], "decoder_input_ids": model._shift_right(labels)}
    other = calibrate(model, config, [explicit], progressbar=False)
    prints = [[layer.fingerprint() for layer in packed_layers(each).values()] for each in (calibrated, other)]
    assert prints[0] == prints[1]


@pytest.mark.parametrize("model", ["llama", "opt"])
def test_padding_does_not_count(model, monkeypatch):
    """Also where a model flattens the tokens before a layer, as OPT does."""
    counted, original = [], calibration._moments
    monkeypatch.setattr(calibration, "_moments", lambda x, *rest: counted.append(len(x)) or original(x, *rest))
    batches = [{"input_ids": torch.randint(3, 20, (2, length))} for length in (5, 8)]
    calibrate(tiny(model), PeqaConfig(init_method="calibrated"), batches, progressbar=False)
    assert set(counted) == {2 * 5 + 2 * 8}


def test_padding_of_labels_does_not_count(monkeypatch):
    counted, original = [], calibration._moments
    monkeypatch.setattr(calibration, "_moments", lambda x, *rest: counted.append(len(x)) or original(x, *rest))
    labels = torch.randint(3, 20, (2, 7))
    labels[1, 4:] = -100
    batches = [
        {"input_ids": torch.randint(3, 20, (2, 9)), "labels": labels},
        {"input_ids": torch.randint(3, 20, (2, 6)), "labels": torch.randint(3, 20, (2, 5))},
    ]
    calibrate(tiny("t5"), PeqaConfig(init_method="calibrated"), batches, progressbar=False)
    encoder, decoder = 2 * 9 + 2 * 6, 7 + 4 + 2 * 5
    assert set(counted) == {encoder, decoder}


def test_calibration_keeps_no_cache():
    model = tiny("llama")
    seen = []
    model.model.layers[0].register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs.get("past_key_values")), with_kwargs=True
    )
    calibrate(model, PeqaConfig(init_method="calibrated"), BATCHES, progressbar=False)
    assert seen == [None] and model.config.use_cache


@pytest.mark.parametrize("init_method", ["minmax", "calibrated"])
def test_one_float_layer_at_a_time(init_method, monkeypatch):
    """Every float weight is gone by the time that the next layer is packed."""
    model, config, alive = tiny("llama"), PeqaConfig(init_method=init_method), []
    packs = [calibration, tuner_model]
    original = calibration.pack_layer

    def watched(module, *args):
        for reference in alive:
            assert reference() is None
        packed = original(module, *args)
        if not isinstance(module, PackedLinear):
            alive.append(weakref.ref(module.weight))
        return packed

    for module in packs:
        monkeypatch.setattr(module, "pack_layer", watched)
    if init_method == "calibrated":
        calibrate(model, config, BATCHES, progressbar=False)
    get_peft_model(model, config)
    assert len(alive) == 7 * LAYERS


def test_calibration_leaves_modes_and_config_alone():
    """Every module has its own mode afterwards, a packed layer that of the float one: a frozen part stays in eval."""
    config = PeqaConfig(init_method="calibrated")
    model = tiny("llama").train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    calibrate(model, config, BATCHES, progressbar=False)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert config == PeqaConfig(init_method="calibrated")


def test_calibration_that_fails_leaves_modes_and_cache_alone():
    model = tiny("llama").train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    model.model.layers[1].input_layernorm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="calibration inputs have NaN"):
        calibrate(model, PeqaConfig(init_method="calibrated"), BATCHES, progressbar=False)
    assert {name: module.training for name, module in model.named_modules()} == before and model.config.use_cache
