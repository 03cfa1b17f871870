# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""An AdapterPool computes what PeftModel computes with the same adapter files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_ext import AdapterPool, AlphaTuningConfig, PeqaConfig
from peft_ext.quant.conversion import packed_layers
from tests.cases import CASES_THAT_MERGE, assert_differs, assert_same, move_adapter, over
from tests.tiny.models import inputs, tiny


FILE = "adapter_model.safetensors"
# A pool is for scales; a classifier's head is trained in full, which it has no room for.
POOL_CASES = [case for case in CASES_THAT_MERGE if "modules_to_save" not in case.kwargs and case.model != "bert"]
pool_cases = over(POOL_CASES)
# OPT flattens batch and tokens, which leaves no samples to tell apart
MIXED_CASES = [case for case in POOL_CASES if case.model != "opt"]


def _saved(model: PeftModel, folder: Path) -> dict[str, Path]:
    model.save_pretrained(folder)
    return {name: folder if name == "default" else folder / name for name in model.peft_config}


def _pool_of(case, folder: Path) -> tuple[AdapterPool, dict[str, torch.Tensor]]:
    """A pool with the adapters "default" and "other", and what PEFT computes with each, and without ("base")."""
    model = case.with_two_adapters()
    paths = _saved(model, folder)
    expected = {}
    for name in paths:
        model.set_adapter(name)
        expected[name] = case.logits(model)
    with model.disable_adapter():
        expected["base"] = case.logits(model)
    pool = AdapterPool(model.unload())
    for name, path in paths.items():
        assert pool.load(path, name) == name
    return pool, expected


@pool_cases
def test_activate(case, tmp_path):
    pool, expected = _pool_of(case, tmp_path)
    assert torch.equal(case.logits(pool.model), expected["base"])
    for name in ("other", "default", "other"):
        pool.activate(name)
        assert pool.active == name
        assert_same(case.logits(pool.model), expected[name])
    assert_differs(expected["other"], expected["default"])
    pool.activate(None)
    assert torch.equal(case.logits(pool.model), expected["base"])


@pytest.mark.parametrize("together", [True, False])
@over(MIXED_CASES)
def test_mixed(case, together, tmp_path, monkeypatch):
    if not together:
        monkeypatch.setattr("peft_ext.scale_tuning.pool._STACKED_BYTES", 0)
    pool, expected = _pool_of(case, tmp_path)
    pool.activate("other")  # rows without a name take the base nevertheless
    with pool.mixed(["default", None, "other"]):
        mixed = case.logits(pool.model)
    for row, name in enumerate(("default", "base", "other")):
        assert_same(mixed[row], expected[name][row])
    assert_same(case.logits(pool.model), expected["other"])


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_mixed_beams(model, tmp_path):
    batch = inputs(model)
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    tuned = get_peft_model(tiny(model), PeqaConfig(bits=3)).eval()
    move_adapter(tuned, strength=0.5)
    tuned.save_pretrained(tmp_path)
    pool = AdapterPool(tuned.unload())
    pool.load(tmp_path, "one")
    base = pool.model.generate(**batch, **options)
    pool.activate("one")
    one = pool.model.generate(**batch, **options)
    with pool.mixed(["one", None, "one"]):
        mixed = pool.model.generate(**batch, **options)
    assert mixed[:2].tolist() == one[:2].tolist() and mixed[4:].tolist() == one[4:].tolist()
    assert mixed[2:4].tolist() == base[2:4].tolist()
    assert one.tolist() != base.tolist()


def test_adapters_of_other_layers_and_kinds_share_a_pool(tmp_path):
    configs = {
        "first": AlphaTuningConfig(bits=3),
        "all": AlphaTuningConfig(bits=3, trained_alphas="all"),
        "part": AlphaTuningConfig(bits=3, target_modules=["q_proj", "up_proj"]),
    }
    model = get_peft_model(tiny("llama"), configs["first"], "first").eval()
    for name in ("all", "part"):
        model.add_adapter(name, configs[name])
    for seed, name in enumerate(configs):
        move_adapter(model, name, seed=seed)
    batch = inputs("llama")
    expected = {}
    for name in configs:
        model.set_adapter(name)
        with torch.no_grad():
            expected[name] = model(**batch).logits
    model.save_pretrained(tmp_path)
    pool = AdapterPool(model.unload())
    for name in configs:
        pool.load(tmp_path / name)
    assert pool.names == list(configs)
    with torch.no_grad():
        for name in ("all", "part", "first", "all", "first", "part"):
            pool.activate(name)
            assert_same(pool.model(**batch).logits, expected[name])
        with pool.mixed(["part", "all", "first"]):
            mixed = pool.model(**batch).logits
    for row, name in enumerate(("part", "all", "first")):
        assert_same(mixed[row], expected[name][row])
    total = sum(layer.scale.numel() for layer in packed_layers(pool.model).values())
    assert pool.nbytes < 4 * 2 * total  # "first" holds a third of the scales, "part" less


def test_a_packed_checkpoint_and_a_saved_model(tmp_path):
    """A pool on what `from_pretrained` loads; the model is saved with the scales of the active adapter."""
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4, task_type="CAUSAL_LM")).eval()
    move_adapter(model)
    batch = inputs("llama")
    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    cls = type(tiny("llama"))
    pool = AdapterPool(cls.from_pretrained(tmp_path / "base").eval())
    pool.load(tmp_path / "adapter")
    pool.activate("adapter")
    with torch.no_grad():
        assert_same(pool.model(**batch).logits, expected)
        pool.model.save_pretrained(tmp_path / "merged")
        assert_same(cls.from_pretrained(tmp_path / "merged").eval()(**batch).logits, expected)


