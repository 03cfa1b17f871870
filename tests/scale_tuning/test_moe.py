# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The life of a mixture of experts: packed, calibrated, tuned, saved, loaded packed, merged, served from a pool."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_ext import AdapterPool, AlphaTuningConfig, BcqConfig, PeqaConfig, calibrate, load_packed
from peft_ext.checkpoint.pack_quantized import PackQuantizedWriter
from peft_ext.memory.estimate import tuning_memory
from peft_ext.memory.trace import TrainingStep
from peft_ext.quant.conversion import dequantize_layers, float_layers, packed_layers
from peft_ext.quant.experts import fused_experts, unfused_experts
from peft_ext.quant.replaceable import acts_linearly
from peft_ext.routers import routers
from peft_ext.scale_tuning.layer import ScaleTuningLinear
from tests.tiny.moe import EXPERTS, MOE, moe_batch, tiny_moe
from tests.tiny.tokenizers import VOCAB


families = pytest.mark.parametrize("family", MOE)
configs = pytest.mark.parametrize(
    "config",
    [PeqaConfig(bits=4), PeqaConfig(bits=3, sym=True, group_size=32), AlphaTuningConfig(bits=2, init_method="greedy")],
    ids=["peqa", "peqa-sym", "alphatuning"],
)
# Where stock transformers finds the experts of a packed checkpoint one by one.
APART = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "phimoe", "llama4")


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch):
    monkeypatch.setenv("PEFT_EXT_KERNEL", "torch")  # the kernel rounds inputs, and a router may then choose otherwise


def _tokens(rows: int = 8, seed: int = 5) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (rows, 48), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _moved(model: PeftModel, seed: int = 0) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _logits(model: nn.Module, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**moe_batch(), **kwargs).logits


@families
@configs
def test_all_linear_packs_the_experts_and_leaves_the_routers(family, config):
    model = get_peft_model(tiny_moe(family), copy.deepcopy(config))
    floats = set(float_layers(model.get_base_model()))
    assert floats == {"lm_head"} | routers(model.get_base_model())
    packed = packed_layers(model)
    weights = sum(layer.in_features * layer.out_features for layer in packed.values())
    assert weights / tiny_moe(family).num_parameters() > 0.85
    assert sum(".experts." in name for name in packed) == 3 * EXPERTS * len(unfused_experts(model))


@families
@configs
def test_every_expert_that_got_tokens_learns(family, config):
    model = get_peft_model(tiny_moe(family), copy.deepcopy(config)).train()
    reached = set()
    for name, layer in model.named_modules():
        if isinstance(layer, ScaleTuningLinear):
            layer.register_forward_hook(lambda layer, args, output, name=name: reached.add(name))
    batch = moe_batch()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    deltas = {
        name: layer.delta("default") for name, layer in model.named_modules() if isinstance(layer, ScaleTuningLinear)
    }
    assert reached == {name for name, delta in deltas.items() if delta.grad is not None}
    assert sum(bool(deltas[name].grad.any()) for name in reached) > 0.9 * len(
        reached
    )  # the last token teaches nothing
    assert sum(".experts." in name for name in reached) > 3 * EXPERTS / 2


