# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`bits_budget`: what it costs to round a layer, the choice under a budget, and what comes of it in configs and files."""

from __future__ import annotations

import itertools
import json
import random
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import peft_ext
from peft_ext import AlphaTuningConfig, PeqaConfig, allocate_bits, calibrate
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.quant.conversion import packed_layers, weight_of
from peft_ext.quant.uniform import dequantize, quantize
from peft_ext.scale_tuning.bit_budget import BUDGET_WIDTHS, layer_bytes, units
from peft_ext.scale_tuning.knapsack import choose
from peft_ext.scale_tuning.model import check_targets
from peft_ext.scale_tuning.sensitivity import left_by_feedback
from tests.checkpoint.test_pack_quantized import STOCK
from tests.tiny.models import LAYERS, inputs, tiny
from tests.tiny.moe import moe_batch, tiny_moe


TUNERS = [PeqaConfig, AlphaTuningConfig]
BATCHES = [torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def test_the_knapsack_against_every_choice():
    draw = random.Random(0)
    for _ in range(400):
        sizes = [draw.randint(1, 4) for _ in range(draw.randint(1, 6))]
        costs = [[draw.randint(0, 12) for _ in range(size)] for size in sizes]
        losses = [
            [draw.choice([draw.random(), draw.randint(0, 3), 1e6 * draw.random()]) for _ in each] for each in costs
        ]
        budget = sum(map(min, costs)) + draw.randint(0, 25)

        def total(values, picks):
            return sum(each[pick] for each, pick in zip(values, picks))

        every = itertools.product(*(range(size) for size in sizes))
        best = min(total(losses, picks) for picks in every if total(costs, picks) <= budget)
        picks = choose(costs, losses, budget)
        assert total(costs, picks) <= budget
        assert total(losses, picks) <= best + 1e-7 * sum(max(each) - min(each) for each in losses) + 1e-12


def test_a_knapsack_of_hundreds_of_layers():
    """What a price of bytes alone can't do: it leaves a part of the budget."""
    draw = random.Random(0)
    sizes = [draw.choice([9, 3, 3, 9, 24, 24, 24]) for _ in range(280)]
    costs = [[size * bits for bits in BUDGET_WIDTHS] for size in sizes]
    losses = [[size * draw.lognormvariate(0, 1) * 4.0**-bits for bits in BUDGET_WIDTHS] for size in sizes]
    picks = choose(costs, losses, 3 * sum(sizes))
    spent = sum(each[pick] for each, pick in zip(costs, picks))
    assert 3 * sum(sizes) - 3 <= spent <= 3 * sum(sizes)
    with pytest.raises(ValueError, match="cheapest options cost"):
        choose(costs, losses, 2 * sum(sizes) - 1)


def _slow_losses(model, batches, name, config):
    """The definition, token by token: gradients of the loss where one token's row of the layer's output moves."""
    layer = model.get_submodule(name)
    weight = weight_of(layer).detach()
    squares = torch.zeros_like(weight)
    for batch in batches:
        kept = {}

        def keep(_, args, output, kept=kept):
            output.retain_grad()
            kept["x"], kept["y"] = args[0].detach(), output

        handle = layer.register_forward_hook(keep)
        loss = model(input_ids=batch, labels=batch).loss * batch[:, 1:].numel()
        loss.backward()
        handle.remove()
        for x, delta in zip(kept["x"].flatten(0, 1), kept["y"].grad.flatten(0, 1)):
            squares += torch.outer(delta, x) ** 2
        model.zero_grad()
    tokens = sum(batch[:, 1:].numel() for batch in batches)
    errors = [dequantize(*quantize(weight, bits, config.group_size)) - weight for bits in BUDGET_WIDTHS]
    return [float((squares * error**2).sum()) / 2 / tokens for error in errors]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_losses_against_a_slow_reference(name):
    config = PeqaConfig(bits_budget=3.0, group_size=16)
    model = tiny(name)
    before = {key: (value.clone(), value.requires_grad) for key, value in model.named_parameters()}
    found = allocate_bits(model, config, BATCHES, progressbar=False).losses
    for key, value in model.named_parameters():
        assert torch.equal(value, before[key][0]) and value.requires_grad == before[key][1] and value.grad is None
    assert not any(module._forward_hooks for module in model.modules())
    for layer in list(found)[:3] + list(found)[-1:]:
        expected = _slow_losses(tiny(name), BATCHES, layer, PeqaConfig(group_size=16))
        assert list(found[layer].values()) == pytest.approx(expected, rel=1e-3)
        assert expected[0] > expected[1] > expected[2] > expected[3] > 0


@pytest.mark.parametrize("config_cls", TUNERS)
@pytest.mark.parametrize("budget", [2, 2.5, 3.0, 3.7, 8])
def test_no_more_bytes_than_uniform_and_hardly_less(config_cls, budget):
    config = config_cls(bits_budget=budget, group_size=16, init_method="calibrated")
    model = tiny("llama")
    allocation = allocate_bits(model, config, BATCHES, progressbar=False)
    assert config.bits_budget is None and len(allocation.widths) == 7 * LAYERS
    assert allocation.nbytes <= allocation.budget_bytes and allocation.average <= budget
    assert all(config.format_of(name).bits == bits for name, bits in allocation.widths.items())
    layers = check_targets(config_cls(target_modules="all-linear", group_size=16), tiny("llama"))
    if budget in BUDGET_WIDTHS:
        plain = config_cls(group_size=16)
        assert allocation.budget_bytes == sum(
            layer_bytes(plain, name, layer, int(budget)) for name, layer in layers.items()
        )
    if budget in (2, 8):
        assert set(allocation.widths.values()) == {budget} and config.bits == budget and not config.bits_pattern
    else:
        assert allocation.average > budget - 0.3 and len(set(allocation.widths.values())) > 1
    assert f"{allocation.average:.2f} bits on average" in str(allocation) and "mlp.down_proj" in str(allocation)


def _left(x, damping=0.01):
    """By its definition: what is left of each input when those behind it, by falling energy, have explained it."""
    hessian = x.double().T @ x.double() / len(x)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    shares = torch.ones(len(hessian), dtype=torch.float64)
    for place, own in enumerate(order[:-1]):
        behind = order[place + 1 :]
        explained = hessian[own, behind] @ torch.linalg.solve(hessian[behind][:, behind], hessian[behind, own])
        shares[own] = 1 - explained / hessian[own, own]
    return shares


def test_what_feedback_leaves_against_a_slow_reference():
    model = tiny("llama")
    layers = {
        name: model.get_submodule(name) for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj")
    }
    kept = {}

    def keep(name, _, args):
        kept[name] = args[0].flatten(0, 1)

    handles = [layer.register_forward_pre_hook(partial(keep, name)) for name, layer in layers.items()]
    tokens = torch.randint(3, 100, (8, 16))
    model(tokens)
    for handle in handles:
        handle.remove()
    found = left_by_feedback(model, layers, tokens)
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, shares in found.items():
        assert torch.allclose(shares.double(), _left(kept[name].detach()), atol=1e-3)
        assert 0 < shares.mean() < 0.95
    # padding doesn't count
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (0, 4))
    padded = {"input_ids": torch.nn.functional.pad(tokens, (0, 4)), "attention_mask": mask}
    for name, shares in left_by_feedback(model, layers, padded).items():
        assert torch.allclose(shares, found[name], atol=1e-3)


