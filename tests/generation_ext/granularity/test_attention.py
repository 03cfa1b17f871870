# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""GA-Attention in one's own model and on pretrained ones, against a loop over tokens, with caches, beams and PEFT."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from generation_ext.granularity import (
    GranularityAttention,
    GranularityConfig,
    convert_to_granularity_attention,
    granularity_parameters,
    load_granularities,
    recorded,
)
from generation_ext.granularity.attention import GranularityHead
from generation_ext.granularity.masks import MODES
from tests.tiny.byte_models import CONFIGS
from tests.tiny.byte_models import model as tiny


N = 16
STARTING = GranularityConfig(link="rectified", initial=0.0, max_length=512)


MODELS = {
    "llama": lambda: copy.deepcopy(tiny("llama")),
    "mistral": lambda: copy.deepcopy(tiny("mistral")),
    "t5": lambda: copy.deepcopy(tiny("t5")),
    "bart": lambda: copy.deepcopy(tiny("bart")),
    "bert": lambda: transformers.BertForMaskedLM(CONFIGS["bert"]()).eval(),
}
GENERATES = ("llama", "mistral", "t5", "bart")


@pytest.fixture(scope="module")
def pretrained():
    torch.manual_seed(0)
    return {name: make() for name, make in MODELS.items()}


def converted(pretrained, name, config=None, implementation="sdpa", spread=0.5):
    """A converted copy whose granularities are all over the place."""
    lm = copy.deepcopy(pretrained[name])
    lm.set_attn_implementation(implementation)
    convert_to_granularity_attention(lm, config or GranularityConfig(max_length=N))
    torch.manual_seed(1)
    for parameter in granularity_parameters(lm):
        torch.nn.init.normal_(parameter, std=spread)
    return lm


def inputs(name):
    torch.manual_seed(2)
    ids = torch.randint(3, 250, (2, 9))
    mask = torch.ones_like(ids)
    if name in ("llama", "mistral"):
        mask[0, :3] = 0  # padded on the left
    else:
        mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(lm, name, batch):
    """Of real tokens."""
    if name in ("t5", "bart"):
        return lm(**batch, decoder_input_ids=batch["input_ids"][:, :5]).logits
    return lm(**batch).logits * batch["attention_mask"][..., None]


# ---- one's own model


def by_hand(attention, hidden, others=None, real=None):
    """Scores, masks and sums one query and one key at a time."""
    config = attention.granularity.config
    cross = others is not None
    others = hidden if others is None else others
    size = hidden.shape[-1] // attention.heads
    q, k, v = attention.q_proj(hidden), attention.k_proj(others), attention.v_proj(others)
    zq, zk = attention.granularity(hidden), attention.granularity(others)
    output = torch.zeros_like(hidden)
    for b in range(hidden.shape[0]):
        for i in range(hidden.shape[1]):
            seen = [j for j in range(others.shape[1]) if real is None or real[b, j]]
            seen = [j for j in seen if cross or not attention.is_causal or j <= i]
            if not seen:
                seen, blind = list(range(others.shape[1])), True
            else:
                blind = False
            masks = []
            for j in seen:
                a, z = zq[b, i], zk[b, j]
                c = (1 - a) * max(0, 1 - (a + z)) + a * min(1, 1 - a + z)
                s = max(0, min(1, (config.max_length - 2) ** (1 - a) + 2 - abs(i - j)))
                both = {"R": c, "S": s, "R*S": c * s, "R+S": (c + s) / 2}[config.mode]
                masks.append(c if cross else both)
            for head in range(attention.heads):
                part = slice(head * size, (head + 1) * size)
                scores = torch.stack([(q[b, i, part] * k[b, j, part]).sum() / size**0.5 for j in seen])
                if config.placement == "before":
                    weights = scores.exp() * torch.stack([torch.as_tensor(m, dtype=hidden.dtype) for m in masks])
                    weights = weights / weights.sum() if weights.sum() > 0 else scores.softmax(0)
                else:
                    weights = scores.softmax(0) * torch.stack([torch.as_tensor(m, dtype=hidden.dtype) for m in masks])
                if not blind:
                    output[b, i, part] = sum(w * v[b, j, part] for w, j in zip(weights, seen))
    return attention.out_proj(output)


