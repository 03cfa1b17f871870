# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The three training stages through their scripts, on a tiny model: what they write, resuming, refusals."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer

from generation_ext.shared_prefix.sampling import row_generator
from peft_ext.language_model import inference
from peft_ext.rows import RowFile, write_rows
from peft_ext.runs import last_checkpoint
from tests.almost.training.trained import ANSWER, FLAGS, WORSE, write_lines, write_run
from tests.tiny.tokenizers import byte_tokenizer, chat_tokenizer
from trl_ext.almost.config import ComparisonsConfig
from trl_ext.almost.data import comparisons
from trl_ext.almost.data.queries import read_queries
from trl_ext.almost.models import load_policy
from trl_ext.almost.rewards import RewardModel
from trl_ext.almost.training import rlsf_generation
from trl_ext.almost.training.reward import AlmostRewardConfig, RewardArguments, encode_pairs, half_of
from trl_ext.almost.training.rlsf import RLSFArguments, prompts_of, summary, trainer_of
from trl_ext.almost.training.rlsf_generation import (
    MergedGRPOTrainer,
    MergedRLOOTrainer,
    _MergedGeneration,
    merged_copy,
)
from trl_ext.almost.training.sft import encode_demonstrations
from trl_ext.almost.training.stage import AlmostModelConfig, StageArguments, _settings, adapter_config, start
from trl_ext.scripts import almost_reward, almost_rlsf, almost_sft