def test_calibrated_codes_are_weighed_by_what_feedback_leaves():
    losses = [
        allocate_bits(
            tiny("llama"), PeqaConfig(bits_budget=3.0, init_method=method), BATCHES, progressbar=False
        ).losses
        for method in ("minmax", "calibrated")
    ]
    for name, plain in losses[0].items():
        assert all(losses[1][name][bits] < plain[bits] for bits in BUDGET_WIDTHS)


def test_shared_weights_get_one_width():
    model = tiny("llama")
    first, second = (model.model.layers[index].mlp for index in range(2))
    second.down_proj.weight = first.down_proj.weight
    widths = allocate_bits(model, PeqaConfig(bits_budget=2.7), BATCHES, progressbar=False).widths
    assert widths["model.layers.0.mlp.down_proj"] == widths["model.layers.1.mlp.down_proj"]
    assert ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"] in units(model, widths)


def test_experts_of_a_block_get_one_width():
    model, config = tiny_moe("mixtral"), PeqaConfig(bits_budget=3.0, init_method="calibrated")
    model = calibrate(model, config, [moe_batch()], progressbar=False)
    inside: dict[str, set[int]] = {}
    for name, layer in packed_layers(model).items():
        if ".experts." in name:
            inside.setdefault(name.partition(".experts.")[0], set()).add(layer.bits)
    assert inside and all(len(widths) == 1 for widths in inside.values())
    get_peft_model(model, config)


