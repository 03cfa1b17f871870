# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`save_pretrained` replaces a folder whole, keeps what is someone else's in it, and its files know each other."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from generation_ext.critic import Critic
from generation_ext.granularity import CDNPGForConditionalGeneration, convert_to_granularity_attention
from peft_ext import AlphaTuningConfig, PeqaConfig, load_packed
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.model_card import README
from peft_ext.ood.detectors import load_detector, make_detector
from peft_ext.quant.conversion import packed_layers
from tests.cases import move_adapter
from tests.tiny.models import HIDDEN, inputs, logits_of, tiny


PACKED = PeqaConfig(bits=4, group_size=8, task_type="CAUSAL_LM")


def base(config, checkpoint_format=None):
    model = get_peft_model(tiny("llama"), copy.deepcopy(config)).unload()
    make_saveable(model, checkpoint_format)
    return model.eval()


@pytest.fixture(scope="module")
def packed():
    return base(PACKED)


def adapted(packed, strength, *names):
    model = get_peft_model(copy.deepcopy(packed), copy.deepcopy(PACKED))
    for name in names:
        model.add_adapter(name, copy.deepcopy(PACKED))
    move_adapter(model, strength=strength)
    return model


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def same(one, other) -> bool:
    """Up to rounding: an adapter's file holds scales, of which what is trained is a function."""
    one, other = (logits_of(each.eval(), inputs("llama")) for each in (one, other))
    return torch.allclose(one, other, rtol=0, atol=1e-5)


def test_a_packed_base_over_another_format(packed, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "base").symlink_to(tmp_path / "elsewhere")
    base(AlphaTuningConfig(bits=2, task_type="CAUSAL_LM"), "bcq").save_pretrained(
        tmp_path / "base", max_shard_size="20KB"
    )
    assert "model.safetensors.index.json" in listing(tmp_path / "base")
    (tmp_path / "base" / "notes").mkdir()
    (tmp_path / "base" / "notes" / "mine.txt").write_text("mine")
    card = tmp_path / "base" / README
    card.write_text(card.read_text().replace("license", "note: my own\nlicense", 1))
    packed.save_pretrained(tmp_path / "base")
    names = {"config.json", "generation_config.json", "model.safetensors", README, "notes", "notes/mine.txt"}
    assert listing(tmp_path / "base") == names and (tmp_path / "base").is_symlink()
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), packed)
    assert sorted(os.listdir(tmp_path)) == ["base", "elsewhere"]


def test_a_save_that_fails_leaves_the_old_base(packed, tmp_path, monkeypatch):
    packed.save_pretrained(tmp_path / "base")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        base(AlphaTuningConfig(bits=2, task_type="CAUSAL_LM"), "bcq").save_pretrained(tmp_path / "base")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), packed)
    assert os.listdir(tmp_path) == ["base"]


def test_models_of_others_are_saved_as_ever(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    inode = (tmp_path / "model").stat().st_ino
    tiny("llama").save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").stat().st_ino == inode
    get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").stat().st_ino == inode
    convert_to_granularity_attention(tiny("llama")).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").stat().st_ino != inode, "this one is ours"
    assert {"adapter_model.safetensors", "model.safetensors"} <= listing(tmp_path / "model")


def test_other_processes_write_nothing(packed, tmp_path):
    packed.save_pretrained(tmp_path / "base")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "base").iterdir()}
    packed.save_pretrained(tmp_path / "base", is_main_process=False)
    adapted(packed, 0.1).save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "base").iterdir()}
    assert not listing(tmp_path / "adapter") or not os.listdir(tmp_path / "adapter")


def test_a_file_in_the_way_stays(packed, tmp_path):
    (tmp_path / "base").write_text("mine")
    packed.save_pretrained(tmp_path / "base")  # transformers logs an error
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        adapted(packed, 0.1).save_pretrained(tmp_path / "base")
    assert (tmp_path / "base").read_text() == "mine"


