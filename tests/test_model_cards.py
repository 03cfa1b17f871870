# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Model cards: what they say, that their snippets run as they stand, what a user's edits survive."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from generation_ext import CDNPGConfig, CDNPGForConditionalGeneration, Critic, PALPClassifier
from peft_ext import AlphaTuningConfig, BottleneckConfig, PeqaConfig, calibrate, load, note_measured
from peft_ext.checkpoint.gguf_header import read_text
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.language_model import base_fingerprint
from peft_ext.model_card import README, BaseModel, Card, write_card
from peft_ext.ood import OODPipeline
from peft_ext.packed_cards import codes_digest, install
from tests.snippets import printed_by_card
from tests.tiny.folders import save_tiny, save_tiny_model
from tests.tiny.models import tiny
from tests.tiny.tokenizers import byte_tokenizer, tiny_tokenizer


BLANK = re.compile(r"More Information Needed|automatically generated")
CONFIGS = {
    "peqa": PeqaConfig(bits=4, group_size=32, task_type="CAUSAL_LM"),
    "alphatuning": AlphaTuningConfig(bits=3, group_size=32, task_type="CAUSAL_LM"),
    "bottleneck": BottleneckConfig(bottleneck_dim=4, task_type="CAUSAL_LM"),
    "untyped": PeqaConfig(bits=4),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny model with its tokenizer, and a card that says its licence."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    (folder / README).write_text("---\nlicense: mit\nbase_model: owner/tiny\n---\n\n# A tiny model\n")
    return folder


def _load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder)


def _run(folder: Path) -> str:
    """What the card's snippet prints in the folder that it lies in."""
    return printed_by_card((folder / README).read_text(), folder)


def _card(folder: Path) -> ModelCard:
    card = ModelCard.load(folder / README)
    assert not BLANK.search(card.content)
    return card


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapters_card(name, base, tmp_path):
    model = get_peft_model(_load(base), copy.deepcopy(CONFIGS[name]))
    model.save_pretrained(tmp_path)
    card, data = _card(tmp_path), _card(tmp_path).data
    assert data.library_name == "peft" and data.pipeline_tag == "text-generation"
    assert data.base_model == "owner/tiny" and data.base_model_relation == "adapter" and data.license == "mit"
    assert {"peft-ext", "peft"} <= set(data.tags)
    assert base_fingerprint(model) in card.text and str(base) not in card.content
    if name != "bottleneck":
        bits = CONFIGS[name].bits
        assert f"of {bits} bits" in card.text and f"{bits}-bit" in data.tags and codes_digest(model) in card.text
    else:
        assert "`bottleneck_dim=4`" in card.text
    assert _run(tmp_path)


@pytest.mark.parametrize("checkpoint_format", ["pack-quantized", "bcq"])
@pytest.mark.parametrize("beside", [True, False], ids=["tokenizer", "no-tokenizer"])
def test_a_packed_bases_card(checkpoint_format, beside, base, tmp_path):
    model = get_peft_model(_load(base), PeqaConfig(bits=3, group_size=32)).unload()
    make_saveable(model, checkpoint_format)
    if beside:
        byte_tokenizer().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card, data = _card(tmp_path), _card(tmp_path).data
    assert data.base_model == "owner/tiny" and data.base_model_relation == "quantized" and data.license == "mit"
    assert {"3-bit", "quantized", "peft-ext"} <= set(data.tags) and data.library_name == "transformers"
    assert "uniform integers of 3 bits, in groups of 32 (14 layers)" in card.text and codes_digest(model) in card.text
    (smaller,) = map(float, re.findall(r"([\d.]+) times smaller than bfloat16", card.text))
    assert 2.5 < smaller < 4  # 3 bits, and 40 in 32 weights for scales and zero points
    assert _run(tmp_path)
    # base and adapters on it show the same codes
    adapted = get_peft_model(_load(tmp_path), PeqaConfig(bits=3, group_size=32))
    assert codes_digest(adapted) == codes_digest(model)