def test_what_the_data_do_not_reach_keeps_the_average():
    model = tiny("llama")
    model.unused = torch.nn.Linear(32, 32)
    targets = ["q_proj", "k_proj", "v_proj", "down_proj", "unused"]
    with pytest.warns(UserWarning, match="never reached 1 of 9 layers, such as 'unused', which get 3 bits"):
        allocation = allocate_bits(
            model, PeqaConfig(bits_budget=3.5, target_modules=targets), BATCHES, progressbar=False
        )
    assert allocation.widths["unused"] == 3 and allocation.nbytes <= allocation.budget_bytes


def test_padding_and_the_size_of_batches_do_not_matter():
    def losses(batches):
        return allocate_bits(tiny("llama"), PeqaConfig(bits_budget=3.0), batches, progressbar=False).losses

    whole = losses(BATCHES[:1])
    single = losses(list(BATCHES[0].split(1)))
    short = torch.nn.functional.pad(BATCHES[0], (0, 8))
    mask = torch.nn.functional.pad(torch.ones_like(BATCHES[0]), (0, 8))
    padded = losses([{"input_ids": short, "attention_mask": mask}])
    for name in whole:
        assert list(single[name].values()) == pytest.approx(list(whole[name].values()), rel=1e-3)
        assert list(padded[name].values()) == pytest.approx(list(whole[name].values()), rel=1e-3)


def test_an_encoder_decoder():
    config = PeqaConfig(bits_budget=3.0)
    batch = {"input_ids": inputs("t5")["input_ids"], "labels": inputs("t5")["decoder_input_ids"]}
    allocation = allocate_bits(tiny("t5"), config, [batch], progressbar=False)
    assert set(allocation.losses) == set(allocation.widths)


@pytest.mark.parametrize("config_cls", TUNERS)
def test_the_adapter_and_its_config_need_no_sensitivities(config_cls, tmp_path):
    config = config_cls(bits_budget=3.0, group_size=16, init_method="calibrated")
    model = get_peft_model(calibrate(tiny("llama"), config, BATCHES, progressbar=False), config).eval()
    widths = {name.removesuffix(".base_layer"): layer.bits for name, layer in packed_layers(model).items()}
    assert len(set(widths.values())) > 1
    with torch.no_grad():
        expected = model(input_ids=BATCHES[0]).logits
    model.save_pretrained(tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["bits_budget"] is None and stored["bits_pattern"] and stored["bits"] in BUDGET_WIDTHS
    assert config_cls.from_pretrained(tmp_path / "adapter").bits_pattern == config.bits_pattern
    model.unload().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(again(input_ids=BATCHES[0]).logits, expected, atol=1e-5)
    merged = again.merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=BATCHES[0]).logits, expected, atol=1e-5)


