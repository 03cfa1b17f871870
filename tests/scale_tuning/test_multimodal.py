# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Models that see or hear: their language model is packed, on images and sounds, tuned, saved, loaded, by us and by stock."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from peft_ext import AdapterPool, AlphaTuningConfig, PeqaConfig, calibrate, report
from peft_ext.commands.export import main as export
from peft_ext.commands.tune import main as tune
from peft_ext.models import load
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.error_feedback import quantize_calibrated
from peft_ext.scale_tuning import calibration
from tests.cases import assert_same, move_adapter, tuner_layers
from tests.tiny.multimodal import AUDIO, IMAGE, MULTIMODAL, batch, multimodal, texts
from tests.tiny.tokenizers import byte_tokenizer


CONFIGS = {
    "calibrated": lambda: PeqaConfig(bits=4, init_method="calibrated"),
    "alphatuning": lambda: AlphaTuningConfig(bits=3, init_method="calibrated"),
    "symmetric": lambda: PeqaConfig(bits=4, sym=True),
    "groups": lambda: PeqaConfig(bits=3, group_size=16),
}
CYCLES = [
    *((name, "calibrated") for name in ("gemma3", "qwen2_5_vl", "llava", "qwen2_audio", "whisper")),
    *((name, "alphatuning") for name in ("gemma3", "qwen2_5_vl", "idefics3")),
    *(("paligemma", kind) for kind in ("symmetric", "groups")),
]
# Whose bases are saved without zero points, which stock loads compressed.
SYMMETRIC = ("qwen2_5_vl", "llava_next", "idefics3", "voxtral")
# Experts whose checkpoints fuse them are stored as bcq, which needs peft_ext.
FOR_STOCK = [name for name in MULTIMODAL if name != "qwen3_vl_moe"]
pytestmark = pytest.mark.filterwarnings("ignore:packed .* linear layers")


def every_layer(name: str, **kwargs) -> PeqaConfig:
    """Towers and projectors are named beside the language model; what Gemma3 doesn't use of its tower is not."""
    names = {key for key, module in multimodal(name).named_modules() if isinstance(module, torch.nn.Linear)}
    chosen = {key for key in names if not key.startswith(("lm_head", "model.vision_tower.head"))}
    return PeqaConfig(bits=3, init_method="calibrated", target_modules=chosen, **kwargs)