@pytest.mark.parametrize("kind", ["both sides", "causal", "cross"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("placement", ["before", "after"])
def test_own_attention_is_the_loop(kind, mode, placement):
    torch.manual_seed(0)
    config = GranularityConfig(mode=mode, placement=placement, max_length=7)
    attention = GranularityAttention(8, 2, config, is_causal=kind == "causal").double().eval()
    torch.nn.init.normal_(attention.granularity.projection.weight, std=1.0)
    hidden = torch.randn(2, 6, 8, dtype=torch.float64)
    others = torch.randn(2, 5, 8, dtype=torch.float64) if kind == "cross" else None
    torch.testing.assert_close(attention(hidden, others), by_hand(attention, hidden, others))
    if kind != "causal":
        real = torch.ones(2, 5 if kind == "cross" else 6)
        real[0, 3:] = 0
        torch.testing.assert_close(attention(hidden, others, real), by_hand(attention, hidden, others, real))


def test_own_attention_is_differentiable_to_the_second_digit():
    torch.manual_seed(0)
    attention = GranularityAttention(4, 2, GranularityConfig(max_length=5)).double()
    hidden = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention, (hidden,), eps=1e-6, atol=1e-4)


def test_cross_attention_does_not_mind_the_keys_order():
    torch.manual_seed(0)
    attention = GranularityAttention(8, 2, GranularityConfig()).eval()
    hidden, others = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    torch.testing.assert_close(attention(hidden, others), attention(hidden, others[:, [3, 1, 4, 0, 2]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_that_see_nothing_are_finite(dtype):
    torch.manual_seed(0)
    attention = GranularityAttention(8, 2, GranularityConfig(mode="S", max_length=8)).to(dtype)
    with torch.no_grad():
        attention.granularity.projection.bias.fill_(20.0)  # z = 1
    hidden = torch.randn(2, 8, 8, dtype=dtype, requires_grad=True)
    output = attention(hidden, attention_mask=torch.zeros(2, 8))
    output.float().sum().backward()
    assert torch.isfinite(output).all() and torch.isfinite(hidden.grad).all()


# ---- out of scope


HALVES = (torch.float16, torch.bfloat16)


def far_scores(gap, dtype):
    """Attention of width 2 whose scores are 0, but `gap` on the last of 8 keys; z = 1, so the first queries don't see it."""
    attention = GranularityAttention(2, 1, GranularityConfig(mode="S", max_length=8))
    with torch.no_grad():
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
            linear.weight.copy_(torch.eye(2)), linear.bias.zero_()
        attention.q_proj.weight.zero_(), attention.q_proj.bias.copy_(torch.tensor([gap * 2**0.5, 0.0]))
        attention.granularity.projection.weight.zero_(), attention.granularity.projection.bias.fill_(40.0)
    hidden = torch.zeros(1, 8, 2)
    hidden[0, 7] = 1  # its key is what queries ask for; its value is 1
    return attention.to(dtype), hidden.to(dtype).requires_grad_()


@pytest.mark.parametrize("gap", [12.0, 16.0, 100.0])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("path", ["biased", "sdpa", "compiled sdpa"])
def test_out_of_scope_is_no_weight(gap, dtype, path):
    """(With a floor of a millionth, the last key has 5 % of the first query's weight at a gap of 12, three quarters at 16.)"""
    attention, hidden = far_scores(gap, dtype)
    if path == "biased":
        output = attention(hidden)
    elif path == "sdpa":
        with torch.no_grad():
            output = attention(hidden)
    else:
        output = torch.compile(attention, backend="aot_eager")(hidden)
    assert (output[0, :5, 1] == 0).all(), "a key that is three tokens away is seen"
    assert (output[0, 5:, 1] > 0.99).all(), "a key that is two tokens away isn't"
    if output.requires_grad:
        output[0, :5].sum().backward()
        assert (hidden.grad[0, 7] == 0).all() and torch.isfinite(hidden.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in attention.parameters() if p.grad is not None)
    attention.granularity.config.mask_floor = 1e-6
    seen = attention(hidden)[0, 0, 1].item()
    assert seen == pytest.approx({12.0: 0.05, 16.0: 0.75, 100.0: 1.0}[gap], abs=0.02), "the floor of earlier models"


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_eager_weights_out_of_scope_are_zero(pretrained, dtype, implementation):
    """In a model of transformers, whose scores are made steep."""
    lm = converted(pretrained, "bart", GranularityConfig(mode="S", max_length=N), implementation).to(dtype)
    for name, parameter in lm.named_parameters():
        if "q_proj.weight" in name:
            parameter.mul_(30)
        if ".granularity.projection." in name:
            parameter.fill_(40.0 if "bias" in name else 0.0)
    ids = inputs("bart")["input_ids"]
    if implementation == "eager":
        weights = torch.stack(lm(input_ids=ids, decoder_input_ids=ids, output_attentions=True).encoder_attentions)
        far = (torch.arange(9)[:, None] - torch.arange(9)).abs() > 2
        assert (weights[..., far] == 0).all() and torch.isfinite(weights).all()
        return
    other = ids.clone()
    other[:, 8] += 1  # four layers of windows of two tokens reach no farther than the second token
    encoder = lm.get_encoder()
    reach = 2 * len(encoder.layers)
    assert torch.equal(encoder(ids)[0][:, : 8 - reach], encoder(other)[0][:, : 8 - reach])


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("learns", [True, False])
def test_a_query_with_no_key_in_scope_is_plain_attention(dtype, learns):
    """Cross-attention from details to a sentence of template words alone: C is 0 for all keys."""
    torch.manual_seed(0)
    attention = GranularityAttention(8, 2, GranularityConfig()).to(dtype)
    hidden, others = torch.randn(2, 3, 8, dtype=dtype), torch.randn(2, 5, 8, dtype=dtype)
    real = torch.ones(2, 5, dtype=torch.long)
    real[0, 3:] = 0

    def run(z_of_queries, z_of_keys):
        head = attention.granularity
        found = {hidden.shape[1]: z_of_queries, others.shape[1]: z_of_keys}
        head.forward = lambda states: states.float().sum(-1) * 0 + found[states.shape[1]]
        return attention(hidden, others, real)

    hidden.requires_grad_(learns)
    plain, blind = run(0.0, 0.0), run(1.0, 0.0)
    torch.testing.assert_close(blind, plain)
    some = run(1.0, torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(some[0], plain[0])  # the key in scope is padding there
    assert not torch.allclose(some[1], plain[1], atol=1e-2)
    if learns:
        (blind + some).float().sum().backward()
        assert torch.isfinite(hidden.grad).all() and hidden.grad.abs().max() > 0


# ---- pretrained models


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_starts_as_what_it_was(pretrained, name, implementation):
    lm = copy.deepcopy(pretrained[name])
    lm.set_attn_implementation(implementation)
    batch = inputs(name)
    before = logits(lm, name, batch)
    after = logits(convert_to_granularity_attention(lm, STARTING), name, batch)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert before.abs().max() > 0.01


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("placement", ["before", "after"])
@torch.no_grad()
def test_eager_and_sdpa_agree_and_differ_from_plain(pretrained, name, placement):
    config = GranularityConfig(max_length=N, placement=placement)
    batch = inputs(name)
    found = [logits(converted(pretrained, name, config, each), name, batch) for each in ("eager", "sdpa")]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    assert (found[0] - logits(pretrained[name], name, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_padding_does_not_matter(pretrained, name):
    lm, batch = converted(pretrained, name), inputs(name)
    whole = logits(lm, name, batch)[0]
    real = batch["attention_mask"][0].bool()
    alone = {key: value[:1, real] for key, value in batch.items()}
    if name in ("t5", "bart"):
        found = lm(**alone, decoder_input_ids=batch["input_ids"][:1, :5]).logits[0]
    else:
        whole, found = whole[real], lm(**alone).logits[0]
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", GENERATES)
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_decoding_with_a_cache_is_decoding_without(pretrained, name, beams):
    lm, batch = converted(pretrained, name), inputs(name)
    common = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "output_scores": True}
    one, two = (
        lm.generate(**batch, **common, use_cache=cache, return_dict_in_generate=True) for cache in (True, False)
    )
    assert torch.equal(one.sequences, two.sequences)
    for ours, theirs in zip(one.scores, two.scores):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_static_cache(pretrained):
    lm, batch = converted(pretrained, "llama"), inputs("llama")
    found = [
        lm.generate(**batch, max_new_tokens=5, do_sample=False, disable_compile=True, cache_implementation=each)
        for each in ("static", None)
    ]
    assert torch.equal(*found)


@torch.no_grad()
def test_step_by_step_is_teacher_forcing(pretrained):
    lm = converted(pretrained, "llama")
    ids = inputs("llama")["input_ids"]
    cache, steps = transformers.DynamicCache(config=lm.config), []
    for position in range(ids.shape[1]):
        steps.append(lm(ids[:, position : position + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), lm(ids).logits, atol=1e-4, rtol=1e-4)


def test_beams_reorder_granularities(pretrained):
    lm = converted(pretrained, "llama")
    cache = transformers.DynamicCache(config=lm.config)
    with torch.no_grad():
        lm(inputs("llama")["input_ids"], past_key_values=cache, use_cache=True)
    before = {layer: z.clone() for layer, z in cache.granularities.items()}
    cache.reorder_cache(torch.tensor([1, 0]))
    assert all(torch.equal(z, before[layer][[1, 0]]) for layer, z in cache.granularities.items())
    cache.batch_repeat_interleave(2)
    assert all(z.shape == (4, 9) for z in cache.granularities.values())
    cache.batch_select_indices(torch.tensor([0]))
    cache.crop(-4)
    assert all(torch.equal(z, before[layer][1:, :5]) for layer, z in cache.granularities.items())
    cache.reset()
    assert cache.granularities == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pretrained, dtype):
    lm, batch = converted(pretrained, "llama").to(dtype), inputs("llama")
    output = lm(**batch, labels=batch["input_ids"])
    output.loss.backward()
    assert torch.isfinite(output.logits).all() and output.logits.dtype == dtype
    assert all(torch.isfinite(p.grad).all() for p in granularity_parameters(lm))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_meta_device(dtype):
    with torch.device("meta"):
        attention = GranularityAttention(8, 2, GranularityConfig(), is_causal=True).to(dtype)
        output = attention(torch.ones(2, 5, 8, dtype=dtype), attention_mask=torch.ones(2, 5))
    assert output.device.type == "meta" and output.shape == (2, 5, 8) and output.dtype == dtype


@pytest.mark.parametrize("name", ["llama", "bart", "t5"])
def test_heads_learn_from_nothing(pretrained, name):
    lm = convert_to_granularity_attention(copy.deepcopy(pretrained[name]), STARTING).train()
    lm.requires_grad_(False)
    heads = granularity_parameters(lm)
    for parameter in heads:
        parameter.requires_grad_()
    batch = inputs(name)
    optimizer = torch.optim.AdamW(heads, lr=1e-2)
    for _ in range(3):
        lm(**batch, labels=batch["input_ids"]).loss.backward()
        assert any(parameter.grad.abs().max() > 0 for parameter in heads)
        optimizer.step(), optimizer.zero_grad()
    with recorded(lm) as found, torch.no_grad():
        lm(**batch, labels=batch["input_ids"])
    assert len(found) == sum(hasattr(module, "granularity") for module in lm.modules())
    assert max(z.max() for z in found.values()) > 0 and min(z.min() for z in found.values()) >= 0


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_from_nothing(pretrained, mode):
    """Texts much shorter than N: the scope is saturated for all of their pairs."""
    lm = convert_to_granularity_attention(
        copy.deepcopy(pretrained["llama"]), GranularityConfig(mode, link="rectified", initial=0.0, max_length=512)
    )
    batch = inputs("llama")
    lm(**batch, labels=batch["input_ids"]).loss.backward()
    for parameter in granularity_parameters(lm):
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 1e-6


def test_no_token_is_lost_below_zero():
    head = GranularityHead(2, GranularityConfig(link="rectified", initial=0.0))
    states = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    with torch.no_grad():
        head.projection.weight.copy_(torch.tensor([[-1.0, 1.0]]))
    z = head(states)
    torch.testing.assert_close(z, torch.tensor([[0.0, math.tanh(0.5), math.tanh(0.5)]]))
    slope = (1 - math.tanh(0.5) ** 2) / 2
    for asked, gradient in ((-1.0, [slope, slope, slope]), (1.0, [0.0, slope, slope])):
        (found,) = torch.autograd.grad(head(states), head.projection.bias, torch.full((1, 3), asked))
        torch.testing.assert_close(found.item(), asked * sum(gradient))


def test_gradient_checkpointing_gives_the_same_gradients(pretrained):
    found = []
    for checkpointing in (False, True):
        lm, batch = converted(pretrained, "llama").train(), inputs("llama")
        if checkpointing:
            lm.gradient_checkpointing_enable()
        lm(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        found.append([parameter.grad for parameter in granularity_parameters(lm)])
    for one, two in zip(*found):
        torch.testing.assert_close(one, two)


def test_lora_and_heads_save_and_load(pretrained, tmp_path):
    lm = convert_to_granularity_attention(copy.deepcopy(pretrained["llama"]), STARTING)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["granularity"])
    tuned, batch = get_peft_model(lm, config), inputs("llama")
    trained = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    assert any("granularity.modules_to_save" in name for name in trained) and any("lora_A" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(3):
        tuned(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    tuned.eval().save_pretrained(tmp_path)
    base = convert_to_granularity_attention(copy.deepcopy(pretrained["llama"]), STARTING)
    back = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(**batch).logits, tuned(**batch).logits)
        assert (back(**batch).logits - pretrained["llama"](**batch).logits).abs().max() > 1e-3


@torch.no_grad()
def test_a_converted_model_comes_back_from_its_folder(pretrained, tmp_path):
    lm, batch = converted(pretrained, "bart"), inputs("bart")
    lm.save_pretrained(tmp_path)
    back = load_granularities(transformers.BartForConditionalGeneration.from_pretrained(tmp_path).eval(), tmp_path)
    torch.testing.assert_close(logits(back, "bart", batch), logits(lm, "bart", batch))


@torch.no_grad()
def test_a_folder_of_before_keeps_the_floor_it_was_trained_with(pretrained, tmp_path):
    lm = converted(pretrained, "bart", GranularityConfig(mode="S", max_length=N, mask_floor=1e-6), spread=2.0)
    lm.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["granularity"].pop("mask_floor") == 1e-6
    (tmp_path / "config.json").write_text(json.dumps(config))
    batch, load = inputs("bart"), transformers.BartForConditionalGeneration.from_pretrained
    right = convert_to_granularity_attention(load(tmp_path).eval(), GranularityConfig(mode="S", max_length=N))
    for back in (load(tmp_path).eval(), right):
        load_granularities(back, tmp_path)
        assert back.config.granularity["mask_floor"] == 1e-6
        torch.testing.assert_close(logits(back, "bart", batch), logits(lm, "bart", batch))
    other = convert_to_granularity_attention(load(tmp_path).eval(), GranularityConfig(mode="R", max_length=N))
    with pytest.raises(ValueError, match="was converted with mode='S', this model otherwise"):
        load_granularities(other, tmp_path)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bart", "t5"])
@torch.no_grad()
def test_cross_attention_can_do_without(pretrained, name, implementation):
    """It is the model's own, beside self-attention with heads."""
    config = GranularityConfig(max_length=N, cross_attention=False)
    lm, other = converted(pretrained, name, config, implementation), converted(pretrained, name, None, implementation)
    heads = [each for each, module in lm.named_modules() if isinstance(module, GranularityHead)]
    assert heads and not any("encoder_attn" in each or "EncDecAttention" in each for each in heads)
    batch = inputs(name)
    found = logits(lm, name, batch)
    assert not torch.allclose(found, logits(other, name, batch), atol=1e-4)
    for parameter in granularity_parameters(lm):
        parameter.fill_(-30.0 if parameter.dim() == 1 else 0.0)  # z = 0
    torch.testing.assert_close(logits(lm, name, batch), logits(pretrained[name], name, batch), atol=1e-4, rtol=1e-4)


# ---- bad input


def test_refusals(pretrained, tmp_path):
    with pytest.raises(ValueError, match="none of which is known; known are .*'LlamaAttention'"):
        convert_to_granularity_attention(copy.deepcopy(tiny("gpt2")))
    lm = converted(pretrained, "llama")
    with pytest.raises(ValueError, match="converted already"):
        convert_to_granularity_attention(lm)
    with pytest.raises(ValueError, match="17 tokens are more than max_length=16"):
        lm(torch.ones(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="pass config=GranularityConfig"):
        convert_to_granularity_attention(copy.deepcopy(pretrained["t5"]))
    flash = copy.deepcopy(pretrained["llama"])
    flash.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2' takes no additive mask"):
        convert_to_granularity_attention(flash)
    pretrained["bert"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not of a converted model"):
        load_granularities(copy.deepcopy(pretrained["bert"]), tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "C"}, "mode='C'"),
        ({"placement": "around"}, "placement='around'"),
        ({"link": "relu"}, "link='relu'"),
        ({"max_length": 0}, "max_length=0"),
        ({"initial": 1.0}, "initial=1.0"),
        ({"mask_floor": 1.0}, "mask_floor=1.0"),
        ({"initial": 0.0}, "above 0 with link='sigmoid'"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        GranularityConfig(**options)


def test_an_implementation_that_is_set_later_keeps_granularities(pretrained):
    lm, batch = converted(pretrained, "llama"), inputs("llama")
    with torch.no_grad():
        before = lm(**batch).logits
        lm.set_attn_implementation("eager")
        torch.testing.assert_close(lm(**batch).logits, before, atol=1e-4, rtol=1e-4)
    assert lm.config._attn_implementation == "granularity_eager"