def _mixed(**kwargs):
    """A model of layers of several widths, its input and what it says."""
    config = PeqaConfig(bits_budget=3.5, group_size=16, **kwargs)
    model = tiny("llama")
    allocate_bits(model, config, BATCHES, progressbar=False)
    base = get_peft_model(model, config).unload().eval()
    assert len({layer.bits for layer in packed_layers(base).values()}) > 1
    with torch.no_grad():
        return base, base(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


def _widths(model):
    return {name: layer.bits for name, layer in packed_layers(model).items()}


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("checkpoint_format", [None, "bcq", "pack-quantized"])
def test_every_file_keeps_codes_and_widths(checkpoint_format, sym, tmp_path, fresh_process):
    base, expected = _mixed(sym=sym)
    make_saveable(base, checkpoint_format)
    base.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    own = sym or checkpoint_format != "pack-quantized"  # else in containers of the widest
    assert stored["quant_method"] == (
        "bcq" if checkpoint_format == "bcq" or (not sym and own) else "compressed-tensors"
    )
    if stored["quant_method"] == "compressed-tensors":
        assert len(stored["config_groups"]) == (len(set(_widths(base).values())) if sym else 1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=torch.tensor([[5, 6, 7, 8]])).logits, expected)
    assert _widths(loaded) == _widths(base)
    codes = {name: layer.fingerprint() for name, layer in packed_layers(base).items()}
    assert {name: layer.fingerprint() for name, layer in packed_layers(loaded).items()} == codes
    if stored["quant_method"] == "compressed-tensors":  # what stock transformers makes of it
        found = torch.tensor(json.loads(fresh_process(STOCK, tmp_path)))
        assert torch.allclose(found, expected.flatten(), atol=1e-3)


def test_files_take_what_the_budget_says(tmp_path):
    """Layers of several widths lie each in containers of its own, not all in the widest's."""
    base, _ = _mixed(sym=True)
    sizes = {}
    for container_bits in (None, 8):
        make_saveable(base, container_bits=container_bits)
        base.save_pretrained(tmp_path / str(container_bits))
        sizes[container_bits] = (tmp_path / str(container_bits) / "model.safetensors").stat().st_size
    codes = sum(layer.in_features * layer.out_features for layer in packed_layers(base).values())
    assert sizes[8] - sizes[None] > 0.4 * codes  # more than three bits of each


@pytest.mark.parametrize("config_cls", TUNERS)
def test_mistakes_in_one_line(config_cls):
    for budget in (1.9, 8.5, True, "3", float("nan")):
        with pytest.raises(ValueError, match="bits_budget=.* must be a number from 2 to 8"):
            config_cls(bits_budget=budget)
    with pytest.raises(ValueError, match="bits_budget=3.0 chooses the widths of all layers, and bits_pattern="):
        config_cls(bits_budget=3.0, bits_pattern={"q_proj": 4})
    with pytest.raises(ValueError, match="bits_budget=3.0 chooses the widths of all layers, and bits=4"):
        config_cls(bits_budget=3.0, bits=4)
    with pytest.raises(ValueError, match="bits=2.5 is not supported; .* pass bits_budget=2.5"):
        config_cls(bits=2.5)
    with pytest.raises(ValueError, match="bits_budget=3 needs data to weigh 14 layers, such as"):
        get_peft_model(tiny("llama"), config_cls(bits_budget=3))
    with pytest.raises(ValueError, match="bits_budget=3 needs data .* batches is empty"):
        allocate_bits(tiny("llama"), config_cls(bits_budget=3), [])
    with pytest.raises(ValueError, match="the config has no bits_budget"):
        allocate_bits(tiny("llama"), config_cls(bits=3), BATCHES)
    with pytest.raises(ValueError, match="weighs layers by a loss, which Sequential"):
        model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
        allocate_bits(model, config_cls(bits_budget=3, target_modules=["0", "1"]), [torch.randn(2, 16)], False)
    packed = get_peft_model(tiny("llama"), config_cls(bits=4)).unload()
    for call in (lambda config: allocate_bits(packed, config, BATCHES), lambda config: get_peft_model(packed, config)):
        with pytest.raises(ValueError, match="all targets are packed already"):
            call(config_cls(bits_budget=3))


def test_lattices_have_widths_of_their_own():
    with pytest.raises(ValueError, match="bits_budget=3 rounds weights, and init_method='lattice'"):
        PeqaConfig(bits_budget=3, init_method="lattice")


def test_the_report_counts_them():
    config = PeqaConfig(bits_budget=3.0, group_size=32, init_method="calibrated")
    model = get_peft_model(calibrate(tiny("llama"), config, BATCHES, progressbar=False), config)
    shown = str(peft_ext.report(model))
    assert " bits in groups of 32 (uniform integers), calibrated" in shown
