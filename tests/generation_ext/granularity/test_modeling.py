# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""C-DNPG is a model of transformers: Auto classes, generate, folders, checkpointing, outputs."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BartForConditionalGeneration

from generation_ext.granularity import CDNPGConfig, CDNPGForConditionalGeneration


SIZES = {"vocab_size": 60, "d_model": 36, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "init_std": 0.2}
MODES = (None, "R", "S", "R*S", "R+S")


def make(**options):
    torch.manual_seed(0)
    return CDNPGForConditionalGeneration(CDNPGConfig(**{**SIZES, **options})).eval()


def batch():
    torch.manual_seed(1)
    source, target = torch.randint(3, 60, (3, 8)), torch.randint(3, 60, (3, 6))
    mask = torch.ones_like(source)
    mask[0, 5:] = 0
    return {"input_ids": source, "attention_mask": mask, "labels": target}


def test_the_papers_size():
    config = CDNPGConfig()
    assert (config.encoder_layers, config.d_model, config.encoder_attention_heads, config.encoder_ffn_dim) == (
        3,
        450,
        9,
        1024,
    )
    with torch.device("meta"):
        ours, plain = (CDNPGForConditionalGeneration(CDNPGConfig(granularity_mode=mode)) for mode in ("R", None))
    # a head of 451 numbers for each of the nine attentions
    assert ours.num_parameters() - plain.num_parameters() == 9 * 451


def test_without_granularities_it_is_bart():
    plain = make(granularity_mode=None)
    other = BartForConditionalGeneration(plain.config).eval()
    other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch()).logits, other(**batch()).logits)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_folder_and_auto_classes(mode, tmp_path):
    model = make(granularity_mode=mode)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "cdnpg"
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CDNPGConfig)
    back = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert type(back) is CDNPGForConditionalGeneration and back.config.granularity_mode == mode
    torch.testing.assert_close(back(**batch()).loss, model(**batch()).loss)


@torch.no_grad()
def test_a_model_of_before_keeps_the_floor_it_was_trained_with(tmp_path):
    """Its config doesn't name one; what is saved now does, whichever it is."""
    earlier = make(mask_floor=1e-6, granularity_mode="S", initial_granularity=0.99)
    for floor, named in ((1e-6, True), (1e-6, False), (0.0, True)):
        model = make(mask_floor=floor, granularity_mode="S", initial_granularity=0.99)
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config.pop("mask_floor") == floor
        if not named:
            (tmp_path / "config.json").write_text(json.dumps(config))
        back = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
        assert (
            back.config.mask_floor == floor
            and back.model.encoder.layers[0].self_attn.granularity.config.mask_floor == floor
        )
        assert torch.equal(back(**batch()).loss, model(**batch()).loss)
        assert torch.equal(back(**batch()).loss, earlier(**batch()).loss) == bool(floor)
    assert CDNPGConfig.from_dict({"d_model": 36}).mask_floor == CDNPGConfig().mask_floor == 0


@torch.no_grad()
def test_cross_attention_can_do_without():
    model = make(granularity_cross_attention=False)
    names = [name for name, _ in model.named_modules() if name.endswith(".granularity")]
    assert len(names) == 6 and not any("encoder_attn" in name for name in names)
    output = model(**batch(), output_granularities=True)
    assert len(output.decoder_granularities) == 3 and not output.cross_granularities and torch.isfinite(output.loss)


def test_starts_at_the_initial_granularity():
    output = make(initial_granularity=0.2, init_std=0.02)(**batch(), output_granularities=True)
    for z in output.encoder_granularities:
        torch.testing.assert_close(z, torch.full_like(z, 0.2), atol=0.1, rtol=0)


@torch.no_grad()
def test_output_granularities():
    model, inputs = make(), batch()
    plain, output = model(**inputs), model(**inputs, output_granularities=True)
    torch.testing.assert_close(output.logits, plain.logits)
    assert [len(output[f"{part}_granularities"]) for part in ("encoder", "decoder", "cross")] == [3, 3, 3]
    assert {z.shape for z in output.encoder_granularities} == {(3, 8)}
    assert {z.shape for z in (*output.decoder_granularities, *output.cross_granularities)} == {(3, 6)}
    hidden = model.model.encoder(
        inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True
    ).hidden_states
    for layer, z, states in zip(model.model.encoder.layers, output.encoder_granularities, hidden):
        torch.testing.assert_close(z, layer.self_attn.granularity(states))
    assert "encoder_granularities" not in plain
    assert make(granularity_mode=None)(**inputs, output_granularities=True).loss is not None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("placement", ["before", "after"])
@torch.no_grad()
def test_generate_with_and_without_cache(mode, placement):
    model, inputs = make(granularity_mode=mode, granularity_placement=placement), batch()
    del inputs["labels"]
    for options in ({"num_beams": 4}, {"num_beams": 1}):
        found = [
            model.generate(**inputs, max_new_tokens=10, do_sample=False, use_cache=each, **options)
            for each in (True, False)
        ]
        assert torch.equal(*found)
    assert model.generate(**inputs, max_new_tokens=5, do_sample=True).shape[0] == 3


@torch.no_grad()
def test_attentions_have_the_bias_in_them():
    model = make()
    model.set_attn_implementation("eager")
    output = model(**batch(), output_attentions=True)
    assert len(output.encoder_attentions) == len(output.cross_attentions) == 3
    weights = output.encoder_attentions[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    assert (weights[0, :, :, 5:] < 1e-6).all(), "padding is seen"


def test_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = make(dropout=0.0, attention_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any("granularity" in name for name in found[0])
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])


def test_learns_to_copy():
    model = make(dropout=0.0, attention_dropout=0.0, init_std=0.05).train()
    inputs = batch()
    inputs["labels"] = inputs["input_ids"][:, :6].clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = None
    for _ in range(60):
        loss = model(**inputs).loss
        first = first or loss.item()
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
    assert loss.item() < 0.2 * first


def test_resized_embeddings():
    model = make()
    model.resize_token_embeddings(70)
    assert model(**batch()).logits.shape[-1] == 70


@pytest.mark.parametrize(
    "options, message",
    [
        ({"granularity_mode": "X"}, "mode='X'"),
        ({"max_position_embeddings": 2}, "max_length=2"),
        ({"initial_granularity": 1.0}, "initial=1.0"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_flash_attention_is_refused():
    with pytest.raises((ValueError, ImportError), match="flash|Flash"):
        CDNPGForConditionalGeneration._from_config(CDNPGConfig(**SIZES), attn_implementation="flash_attention_2")


def test_texts_that_are_too_long():
    with pytest.raises((ValueError, IndexError), match="max_length=20|out of range"):
        make()(input_ids=torch.ones(1, 25, dtype=torch.long))
