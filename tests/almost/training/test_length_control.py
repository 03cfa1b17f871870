# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Rewards without length: what it explains of pairs, the head without it, and a training where longer answers are better."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.almost.training.trained import FLAGS, write_lines
from tests.tiny.folders import save_tiny_model
from tests.tiny.tokenizers import byte_tokenizer
from trl_ext.almost.rewards import RewardModel
from trl_ext.almost.training.length_control import (
    control_head,
    correlations,
    covariates,
    explained,
    score_head,
    without_covariates,
)
from trl_ext.scripts import almost_reward


def confounded(rng, count=400, size=12, slope=3.0):
    """Better and worse answers' states and covariates, the better ones longer by three deviations: the first number of
    a state is quality, the second length with a little noise, the others nothing."""
    sides = []
    for quality, longer in ((1.0, slope), (-1.0, 0.0)):
        lengths = rng.normal(longer, 1.0, count)
        states = rng.normal(0, 1.0, (count, size))
        states[:, 0] = quality + rng.normal(0, 1.0, count)
        states[:, 1] = lengths + rng.normal(0, 0.1, count)
        sides.append((states, np.stack([lengths, rng.normal(0, 1.0, count)], axis=1)))
    return sides


def bradley_terry(differences, offsets):
    def loss(weights):
        logits = differences @ weights + offsets
        return np.logaddexp(0, -logits).sum() + 0.5 * weights @ weights

    return minimize(loss, np.zeros(differences.shape[1])).x


def centred(*parts):
    return np.concatenate([part - part.mean(axis=0) for part in parts])


def test_a_judge_of_pairs_whose_better_answers_are_longer_ranks_by_quality():
    rng = np.random.default_rng(0)
    (good, long), (bad, short) = confounded(rng)
    plain = bradley_terry(good - bad, 0.0)
    (logits,) = explained(long, short)
    trained = bradley_terry(good - bad, logits)
    head = without_covariates(trained, centred(good, bad), centred(long, short))
    (new_good, new_long), (new_bad, new_short) = confounded(rng, slope=-3.0)  # now the better ones are shorter
    right = [((new_good - new_bad) @ weights > 0).mean() for weights in (plain, head)]
    assert right[0] < 0.5 and right[1] > 0.85
    among_equals = centred(new_good, new_bad), centred(new_long, new_short)
    before, after = (
        correlations(among_equals[0] @ weights, among_equals[1])["log_tokens"] for weights in (plain, head)
    )
    assert before > 0.5 and abs(after) < 0.1


def test_the_regression_on_length_is_the_penalised_one():
    rng = np.random.default_rng(1)
    chosen, rejected = rng.normal(1, 2, (50, 2)), rng.normal(0, 2, (50, 2))
    logits, other = explained(chosen, rejected, [np.ones((3, 2))])
    scale = np.concatenate([chosen, rejected]).std(axis=0)
    weights = bradley_terry((chosen - rejected) / scale, 0.0)
    assert logits == pytest.approx((chosen - rejected) / scale @ weights, abs=1e-4)
    assert other == pytest.approx(np.full(3, (1 / scale) @ weights), abs=1e-4)


def test_pairs_that_length_always_orders_have_finite_logits_and_a_constant_covariate_says_nothing():
    chosen = np.stack([np.linspace(5, 6, 40), np.zeros(40)], axis=1)
    logits, held_out = explained(chosen, chosen - [3.0, 0.0], [np.empty((0, 2))])
    assert np.isfinite(logits).all() and (logits > 0).all() and held_out.shape == (0,)


@pytest.mark.parametrize("answers", [6, 200])
def test_the_new_head_s_scores_have_no_covariance_with_the_covariates(answers):
    rng = np.random.default_rng(2)
    varying = rng.normal(size=(answers, 2))
    states = rng.normal(size=(answers, 16)) + varying @ rng.normal(size=(2, 16))
    states, varying = centred(states), centred(varying)
    weight = rng.normal(size=16)
    head = without_covariates(weight, states, varying)
    assert np.abs((states @ head) @ varying / answers).max() < 1e-9
    assert without_covariates(head, states, varying) == pytest.approx(head, abs=1e-9), (
        "there is nothing left to take out"
    )
    nothing = np.zeros_like(varying)
    assert without_covariates(weight, states, nothing) == pytest.approx(weight), "nothing varies, nothing changes"


def classifier(**kwargs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=300, num_labels=1, pad_token_id=0, **sizes, **kwargs))


