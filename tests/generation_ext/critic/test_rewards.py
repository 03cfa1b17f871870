# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import types

import numpy as np
import pytest
import torch
import transformers

from generation_ext.critic.rewards import from_classifier, from_pipeline, from_texts, score
from tests.tiny.models import tiny
from tests.tiny.tokenizers import tiny_tokenizer


PROMPTS, COMPLETIONS = ["w3 w4", "w5"], [" w6", " w7 w8"]
IDS = [[6], [7, 8]]


class Classifier:
    """As scikit-learn's: two classes, the probability of "long" grows with the text."""

    classes_ = np.array(["long", "short"])

    def predict_proba(self, texts):
        share = np.array([min(len(text) / 10, 1.0) for text in texts])
        return np.stack([share, 1 - share], axis=1)


def call(reward, **columns):
    return score(reward, PROMPTS, COMPLETIONS, IDS, columns)


def test_from_texts_sees_prompt_and_completion():
    seen = []
    reward = from_texts(lambda texts: seen.extend(texts) or [0.25, 1])
    assert call(reward) == [0.25, 1.0]
    assert seen == ["w3 w4 w6", "w5 w7 w8"]


def test_a_function_in_trls_shape_gets_all_columns():
    def reward(prompts, completions, completion_ids, topic):
        assert (prompts, completions, completion_ids) == (PROMPTS, COMPLETIONS, IDS)
        return [1.0 if name == "art" else None for name in topic]

    assert call(reward, topic=["art", "war"]) == [1.0, None]


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_rewards_may_be_arrays(kind):
    assert call(lambda **columns: kind([0.5, 0.25])) == [0.5, 0.25]


def test_rounding_errors_are_cut_off():
    assert call(lambda **columns: [1.0000001, -1e-9]) == [1.0, 0.0]


def test_classifier():
    assert call(from_classifier(Classifier(), "long")) == pytest.approx([0.8, 0.8])
    assert call(from_classifier(Classifier(), "short")) == pytest.approx([0.2, 0.2])
    assert call(from_classifier(Classifier()), control_code=["short", "long"]) == pytest.approx([0.2, 0.8])


def test_classifier_bad_input():
    with pytest.raises(ValueError, match=r"label='middle'.*\['long', 'short'\]"):
        from_classifier(Classifier(), "middle")
    with pytest.raises(TypeError, match="predict_proba"):
        from_classifier(types.SimpleNamespace(classes_=["a"]))
    with pytest.raises(ValueError, match="isn't fitted"):
        from_classifier(types.SimpleNamespace(predict_proba=len))
    with pytest.raises(ValueError, match="no control code"):
        call(from_classifier(Classifier()))
    with pytest.raises(ValueError, match="label='art'"):
        call(from_classifier(Classifier()), control_code=["art", "long"])


def test_classifier_of_scikit_learn():
    pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(CountVectorizer(), LogisticRegression()).fit(["w6 w9", "w8 w9"] * 4, ["a", "b"] * 4)
    rewards = call(from_classifier(classifier, "b"))
    assert rewards == pytest.approx(classifier.predict_proba(["w3 w4 w6", "w5 w7 w8"])[:, 1].tolist())
    assert rewards[0] < 0.5 < rewards[1]


def test_pipeline():
    pipeline = transformers.pipeline("text-classification", model=tiny("bert"), tokenizer=tiny_tokenizer())
    inputs = tiny_tokenizer()(["w3 w4 w6", "w5 w7 w8"], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = tiny("bert")(**inputs).logits.softmax(dim=-1)
    assert call(from_pipeline(pipeline, "LABEL_2")) == pytest.approx(expected[:, 2].tolist(), abs=1e-5)
    by_code = call(from_pipeline(pipeline), control_code=["LABEL_0", "LABEL_1"])
    assert by_code == pytest.approx([expected[0, 0].item(), expected[1, 1].item()], abs=1e-5)


def test_pipeline_cuts_long_texts():
    pipeline = transformers.pipeline("text-classification", model=tiny("bert"), tokenizer=tiny_tokenizer())
    rewards = score(from_pipeline(pipeline, "LABEL_0"), ["w5 " * 200], ["w6"], [[6]])
    assert 0 < rewards[0] < 1


def test_pipeline_bad_input():
    pipeline = transformers.pipeline("text-classification", model=tiny("bert"), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="label='POSITIVE'.*LABEL_0"):
        from_pipeline(pipeline, "POSITIVE")
    with pytest.raises(TypeError, match="text-classification"):
        from_pipeline(transformers.pipeline("text-generation", model=tiny("llama"), tokenizer=tiny_tokenizer()))


def test_a_reward_function_that_raises_is_named_and_its_cause_kept():
    def broken(**columns):
        raise KeyError("nothing")

    with pytest.raises(ValueError, match="broken raised KeyError") as caught:
        call(broken)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_reward_function_with_other_arguments_is_told_which_come():
    with pytest.raises(ValueError, match="prompts, completions, completion_ids, topic"):
        call(lambda texts: [0, 0], topic=["a", "b"])


@pytest.mark.parametrize(
    "result, error, message",
    [
        ([0.5], ValueError, "returned 1 rewards for 2 texts"),
        ([0.5] * 3, ValueError, "returned 3 rewards for 2 texts"),
        ([0.5, float("nan")], ValueError, "returned NaN for the text 'w5 w7 w8'.*None"),
        ([0.5, 1.5], ValueError, "returned 1.5 for the text 'w5 w7 w8'.*sigmoid"),
        ([-0.1, 0.5], ValueError, "returned -0.1 for the text 'w3 w4 w6'"),
        ([float("inf"), 0.5], ValueError, "returned inf"),
        (["good", 0.5], TypeError, "returned 'good'"),
        (0.5, TypeError, "must return a list"),
        (None, TypeError, "must return a list"),
        ("ab", TypeError, "must return a list"),
    ],
)
def test_bad_rewards(result, error, message):
    def judge(**columns):
        return result

    with pytest.raises(error, match=message) as caught:
        call(judge)
    assert "judge" in str(caught.value)


def test_what_is_no_reward_function():
    async def later(**columns):
        return [0.5, 0.5]

    with pytest.raises(TypeError, match="from_texts"):
        call(None)
    with pytest.raises(TypeError, match="later is asynchronous"):
        call(later)
    with pytest.raises(TypeError, match="can't be called"):
        from_texts("texts")


def test_an_interrupt_goes_through():
    def stopped(**columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(stopped)