@pytest.mark.parametrize(
    ("name", "auto"), [("t5", AutoModelForSeq2SeqLM), ("bert", AutoModelForSequenceClassification)]
)
def test_other_kinds(name, auto, tmp_path):
    save_tiny(name, tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    model = auto.from_pretrained(tmp_path / "float")
    task = "SEQ_2_SEQ_LM" if name == "t5" else "SEQ_CLS"
    adapted = get_peft_model(model, PeqaConfig(bits=4, task_type=task))
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.unload().save_pretrained(tmp_path / "base")
    assert _run(tmp_path / "adapter")
    assert _run(tmp_path / "base")


def test_a_model_without_a_name(tmp_path):
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4))
    model.save_pretrained(tmp_path / "adapter")
    assert (
        "a model without a name" in _card(tmp_path / "adapter").text
        and "```python" not in _card(tmp_path / "adapter").text
    )
    model.unload().save_pretrained(tmp_path / "base")
    assert _run(tmp_path / "base")
    assert "licence wasn't known" in _card(tmp_path / "base").text and _card(tmp_path / "base").data.license is None


def test_a_calibrated_adapter_says_what_it_needs(base, tmp_path):
    model, config = _load(base), PeqaConfig(bits=3, init_method="calibrated", task_type="CAUSAL_LM")
    calibrate(model, config, [{"input_ids": torch.randint(3, 100, (2, 16))}], progressbar=False)
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    card = _card(tmp_path / "adapter").text
    assert 'save them, `model.unload().save_pretrained("base")`' in card and "```python" not in card
    model.unload().save_pretrained(tmp_path / "base")
    tuned = get_peft_model(_load(tmp_path / "base"), config)
    tuned.save_pretrained(tmp_path / "of-base")
    assert "```python" in _card(tmp_path / "of-base").text


