# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from generation_ext.critic import Critic
from generation_ext.critic.action_values import try_candidates
from generation_ext.critic.batches import values_of
from generation_ext.critic.diagnostics import explained_variance
from generation_ext.critic.rollout_files import read_rollouts
from generation_ext.critic.rollouts import fill_hidden
from generation_ext.critic.training import CriticConfig, CriticTrainer
from tests.tiny.models import HIDDEN, tiny
from tests.tiny.tokenizers import tiny_tokenizer


PROMPTS = ["w5 w17 w40 w8", "w9", "w33 w90 w21 w6 w50 w7", "w12 w13", "w60 w61", "w88"]
NEW = 6
CODES = {"control_codes": ["w70", "w71"], "prompt_template": "{code} {prompt}"}


def small_share(completion_ids, **columns):
    """The share of tokens below 50: plain to see in what was written so far."""
    return [sum(token < 50 for token in ids) / len(ids) for ids in completion_ids]


def telling(name: str):
    """A tiny model whose token embeddings say on which side of 50 a token is."""
    model = tiny(name)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        pattern = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(2)) * weight.std()
        pattern *= {"llama": 4.0, "gpt2": 2.0, "t5": 0.3}[name]  # with a tied head, more would write one side only
        weight[:50] += pattern
        weight[50:] -= pattern
    return model


def config(folder, **kwargs) -> CriticConfig:
    defaults = {
        "num_iterations": 2,
        "rollouts_per_iteration": 24,
        "epochs_per_iteration": 2,
        "rollout_batch_size": 8,
        "per_device_train_batch_size": 6,
        "max_new_tokens": NEW,
        "learning_rate": 1e-2,
        "eval_rollouts": 16,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 4,
        "use_cpu": True,
    }
    return CriticConfig(output_dir=str(folder), **{**defaults, **kwargs})


def trainer(folder, critic=None, model=None, reward=small_share, prompts=PROMPTS, callbacks=None, **kwargs):
    model = model if model is not None else tiny("llama")
    critic = critic if critic is not None else Critic.for_model(model)
    args = config(folder, **kwargs)
    return CriticTrainer(critic, args, model, reward, prompts, PROMPTS[:3], tiny_tokenizer(), callbacks=callbacks)


def weights(trained: CriticTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trained.model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=1e-3)


def count_generate(model, monkeypatch) -> list[int]:
    """The sizes of the batches that the model samples from here on."""
    sizes = []
    generate = model.generate

    def counted(*args, **kwargs):
        sizes.append(kwargs["input_ids"].shape[0])
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", counted)
    return sizes