def test_adapters(packed, tmp_path, monkeypatch):
    folder = tmp_path / "adapters"
    first = adapted(packed, 0.1, "second")
    first.save_pretrained(folder)
    (folder / "second" / "mine.txt").write_text("mine")
    second_before = (folder / "second" / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.bin").write_bytes(b"of an older PEFT")
    again = adapted(packed, 0.4, "second")
    again.save_pretrained(folder, selected_adapters=["default"])
    assert not (folder / "adapter_model.bin").exists() and (folder / "second" / "mine.txt").read_text() == "mine"
    assert (folder / "second" / "adapter_model.safetensors").read_bytes() == second_before
    assert same(PeftModel.from_pretrained(copy.deepcopy(packed), folder), again)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        first.save_pretrained(folder)
    assert same(PeftModel.from_pretrained(copy.deepcopy(packed), folder), again)


def test_into_the_working_directory(packed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packed.save_pretrained(".")
    assert "model.safetensors" in os.listdir(".") and same(AutoModelForCausalLM.from_pretrained("."), packed)
    adapted(packed, 0.1).save_pretrained(".")
    assert {"model.safetensors", "adapter_model.safetensors"} <= set(os.listdir("."))


def critics(folder: Path, shift: float) -> None:
    critic = Critic.for_model(tiny("llama"))
    with torch.no_grad():
        critic.head.weight.add_(shift)
    critic.save_pretrained(folder)


def paraphrasers(folder: Path, shift: float) -> None:
    from generation_ext.granularity import CDNPGConfig

    sizes = {"vocab_size": 60, "d_model": 36, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
    model = CDNPGForConditionalGeneration(CDNPGConfig(**sizes, encoder_layers=1, decoder_layers=1))
    with torch.no_grad():
        model.final_logits_bias.add_(shift)
    model.save_pretrained(folder)


def detectors(folder: Path, shift: float) -> None:
    features = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(0)) + shift
    make_detector("mahalanobis").fit(features, None, [0, 1] * 20).save_pretrained(folder)


MIXED = {
    "critic": (critics, Critic.from_pretrained, "model.safetensors"),
    "C-DNPG": (paraphrasers, CDNPGForConditionalGeneration.from_pretrained, "model.safetensors"),
    "detector": (detectors, load_detector, "detector.safetensors"),
}


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, load_packed])
def test_a_mixture_of_shards_is_refused(load, tmp_path):
    for name, seed in (("old", 1), ("new", 2)):
        model = base(PACKED)
        for layer in packed_layers(model).values():
            layer.scale.mul_(seed)
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
        load(tmp_path / name)
    shards = sorted(path.name for path in (tmp_path / "new").glob("*.safetensors"))
    assert shards == sorted(path.name for path in (tmp_path / "old").glob("*.safetensors")) and len(shards) > 1
    shutil.copy(tmp_path / "old" / shards[-1], tmp_path / "new" / shards[-1])
    with pytest.raises(ValueError, match=f"{shards[-1]}' isn't the shard that was saved with model.safetensors.index"):
        load(tmp_path / "new")


@pytest.mark.parametrize("kind", MIXED)
def test_a_mixture_of_two_saves_is_refused(kind, tmp_path):
    save, load, weights = MIXED[kind]
    for name, shift in (("old", 0.0), ("new", 1.0)):
        save(tmp_path / name, shift)
    load(tmp_path / "old")
    shutil.copy(tmp_path / "old" / weights, tmp_path / "new" / weights)
    with pytest.raises(ValueError, match=f"{weights}' isn't the file that was saved with"):
        load(tmp_path / "new")
    config = next((tmp_path / "new").glob("[cd]*.json"))
    settings = json.loads(config.read_text())
    del settings["files"]  # as an earlier version wrote it
    config.write_text(json.dumps(settings))
    load(tmp_path / "new")