def test_others_cards_are_peft_s_and_none(base, tmp_path):
    get_peft_model(_load(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    assert "More Information Needed" in (tmp_path / "lora" / README).read_text()
    _load(base).save_pretrained(tmp_path / "float")
    assert not (tmp_path / "float" / README).exists()


def test_what_was_measured(base, tmp_path):
    model = get_peft_model(_load(base), PeqaConfig(bits=4))
    note_measured(model, "perplexity, held-out text", float=19.27, packed=26.13)
    note_measured(model, "perplexity, held-out text", tuned=18.63)
    note_measured(model, "texts", tuned=1200)
    model.save_pretrained(tmp_path)
    text = _card(tmp_path).text
    assert "|  | float | packed | tuned |" in text and "| perplexity, held-out text | 19.27 | 26.13 | 18.63 |" in text
    assert "| texts | - | - | 1,200 |" in text


def test_an_edited_card_is_kept(base, tmp_path):
    model = get_peft_model(_load(base), PeqaConfig(bits=4))
    model.save_pretrained(tmp_path)
    path = tmp_path / README
    written = path.read_text()
    model.save_pretrained(tmp_path)
    assert path.read_text() == written
    note_measured(model, "perplexity", tuned=3.0)
    model.save_pretrained(tmp_path)
    assert "| perplexity | 3 |" in path.read_text(), "nobody edited it, so it is renewed"
    path.write_text(
        path.read_text().replace("# PEQA", "# My PEQA").replace("license: mit", "license: cc0-1.0\nlanguage: de")
    )
    note_measured(model, "perplexity", tuned=4.0)
    model.save_pretrained(tmp_path)
    card = _card(tmp_path)
    assert "# My PEQA" in card.text and "| perplexity | 3 |" in card.text
    assert card.data.license == "cc0-1.0" and card.data.language == "de" and card.data.base_model == "owner/tiny"


def test_blank_templates_are_replaced_and_folders_are_no_base_models(base, tmp_path):
    blank = ModelCard.from_template(ModelCardData())
    blank.data["base_model"], blank.data["language"] = "/a/folder", "de"
    blank.text += "\n### Framework versions\n\n- PEFT 0.21.2"
    blank.save(tmp_path / README)
    get_peft_model(tiny("llama"), PeqaConfig(bits=4)).save_pretrained(tmp_path)
    card = _card(tmp_path)
    assert card.data.language == "de" and card.data.base_model is None and "PEQA at 4 bits" in card.text


def test_a_card_that_cannot_be_read_is_left(tmp_path):
    (tmp_path / README).write_text("---\nlicense: [\n---\nMine.\n")
    with pytest.warns(UserWarning, match="the model card is left as it is"):
        write_card(Card("Title", "Text.", BaseModel()), tmp_path)
    assert (tmp_path / README).read_text().endswith("Mine.\n")


def test_a_card_that_goes_wrong_costs_no_checkpoint(base, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_ext.packed_cards.codes_digest", lambda model: 1 / 0)
    model = get_peft_model(_load(base), PeqaConfig(bits=4))
    with pytest.warns(UserWarning, match="no model card was written: ZeroDivisionError"):
        model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="no model card was written: ZeroDivisionError"):
        model.unload().save_pretrained(tmp_path / "base")
    monkeypatch.undo()
    assert isinstance(load(str(tmp_path / "base"), adapter=str(tmp_path / "adapter")), PeftModel)


def test_a_critics_card(base, tmp_path):
    for codes in (None, ["sports", "science"]):
        critic = Critic.for_model(_load(base), control_codes=codes)
        note_measured(critic, "held-out roll-outs", explained_variance=0.4)
        critic.save_pretrained(tmp_path)
        card = _card(tmp_path)
        assert (
            card.data.license == "mit" and card.data.base_model == "owner/tiny" and "critic-control" in card.data.tags
        )
        assert base_fingerprint(_load(base)) in card.text and "explained_variance" in card.text
        assert _run(tmp_path)


def test_a_palp_classifiers_card(base, tmp_path):
    palp = PALPClassifier(
        _load(base), byte_tokenizer(), template="Review: {text}\nSentiment:", demonstrations="per-class"
    )
    palp.fit(["a fine film", "two lost hours", "what a joy", "dull"], ["good", "bad", "good", "bad"])
    (tmp_path / "palp").mkdir()
    (tmp_path / "palp" / README).write_text("# Mine\n")
    palp.save_pretrained(tmp_path / "palp")
    assert (tmp_path / "palp" / README).read_text().endswith("# Mine\n")
    palp.save_pretrained(tmp_path / "other")
    card = _card(tmp_path / "other")
    assert "`'Review: {text}\\nSentiment:'`" in card.text and "palp" in card.data.tags and card.data.license == "mit"
    assert re.search("good|bad", _run(tmp_path / "other"))


def test_an_ood_pipelines_card(base, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model.config.pad_token_id = tiny_tokenizer().pad_token_id
    model = get_peft_model(model, PeqaConfig(bits=4, task_type="SEQ_CLS"))
    texts = ["book a table", "a table please", "play a song", "more music"]
    pipeline = OODPipeline.fit(model, tiny_tokenizer(), texts, [0, 0, 1, 1], texts, "msp")
    pipeline.save_pretrained(tmp_path)
    card = _card(tmp_path)
    assert card.data.base_model == "owner/tiny" and "msp" in card.data.tags and "trained: PEQA" in card.text
    assert list(tmp_path.rglob(README)) == [tmp_path / README]
    assert "in_distribution" in _run(tmp_path)


def test_a_paraphrase_models_card(tmp_path):
    config = CDNPGConfig(
        vocab_size=len(tiny_tokenizer()),
        pad_token_id=0,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=64,
    )
    CDNPGForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "base model" not in _card(tmp_path).text and "c-dnpg" in _card(tmp_path).data.tags
    _run(tmp_path)


def test_installed_twice_it_is_there_once():
    method = PreTrainedModel.save_pretrained
    install()
    assert PreTrainedModel.save_pretrained.__wrapped__ is method.__wrapped__


def test_the_default_models_lineage(monkeypatch):
    from peft_ext.model_card import DEFAULT_ON_HUB, named_base
    from peft_ext.models import DEFAULT_MODEL, DEFAULT_VARIABLE, resolve_model

    monkeypatch.delenv(DEFAULT_VARIABLE, raising=False)
    base = named_base(DEFAULT_MODEL)
    source = resolve_model(DEFAULT_MODEL)
    path = Path(source.name_or_path, source.gguf_file)
    assert read_text(path, "general.architecture") == "llama" and read_text(path, "tokenizer.nothing") is None
    with pytest.raises(ValueError, match="is no GGUF"):
        read_text(Path(__file__), "general.license")
    assert base.hub_id == DEFAULT_ON_HUB and base.license == {"license": "apache-2.0"} and base.loads_elsewhere
