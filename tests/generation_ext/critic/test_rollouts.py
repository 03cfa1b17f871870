# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from generation_ext.critic import Critic, backbone
from generation_ext.critic.action_values import try_candidates
from generation_ext.critic.rewards import from_texts
from generation_ext.critic.rollout_files import RolloutWriter, read_rollouts
from generation_ext.critic.rollouts import Rollout, RolloutSampler, encode, fill_hidden, prompt_rows, schedule
from peft_ext.rows import CHECK
from tests.generation_ext.critic.reference import PLAIN
from tests.tiny.models import HIDDEN, tiny
from tests.tiny.tokenizers import tiny_tokenizer


MODELS = ("llama", "gpt2", "opt", "gpt_neox", "t5")
PROMPTS = ("w5 w17 w40 w8", "w9", "w33 w90 w21 w6 w50 w7", "w12 w13")
ROWS = prompt_rows(PROMPTS)
NEW = 7


def ending(name: str, ends: range):
    """A tiny model for which many tokens end a text."""
    model = tiny(name)
    model.generation_config.eos_token_id = list(ends)
    return model


def sampler(model, reward=None, **kwargs) -> RolloutSampler:
    kwargs.setdefault("max_new_tokens", NEW)
    return RolloutSampler(model, tiny_tokenizer(), reward, **kwargs)


@torch.no_grad()
def fresh_states(model, rollout: Rollout) -> torch.Tensor:
    """One text, not padded, without a cache."""
    if model.config.is_encoder_decoder:
        output = model(
            input_ids=torch.tensor([rollout.prompt_ids]),
            decoder_input_ids=torch.tensor([[0, *rollout.completion_ids]]),
            output_hidden_states=True,
        )
        return output.decoder_hidden_states[-1][0]
    hidden = backbone(model)(input_ids=torch.tensor([rollout.prompt_ids + rollout.completion_ids])).last_hidden_state
    return hidden[0, len(rollout.prompt_ids) - 1 :]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ends", [range(2, 3), range(2, 15), range(2, 100)], ids=["never", "some", "at once"])