def test_load_again_and_remove(tmp_path):
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4)).eval()
    move_adapter(model)
    model.save_pretrained(tmp_path)
    pool = AdapterPool(model.unload())
    batch = inputs("llama")
    pool.load(tmp_path, "one")
    with torch.no_grad():
        base = pool.model(**batch).logits
        pool.activate("one")
        before = pool.model(**batch).logits
        tensors = load_file(tmp_path / FILE)
        save_file(
            {key: 2 * value if value.is_floating_point() else value for key, value in tensors.items()}, tmp_path / FILE
        )
        pool.load(tmp_path, "one")
        assert_differs(pool.model(**batch).logits, before)
        pool.remove("one")
        assert torch.equal(pool.model(**batch).logits, base)
    assert pool.names == [] and pool.nbytes == 0 and pool.active is None


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="no packed layers"):
        AdapterPool(tiny("llama"))
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4)).eval()
    with pytest.raises(ValueError, match=r"model\.unload\(\)"):
        AdapterPool(model)
    model.save_pretrained(tmp_path / "good")
    pool = AdapterPool(model.unload())
    pool.load(tmp_path / "good")
    with pytest.raises(ValueError, match="no adapter 'bad' in the pool; it has 1 \\('good'"):
        pool.activate("bad")
    with pytest.raises(ValueError, match="no adapter 'bad'"), pool.mixed(["good", "bad"]):
        pass
    for names in ([], "good"):
        with pytest.raises(ValueError, match="names="), pool.mixed(names):
            pass
    with pytest.raises(ValueError, match="2 names for a batch of 3"), pool.mixed(["good", None]):
        pool.model(**inputs("llama"))
    pool.activate(None)
    with torch.no_grad():
        pool.model(**inputs("llama"))  # no failed block goes on

    other = get_peft_model(tiny("llama"), PeqaConfig(bits=3))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained on other integer codes"):
        pool.load(tmp_path / "other")
    get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="LORA; the pool holds adapters of scales only"):
        pool.load(tmp_path / "lora")
    saved = get_peft_model(tiny("llama"), PeqaConfig(bits=4, modules_to_save=["lm_head"]))
    saved.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="modules_to_save=.*PeftModel.from_pretrained"):
        pool.load(tmp_path / "saved")
    assert pool.names == ["good"]


def test_trained_embeddings_are_not_dropped(tmp_path):
    saved = get_peft_model(tiny("llama"), PeqaConfig(bits=4))
    saved.save_pretrained(tmp_path, save_embedding_layers=True)
    pool = AdapterPool(get_peft_model(tiny("llama"), PeqaConfig(bits=4)).unload())
    with pytest.raises(ValueError, match="trained tensors beside its scales .*2 in all.*PeftModel.from_pretrained"):
        pool.load(tmp_path)
    assert not pool.names


def test_a_model_that_changes_under_the_pool(tmp_path):
    """Scales that are views no more would be switched where nobody reads them, and give the base's text."""
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4)).eval()
    move_adapter(model)
    model.save_pretrained(tmp_path)
    pool = AdapterPool(model.unload())
    pool.load(tmp_path, "one")
    with pool.mixed(["one"]), pytest.raises(ValueError, match="within itself"), pool.mixed([None]):
        pass
    pool.activate("one")  # the failed block has left nothing behind
    with pool.mixed(["one"]):
        pass
    pool.model.to(torch.bfloat16)  # leaves scales alone
    pool.activate("one")
    pool.model.to(torch.float64)
    for use in (lambda: pool.activate(None), lambda: pool.mixed(["one"]).__enter__()):
        with pytest.raises(ValueError, match="make the pool last"):
            use()


@pytest.mark.parametrize("damage", ["nan", "shape", "codes", "layer", "empty"])
def test_damaged_files(damage, tmp_path):
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4))
    model.save_pretrained(tmp_path)
    pool = AdapterPool(model.unload())
    tensors = load_file(tmp_path / FILE)
    key = next(key for key in tensors if key.endswith("peqa_scale"))
    match damage:
        case "nan":
            tensors[key][0] = float("nan")
        case "shape":
            tensors[key] = tensors[key][1:].clone()
        case "codes":
            del tensors[key.replace("scale", "codes")]
        case "layer":
            for part in (key, key.replace("scale", "codes")):
                tensors[part.replace("layers.0", "layers.7")] = tensors.pop(part)
        case "empty":
            tensors = {"x": torch.zeros(1)}
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    expected = {
        "nan": "NaN",
        "shape": "expected",
        "codes": "fingerprint",
        "layer": "does not tune",
        "empty": "no sca",
    }
    with pytest.raises(ValueError, match=expected[damage]):
        pool.load(tmp_path, "one")
    assert pool.names == []


def test_an_adapter_of_a_newer_peft_names_its_type(tmp_path):
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "NO_SUCH"}))
    with pytest.raises((KeyError, ValueError), match="NO_SUCH"):
        AdapterPool(model.unload()).load(tmp_path)