@families
@configs
def test_saved_and_loaded_packed(family, config, tmp_path):
    model = _moved(get_peft_model(tiny_moe(family), copy.deepcopy(config)))
    expected = _logits(model)
    model.save_pretrained(tmp_path / "adapter")
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(_logits(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert packed_layers(loaded).keys() == packed_layers(merged).keys() and not fused_experts(loaded)
    assert torch.equal(_logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)

    model.unload().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(_logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)
    pool = AdapterPool(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    pool.load(tmp_path / "adapter", name="one")
    pool.activate("one")
    torch.testing.assert_close(_logits(pool.model), expected)


@families
def test_merged_to_floats_it_is_the_family_s_own_model(family, tmp_path):
    model = _moved(get_peft_model(tiny_moe(family), PeqaConfig(bits=4)))
    expected = _logits(model)
    floats = model.merge_and_unload(dequantize=True)
    assert len(fused_experts(floats)) == len(fused_experts(tiny_moe(family))) and not unfused_experts(floats)
    torch.testing.assert_close(_logits(floats), expected, rtol=1e-4, atol=1e-4)
    floats.save_pretrained(tmp_path)
    torch.testing.assert_close(_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, rtol=1e-4, atol=1e-4)


def test_stock_transformers_loads_symmetric_ones(tmp_path):
    """In a process without peft_ext: floats, and the same logits."""
    for family in APART:
        model = get_peft_model(tiny_moe(family), PeqaConfig(bits=3, sym=True)).merge_and_unload()
        assert model.config.quantization_config.quant_method == "compressed-tensors"
        model.save_pretrained(tmp_path / family)
        torch.save(_logits(dequantize_layers(model)), tmp_path / family / "logits.pt")
    torch.save(moe_batch(), tmp_path / "batch.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", _STOCK, str(tmp_path), *APART]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


_STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, *families = sys.argv[1:]
batch = torch.load(f"{folder}/batch.pt")
for family in families:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{family}").eval()
    with torch.no_grad():
        logits = model(**batch).logits
    torch.testing.assert_close(logits, torch.load(f"{folder}/{family}/logits.pt"), rtol=1e-4, atol=1e-4)
assert "peft_ext" not in sys.modules
"""


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_where_stock_transformers_finds_no_single_experts_the_format_is_ours(family):
    model = get_peft_model(tiny_moe(family), PeqaConfig(bits=3, sym=True)).merge_and_unload()
    assert model.config.quantization_config.quant_method == "bcq"


def test_zero_points_of_experts_are_not_written_where_stock_transformers_would_drop_them():
    model = get_peft_model(tiny_moe("mixtral"), PeqaConfig(bits=4)).merge_and_unload()
    assert model.config.quantization_config.quant_method == "bcq"


@families
@pytest.mark.parametrize("config", [PeqaConfig, AlphaTuningConfig])
def test_calibration_is_better_than_none(family, config):
    bits = 3 if config is PeqaConfig else 2
    data_free = {"init_method": "mse"} if config is PeqaConfig else {"init_method": "alternating"}
    held_out = _tokens(seed=6)
    with torch.no_grad():
        expected = tiny_moe(family)(**held_out).logits
    errors = []
    for options in (data_free, {"init_method": "calibrated"}):
        asked, model = config(bits=bits, **options), tiny_moe(family)
        if options["init_method"] == "calibrated":
            calibrate(model, asked, [_tokens()], progressbar=False)
            assert all(experts.pairing is None for experts in unfused_experts(model).values())
        model = get_peft_model(model, asked)
        with torch.no_grad():
            errors.append((model(**held_out).logits - expected).square().mean())
    assert errors[1] < 0.95 * errors[0]


def test_experts_with_too_few_tokens_are_named():
    model, config = tiny_moe("qwen3_moe"), PeqaConfig(bits=3, init_method="calibrated")
    few = {"input_ids": torch.full((1, 40), 5)}  # one token, again and again: two experts of each block
    with pytest.warns(
        UserWarning, match=r"calibrate: \d of 8 experts, such as 'model.layers.0.mlp.experts.\d', .* data"
    ):
        calibrate(model, config, [few], progressbar=False)
    packed = packed_layers(model)
    assert set(float_layers(model)) == {"lm_head"} and len(packed) == 2 * (4 + 3 * EXPERTS)
    # those without data are what the data-free initialisation gives
    free = packed_layers(get_peft_model(tiny_moe("qwen3_moe"), PeqaConfig(bits=3)).unload())
    same = [name for name in packed if packed[name].fingerprint() == free[name].fingerprint()]
    assert same and all(".experts." in name for name in same)


def test_calibration_of_experts_alone():
    config = PeqaConfig(bits=3, init_method="calibrated", target_modules=r".*experts.*_proj")
    model = calibrate(tiny_moe("qwen3_moe"), config, [_tokens()], progressbar=False)
    assert all(".experts." in name for name in packed_layers(model))
    assert get_peft_model(model, config).get_nb_trainable_parameters()[0] > 0


@families
def test_mixed_batches(family, tmp_path):
    model = _moved(get_peft_model(tiny_moe(family), PeqaConfig(bits=4)))
    model.add_adapter("other", PeqaConfig(bits=4))
    model.set_adapter("other")
    _moved(model, seed=1)
    names, rows = ["default", "__base__", "other"], []
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(_logits(model)[row])
        else:
            model.set_adapter(name)
            rows.append(_logits(model)[row])
    mixed = _logits(model, adapter_names=names)
    torch.testing.assert_close(mixed, torch.stack(rows), rtol=1e-4, atol=1e-4)

    model.save_pretrained(tmp_path)
    pool = AdapterPool(model.unload())
    pool.load(tmp_path, name="default")
    pool.load(tmp_path / "other")
    with pool.mixed(["default", None, "other"]):
        torch.testing.assert_close(_logits(pool.model), torch.stack(rows), rtol=1e-4, atol=1e-4)
    with pool.mixed(["default", "other"]), pytest.raises(ValueError, match="names"):
        _logits(pool.model)


def test_mixed_batches_generate():
    model = _moved(get_peft_model(tiny_moe("mixtral"), PeqaConfig(bits=4)))
    batch = {name: tensor[:, :6] for name, tensor in moe_batch().items()}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2}
    with model.disable_adapter():
        base = model.generate(**batch, **options)
    tuned = model.generate(**batch, **options)
    mixed = model.generate(**batch, **options, adapter_names=["default", "__base__", "default"])
    assert torch.equal(mixed, torch.stack([tuned[0], base[1], tuned[2]]))


@pytest.mark.parametrize("family", ["llama4", "phimoe"])
def test_routers_that_choose_in_their_forward(family):
    model = tiny_moe(family)
    names = routers(model)
    assert len(names) == 2 and not any(acts_linearly(model.get_submodule(name)) for name in names)
    name = min(names)
    with pytest.raises(ValueError, match=f"{name}.*something else than a linear layer"):
        get_peft_model(model, PeqaConfig(bits=4, target_modules=[name]))
    assert not packed_layers(model)


def test_the_gate_of_a_shared_expert_can_be_named():
    config = PeqaConfig(bits=4, target_modules=["shared_expert_gate"])
    model = get_peft_model(tiny_moe("qwen2_moe"), config)
    assert all(name.endswith("shared_expert_gate.base_layer") for name in packed_layers(model))
    assert fused_experts(model)  # nothing of theirs was asked for


def test_some_experts_only(tmp_path):
    """What isn't packed of them stays a layer, too, and comes back from the file."""
    for family in ("mixtral", "gpt_oss"):
        ending = "w2" if family == "mixtral" else "down_proj"
        config = PeqaConfig(bits=4, target_modules=rf".*layers.1.*experts\.[02]\.{ending}")
        model = get_peft_model(tiny_moe(family), config).merge_and_unload()
        assert len(packed_layers(model)) == 2 and len(fused_experts(model)) == 1
        expected = _logits(model)
        model.save_pretrained(tmp_path / family)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        assert packed_layers(loaded).keys() == packed_layers(model).keys()
        torch.testing.assert_close(_logits(loaded), expected, rtol=1e-5, atol=1e-5)


def test_quantised_while_loaded(tmp_path):
    """A float checkpoint of experts that lie apart is quantised weight by weight, experts included."""
    tiny_moe("mixtral").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BcqConfig(bits=4))
    assert set(float_layers(model)) == {"lm_head"} and sum("experts" in name for name in packed_layers(model)) == 24
    by_hand = get_peft_model(tiny_moe("mixtral"), AlphaTuningConfig(bits=4, init_method="alternating")).unload()
    assert torch.equal(_logits(model), _logits(by_hand))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
@pytest.mark.parametrize("by_name", [True, False], ids=["names", "all-linear"])
def test_lora_on_a_packed_base(family, by_name, tmp_path):
    """PEFT would put names of fused parameters, which aren't there, in the place of those of layers."""
    get_peft_model(tiny_moe(family), PeqaConfig(bits=4)).unload().save_pretrained(tmp_path / "base")
    names = ["w1", "w2"] if family == "mixtral" else ["gate_proj", "down_proj"]
    config = LoraConfig(r=2, target_modules=names if by_name else "all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    inside = [name for name, module in model.named_modules() if hasattr(module, "lora_A") and ".experts." in name]
    assert len(inside) == 2 * EXPERTS * (2 if by_name else 3)
    expected = _logits(model)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(_logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)


def test_lora_on_a_float_model_is_peft_s_own():
    model = get_peft_model(tiny_moe("mixtral"), LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"]))
    assert any("ParamWrapper" in type(module).__name__ for module in model.modules())


def _in_others_manner(model: nn.Module, folder: Path) -> Path:
    """As llm-compressor writes packed experts, one by one; without our mark."""
    model.hf_quantizer = PackQuantizedWriter(model)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("packed_bits", None)
    config["quantization_config"].pop("dequantize", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "llama4"])
@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
def test_what_others_packed_is_loaded_packed(family, sym, tmp_path):
    """Asymmetric experts, which stock transformers can't read, among them."""
    model = get_peft_model(tiny_moe(family), PeqaConfig(bits=4, sym=sym, group_size=32)).unload()
    expected, names = _logits(model), packed_layers(model).keys()
    loaded = load_packed(_in_others_manner(model, tmp_path))
    assert packed_layers(loaded).keys() == names and torch.equal(_logits(loaded), expected)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after-a-forward"])
def test_experts_that_stock_transformers_made_floats_of_are_taken_back(used, tmp_path):
    model = get_peft_model(tiny_moe("mixtral"), PeqaConfig(bits=4, sym=True, group_size=32)).unload()
    expected = _logits(model)
    stock = AutoModelForCausalLM.from_pretrained(_in_others_manner(model, tmp_path))
    assert fused_experts(stock)
    if used:
        torch.testing.assert_close(_logits(stock), expected, rtol=1e-4, atol=1e-4)
    tuned = get_peft_model(stock, PeqaConfig(bits=4, sym=True, group_size=32)).eval()
    assert torch.equal(_logits(tuned), expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "phimoe"])  # experts as others', and routers that PEFT's LoRA dies of
def test_a_plan(family):
    """Runs the experts on the meta device, evenly loaded, for all methods that `peft-ext plan` compares."""
    config, step = tiny_moe(family).config, TrainingStep(2, 24)
    plans = [
        tuning_memory(config, method, torch.bfloat16, step)
        for method in (None, LoraConfig(target_modules="all-linear"), PeqaConfig(bits=4), AlphaTuningConfig(bits=2))
    ]
    full, _, peqa, alphatuning = (plan.weights for plan in plans)
    assert alphatuning < peqa < full / 2