def test_hidden_states_are_those_of_a_fresh_forward(name, ends):
    model = ending(name, ends)
    rollouts = sampler(model).sample(ROWS, seed=1)
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    if ends == range(2, 100):
        assert max(lengths) < NEW  # generate stops before there is a state after the last token
    for rollout in rollouts:
        assert rollout.hidden.shape == (rollout.states, HIDDEN)
        torch.testing.assert_close(rollout.hidden, fresh_states(model, rollout), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_states_cost_no_forward_pass_but_one_more_step(name):
    model = tiny(name)
    model.generation_config.eos_token_id = None
    calls = []
    backbone(model).register_forward_hook(lambda module, args, output: calls.append(output[0].shape[1]))
    sampler(model).sample(ROWS, seed=1)
    longest = 1 if name == "t5" else 6
    assert calls == [longest, *[1] * NEW]


def test_texts_of_one_batch_end_at_different_places():
    lengths = [len(r.completion_ids) for r in sampler(ending("llama", range(2, 15))).sample(ROWS, seed=1)]
    assert min(lengths) < max(lengths) == NEW


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_rollout_ends_with_its_end_token(name):
    for rollout in sampler(ending(name, range(2, 15))).sample(ROWS, seed=1):
        ended = [token in range(2, 15) for token in rollout.completion_ids]
        assert not any(ended[:-1]) and (ended[-1] or len(ended) == NEW)


def test_rollouts_are_what_generate_samples():
    model = tiny("llama")
    rollouts = sampler(model, temperature=0.7, top_k=20).sample(ROWS[:1], seed=3, with_hidden=False)
    torch.manual_seed(3)
    ids = tiny_tokenizer()(PROMPTS[0], return_tensors="pt")
    tokens = model.generate(**ids, do_sample=True, temperature=0.7, top_k=20, max_new_tokens=NEW, pad_token_id=0)[
        0
    ].tolist()
    assert rollouts[0].prompt_ids == [5, 17, 40, 8]
    assert rollouts[0].completion_ids == tokens[4:]
    assert rollouts[0].prompt + rollouts[0].completion == tiny_tokenizer().decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("name", MODELS)
def test_states_of_saved_rollouts_are_those_of_sampling(name):
    model = ending(name, range(2, 15))
    rollouts = sampler(model).sample(ROWS, seed=1)
    again = copy.deepcopy(rollouts)
    for rollout in again:
        rollout.hidden = None
    fill_hidden(model, again, batch_size=3)
    for one, other in zip(rollouts, again):
        torch.testing.assert_close(one.hidden, other.hidden, atol=2e-5, rtol=1e-4)


def test_the_seed_alone_decides_and_the_global_one_is_left_alone():
    model = tiny("llama")
    torch.manual_seed(11)
    first = sampler(model).sample(ROWS, seed=1)
    after = torch.rand(3)
    torch.manual_seed(11)
    torch.testing.assert_close(after, torch.rand(3))
    torch.manual_seed(12)
    assert sampler(model).sample(ROWS, seed=1) == first
    assert sampler(model).sample(ROWS, seed=2) != first


def test_the_model_is_left_as_it_was():
    model = tiny("llama").train()
    before = copy.deepcopy(model.state_dict())
    sampler(model).sample(ROWS, seed=1)
    assert model.training and not backbone(model)._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("run", [
    lambda model, rollouts: sampler(model).sample(ROWS, seed=1),
    lambda model, rollouts: fill_hidden(model, rollouts),
    lambda model, rollouts: try_candidates(model, Critic.for_model(model), rollouts, 3, seed=1),
], ids=["sample", "fill_hidden", "try_candidates"])  # fmt: skip
def test_every_part_of_the_model_keeps_its_own_mode(run):
    rollouts = sampler(tiny("llama")).sample(ROWS, seed=1)
    model = tiny("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    run(model, rollouts)
    assert [module.training for module in model.modules()] == modes


def test_the_start_token_is_the_one_that_generate_takes():
    """Which is the generation config's, where the two configs disagree."""
    model = tiny("t5")
    model.generation_config.decoder_start_token_id = 5
    rollouts = sampler(model).sample(ROWS, seed=1)
    again = copy.deepcopy(rollouts)
    fill_hidden(model, again)
    for one, other in zip(rollouts, again):
        torch.testing.assert_close(one.hidden, other.hidden, atol=2e-5, rtol=1e-4)


def test_hooks_go_when_generate_fails():
    model = tiny("llama")
    with pytest.raises(ValueError):
        sampler(model).sample(ROWS, seed=1, no_such_argument=1)
    assert not backbone(model)._forward_hooks


def test_rewards_and_columns():
    def reward(prompts, completions, completion_ids, topic):
        assert topic == ["art", None, None, None]
        return [len(ids) / NEW for ids in completion_ids]

    rows = prompt_rows([{"prompt": PROMPTS[0], "topic": "art"}, *PROMPTS[1:]])
    rollouts = sampler(ending("llama", range(2, 15)), reward).sample(rows, seed=1)
    assert [r.reward for r in rollouts] == [len(r.completion_ids) / NEW for r in rollouts]
    assert rollouts[0].columns == {"topic": "art"}


def test_control_codes_come_before_the_prompt_but_not_before_the_reward():
    model = tiny("llama")
    critic = Critic.for_model(model, control_codes=["w70", "w71"], prompt_template="{code} {prompt}")
    seen = {}

    def reward(prompts, control_code, **columns):
        seen.update(prompts=prompts, codes=control_code)
        return [0.5] * len(prompts)

    rows = schedule(ROWS, critic.config.control_codes, 4, seed=0)
    rollouts = sampler(model, reward, critic=critic).sample(rows, seed=1)
    assert seen["prompts"] == [row["prompt"] for row in rows]
    assert seen["codes"] == [row["control_code"] for row in rows]
    for rollout in rollouts:
        assert rollout.prompt_ids[0] == {"w70": 70, "w71": 71}[rollout.control_code]
    with pytest.raises(ValueError, match="no control_code"):
        sampler(model, reward, critic=critic).sample(ROWS, seed=1)
    with pytest.raises(ValueError, match="cut off its control code"):
        sampler(model, reward, critic=critic, max_prompt_length=2).sample(rows, seed=1)


def test_long_prompts_keep_their_last_tokens():
    rollouts = sampler(tiny("llama"), max_prompt_length=2).sample(ROWS, seed=1)
    assert [rollout.prompt_ids for rollout in rollouts] == [[40, 8], [9], [50, 7], [12, 13]]


def test_schedule_goes_through_all_prompts():
    rows = schedule(ROWS, [], 10, seed=4)
    assert sorted(row["prompt"] for row in rows[:4]) == sorted(PROMPTS)
    assert sorted(row["prompt"] for row in rows[4:8]) == sorted(PROMPTS)
    assert rows != schedule(ROWS, [], 10, seed=5)
    coded = schedule([{"prompt": "w5", "control_code": "w8"}], ["w70", "w71"], 5, seed=0)
    assert {row["control_code"] for row in coded} == {"w8"}


def test_lora_states_have_gradients_and_fill_hidden_uses_them():
    model = tiny("llama")
    critic = Critic.for_model(model, lora_rank=2, **PLAIN)
    with torch.no_grad():
        for up in critic.lora_b:
            up.normal_()
    rollouts = sampler(model).sample(ROWS, seed=1)
    states = encode(model, rollouts, critic)
    assert not torch.allclose(states[0, :3], rollouts[0].hidden[:3], atol=1e-3)
    states.sum().backward()
    assert all(parameter.grad is not None for parameter in critic.lora_b)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    fill_hidden(model, rollouts, critic=critic)
    torch.testing.assert_close(rollouts[0].hidden, states[0, : rollouts[0].states].detach(), atol=2e-5, rtol=1e-4)


def test_bfloat16():
    rollouts = sampler(tiny("llama", torch.bfloat16)).sample(ROWS, seed=1)
    assert rollouts[0].hidden.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "prompts, error, message",
    [
        ([], ValueError, "no prompts"),
        ([{"text": "w5"}], ValueError, r"\['text'\], but no 'prompt'"),
        ([[{"role": "user", "content": "w5"}]], TypeError, "pass texts"),
        ([{"prompt": [{"role": "user"}]}], TypeError, "messages with a 'role' and a 'content'"),
        ([{"prompt": []}], TypeError, "must be a text, or messages"),
    ],
)
def test_bad_prompts(prompts, error, message):
    with pytest.raises(error, match=message):
        prompt_rows(prompts)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_checkpoint_has_no_say_in_what_is_sampled(name):
    """`generation_config.json` of many checkpoints has a penalty or a nucleus, which `generate` takes from there."""
    opinionated = tiny(name)
    expected = [rollout.completion_ids for rollout in sampler(opinionated).sample(ROWS, seed=3)]
    choices = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "min_p": 0.2, "suppress_tokens": list(range(40))}
    for key, value in {**choices, "top_k": 3, "temperature": 0.2, "min_length": 60}.items():
        setattr(opinionated.generation_config, key, value)
    assert [rollout.completion_ids for rollout in sampler(opinionated).sample(ROWS, seed=3)] == expected