def test_the_head_changes_by_what_the_model_s_own_scores_say():
    model, tokenizer = classifier(), byte_tokenizer()
    texts = ["".join(np.random.default_rng(n).choice(list("abcdefgh"), n)) for n in range(4, 24)]
    rewards = RewardModel(model, tokenizer, batch_size=3)
    rows = [rewards.encode("q", text) for text in texts]
    varying = covariates(tokenizer, texts)
    found = control_head(model, rows, varying, rewards.tokenizer.pad_token_id, batch_size=3)
    scores = np.array(rewards.score(["q"] * 20, texts))
    assert abs(found["before"]["log_tokens"]) > 0.1 and found["answers"] == 20
    among_equals = centred(scores[:10], scores[10:]), centred(varying[:10], varying[10:])
    # float32 scores, so as good as none
    assert correlations(*among_equals)["log_tokens"] == pytest.approx(0, abs=1e-3)
    assert found["after"] == pytest.approx({"log_tokens": 0, "tokens": 0, "repeated_share": 0}, abs=1e-3)


def test_covariates_are_tokens_of_the_answer_and_repeated_3_grams():
    found = covariates(byte_tokenizer(), ["It is so. It is so. It is so.", "", "abc"])
    assert found == pytest.approx(np.array([[np.log(29), 29, 4 / 7], [0, 0, 0], [np.log(3), 3, 0]]))
    assert covariates(byte_tokenizer(), []).shape == (0, 3)


def test_a_model_without_one_linear_score_is_refused():
    model = classifier()
    assert score_head(model) is model.score
    model.score.requires_grad_(False)
    with pytest.raises(ValueError, match="one linear head of one score; LlamaForSequenceClassification has 0"):
        score_head(model)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"log_tokens": 0.8}, "among equally good answers: 0.80 (--length_control keeps it out)"),
        ({"log_tokens": 0.2}, "among equally good answers: 0.20"),
        (None, "held-out accuracy: 0.75"),
    ],
)
def test_the_script_says_how_scores_go_with_length(result, said, monkeypatch, capsys):
    found = {"pairs": 3, "held_out_accuracy": 0.75, **({"held_out_correlation": result} if result else {})}
    monkeypatch.setattr(almost_reward.reward, "parse", lambda argv: ())
    monkeypatch.setattr(almost_reward.reward, "run", lambda: found)
    almost_reward.main([])
    assert capsys.readouterr().out.strip().endswith(said)


def user(text):
    return [{"role": "user", "content": text}]


def says(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same training with and without control: better answers have more a's than z's, and most of them are longer."""
    folder, rng = tmp_path_factory.mktemp("control"), np.random.default_rng(0)
    save_tiny_model(folder / "base")

    def pairs(count, longer):
        def answer(share, length):
            return says("".join(rng.choice(["a", "z"], length, p=[share, 1 - share])) + ".")

        return [
            {
                "prompt": user(f"q {i}"),
                "chosen": answer(0.6, int(rng.integers(12, 30)) + max(longer, 0)),
                "rejected": answer(0.4, int(rng.integers(12, 30)) + max(-longer, 0)),
            }
            for i in range(count)
        ]

    write_lines(folder / "pairs.jsonl", pairs(96, 14))
    write_lines(folder / "heldout.jsonl", pairs(48, -14))
    found = {}
    for name, flags in (
        ("plain", []),
        ("controlled", ["--length_control"]),
        ("lora", ["--length_control", "--use_peft"]),
    ):
        data = ["--dataset_name", folder / "pairs.jsonl", "--eval_dataset_name", folder / "heldout.jsonl"]
        rate = ["--learning_rate", "3e-3" if name != "lora" else "1e-2", "--max_steps", "32", "--eval_strategy", "no"]
        flags = [*flags, *(["--lora_target_modules", "all-linear"] if name == "lora" else [])]
        out = ["--model_name_or_path", folder / "base", *data, "--output_dir", folder / name]
        almost_reward.main([*map(str, [*out, *rate, *flags]), *FLAGS])
        found[name] = json.loads((folder / name / "training.json").read_text())
    return folder, found


def test_a_reward_model_of_confounded_pairs_is_right_where_the_better_answer_is_the_shorter(trained):
    _, found = trained
    plain = found["plain"]
    assert plain["held_out_accuracy"] < 0.5 and plain["held_out_correlation"]["log_tokens"] > 0.5
    assert "length_control" not in plain
    for name in ("controlled", "lora"):
        assert found[name]["held_out_accuracy"] > 0.75
        control, held_out = found[name]["length_control"], found[name]["held_out_correlation"]["log_tokens"]
        assert control["answers"] == 192 and abs(control["after"]["log_tokens"]) < 1e-6
        assert abs(held_out) < 0.25


def test_what_is_written_is_the_changed_head(trained):
    folder, found = trained
    pairs = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    for name in ("controlled", "lora"):
        assert RewardModel.from_pretrained(str(folder / name)).score_pairs(pairs).accuracy == pytest.approx(
            found[name]["held_out_accuracy"], abs=0.03
        )
    adapter = RewardModel.from_pretrained(str(folder / "lora" / "adapter")).score_pairs(pairs).chosen
    merged = RewardModel.from_pretrained(str(folder / "lora")).score_pairs(pairs).chosen
    assert adapter == pytest.approx(merged, abs=1e-3)