def out(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def packed(name: str, config) -> PeftModel:
    model = multimodal(name)
    if config.init_method == "calibrated":
        calibrate(model, config, [batch(name), batch(name, 1)], progressbar=False)
    return get_peft_model(model, config)


def load_again(name: str, folder):
    return getattr(transformers, MULTIMODAL[name].auto_class).from_pretrained(folder).eval()


@pytest.mark.parametrize(("name", "kind"), CYCLES)
def test_life_cycle(name, kind, tmp_path):
    """Calibrated on images and sounds, trained a step, saved, loaded packed; the adapter on it, merged, in a pool."""
    config, inputs, count = CONFIGS[kind](), batch(name), MULTIMODAL[name].packed
    model = packed(name, config)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert len(tuner_layers(model)) == count and len(trained) == count
    words = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    model.train()(**{k: v for k, v in inputs.items() if k != "decoder_input_ids"}, labels=words).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.values())
    move_adapter(model)
    tuned = out(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    base = model.unload()
    untuned = out(base, inputs)
    base.save_pretrained(tmp_path / "base")

    loaded = load_again(name, tmp_path / "base")
    assert set(packed_layers(loaded)) == set(packed_layers(base))
    assert torch.equal(out(loaded, inputs), untuned)
    again = PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    assert_same(out(again, inputs), tuned)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_same(out(load_again(name, tmp_path / "merged"), inputs), tuned)
    pool = AdapterPool(load_again(name, tmp_path / "base"))
    pool.load(tmp_path / "adapter", "tuned")
    pool.activate("tuned")
    assert_same(out(pool.model, inputs), tuned)
    assert len(tuner_layers(get_peft_model(load_again(name, tmp_path / "base"), CONFIGS[kind]()))) == count


STOCK = """
import json, sys, torch, transformers
inputs = torch.load(sys.argv[1] + "/inputs.pt")
for name, auto_class in json.loads(sys.argv[2]).items():
    model = getattr(transformers, auto_class).from_pretrained(f"{sys.argv[1]}/{name}").eval()
    with torch.no_grad():
        torch.save(model(**inputs[name]).logits, f"{sys.argv[1]}/{name}.pt")
assert not any(module.startswith("peft_ext") for module in sys.modules)
"""


class Base(NamedTuple):
    """A packed base in a folder, and what was said when it was packed."""

    model: nn.Module
    folder: Path
    said: list[str]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Of every model, without data: some symmetric, which stock loads compressed, others not, which it makes floats of."""
    root, found = tmp_path_factory.mktemp("bases"), {}
    for name in MULTIMODAL:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = packed(name, PeqaConfig(bits=4, sym=name in SYMMETRIC))
        said = [str(warning.message) for warning in caught if "linear layers" in str(warning.message)]
        found[name] = Base(model.unload(), root / name, said)
        found[name].model.save_pretrained(root / name)
    return found


def test_stock_transformers_loads_the_bases(bases, tmp_path, fresh_process):
    for name in FOR_STOCK:
        (tmp_path / name).symlink_to(bases[name].folder)
    torch.save({name: batch(name) for name in FOR_STOCK}, tmp_path / "inputs.pt")
    fresh_process(STOCK, tmp_path, json.dumps({name: MULTIMODAL[name].auto_class for name in FOR_STOCK}))
    for name in FOR_STOCK:
        assert_same(torch.load(tmp_path / f"{name}.pt"), out(bases[name].model, batch(name)), 1e-4)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_we_load_them_packed(name, bases):
    loaded = load_again(name, bases[name].folder)
    assert len(packed_layers(loaded)) == MULTIMODAL[name].packed
    assert torch.equal(out(loaded, batch(name)), out(bases[name].model, batch(name)))


@pytest.mark.parametrize("name", [name for name in FOR_STOCK if name not in SYMMETRIC])
def test_a_base_of_somebody_else_is_taken_over(name, bases, tmp_path):
    """Stock transformers has made floats of it; the files have the codes, under names that the model doesn't have."""
    settings = json.loads((bases[name].folder / "config.json").read_text())
    del settings["packed_bits"]  # our mark
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").symlink_to(bases[name].folder / "model.safetensors")
    loaded = load_again(name, tmp_path)
    assert not packed_layers(loaded)
    tuned = get_peft_model(loaded, PeqaConfig(bits=4)).get_base_model()
    layers = {key.removesuffix(".base_layer"): layer.fingerprint() for key, layer in packed_layers(tuned).items()}
    assert layers == {key: layer.fingerprint() for key, layer in packed_layers(bases[name].model).items()}


@pytest.mark.parametrize("name", MULTIMODAL)
def test_what_is_left_is_said_once(name, bases):
    _, _, said = bases[name]
    left = [part.reason for part in report(bases[name].model).left.values()]
    assert {reason: left.count(reason) for reason in left if reason != "output layer"} == MULTIMODAL[name].left
    assert len(said) == bool(MULTIMODAL[name].left)
    assert all(f"{reason}" in said[0] for reason in MULTIMODAL[name].left)


def test_calibration_and_injection_say_it_once():
    with pytest.warns(UserWarning) as caught:
        model = packed("llava", CONFIGS["calibrated"]())
    (line,) = (str(warning.message) for warning in caught if "linear layers" in str(warning.message))
    assert "packed 14 of 29 linear layers; left: vision tower x12, projector x2, lm_head (output layer)" in line
    assert report(model).uncalibrated == []


def test_towers_are_packed_where_they_are_named():
    config, model = every_layer("gemma3"), multimodal("gemma3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, config, [batch("gemma3")], progressbar=False)
    assert set(packed_layers(model)) == config.target_modules
    assert {layer.origin for layer in packed_layers(model).values()} == {"calibrated"}
    count = len(packed_layers(model))
    assert len(tuner_layers(get_peft_model(model, config))) == count == 14 + 12


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next", "mistral3", "qwen2_audio"])
def test_calibration_on_images_is_the_slow_way_done_at_once(name):
    """Layer by layer through tower, projector and language model, with the inputs of each computed anew."""
    float_model, step, inputs, config = multimodal(name), multimodal(name), batch(name), every_layer(name)
    calibrated = calibrate(multimodal(name), config, [inputs], progressbar=False)
    for layer_name in _in_order(float_model, config.target_modules, inputs):
        wanted, arrived = (_input_of(layer_name, model, inputs) for model in (float_model, step))
        layer = calibrated.get_submodule(layer_name)
        expected = quantize_calibrated(
            float_model.get_submodule(layer_name).weight,
            arrived.t() @ arrived,
            bits=3,
            shift=(wanted - arrived).t() @ arrived,
        )
        same = (layer.codes() == expected.codes).float().mean()
        assert same > 0.99, (layer_name, same)  # sums in another order may round a code the other way
        step.set_submodule(layer_name, layer)


def _in_order(model, names, inputs) -> list[str]:
    order: list[str] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name in names
    ]
    out(model, inputs)
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(order))


def _input_of(name, model, inputs) -> torch.Tensor:
    found = []
    with model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0])):
        out(model, inputs)
    return found[0].reshape(-1, found[0].shape[-1])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "mistral3", "smolvlm", "qwen2_audio"])
