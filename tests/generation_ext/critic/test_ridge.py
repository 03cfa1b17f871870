# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from generation_ext.critic import Critic
from generation_ext.critic import ridge as module
from generation_ext.critic.batches import states_mask
from generation_ext.critic.ridge import Explained, best_of, candidate_layers, explained_by, fit_head
from generation_ext.critic.rollouts import Rollout, encode
from tests.generation_ext.critic.reference import shared
from tests.generation_ext.critic.test_training import telling, trainer
from tests.tiny.models import VOCAB


def texts(count: int, prompts: int = 40) -> list[Rollout]:
    generator = torch.Generator().manual_seed(3)

    def tokens(length):
        return torch.randint(5, VOCAB, (length,), generator=generator).tolist()

    begun = [tokens(3) for _ in range(prompts)]
    return [Rollout("", "", begun[number % prompts], tokens(2 + number % 5)) for number in range(count)]


@pytest.mark.parametrize("largest", [8192, 40], ids=["primal", "dual"])
def test_the_head_is_ridge_regression(monkeypatch, largest):
    monkeypatch.setattr(module, "_LARGEST", largest)
    critic = Critic.for_model(shared("llama"))
    states = [torch.randn(4, critic.state_size, generator=torch.Generator().manual_seed(n)) for n in range(10)]
    targets = [(0.4 + 0.1 * each[:, 0]).clamp(0, 1) for each in states]
    rows, wanted = torch.cat(states), torch.cat(targets)
    critic.fit_standardisation(rows)
    fit_head(critic, states, targets, penalty=0.2)
    standard = ((rows - critic.mean) / critic.std).numpy()
    expected = Ridge(alpha=0.2 * len(rows), fit_intercept=False).fit(standard, (wanted - wanted.mean()).numpy())
    mean = float(wanted.mean())
    np.testing.assert_allclose(critic.head.weight[0].detach() * mean * (1 - mean), expected.coef_, atol=1e-5)
    assert float(torch.sigmoid(critic.head.bias.detach())) == pytest.approx(mean, abs=1e-6)


def test_the_layer_that_outcomes_come_from_explains_most():
    model = shared("llama")
    critic = Critic.for_model(model)
    rollouts = texts(240)
    with torch.no_grad():
        states = encode(model, rollouts, Critic.for_model(model, layer=1))
    outcomes = torch.sigmoid(2 * states[..., 35] / states[..., 35].std())
    layers = candidate_layers(model, critic.reading(model))
    found = explained_by(model, critic, [(index,) for index in layers], rollouts, outcomes, seed=0)
    by_layer = dict(zip(layers, found))
    assert layers == [1, 2] and best_of(by_layer) == 1
    assert by_layer[1].share > 0.6 and by_layer[1].share > by_layer[2].share + 0.05
    noise = torch.rand(outcomes.shape, generator=torch.Generator().manual_seed(0))
    (unknown,) = explained_by(model, critic, [(1,)], rollouts, noise, seed=0)
    assert unknown.share < 0.1 and unknown.penalty > by_layer[1].penalty


def test_too_little_to_tell():
    model = shared("llama")
    critic = Critic.for_model(model)
    few = texts(15)
    assert explained_by(model, critic, [(1,)], few, torch.rand(states_mask(few).shape), seed=0) == []
    many = texts(20)
    assert explained_by(model, critic, [(1,)], many, torch.ones(states_mask(many).shape), seed=0) == []


def test_the_penalty_goes_down_with_more_roll_outs():
    assert Explained(0.3, 1.0, 400).penalty_of(1600) == 0.25


def test_training_begins_as_ridge_regression_and_says_what_layers_explain(tmp_path):
    """At a learning rate of 0, all that the critic knows is from there."""
    model = telling("llama")
    options = {"rollouts_per_iteration": 200, "num_iterations": 1, "epochs_per_iteration": 1, "learning_rate": 0.0,
               "rollout_batch_size": 50, "eval_rollouts": 100}  # fmt: skip
    trained = trainer(tmp_path / "fitted", Critic.for_model(model), model, **options)
    trained.train()
    assert trained.evaluate()["eval_explained_variance"] > 0.1
    assert set(trained.layers_explained) == {1, 2}
    log = trained.state.log_history[0]
    assert {
        f"explained_variance_layer_{index}": share for index, share in trained.layers_explained.items()
    }.items() <= log.items()
    best = max(trained.layers_explained, key=trained.layers_explained.get)
    assert trained.model.config.layers == (None if best == 2 else [best])
    assert json.loads((tmp_path / "fitted" / "rollouts" / "penalty.json").read_text())["l2"] > 0
    alone = trainer(tmp_path / "alone", Critic.for_model(model), model, closed_form=False, **options)
    alone.train()
    assert alone.evaluate()["eval_explained_variance"] == pytest.approx(0, abs=1e-4)
    assert not (tmp_path / "alone" / "rollouts" / "penalty.json").exists()


def test_a_penalty_pulls_the_weights_to_zero(tmp_path):
    model = telling("llama")
    sizes = []
    for l2 in (0.0, 10.0):
        trained = trainer(tmp_path / str(l2), Critic.for_model(model), model, closed_form=False, l2=l2)
        trained.train()
        sizes.append(float(trained.model.head.weight.detach().norm()))
    assert sizes[1] < 0.5 * sizes[0]
    with pytest.raises(ValueError, match="l2=-1"):
        trainer(tmp_path / "no", l2=-1.0)