LORA = ["--use_peft", "--lora_target_modules", "all-linear"]
ADAPTERS = {"whole": [], "lora": LORA, "peqa": ["--peqa_bits", "4"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("almost"))


def reward_flags(run, out, *flags) -> list[str]:
    files = ["--dataset_name", run / "comparisons.jsonl", "--eval_dataset_name", run / "comparisons.heldout.jsonl"]
    flags = ["--model_name_or_path", run / "base", *files, "--output_dir", out, "--learning_rate", "1e-2", *flags]
    return [*map(str, flags), *FLAGS]


def sft_flags(run, out, *flags) -> list[str]:
    data = ["--dataset_name", run / "demonstrations.jsonl"]
    flags = ["--model_name_or_path", run / "base", *data, "--output_dir", out, "--learning_rate", "1e-2", *flags]
    return [*map(str, flags), *FLAGS]


def rlsf_flags(run, policy, rewards, out, *flags) -> list[str]:
    data = ["--dataset_name", run / "rlsf_queries.jsonl", "--reward_model", rewards, "--output_dir", out]
    sizes = ["--max_completion_length", "6", "--max_steps", "3", "--learning_rate", "1e-2"]
    return [*map(str, ["--model_name_or_path", policy, *data, *sizes, *flags]), *FLAGS]


@pytest.fixture(scope="module")
def reward_models(run):
    """A trained reward model of each kind."""

    def train(kind):
        folder = run / f"reward-{kind}"
        if not folder.is_dir():
            almost_reward.main(reward_flags(run, folder, "--max_steps", "8", *ADAPTERS[kind]))
        return folder

    return train


@pytest.fixture(scope="module")
def sft(run):
    """An SFT policy, written as an adapter."""
    folder = run / "sft"
    almost_sft.main(sft_flags(run, folder, "--no_merge_adapter", *LORA))
    return folder


def result(folder) -> dict:
    return json.loads((folder / "training.json").read_text())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_reward_model_learns_and_is_written_whole(run, reward_models, kind):
    folder = reward_models(kind)
    found = result(folder)
    assert found["held_out_accuracy"] == 1 and found["pairs"] == 24 and found["held_out_pairs"] == 6
    assert not list(folder.glob("checkpoint-*"))
    assert (folder / "adapter").is_dir() == (kind != "whole")
    rewards = RewardModel.from_pretrained(str(folder))
    scores = rewards.score(["q 99", "q 99"], [ANSWER, WORSE])
    assert scores[0] > scores[1] + 0.1
    if kind == "lora":  # the adapter, and the model that it was merged into
        apart = RewardModel.from_pretrained(str(folder / "adapter")).score(["q 99", "q 99"], [ANSWER, WORSE])
        assert apart == pytest.approx(scores, abs=1e-4)
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    assert RewardModel(stock, byte_tokenizer()).score(["q 99", "q 99"], [ANSWER, WORSE]) == pytest.approx(
        scores, abs=1e-4
    )


def test_texts_of_about_one_length_are_beside_each_other_if_asked_for(run, tmp_path):
    flags = ["--train_sampling_strategy", "group_by_length", "--max_steps", "2"]
    almost_reward.main(reward_flags(run, tmp_path / "grouped", *flags))
    assert result(tmp_path / "grouped")["steps"] == 2
    almost_sft.main(sft_flags(run, tmp_path / "sft", *flags))
    assert result(tmp_path / "sft")["steps"] == 2


def test_the_papers_settings_are_the_defaults(reward_models):
    settings = json.loads((reward_models("whole") / "settings.json").read_text())
    expected = {
        "weight_decay": 0.1,
        "warmup_steps": 0.03,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 1.0,
        "max_length": 1024,
    }
    assert {name: settings[name] for name in expected} == expected


def test_a_finished_training_is_not_repeated(run, reward_models, monkeypatch, capsys):
    folder = reward_models("whole")
    monkeypatch.setattr(Trainer, "train", None)
    almost_reward.main(reward_flags(run, folder, "--max_steps", "8"))
    assert "held-out accuracy: 1.0" in capsys.readouterr().out


def test_other_settings_are_refused_with_both_values(run, reward_models):
    folder = reward_models("whole")
    with pytest.raises(
        FileExistsError,
        match=r"output_dir=.*other settings \(max_steps: was 8, is 9\).*another folder.*reward-whole-2",
    ):
        almost_reward.main(reward_flags(run, folder, "--max_steps", "9"))
    with pytest.raises(FileExistsError, match="output_dir=.*holds no run of ours"):
        almost_reward.main(reward_flags(run, run / "base"))


def test_data_may_be_moved_but_not_changed(tmp_path):
    def begin(name):
        arguments = RewardArguments(dataset_name=str(tmp_path / name))
        return start(AlmostRewardConfig(output_dir=str(tmp_path / "out")), arguments)

    write_lines(tmp_path / "a.jsonl", [{"id": 0}])
    write_lines(tmp_path / "b.jsonl", [{"id": 0}])
    assert begin("mistyped.jsonl") is None and begin("a.jsonl") is None, "nothing has been trained on it"
    write_lines(tmp_path / "out" / "checkpoint-1" / "trainer_state.json", [{"global_step": 1}])
    save_file({"w": torch.zeros(1)}, tmp_path / "out" / "checkpoint-1" / "model.safetensors")
    assert begin("b.jsonl") is None
    write_lines(tmp_path / "b.jsonl", [{"id": 1}])
    with pytest.raises(FileExistsError, match='dataset_name: was "sha256:.*, is "sha256:'):
        begin("b.jsonl")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_what_a_stage_wrote_is_read_whatever_characters_an_answer_holds(tmp_path, mark):
    """The fault: an answer with one of these was written by one stage, and a damaged file to the next."""
    good = f"A first line.{mark}And a second one, of an answer that is long enough."
    bad = "An answer that is as long, but that a generator of a worse rank has given."
    answers = [
        {"id": f"{q}/{n}", "query_id": q, "rung": n, "query": "Why?", "response": text}
        for q in range(4)
        for n, text in enumerate((good, bad))
    ]
    write_rows(tmp_path / "responses.jsonl", answers)
    config = ComparisonsConfig(heldout_share=0.25, length_aware=False)
    comparisons.run(config, ["shots=1", "shots=0"], tmp_path / "responses.jsonl", tmp_path)
    data = StageArguments(
        dataset_name=str(tmp_path / comparisons.TRAINING), eval_dataset_name=str(tmp_path / comparisons.HELDOUT)
    )
    assert [row["chosen"][0]["content"] for row in [*data.rows(), *data.held_out_rows()]] == [good] * 4
    RowFile(tmp_path / "talks.jsonl").append([{"id": 0, "messages": [{"role": "assistant", "content": good}]}])
    talks = StageArguments(dataset_name=str(tmp_path / "talks.jsonl")).rows()
    assert talks[0]["messages"][0]["content"] == good
    write_rows(tmp_path / "queries.jsonl", [{"id": 0, "query": f"Why?{mark}How?"}])
    assert read_queries(tmp_path / "queries.jsonl")[0]["query"] == f"Why?{mark}How?"


@contextlib.contextmanager
def killed_at(number, monkeypatch):
    """The training is broken off at its so manyth step."""
    step, seen = Trainer.training_step, []

    def training_step(self, *args, **kwargs):
        seen.append(self.state.global_step)
        if len(seen) == number:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_an_interrupted_training_ends_with_the_same_weights(run, tmp_path, monkeypatch):
    flags = ["--max_steps", "6", "--save_steps", "2", "--no_merge_adapter", *LORA]
    almost_reward.main(reward_flags(run, tmp_path / "through", *flags))
    with killed_at(6, monkeypatch):
        almost_reward.main(reward_flags(run, tmp_path / "cut", *flags))
    assert not (tmp_path / "cut" / "training.json").exists() and last_checkpoint(str(tmp_path / "cut")).endswith("-4")
    almost_reward.main(reward_flags(run, tmp_path / "cut", *flags))
    through, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("through", "cut"))
    assert through.keys() == cut.keys()
    for name, weight in through.items():
        torch.testing.assert_close(cut[name], weight)
    assert result(tmp_path / "cut")["steps"] == 6
    assert result(tmp_path / "cut")["held_out_accuracy"] == result(tmp_path / "through")["held_out_accuracy"]


