# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Wrong input: each an error that names what is wrong, before any change where the check can run first."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_ext import AlphaTuningConfig, PeqaConfig, calibrate
from tests.cases import assert_same, move_adapter, tuner_layers
from tests.tiny.models import inputs, logits_of, tiny


IDS = torch.randint(3, 100, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[PeqaConfig, AlphaTuningConfig], ids=["peqa", "alphatuning"])
def config_cls(request):
    return request.param


def _refused(model, config, match: str, error: type[Exception] = ValueError) -> None:
    """`get_peft_model` refuses, and leaves every weight and module as it was."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    types = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=match):
        get_peft_model(model, config)
    assert {name: type(module) for name, module in model.named_modules()} == types
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [0, 1, 7, 9, 16, -4, 4.5, None, "4", "base", True])
def test_bits(bits):
    if bits not in (None, "base"):
        with pytest.raises((ValueError, TypeError), match=rf"bits={bits!r}.*2, 3, 4, 5, 6, 8"):
            PeqaConfig(bits=bits)
    with pytest.raises((ValueError, TypeError), match=rf"{bits!r}.*2, 3, 4, 5, 6, 8"):
        PeqaConfig(bits_pattern={"q_proj": bits})


@pytest.mark.parametrize("group_size", [0, -2, 1.5, "64", None, True])
def test_group_size(config_cls, group_size):
    if group_size is not None:
        with pytest.raises((ValueError, TypeError), match=rf"group_size={group_size!r}"):
            config_cls(group_size=group_size)
    with pytest.raises((ValueError, TypeError), match=rf"group_size={group_size!r}"):
        config_cls(group_size_pattern={"q_proj": group_size})


@pytest.mark.parametrize(
    ("field", "value"),
    [("init_method", "best"), ("init_method", None), ("parametrization", "linear"), ("task_type", "SING")],
)
def test_choices(field, value):
    with pytest.raises(ValueError, match=f"{value}"):
        PeqaConfig(**{field: value})


def test_unknown_argument(config_cls):
    with pytest.raises(TypeError, match="bit_width"):
        config_cls(bit_width=3)


@pytest.mark.parametrize("group_size", [24, 33, 64])
def test_a_group_size_that_does_not_divide(config_cls, group_size):
    _refused(tiny("llama"), config_cls(group_size=group_size), rf"q_proj.*group_size={group_size}.*in_features=32")


def test_a_group_size_that_divides_some_layers_only(config_cls):
    config = config_cls(group_size=64, target_modules=["down_proj", "q_proj"])
    _refused(tiny("llama"), config, "q_proj.*group_size=64.*in_features=32")


@pytest.mark.parametrize("targets", [["nothing_like_this"], r".*nothing_like_this", []], ids=str)
def test_no_matching_module(config_cls, targets):
    _refused(tiny("llama"), config_cls(target_modules=targets), "nothing_like_this.*not found|No.*target")


def test_nothing_left_in_the_chosen_layers(config_cls):
    config = config_cls(target_modules=["q_proj"], layers_to_transform=[7])
    _refused(tiny("llama"), config, r"q_proj.*not found.*layers_to_transform.*7")


@pytest.mark.parametrize(
    ("model", "target", "kind"),
    [("llama", "embed_tokens", "Embedding"), ("gpt2", "wte", "Embedding"), ("conv", "embed", "Embedding")]
    + [("conv", "conv1", "Conv2d"), ("llama", "mlp", "MLP"), ("llama", "norm", "Norm")],
)
def test_targets_that_are_not_linear(config_cls, model, target, kind):
    _refused(tiny(model), config_cls(target_modules=[target]), f"{target}.*{kind}.*not supported")


def test_a_bad_target_beside_good_ones_changes_none_of_them(config_cls):
    _refused(tiny("llama"), config_cls(target_modules=["q_proj", "embed_tokens"]), "embed_tokens.*Embedding")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize(
    "config_cls, method",
    [(PeqaConfig, "minmax"), (PeqaConfig, "mse"), (AlphaTuningConfig, "greedy"), (AlphaTuningConfig, "alternating")],
)
def test_a_weight_that_is_not_finite(value, config_cls, method):
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    _refused(model, config_cls(init_method=method), r"model\.layers\.1\.mlp\.up_proj.*(NaN|infinity)")


def test_a_weight_that_is_not_finite_when_calibrating(config_cls):
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj.*NaN"):
        calibrate(model, config_cls(init_method="calibrated"), [IDS], progressbar=False)
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)


@pytest.mark.parametrize("calibrated", [False, True])
def test_an_offloaded_model(calibrated):
    model = cpu_offload(tiny("llama"))
    config = PeqaConfig(init_method="calibrated" if calibrated else "minmax")
    with pytest.raises(ValueError, match="q_proj.*is offloaded.*without offload"):
        calibrate(model, config, [IDS], progressbar=False) if calibrated else get_peft_model(model, config)


def test_integer_input(config_cls):
    layer = next(iter(tuner_layers(get_peft_model(tiny("mlp"), config_cls())).values()))
    with pytest.raises((TypeError, ValueError, RuntimeError), match="(?i)int|float|dtype"):
        layer(torch.ones(2, 10, dtype=torch.long))


@pytest.mark.parametrize("shape", [(2, 9), (2, 3, 11), (10, 2)])
def test_wrong_hidden_size(config_cls, shape):
    layer = next(iter(tuner_layers(get_peft_model(tiny("mlp"), config_cls())).values()))
    with pytest.raises((ValueError, RuntimeError), match=rf"{shape[-1]}.*10|10.*{shape[-1]}"):
        layer(torch.randn(shape))


def test_calibrated_without_calibration(config_cls):
    _refused(tiny("llama"), config_cls(init_method="calibrated"), r"calibrated.*calibrate\(model, config, batches\)")


def test_calibrating_for_another_start():
    with pytest.raises(ValueError, match="init_method='minmax'.*'calibrated'"):
        calibrate(tiny("llama"), PeqaConfig(), [IDS], progressbar=False)


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "empty"),
        ([{"input_ids": IDS}, {"attention_mask": IDS}], "different keys"),
        (["some text"], "str"),
        ([{"input_ids": IDS[:, :0]}], "empty|token"),
    ],
    ids=["none", "keys", "text", "no-tokens"],
)
def test_calibration_data(config_cls, batches, match):
    model = tiny("llama")
    with pytest.raises((ValueError, TypeError), match=match):
        calibrate(model, config_cls(init_method="calibrated"), batches, progressbar=False)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.isfinite(logits_of(model, {"input_ids": IDS})).all()


def test_calibrating_nothing(config_cls):
    config = config_cls(init_method="calibrated", target_modules=["nothing_like_this"])
    with pytest.raises(ValueError, match="nothing_like_this.*not found"):
        calibrate(tiny("llama"), config, [IDS], progressbar=False)


@pytest.fixture
def adapter(tmp_path):
    """A saved 4-bit adapter of the tiny llama."""
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4)).eval()
    move_adapter(model)
    model.save_pretrained(tmp_path)
    return tmp_path


def _weights(folder):
    return folder / "adapter_model.safetensors"


def _edit_weights(folder, change) -> None:
    tensors = load_file(_weights(folder))
    change(tensors)
    save_file(tensors, _weights(folder), metadata={"format": "pt"})


def _edit_config(folder, **values) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _key(kind: str) -> str:
    return f"base_model.model.model.layers.1.self_attn.v_proj.peqa_{kind}"


def test_adapter_for_other_codes(adapter):
    other = tiny("llama")
    other.model.layers[1].self_attn.v_proj.weight.data.mul_(-1)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj.*other integer codes"):
        PeftModel.from_pretrained(other, adapter)


def test_adapter_for_other_bits(adapter):
    _edit_config(adapter, bits=3)
    with pytest.raises(ValueError, match="q_proj.*other integer codes"):
        PeftModel.from_pretrained(tiny("llama"), adapter)


def test_adapter_for_other_bits_as_a_second_one(adapter):
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=3)).eval()
    before = logits_of(model, inputs("llama"))
    with pytest.raises(ValueError, match="q_proj.*bits"):
        model.load_adapter(adapter, "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits_of(model, inputs("llama")), before)


def test_hot_swap_of_other_codes_leaves_the_old_adapter(adapter):
    other = tiny("llama")
    other.model.layers[1].mlp.down_proj.weight.data.mul_(-1)
    model = get_peft_model(other, PeqaConfig(bits=4)).eval()
    move_adapter(model, seed=2)
    before = logits_of(model, inputs("llama"))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj.*other integer codes"):
        model.load_adapter(adapter, "default")
    assert torch.equal(logits_of(model, inputs("llama")), before)


@pytest.mark.parametrize("left", [0, 7, 100, -200])
def test_truncated_file(adapter, left):
    content = _weights(adapter).read_bytes()
    _weights(adapter).write_bytes(content[:left])
    with pytest.raises(Exception, match="(?i)safetensors|header|incomplete|deserializ") as error:
        PeftModel.from_pretrained(tiny("llama"), adapter)
    assert type(error.value).__name__ in ("SafetensorError", "ValueError", "OSError")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t[_key("scale")].fill_(float("nan")), r"v_proj.*NaN"),
        (lambda t: t[_key("scale")].__setitem__(0, float("inf")), r"v_proj.*(NaN|infinity)"),
        (lambda t: t.update({_key("scale"): t[_key("scale")][:-1].clone()}), r"v_proj.*shape.*expected"),
        (lambda t: t.update({_key("scale"): t[_key("scale")].long()}), r"v_proj.*float"),
        (lambda t: t[_key("codes")].add_(1), r"v_proj.*other integer codes"),
        (lambda t: t.pop(_key("codes")), r"v_proj.*fingerprint"),
        (lambda t: t.update({_key("codes"): torch.ones(2, dtype=torch.int64)}), r"v_proj.*fingerprint"),
        (lambda t: t.update({_key("codes"): torch.ones(1)}), r"v_proj.*fingerprint"),
    ],
    ids=["nan", "inf", "shape", "dtype", "fingerprint", "no-fingerprint", "two-fingerprints", "float-fingerprint"],
)
def test_tampered_file(adapter, change, match):
    _edit_weights(adapter, change)
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(tiny("llama"), adapter)


def test_missing_layer_in_the_file(adapter):
    """PEFT warns of missing keys; what's missing stays the base."""
    _edit_weights(adapter, lambda tensors: [tensors.pop(_key(kind)) for kind in ("scale", "codes")])
    with pytest.warns(UserWarning, match=r"missing.*v_proj\.peqa"):
        model = PeftModel.from_pretrained(tiny("llama"), adapter)
    layer = tuner_layers(model.base_model.model)["model.layers.1.self_attn.v_proj"]
    assert_same(layer.scale_of("default"), layer.base_layer.scale)


def test_a_layer_in_the_file_that_is_not_tuned(adapter):
    _edit_config(adapter, exclude_modules=["v_proj"])
    with pytest.raises(ValueError, match=r"v_proj\.peqa.*does not tune"):
        PeftModel.from_pretrained(tiny("llama"), adapter)


def test_no_weights_at_all(adapter):
    _weights(adapter).unlink()
    with pytest.raises((ValueError, OSError), match=str(adapter.name)):
        PeftModel.from_pretrained(tiny("llama"), adapter)


def test_broken_config_file(adapter):
    _edit_config(adapter, bits=7)
    with pytest.raises(ValueError, match="bits=7"):
        PeftModel.from_pretrained(tiny("llama"), adapter)


def test_another_methods_adapter_under_our_name(adapter):
    _edit_config(adapter, peft_type="LORA")
    with pytest.raises((ValueError, RuntimeError, KeyError, TypeError)):
        model = get_peft_model(tiny("llama"), PeqaConfig())
        model.load_adapter(adapter, "second")