def test_conversations_are_read_as_the_chat_template_has_them():
    """Its start token is there once, whether the template or the tokenizer writes it; a code stands in what is asked."""
    subject = sampler(tiny("llama"))
    subject.tokenizer = copy.deepcopy(subject.tokenizer)
    subject.tokenizer.chat_template = (
        "<s> {% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
    )
    messages = [{"role": "user", "content": "w5"}]
    (rollout,) = subject.sample(prompt_rows([{"prompt": messages}]), seed=1)
    assert rollout.prompt == "<s> w5 w9" and rollout.prompt_ids == [1, 5, 9]
    subject.critic = SimpleNamespace(
        config=SimpleNamespace(control_codes=["w3"]), control_prompt=lambda prompt, code: f"{code} {prompt}"
    )
    assert subject._prompt({"prompt": messages, "control_code": "w3"}) == "<s> w3 w5 w9"


def test_a_prompt_without_tokens():
    with pytest.raises(ValueError, match="'' has no tokens"):
        sampler(tiny("llama")).sample(prompt_rows(["w5", ""]), seed=1)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_prompt_length": 0}, "max_prompt_length=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1"),
    ],
)
def test_bad_sampling(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sampler(tiny("llama"), **kwargs)


# ---- files


def some_rollouts() -> list[Rollout]:
    reward = from_texts(lambda texts: [len(text) % 7 / 7 for text in texts])
    rows = prompt_rows([{"prompt": PROMPTS[0], "topic": "ärt\n"}, *PROMPTS[1:]])
    return sampler(tiny("llama"), reward).sample(rows, seed=1)


def test_files_give_back_what_was_written(tmp_path):
    rollouts = some_rollouts()
    rollouts[2].reward = None
    rollouts[1].completion += "\u2028, \u2029 or \u0085"
    path = tmp_path / "new folder" / "rollouts.jsonl"
    writer = RolloutWriter(path)
    writer.write(rollouts[:2])
    writer.write(rollouts[2:])
    assert read_rollouts(path) == rollouts
    assert read_rollouts(path.parent) == rollouts
    lines = path.read_text(encoding="utf-8").split("\n")
    assert len(lines) == 5 and json.loads(lines[0])["prompt"] == PROMPTS[0]


def test_every_write_is_on_disk_before_the_next(tmp_path):
    rollouts = some_rollouts()
    writer = RolloutWriter(tmp_path / "r.jsonl")
    writer.write(rollouts[:2])
    assert read_rollouts(tmp_path / "r.jsonl") == rollouts[:2]


@pytest.mark.parametrize("lost", [1, 10, 60])
def test_a_torn_line_is_passed_over_and_cut_off(tmp_path, lost):
    rollouts = some_rollouts()
    path = tmp_path / "r.jsonl"
    writer = RolloutWriter(path)
    writer.write(rollouts[:3])
    path.write_bytes(path.read_bytes()[:-lost])
    assert read_rollouts(path) == rollouts[:2]
    writer = RolloutWriter(path)
    writer.write(rollouts[2:])
    assert read_rollouts(path) == rollouts


def test_keep_cuts_off_further_lines(tmp_path):
    rollouts = some_rollouts()
    path = tmp_path / "r.jsonl"
    writer = RolloutWriter(path)
    writer.write(rollouts)
    writer = RolloutWriter(path, keep=1)
    writer.write(rollouts[3:])
    assert read_rollouts(path) == [rollouts[0], rollouts[3]]


@pytest.mark.parametrize(
    "change, message",
    [
        ("not json", "line 2 is no JSON"),
        ("[]", "line 2 is no object"),
        ("{}", "row 2: prompt is missing; it must be a text"),
        ({"reward": 1.5}, "reward is 1.5"),
        ({"reward": "good"}, "reward is 'good'"),
        ({"reward": True}, "reward is True"),
        ({"prompt": 3}, "prompt is 3"),
        ({"completion_ids": [1.5]}, r"completion_ids\[0\] is 1.5"),
        ({"completion_ids": [-1]}, r"completion_ids\[0\] is -1"),
        ({"columns": "a"}, "columns is 'a'"),
        ({"prompt_ids": []}, "prompt_ids is empty"),
    ],
)
def test_damaged_files_are_named(tmp_path, change, message):
    path = tmp_path / "r.jsonl"
    writer = RolloutWriter(path)
    writer.write(some_rollouts()[:2])
    first, second = path.read_text(encoding="utf-8").splitlines()
    edited = path.with_name("edited.jsonl")
    edited.write_text(f"{first}\n{second.replace('reward', 'rewards')}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="edited.jsonl, line 2 isn't what was written there"):
        read_rollouts(edited)
    second = json.dumps({name: value for name, value in json.loads(second).items() if name != CHECK})
    line = change if isinstance(change, str) else json.dumps({**json.loads(second), **change})
    path.write_text(f"{first}\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_rollouts(path)
    assert "r.jsonl" in str(caught.value)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_rollouts(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="no .jsonl file"):
        read_rollouts(tmp_path)