def test_a_pair_that_is_too_long_loses_its_beginning():
    rows = encode_pairs(
        byte_tokenizer(), [{"prompt": "a long question", "chosen": "yes", "rejected": "n"}], max_length=12
    )
    assert [len(rows[0][name]) for name in ("chosen_ids", "rejected_ids")] == [12, 12] and rows[0]["length"] == 12
    assert byte_tokenizer().decode(rows[0]["chosen_ids"]) == "istant: yes<eos>"[-12 - 4 :]


def test_the_halves_share_no_query():
    halves = [half_of(f"query {number}") for number in range(200)]
    assert 70 < halves.count(1) < 130 and set(halves) == {1, 2}
    assert half_of([{"role": "user", "content": "query 7"}]) == half_of("query 7")
    with pytest.raises(ValueError, match="half=3"):
        RewardArguments(half=3)


def test_sft_learns_the_answers(sft):
    losses = [entry["loss"] for entry in result(sft)["history"] if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    assert result(sft)["demonstrations"] == 12


def test_sft_merged_is_the_adapter_on_its_base(run, sft):
    almost_sft.main(sft_flags(run, run / "sft-merged", *LORA))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(run / "sft-merged")(ids).logits
        torch.testing.assert_close(load_policy(str(sft))(ids).logits, merged, atol=1e-4, rtol=1e-4)
        assert (load_policy(str(run / "base"))(ids).logits - merged).abs().max() > 0.1


def test_bfloat16_products_leave_the_weights_in_float32(run, sft):
    """Also on a CPU, where transformers wants to be told so."""
    almost_sft.main(sft_flags(run, run / "sft-bf16", "--bf16", "True", *LORA))
    losses, plain = ([e["loss"] for e in result(f)["history"] if "loss" in e] for f in (run / "sft-bf16", sft))
    assert losses != plain and losses == pytest.approx(plain, rel=0.05)
    weights = load_file(run / "sft-bf16" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_rloo_starts_from_the_sft_policy_and_is_held_to_it(run, sft, reward_models, capsys):
    """KL is zero at the first step only if the disabled LoRA is the SFT policy, not its base."""
    folder = run / "rlsf"
    almost_rlsf.main(rlsf_flags(run, sft, reward_models("lora"), folder, *LORA))
    found = result(folder)
    assert found["history"][0]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["history"][2]["kl"] != 0
    assert found["prompts"] == 8 and 1 <= found["length"]["end"] <= 6
    assert found["reward"]["start"] == found["history"][0]["reward"]
    printed = capsys.readouterr().out
    assert "reward: " in printed and "kl: 0 at the start" in printed
    apart = load_policy(str(folder / "adapter"))  # an adapter on an adapter on the base
    ids = torch.arange(40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        torch.testing.assert_close(apart(ids).logits, merged, atol=1e-4, rtol=1e-4)


def test_an_interrupted_rlsf_goes_on_against_the_same_reference(run, sft, reward_models, tmp_path, monkeypatch):
    through, cut = tmp_path / "through", tmp_path / "cut"
    flags = ["--save_steps", "1", "--no_merge_adapter", *LORA]
    almost_rlsf.main(rlsf_flags(run, sft, reward_models("lora"), through, *flags))
    with killed_at(3, monkeypatch):
        almost_rlsf.main(rlsf_flags(run, sft, reward_models("lora"), cut, *flags))
    assert last_checkpoint(str(cut)).endswith("-2")
    almost_rlsf.main(rlsf_flags(run, sft, reward_models("lora"), cut, *flags))
    for name in ("reward", "kl"):
        expected, found = ([entry[name] for entry in result(f)["history"] if name in entry] for f in (through, cut))
        assert found == pytest.approx(expected, abs=1e-5)


def test_grpo_trains_the_whole_policy_against_a_frozen_copy(run, sft, reward_models, tmp_path):
    config = tmp_path / "rlsf.yaml"
    config.write_text(yaml.safe_dump({"trainer": "grpo", "beta": 0.1, "scale_rewards": "none"}))
    almost_rlsf.main(["--config", str(config), *rlsf_flags(run, sft, reward_models("whole"), tmp_path / "out")])
    kl = [entry["kl"] for entry in result(tmp_path / "out")["history"] if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 0.01
    assert not (tmp_path / "out" / "start").exists(), "the frozen copy isn't needed any more"
    before, after = load_policy(str(sft)), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (before.model.norm.weight - after.model.norm.weight).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("trainer", "adapter"), [("rloo", "lora"), ("rloo", "peqa"), ("grpo", "lora"), ("rloo", "whole")]
)
def test_a_merged_copy_writes_what_the_policy_would(run, sft, reward_models, tmp_path, monkeypatch, trainer, adapter):
    """All answers of all steps, against the whole text through the policy itself for every token."""
    seen = []

    def write(self, prompts, *args):
        written = _MergedGeneration._generate_single_turn(self, prompts, *args)
        step, tokens = self.state.global_step, written[0] if trainer == "grpo" else written
        policy = self.accelerator.unwrap_model(self.model_wrapped)
        with inference(policy):
            expected = [
                plain_sample(policy, ids, f"{self.args.seed}/rlsf/{step}/0/0/{n}", self.eos_token_ids, length=6)
                for n, ids in enumerate(prompts)
            ]
        assert tokens == expected
        seen.append(step)
        return written

    for each in (MergedRLOOTrainer, MergedGRPOTrainer):
        monkeypatch.setattr(each, "_generate_single_turn", write)
    flags = ["--trainer", trainer, "--merged_generation", "True", "--num_generations", "2", *ADAPTERS[adapter]]
    almost_rlsf.main(rlsf_flags(run, sft, reward_models("lora"), tmp_path, *flags))
    assert seen == [0, 1, 2]
    weights = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {torch.float32}


def test_a_merged_copy_is_of_the_training_s_type(run, sft, reward_models, tmp_path, monkeypatch):
    copies = []
    monkeypatch.setattr(rlsf_generation, "merged_copy", lambda *args: copies.append(merged_copy(*args)) or copies[-1])
    flags = ["--merged_generation", "True", "--bf16", "True", *LORA]
    almost_rlsf.main(rlsf_flags(run, sft, reward_models("lora"), tmp_path, *flags))
    assert len(copies) == 3
    assert {p.dtype for p in copies[0].parameters()} == {torch.bfloat16}
    assert not any("lora" in name for name, _ in copies[0].named_parameters())
    assert not torch.equal(copies[0].model.layers[0].mlp.up_proj.weight, copies[2].model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("flags", [["--repetition_penalty", "1.2"], ["--min_p", "0.1"]])
def test_settings_of_trl_s_own_generation_are_refused(run, sft, reward_models, tmp_path, flags):
    with pytest.raises(ValueError, match=f"{flags[0][2:]}={flags[1]} doesn't go with merged_generation"):
        almost_rlsf.main(
            rlsf_flags(run, sft, reward_models("lora"), tmp_path / "out", "--merged_generation", "True", *flags, *LORA)
        )
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def plain_sample(model, prompt, seed, ends, length) -> list[int]:
    """The whole text through the model for every token."""
    generator, written = row_generator(seed), []
    while len(written) < length and not (written and written[-1] in ends):
        logits = model(input_ids=torch.tensor([[*prompt, *written]]), use_cache=False).logits[0, -1].double()
        written.append(int((logits.softmax(-1).sort(descending=True).values.cumsum(-1) <= generator.random()).sum()))
        written[-1] = int(logits.argsort(descending=True)[written[-1]])
    return written


def test_rlsf_takes_the_penalty_of_repetitions_off_the_reward(run, sft, reward_models, tmp_path, capsys):
    """The fault: a small reward model doesn't mind answers that go in circles, so that they spread."""
    flags = ["--repetition_weight", "2.5", "--device", "cpu", *LORA]
    almost_rlsf.main(rlsf_flags(run, sft, reward_models("lora"), tmp_path / "out", *flags))
    assert "repetition_penalty: " in capsys.readouterr().out
    for entry in result(tmp_path / "out")["history"][:3]:
        parts = [entry[f"rewards/{name}/mean"] for name in ("reward_model", "repetition_penalty")]
        assert entry["reward"] == pytest.approx(parts[0] + 2.5 * parts[1], abs=1e-5) and -1 <= parts[1] <= 0
    with pytest.raises(FileExistsError, match="repetition_weight: was 2.5"):
        almost_rlsf.main(rlsf_flags(run, sft, reward_models("lora"), tmp_path / "out", "--device", "cpu", *LORA))
    for given, match in (
        ("-1", "repetition_weight=-1"),
        ("1", r"reward_weights=\[1.0, 2.0\] and repetition_weight=1.0"),
    ):
        weights = ["--reward_weights", "1.0", "2.0", "--repetition_weight", given]
        with pytest.raises(ValueError, match=match):
            almost_rlsf.main(rlsf_flags(run, sft, reward_models("lora"), tmp_path / "other", *weights, *LORA))


def test_a_training_that_was_begun_before_a_setting_came_goes_on(run, sft, reward_models):
    """Its settings.json lacks the setting; without it nothing has changed."""
    assert "repetition_weight" not in json.loads((sft / "settings.json").read_text())
    assert {"repetition_weight", "device"}.isdisjoint(_settings(RLSFArguments()))
    assert _settings(RLSFArguments(repetition_weight=1.0))["repetition_weight"] == 1.0


def test_a_device_that_isn_t_there_is_named(run, tmp_path):
    with pytest.raises(ValueError, match="device='cuda:7' can't be used here"):
        almost_sft.main(sft_flags(run, tmp_path / "out", "--device", "cuda:7"))
    assert not (tmp_path / "out").exists()


def test_a_reward_of_nan_stops_rlsf(run, sft, reward_models, tmp_path):
    damaged = RewardModel.from_pretrained(str(reward_models("whole")))
    damaged.model.save_pretrained(tmp_path / "damaged")
    byte_tokenizer().save_pretrained(tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged" / "model.safetensors")
    weights["score.weight"] = weights["score.weight"] * torch.nan
    save_file(weights, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="reward of row 0 is nan: prompt .*what"):
        almost_rlsf.main(rlsf_flags(run, sft, tmp_path / "damaged", tmp_path / "out", *LORA))


def test_the_trainer_is_chosen_by_flag_or_yaml(tmp_path):
    config = tmp_path / "rlsf.yaml"
    config.write_text("trainer: grpo\n")
    assert trainer_of([]) == "rloo"
    assert trainer_of(["--trainer", "grpo", "--beta", "0.1"]) == "grpo"
    assert trainer_of(["--config", str(config)]) == "grpo"
    assert trainer_of(["--config", str(config), "--trainer=rloo"]) == "rloo"
    with pytest.raises(ValueError, match="trainer='ppo' is unknown"):
        trainer_of(["--trainer", "ppo"])


def test_adapters_from_flags():
    assert adapter_config(AlmostModelConfig(), "SEQ_CLS") is None
    lora = adapter_config(AlmostModelConfig(use_peft=True, lora_r=3), "SEQ_CLS")
    assert (lora.peft_type, lora.r, lora.task_type) == ("LORA", 3, "SEQ_CLS")
    peqa = adapter_config(AlmostModelConfig(peqa_bits=3, peqa_group_size=64), "CAUSAL_LM")
    assert (peqa.peft_type, peqa.bits, peqa.group_size, peqa.task_type) == ("PEQA", 3, 64, "CAUSAL_LM")
    with pytest.raises(ValueError, match="leave out one"):
        AlmostModelConfig(peqa_bits=3, use_peft=True)
    with pytest.raises(ValueError, match="peft-ext quantize"):
        AlmostModelConfig(peqa_bits=3, peqa_init_method="calibrated")


def test_the_summary_takes_the_ends_of_the_log():
    history = [{"reward": float(step), "kl": 0.0} for step in range(20)] + [{"train_runtime": 1.0}]
    assert summary(history) == {"reward": {"start": 0.5, "end": 18.5}, "kl": {"start": 0.0, "end": 0.0}}


@pytest.mark.parametrize(
    ("rows", "match"),
    [([{"query": "a"}, {"id": 1}], "row 1 has neither 'query' nor 'prompt'"), ([{"query": ""}], "row 0")],
)
def test_rows_without_a_query_are_named(rows, match):
    with pytest.raises(ValueError, match=match):
        prompts_of(rows)


def test_demonstrations_in_trls_formats():
    """Messages, conversations of prompt and completion, and both as ShareGPT names them are the same tokens."""
    tokenizer = chat_tokenizer()
    asked, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    rows = [
        {"messages": [asked, answer]},
        {"prompt": [asked], "completion": [answer]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ]
    expected, *others = (encode_demonstrations(tokenizer, [row])[0]["input_ids"] for row in rows)
    assert all(ids == expected for ids in others)
    assert "Hello" in tokenizer.decode(encode_demonstrations(tokenizer, [{"text": "Hello"}])[0]["labels"])


def test_bad_files_are_named_before_a_model_is_loaded(run, tmp_path):
    write_lines(tmp_path / "demonstrations.jsonl", [{"id": 0, "words": "x"}])
    flags = sft_flags(run, tmp_path / "out")
    flags[flags.index(str(run / "demonstrations.jsonl"))] = str(tmp_path / "demonstrations.jsonl")
    with pytest.raises(ValueError, match="demonstration 0: no column 'messages'"):
        almost_sft.main(flags)
    with pytest.raises(ValueError, match="--dataset_name"):
        almost_sft.main(["--output_dir", str(tmp_path / "out2")])
    with pytest.raises(ValueError, match="output_dir is missing"):
        almost_sft.main(["--dataset_name", "x.jsonl"])
    with pytest.raises(ValueError, match="--reward_model"):
        almost_rlsf.main(["--dataset_name", "x.jsonl", "--output_dir", str(tmp_path / "out3")])