class StopsAt(TrainerCallback):
    """Kills training after a step, when its checkpoint (if any) has been written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# ---- learning


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_critic_learns_an_obvious_reward(tmp_path, name):
    trained = trainer(tmp_path, model=telling(name), num_iterations=2, rollouts_per_iteration=200,
                      epochs_per_iteration=20, rollout_batch_size=50, per_device_train_batch_size=20,
                      eval_rollouts=150)  # fmt: skip
    before = trained.evaluate()
    assert before["eval_explained_variance"] == pytest.approx(0.0, abs=1e-5)
    trained.train()
    rows = trained.evaluate_positions()
    assert [row["position"] for row in rows] == list(range(NEW + 1))
    assert rows[-1]["explained_variance"] > 0.3
    figures = trained.evaluate()
    assert figures["eval_explained_variance"] > 0.2
    assert figures["eval_loss"] < 0.9 * before["eval_loss"]
    assert figures["eval_calibration_error"] < 0.15
    assert figures["eval_explained_variance_at_4"] == pytest.approx(rows[4]["explained_variance"])


@pytest.mark.parametrize("kwargs", [{"head": "mlp", "mlp_size": 32}, {"lora_rank": 4}], ids=["mlp", "lora"])
def test_other_critics_learn_too(tmp_path, kwargs):
    model = telling("llama")
    frozen = copy.deepcopy(model.state_dict())
    critic = Critic.for_model(model, **kwargs)
    trained = trainer(tmp_path, critic, model, rollouts_per_iteration=100, epochs_per_iteration=12,
                      rollout_batch_size=50, per_device_train_batch_size=20, eval_rollouts=100)  # fmt: skip
    start = weights(trained)
    trained.train()
    assert trained.evaluate()["eval_explained_variance"] > 0.2
    assert all(torch.equal(value, frozen[name]) for name, value in model.state_dict().items())
    if "lora_rank" in kwargs:
        moved = weights(trained)
        assert all(not torch.equal(moved[name], start[name]) for name in moved if "lora_b" in name)
        alone = explained_variance_of_plain_states(trained)
        assert trained.evaluate()["eval_explained_variance"] > alone


def explained_variance_of_plain_states(trained: CriticTrainer) -> float:
    """As if the critic had no LoRA."""
    rollouts = trained._held_out(None)
    plain = Critic(copy.deepcopy(trained.model.config))
    plain.config.lora_layers = {}
    fill_hidden(trained.language_model, rollouts, critic=plain)
    values = torch.cat([trained.model.value(rollout.hidden).detach() for rollout in rollouts])
    outcomes = torch.cat([torch.full((rollout.states,), rollout.reward) for rollout in rollouts])
    return explained_variance(values, outcomes)


def test_cross_entropy_learns(tmp_path):
    options = {
        "rollouts_per_iteration": 100,
        "epochs_per_iteration": 15,
        "rollout_batch_size": 50,
        "eval_rollouts": 100,
    }
    trained = trainer(tmp_path, model=telling("llama"), value_loss="cross_entropy", **options)
    trained.train()
    assert trained.evaluate()["eval_explained_variance"] > 0.2


def test_the_action_value_head_learns_the_next_value_and_leaves_the_value_head_alone(tmp_path):
    options = {
        "rollouts_per_iteration": 200,
        "epochs_per_iteration": 20,
        "rollout_batch_size": 50,
        "max_grad_norm": 0.0,
    }
    plain = trainer(tmp_path / "plain", model=telling("llama"), **options)
    plain.train()
    model = telling("llama")
    critic = Critic.for_model(model, action_values=True)
    both = trainer(tmp_path / "both", critic, model, **options)
    both.train()
    torch.testing.assert_close(both.model.head.weight, plain.model.head.weight)
    assert any("action_value_loss" in entry for entry in both.state.log_history)
    rollouts = both._held_out(None)
    guesses, values, nexts = [], [], []
    for rollout in rollouts:
        actions = torch.tensor(rollout.completion_ids)[:, None]
        guesses.append(critic.action_log_values(rollout.hidden[:-1], actions).exp().squeeze(-1).detach())
        known = critic.value(rollout.hidden).detach()
        values.append(known[:-1])
        nexts.append(known[1:])
    guesses, values, nexts = torch.cat(guesses), torch.cat(values), torch.cat(nexts)
    # the step from V(s) to V(s + a) is what the head adds to V(s)
    assert explained_variance(guesses - values, nexts - values) > 0.3


def test_candidates_teach_the_action_value_head_what_greedy_rollouts_never_show(tmp_path):
    def explained(candidates: int) -> float:
        """Share of the variance of V within a state, over its candidates, that Q explains."""
        model = telling("llama")
        critic = Critic.for_model(model, action_values=True)
        trained = trainer(tmp_path / str(candidates), critic, model, top_k=1, action_value_candidates=candidates,
                          rollouts_per_iteration=60, epochs_per_iteration=20, rollout_batch_size=60)  # fmt: skip
        trained.train()
        rollouts = trained._held_out(None)
        tried = try_candidates(model, critic, rollouts, 8, seed=11)
        gains = []
        for rollout, one in zip(rollouts, tried):
            both = critic.action_log_values(rollout.hidden[one.state], one.tokens), critic.log_value(one.hidden)
            gains.append(torch.stack([values - values.mean() for values in both]).detach())
        return explained_variance(*torch.cat(gains, dim=1))

    assert explained(8) > 0.6 > 0.2 > explained(0)


def test_a_killed_run_tries_the_same_candidates(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "action_value_candidates": 4}

    def fresh(folder, **kwargs):
        model = tiny("llama")
        return trainer(tmp_path / folder, Critic.for_model(model, action_values=True), model, **options, **kwargs)

    whole = fresh("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        fresh("killed", callbacks=[StopsAt(7)]).train()
    going_on = fresh("killed")
    going_on.train(resume_from_checkpoint=True)
    assert_same(weights(whole), weights(going_on))


def test_candidates_are_no_part_of_a_critic_with_a_lora(tmp_path):
    model = tiny("llama")
    with pytest.raises(ValueError, match="action_value_candidates=4.*lora_rank=0"):
        trainer(tmp_path, Critic.for_model(model, action_values=True, lora_rank=2), model, action_value_candidates=4)


def test_control_codes_are_told_apart(tmp_path):
    def reward(completion_ids, control_code, **columns):
        shares = small_share(completion_ids)
        return [share if code == "w70" else 1 - share for share, code in zip(shares, control_code)]

    model = tiny("llama")
    critic = Critic.for_model(model, **CODES)
    trained = trainer(tmp_path, critic, model, reward, rollouts_per_iteration=64, rollout_batch_size=32)
    trained.train()
    rollouts = read_rollouts(tmp_path / "rollouts")
    assert {rollout.control_code for rollout in rollouts} == {"w70", "w71"}
    assert all(rollout.prompt_ids[0] == int(rollout.control_code[1:]) for rollout in rollouts)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_training_begins_at_the_mean_outcome(tmp_path, gamma, head):
    def rare(completion_ids, **columns):
        return [0.1 * share for share in small_share(completion_ids)]

    model = tiny("llama")
    trained = trainer(tmp_path, Critic.for_model(model, head=head), model, rare, gamma=gamma, num_iterations=1)
    trained.train()
    rollouts = read_rollouts(tmp_path / "rollouts")
    outcomes = [gamma ** (rollout.states - 1 - state) * rollout.reward
                for rollout in rollouts for state in range(rollout.states)]  # fmt: skip
    assert trained.state.log_history[0]["value_mean"] == pytest.approx(sum(outcomes) / len(outcomes), abs=1e-5)


def test_a_trained_critic_goes_on_from_where_it_was(tmp_path):
    model = tiny("llama")
    critic = Critic.for_model(model)
    trainer(tmp_path / "first", critic, model).train()
    before = trainer(tmp_path / "measured", critic, model).evaluate()
    again = trainer(tmp_path / "second", critic, model, learning_rate=0.0)
    again.train()
    assert again.evaluate() == pytest.approx(before)


def test_gae_targets_are_used(tmp_path):
    """lambda = 0 and no discount: the first states' targets are their neighbours' values, all the same at first."""
    trained = trainer(tmp_path, lam=0.0, num_iterations=1)
    seen = []
    collate = trained._collate
    trained._collate = lambda items: seen.append((items, collate(items))) or seen[-1][1]
    trained.train()
    items, batch = seen[0]
    last = batch["mask"].long().sum(dim=1) - 1
    start = trained.state.log_history[0]["value_mean"]
    torch.testing.assert_close(batch["targets"][:, 0], torch.full_like(batch["targets"][:, 0], start))
    rewards = torch.tensor([item["rollout"].reward for item in items])
    torch.testing.assert_close(batch["targets"].gather(1, last[:, None])[:, 0], rewards)


# ---- what is logged and saved


def test_the_log_has_new_rollouts_before_the_critic_sees_them(tmp_path):
    trained = trainer(tmp_path)
    trained.train()
    starts = [entry for entry in trained.state.log_history if "reward_mean" in entry]
    assert [entry["step"] for entry in starts] == [0, 8]
    assert starts[0]["explained_variance"] == pytest.approx(0.0, abs=1e-5)
    files = sorted((tmp_path / "rollouts").glob("*.jsonl"))
    for entry, file in zip(starts, files):
        rewards = torch.tensor([rollout.reward for rollout in read_rollouts(file)])
        assert len(rewards) == 24
        assert entry["reward_mean"] == pytest.approx(rewards.mean().item())
        assert entry["reward_std"] == pytest.approx(rewards.std(correction=0).item())
    assert {"calibration_error", "explained_variance_at_4", "rollout_seconds"} <= starts[1].keys()
    assert any("loss" in entry for entry in trained.state.log_history)


def test_save_model_gives_a_folder_for_from_pretrained(tmp_path):
    trained = trainer(tmp_path)
    trained.train()
    trained.save_model(str(tmp_path / "critic"))
    loaded = Critic.from_pretrained(tmp_path / "critic").attach(tiny("llama"))
    hidden = torch.randn(3, loaded.state_size)
    torch.testing.assert_close(loaded.value(hidden), trained.model.value(hidden))
    assert loaded.mean.any()


def test_a_saved_critic_is_safetensors_and_json(tmp_path):
    trained = trainer(tmp_path / "run", save_strategy="steps", save_steps=5)
    trained.train()
    trained.save_model(str(tmp_path / "critic"))
    assert sorted(path.name for path in (tmp_path / "critic").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    trained.save_model()
    files = {path.name for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert files == {"README.md", "config.json", "model.safetensors"}
    assert not list(tmp_path.rglob("training_args.bin"))


def test_evaluation_by_strategy_and_on_other_rollouts(tmp_path, monkeypatch):
    trained = trainer(tmp_path, eval_strategy="epoch")
    trained.train()
    evaluations = [entry for entry in trained.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 4
    sizes = count_generate(trained.language_model, monkeypatch)
    others = read_rollouts(tmp_path / "rollouts")[:10]
    figures = trained.evaluate(others, metric_key_prefix="other")
    assert not sizes and "other_explained_variance" in figures
    known = values_of(trained.model, trained.language_model, others)
    wanted = explained_variance(known.values[known.mask], known.outcomes[:, None].expand(known.mask.shape)[known.mask])
    assert figures["other_explained_variance"] == pytest.approx(wanted, abs=1e-5)


def test_max_steps_and_accumulation(tmp_path):
    trained = trainer(tmp_path, max_steps=11, gradient_accumulation_steps=2)
    trained.train()
    assert trained.state.global_step == 11  # two steps an epoch, two epochs an iteration
    assert len(list((tmp_path / "rollouts").glob("*.jsonl"))) == 3


def test_every_epoch_has_all_rollouts_in_another_order(tmp_path):
    trained = trainer(tmp_path, num_iterations=1, epochs_per_iteration=3)
    seen = []
    collate = trained._collate
    trained._collate = lambda items: seen.extend(id(item["rollout"]) for item in items) or collate(items)
    trained.train()
    epochs = [seen[:24], seen[24:48], seen[48:]]
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2]) and len(set(epochs[0])) == 24
    assert epochs[0] != epochs[1] != epochs[2]


def test_texts_without_reward_are_left_out(tmp_path):
    def reward(completion_ids, **columns):
        shares = small_share(completion_ids)
        return [None if number % 3 == 0 else share for number, share in enumerate(shares)]

    trained = trainer(tmp_path, reward=reward)
    trained.train()
    assert trained.state.global_step == 16
    read = read_rollouts(tmp_path / "rollouts")
    assert sum(rollout.reward is None for rollout in read) == 18 and len(read) == 48
    with pytest.raises(ValueError, match="none of the 24 roll-outs"):
        trainer(tmp_path / "none", reward=lambda prompts, **columns: [None] * len(prompts)).train()


# ---- replay and resuming


@pytest.mark.parametrize("kwargs", [{}, {"lam": 0.8, "gamma": 0.95, "cliprange_value": 0.1}], ids=["plain", "gae"])
def test_a_replay_gives_the_same_critic(tmp_path, monkeypatch, kwargs):
    first = trainer(tmp_path / "first", **kwargs)
    first.train()
    model = tiny("llama")
    sizes = count_generate(model, monkeypatch)
    rollouts = read_rollouts(tmp_path / "first" / "rollouts")
    args = config(tmp_path / "again", **kwargs)
    again = CriticTrainer(Critic.for_model(model), args, model, train_dataset=rollouts)
    again.train()
    assert not sizes
    assert_same(weights(first), weights(again))


@pytest.mark.parametrize("kind", ["linear", "lora"])
@pytest.mark.parametrize("stop", [7, 11, 14])
def test_a_killed_run_goes_on_to_the_same_critic(tmp_path, monkeypatch, kind, stop):
    """Checkpoints at steps 5, 10 and 15, in the middle of epochs; iterations begin at 0 and 8."""
    options = {"save_strategy": "steps", "save_steps": 5, "lam": 0.8, "cliprange_value": 0.1}

    def fresh(folder, **kwargs):
        model = tiny("llama")
        torch.manual_seed(0)
        critic = Critic.for_model(model, lora_rank=2 if kind == "lora" else 0)
        return trainer(tmp_path / folder, critic, model, **options, **kwargs)

    whole = fresh("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        fresh("killed", callbacks=[StopsAt(stop)]).train()
    going_on = fresh("killed")
    sizes = count_generate(going_on.language_model, monkeypatch)
    going_on.train(resume_from_checkpoint=True)
    assert sum(sizes) == (24 if stop < 8 else 0)  # only what hadn't been collected
    assert going_on.state.global_step == 16
    assert_same(weights(whole), weights(going_on))


def test_every_second_batch_of_later_iterations_is_steered(tmp_path):
    found = []
    for strength in (0.0, 20.0):
        trainer(tmp_path / str(strength), steered_strength=strength).train()
        found.append([each.completion_ids for each in read_rollouts(tmp_path / str(strength) / "rollouts")])
    plain, steered = ([texts[start : start + 8] for start in range(0, 48, 8)] for texts in found)
    assert [one == other for one, other in zip(plain, steered)] == [True, True, True, True, False, True]
    with pytest.raises(ValueError, match="save_rollouts=False"):
        trainer(tmp_path / "not kept", steered_strength=1.0, save_rollouts=False)


@pytest.mark.parametrize(("texts", "steered"), [(20, 0.0), (40, 0.0), (40, 4.0)])
def test_a_run_killed_while_collecting_goes_on_with_its_rollouts(tmp_path, monkeypatch, texts, steered):
    """After 20 of the first 24 roll-outs there is no checkpoint yet; after 40 there is one."""
    options = {"save_strategy": "steps", "save_steps": 3, "steered_strength": steered}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    count = 0

    def killed(completion_ids, **columns):
        nonlocal count
        count += len(completion_ids)
        if count > texts:
            raise KeyboardInterrupt
        return small_share(completion_ids)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "killed", reward=killed, **options).train()
    going_on = trainer(tmp_path / "killed", **options)
    sizes = count_generate(going_on.language_model, monkeypatch)
    going_on.train(resume_from_checkpoint=True)
    assert sum(sizes) == 48 - texts // 8 * 8
    assert read_rollouts(tmp_path / "whole" / "rollouts") == read_rollouts(tmp_path / "killed" / "rollouts")
    assert_same(weights(whole), weights(going_on))


def test_a_checkpoint_that_a_kill_left_incomplete_is_not_gone_on_from(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 3}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "killed", callbacks=[StopsAt(11)], **options).train()
    (tmp_path / "killed" / "checkpoint-10" / "trainer_state.json").unlink()
    going_on = trainer(tmp_path / "killed", **options)
    going_on.train(resume_from_checkpoint=True)
    assert going_on.state.global_step == 16
    assert_same(weights(whole), weights(going_on))


def test_without_saved_rollouts_a_resumed_run_samples_them_again(tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 5, "save_rollouts": False}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    assert not (tmp_path / "whole" / "rollouts").exists()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "killed", callbacks=[StopsAt(7)], **options).train()
    going_on = trainer(tmp_path / "killed", **options)
    sizes = count_generate(going_on.language_model, monkeypatch)
    going_on.train(resume_from_checkpoint=True)
    assert sum(sizes) == 48
    assert_same(weights(whole), weights(going_on))


def test_a_resumed_run_must_have_its_own_settings(tmp_path):
    trainer(tmp_path).train()
    with pytest.raises(ValueError, match=r"had other settings \(temperature: was 1.0, is 2.0\)"):
        trainer(tmp_path, temperature=2.0).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="train_dataset: was"):
        trainer(tmp_path, prompts=PROMPTS[:2]).train(resume_from_checkpoint=True)


def test_a_resumed_run_must_have_its_own_adapter(tmp_path):
    def adapted(seed):
        torch.manual_seed(seed)
        model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules="all-linear"))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        return model

    trainer(tmp_path, model=adapted(0)).train()
    with pytest.raises(ValueError, match="had other settings .adapters: was"):
        trainer(tmp_path, model=adapted(1)).train(resume_from_checkpoint=True)
    path = tmp_path / "rollouts" / "settings.json"
    before = {name: value for name, value in json.loads(path.read_text()).items() if name != "adapters"}
    path.write_text(json.dumps(before))  # as earlier versions wrote it
    trainer(tmp_path, model=adapted(1)).train(resume_from_checkpoint=True)


def test_a_new_run_in_an_old_folder_samples_anew(tmp_path):
    trainer(tmp_path).train()
    old = read_rollouts(tmp_path / "rollouts")
    trainer(tmp_path, seed=7, num_iterations=1).train()
    new = read_rollouts(tmp_path / "rollouts")
    assert len(new) == 24 and new != old[:24]
    assert json.loads((tmp_path / "rollouts" / "settings.json").read_text())["seed"] == 7


def test_there_is_nothing_to_resume(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a complete checkpoint nor roll-outs"):
        trainer(tmp_path / "empty").train(resume_from_checkpoint=True)


# ---- several processes


def test_two_processes_share_the_work_and_have_one_critic(tmp_path, run_module):
    run_module("tests.generation_ext.critic.two_processes", tmp_path, processes=2, ranks=True)
    one, other = (json.loads((tmp_path / f"{process}.json").read_text()) for process in (0, 1))
    assert one == other and one["processes"] == 2
    assert any(value != 0 for value in one["weights"]["lora_b.0"][0])
    first = [read_rollouts(tmp_path / "run" / "rollouts" / f"iteration-0000-00{number}.jsonl") for number in (0, 1)]
    assert [len(rollouts) for rollouts in first] == [12, 12] and first[0] != first[1]
    rewards = [rollout.reward for rollouts in first for rollout in rollouts]
    assert one["reward_mean"][0] == pytest.approx(sum(rewards) / 24)


# ---- bad input


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"rollouts_per_iteration": 0}, "rollouts_per_iteration=0"),
        ({"gamma": 1.1}, "gamma=1.1"),
        ({"lam": -0.1}, "lam=-0.1"),
        ({"lam": math.nan}, "lam=nan"),
        ({"value_loss": "mse"}, "value_loss='mse'.*squared_error"),
        ({"cliprange_value": 0.0}, "cliprange_value=0.0"),
        ({"cliprange_value": 0.2, "value_loss": "cross_entropy"}, "leave one of them out"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"action_value_coef": -1.0}, "action_value_coef"),
        ({"action_value_candidates": -1}, "action_value_candidates=-1"),
    ],
)
def test_bad_settings(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **kwargs)


def test_output_dir_is_needed():
    with pytest.raises(ValueError, match="output_dir is missing"):
        CriticConfig()


def test_bad_temperature(tmp_path):
    with pytest.raises(ValueError, match="temperature=0"):
        trainer(tmp_path, temperature=0.0)


def test_bad_arguments(tmp_path):
    model = tiny("llama")
    critic = Critic.for_model(model)
    args = config(tmp_path)
    with pytest.raises(TypeError, match="pass Critic.for_model"):
        CriticTrainer(model, args, model, small_share, PROMPTS, processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match="processing_class is missing"):
        CriticTrainer(critic, args, model, small_share, PROMPTS)
    with pytest.raises(TypeError, match="from_texts"):
        CriticTrainer(critic, args, model, None, PROMPTS, processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match="train_dataset='prompts.txt'"):
        CriticTrainer(critic, args, model, small_share, "prompts.txt", processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match="no prompts"):
        CriticTrainer(critic, args, model, small_share, [], processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match="belongs to"):
        CriticTrainer(critic, args, tiny("gpt2"), small_share, PROMPTS, processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match="eval_dataset is missing"):
        CriticTrainer(critic, args, model, small_share, PROMPTS, processing_class=tiny_tokenizer()).evaluate()


def test_a_bad_reward_stops_training_and_is_named(tmp_path):
    def logits(prompts, **columns):
        return [3.0] * len(prompts)

    with pytest.raises(ValueError, match="reward function logits returned 3.0"):
        trainer(tmp_path, reward=logits).train()