def test_batches_of_text_alone_may_be_among_them(name, monkeypatch):
    """Their tokens count beside the others', which are placed as if they were alone."""
    counted, original = [], calibration._moments
    monkeypatch.setattr(calibration, "_moments", lambda x, *rest: counted.append(len(x)) or original(x, *rest))
    alone = texts(seed=5, count=3)[:, :9]
    batches = [{"input_ids": alone}, batch(name), batch(name, 1)]
    if "attention_mask" in batches[1]:
        batches[0]["attention_mask"] = torch.ones_like(alone)
    model = calibrate(multimodal(name), CONFIGS["calibrated"](), batches, progressbar=False)
    ids = batch(name)["input_ids"]
    assert not ((alone == IMAGE) | (alone == AUDIO)).any()
    assert set(counted) == {2 * ids.numel() + alone.numel()}
    assert report(model).uncalibrated == []


def test_the_model_forgets_the_batch():
    """Qwen's keep the positions of the batch before, here of twice two texts, for embeddings that come without ids."""
    model = calibrate(multimodal("qwen2_5_vl"), CONFIGS["calibrated"](), [batch("qwen2_5_vl")], progressbar=False)
    ids = texts(count=3)
    embedded = {"inputs_embeds": model.get_input_embeddings()(ids)}
    assert_same(out(model, embedded), out(model, {"input_ids": ids}))


def test_mixed_batches():
    model, inputs = packed("qwen2_5_vl", CONFIGS["groups"]()), batch("qwen2_5_vl")
    model.add_adapter("other", CONFIGS["groups"]())
    expected = []
    for seed, name in enumerate(("default", "other")):
        move_adapter(model, name, seed=seed)
        model.set_adapter(name)
        expected.append(out(model, inputs)[seed])
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["default", "other"]).logits
    assert_same(mixed, torch.stack(expected))


def test_images_of_several_sizes():
    """Mistral3's processor pads the images of a batch; those of several batches are padded to the largest."""
    small = batch("mistral3")
    ids = texts(8, seed=3)
    wide = {
        "input_ids": ids,
        "pixel_values": torch.randn(2, 3, 56, 112),
        "image_sizes": torch.tensor([[56, 112], [56, 112]]),
    }
    model = calibrate(multimodal("mistral3"), CONFIGS["calibrated"](), [small, wide], progressbar=False)
    assert len(packed_layers(model)) == MULTIMODAL["mistral3"].packed


def test_keys_that_only_some_batches_have():
    with pytest.raises(ValueError, match="different keys.*position_ids"):
        calibrate(
            multimodal("llava"),
            CONFIGS["calibrated"](),
            [{"input_ids": texts()}, {"input_ids": texts(), "position_ids": torch.arange(14).expand(2, -1)}],
            progressbar=False,
        )


def test_text_alone_leaves_a_tower_that_is_named_uncalibrated_and_says_so():
    config, model = every_layer("qwen2_5_vl"), multimodal("qwen2_5_vl")
    with pytest.warns(UserWarning, match="never reached model.visual.blocks.0.attn.qkv.*minmax") as caught:
        calibrate(model, config, [{"input_ids": texts()}], progressbar=False)
    assert len([w for w in caught if "linear layers" in str(w.message)]) == 1
    assert len(report(model).uncalibrated) == MULTIMODAL["qwen2_5_vl"].left["vision tower"]
    assert all(name.startswith("model.visual.") for name in report(model).uncalibrated)
    assert report(get_peft_model(model, config)).uncalibrated == report(model).uncalibrated


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "voxtral", "whisper"])
def test_models_load_takes_them(name, bases):
    kind = "seq2seq" if name == "whisper" else "causal"
    for asked in (kind, "auto"):
        loaded = load(str(bases[name].folder), kind=asked)
        assert type(loaded) is type(bases[name].model) and packed_layers(loaded)


@pytest.mark.parametrize(("name", "method"), [("gemma3", "peqa"), ("qwen2_5_vl", "alphatuning")])
def test_tune(name, method, tmp_path, capsys):
    """On text: the language model is tuned, image and sound processors' settings go along."""
    config = multimodal(name).config
    config.text_config.vocab_size = len(byte_tokenizer())
    for key in (
        "image_token_id",
        "image_token_index",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
    ):
        if hasattr(config, key):
            setattr(config, key, 255)
    type(multimodal(name))(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    run = tmp_path / "run"
    flags = {
        "--model": tmp_path / "model",
        "--data": tmp_path / "text.txt",
        "--output_dir": run,
        "--method": method,
        "--block_size": 16,
        "--max_steps": 3,
        "--calibration_blocks": 4,
        "--held_out_blocks": 4,
    }
    tune([str(part) for pair in flags.items() for part in pair])
    assert (run / "base" / "preprocessor_config.json").is_file()
    model = load(str(run))
    assert len(tuner_layers(model)) == MULTIMODAL[name].packed
    assert all("language_model" in layer for layer in tuner_layers(model))
    export(["--model", str(run), "--to", "dequantized", "--output_dir", str(tmp_path / "floats")])
    assert (tmp_path / "floats" / "preprocessor_config.json").is_file()
    losses = json.loads((run / "metrics.json").read_text())["losses"]
    assert len({round(loss, 6) for _, loss in losses}) == len(losses)
