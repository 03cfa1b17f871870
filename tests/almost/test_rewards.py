# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Scores of a reward model: against one text at a time, with adapters, another tokenizer, and damaged weights."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from peft_ext import PeqaConfig
from tests.tiny.folders import save_tiny_model
from tests.tiny.tokenizers import byte_tokenizer, tiny_tokenizer
from trl_ext.almost.models import load_classifier
from trl_ext.almost.rewards import RewardModel, encode_answer


PROMPTS = ["one", "a much longer question than that", [{"role": "user", "content": "three"}], ""]
ANSWERS = ["yes", "no, and here is why it is so", [{"role": "assistant", "content": "maybe "}], "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model on disk, and the language model it came from."""
    folder = tmp_path_factory.mktemp("rewards")
    save_tiny_model(folder / "base")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder / "whole")
    byte_tokenizer().save_pretrained(folder / "whole")
    return folder


@pytest.fixture(scope="module")
def rewards(folder):
    return RewardModel.from_pretrained(str(folder / "whole"), batch_size=3)


def by_hand(folder, text: str) -> float:
    """The slow, obvious score: one text, no padding, the last token before the end token (which pads, here)."""
    model = LlamaForSequenceClassification.from_pretrained(folder / "whole").eval()
    ids = torch.tensor([byte_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[0, -1]
        return float(model.score(hidden))


def test_scores_are_those_of_one_text_at_a_time(folder, rewards):
    scores = rewards.score(PROMPTS, ANSWERS)
    texts = ["\n\nHuman: one\n\nAssistant: yes", "\n\nHuman: three\n\nAssistant: maybe", "\n\nHuman: \n\nAssistant: x"]
    expected = [by_hand(folder, text) for text in texts]
    assert [scores[0], scores[2], scores[3]] == pytest.approx(expected, abs=1e-4)
    for prompt, answer, score in zip(PROMPTS, ANSWERS, scores):
        assert rewards.score([prompt], [answer]) == pytest.approx([score], abs=1e-5)


def test_a_long_text_loses_its_beginning(folder):
    short = RewardModel.from_pretrained(str(folder / "whole"), max_length=9)
    whole = encode_answer(short.tokenizer, "a long question", "yes")
    assert short.encode("a long question", "yes") == whole[-9:]
    assert short.score(["a long question"], ["yes"]) == pytest.approx([by_hand(folder, "ant: yes")], abs=1e-4)


def test_it_is_a_reward_function_of_trl(rewards):
    completions = [[{"role": "assistant", "content": "maybe"}]]
    called = rewards(prompts=[PROMPTS[2]], completions=completions, completion_ids=[[1]], query=["x"])
    assert called == rewards.score([PROMPTS[2]], ["maybe"])
    assert rewards.__name__ == "reward_model"


def test_accuracy_counts_ties_half(rewards):
    better, worse = (
        ("yes", "no")
        if rewards.score(["q", "q"], ["yes", "no"])[0] > rewards.score(["q"], ["no"])[0]
        else ("no", "yes")
    )
    pairs = [
        {"prompt": "q", "chosen": better, "rejected": worse},
        {"prompt": "q", "chosen": worse, "rejected": better},
        {"prompt": "q", "chosen": better, "rejected": better},
        {"prompt": "q", "chosen": better, "rejected": worse},
    ]
    assert rewards.score_pairs(pairs).accuracy == (1 + 0 + 0.5 + 1) / 4


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False),
        PeqaConfig(bits=4, task_type="SEQ_CLS"),
    ],
    ids=["lora", "peqa"],
)
def test_an_adapter_is_loaded_on_its_base_with_its_head(folder, config, tmp_path):
    model = get_peft_model(load_classifier(str(folder / "base")), config)
    with torch.no_grad():
        model.get_parameter("base_model.model.score.modules_to_save.default.weight").normal_()
    tokenizer = byte_tokenizer()
    model.save_pretrained(tmp_path)
    expected = RewardModel(model, tokenizer).score(PROMPTS, ANSWERS)
    loaded = RewardModel.from_pretrained(str(tmp_path))
    assert loaded.score(PROMPTS, ANSWERS) == pytest.approx(expected, abs=1e-5)


def test_another_tokenizer_than_the_policys_is_said(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_ext.almost.rewards"):
        RewardModel.from_pretrained(str(folder / "whole"), policy_tokenizer=byte_tokenizer())
        assert not caplog.records
        rewards = RewardModel.from_pretrained(str(folder / "whole"), policy_tokenizer=tiny_tokenizer())
    assert "another tokenizer" in caplog.text
    assert rewards.score(["w3 w4"], ["w5"]) == pytest.approx(
        [by_hand(folder, "\n\nHuman: w3 w4\n\nAssistant: w5")], abs=1e-4
    )


def test_nan_names_the_row(folder):
    rewards = RewardModel.from_pretrained(str(folder / "whole"))
    embedding = rewards.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[rewards.tokenizer("Q", add_special_tokens=False)["input_ids"][0]] = torch.nan
    assert len(rewards.score(["one"], ["yes"])) == 1
    with pytest.raises(ValueError, match="row 1 is nan: prompt 'two Q', response 'no'"):
        rewards.score(["one", "two Q", "three"], ["yes", "no", "x"])


def test_a_language_model_is_no_reward_model(folder):
    with pytest.raises(ValueError, match="no head for a score"):
        RewardModel.from_pretrained(str(folder / "base"))


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path):
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=260, num_labels=3
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gives 3 scores"):
        RewardModel.from_pretrained(str(tmp_path))


def test_an_adapter_without_a_base_is_named(folder, tmp_path):
    shutil.copytree(folder / "whole", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        RewardModel.from_pretrained(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("prompts", "responses", "error", "match"),
    [
        (["a", "b"], ["x"], ValueError, "2 prompts, but 1"),
        ("a", ["x"], TypeError, "pass \\[text\\]"),
        (["a"], [[{"role": "user", "content": "x"}]], ValueError, "message of the assistant"),
    ],
)
def test_bad_input_is_named(rewards, prompts, responses, error, match):
    with pytest.raises(error, match=match):
        rewards.score(prompts, responses)
    with pytest.raises(ValueError, match="batch_size=0"):
        RewardModel(rewards.model, rewards.tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="no rows"):
        rewards.score_pairs([])


def test_no_prompts_no_scores(rewards):
    assert rewards.score([], []) == []


def test_an_encoder_scores_a_text_the_same_in_a_batch():
    """Its attention sees padding unless the mask hides it."""
    config = BertConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=260,
        num_labels=1,
        initializer_range=0.3,
    )
    rewards = RewardModel(BertForSequenceClassification(config), byte_tokenizer())
    scores = rewards.score(PROMPTS, ANSWERS)
    for prompt, answer, score in zip(PROMPTS, ANSWERS, scores):
        assert rewards.score([prompt], [answer]) == pytest.approx([score], abs=1e-5)
