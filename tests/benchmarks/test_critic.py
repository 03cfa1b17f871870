# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""CriticControl's benchmarks run from end to end on a tiny model and made-up data, and their measures are right."""

from __future__ import annotations

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn


pytest.importorskip("sklearn", reason="the benchmarks' classifiers are scikit-learn's")
from sklearn.feature_extraction.text import CountVectorizer  # noqa: E402
from sklearn.naive_bayes import MultinomialNB  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402

from benchmarks import critic_control, critic_cost, critic_tasks, critic_training, text_quality  # noqa: E402
from tests.tiny.models import tiny  # noqa: E402


class _Encoder:
    """Counts of letters in place of MiniLM, which isn't installed everywhere."""

    def __call__(self, texts):
        counts = np.array([[text.lower().count(letter) for letter in "abcdefgh"] for text in texts], dtype=np.float32)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1.0)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Files like the data sets', and stand-ins for the judges' packages."""
    monkeypatch.setenv("PEFT_EXT_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(critic_tasks, "SentenceEncoder", _Encoder)
    monkeypatch.setattr(
        critic_tasks, "FineTunedEncoder", lambda folder: make_pipeline(CountVectorizer(), MultinomialNB())
    )
    analyzer = types.SimpleNamespace(polarity_scores=lambda text: {"compound": text.count("a") - text.count("b")})
    vader = types.SimpleNamespace(SentimentIntensityAnalyzer=lambda: analyzer)
    monkeypatch.setitem(sys.modules, "vaderSentiment", types.SimpleNamespace(vaderSentiment=vader))
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", vader)
    profanity = types.SimpleNamespace(predict=lambda texts: [text.count("b") > 3 for text in texts])
    monkeypatch.setitem(sys.modules, "profanity_check", profanity)

    def write(name, rows):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("\n".join(json.dumps(row) for row in rows))

    moods = [{"text": f"{word} {word} thing number {n} of many here now", "label": label} for n in range(12)
             for word, label in (("aaa", "positive"), ("bbb", "negative"))]  # fmt: skip
    topics = [{"text": f"{label} {label} news {n}", "label": label} for n in range(12)
              for label in ("World", "Sports", "Business", "Sci/Tech")]  # fmt: skip
    write("sst2/train.jsonl", moods)
    write("sst2/validation.jsonl", moods[:4])
    write("ag_news/train.jsonl", topics)
    write("ag_news/test.jsonl", topics[:8])
    write("prompts/topic_prefixes.jsonl", [{"text": f"In {n}"} for n in range(4)])
    toxic = [{"text": f"{'aaa' if n % 2 else 'bbb'} {n}", "prompt_toxicity": 0.2 + 0.6 * (n % 4 == 0),
              "continuation_toxicity": 0.9} for n in range(24)]  # fmt: skip
    write("prompts/rtp_sample.jsonl", toxic)


def test_control(data, smoke):
    found = smoke("critic_control")
    assert "| CriticControl, strength 8 |" in found.shown and "| RLOO, LoRA |" in found.shown
    assert "| CriticControl, unseen topics, strength 8 |" in found.shown
    assert set(found.rows) == {*critic_tasks.TASKS, "sentiment_running_mean", "topic_running_mean"}
    assert len(found.rows["topic"]) == 9, "every method, and topics that the critic never saw"
    assert all(result["perplexity"] > 1 for result in found.results)


def test_rows_are_found_under_the_keys_that_they_had():
    assert critic_control.Row("CriticControl", 4.0).key == {"method": "CriticControl", "level": 4.0}
    best = critic_control.Row("CriticControl", 4.0, 2)
    assert best.key["best_of"] == 2 and best.title == "CriticControl, strength 4, best of 2"
    assert [row.texts for row in (best, critic_control.Row("Best of N", 4), critic_control.Row("Frozen model"))] == [
        2,
        4,
        1,
    ]


def test_odds_of_an_unseen_topic():
    """Scale and bias are those that made the rewards."""
    scores = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)) / 50
    scale, bias = critic_training._odds(scores, torch.sigmoid(30 * scores - 1))
    assert scale == pytest.approx(30, rel=1e-2) and bias == pytest.approx(-1, rel=1e-2)


def test_cost(smoke):
    found = smoke("critic_cost")
    assert "| critic_generate |" in found.shown and "re-encoding over exact" in found.shown
    (result,) = found.results
    assert {len(seconds) for seconds in result.values()} == {2}


def test_reencoding_is_what_the_processor_computes():
    """The released code's way, without its mistakes, gives the same text."""
    model = tiny("llama")
    critic = critic_cost._critic(model)
    ids = torch.randint(3, 90, (2, 5))
    processors = (critic_cost.Reencoding(model, critic), critic_cost.CriticLogitsProcessor(model, critic, top_k=10))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    one, other = (model.generate(ids, logits_processor=[processor], **options).tolist() for processor in processors)
    assert one == other


def test_perplexity_is_that_of_single_texts():
    model = tiny("gpt2")
    prompts, continuations = [[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15], []]
    losses = []
    for prompt, continuation in zip(prompts, continuations):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + continuation])).logits[0]
        for position, token in enumerate(continuation, start=len(prompt)):
            losses.append(-nn.functional.log_softmax(logits[position - 1], dim=-1)[token].item())
    expected = math.exp(sum(losses) / len(losses))
    found = text_quality.continuation_perplexity(model, prompts, continuations, batch_size=2)
    assert found == pytest.approx(expected, rel=1e-4)


def test_diversity_and_repetition():
    assert text_quality.distinct([[1, 2, 1], [2, 1]], 1) == 2 / 5
    assert text_quality.distinct([[1, 2, 1], [2, 1]], 2) == 2 / 3
    assert text_quality.repetition([[1, 2, 3, 1, 2, 3], [4, 5, 6]], 3) == 1 / 5
