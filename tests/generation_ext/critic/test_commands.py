# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import io
import json

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from generation_ext.critic import Critic, CriticLogitsProcessor
from generation_ext.critic.commands.arguments import PromptArguments, load_prompts
from generation_ext.critic.commands.reward_arguments import RewardArguments, load_reward
from generation_ext.critic.rollout_files import read_rollouts
from peft_ext import cli
from tests.tiny.folders import save_tiny_model


def main(arguments):
    return cli.main(["critic", *arguments])


REWARD = """
def vowels(completions, **columns):
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]

def logits(completions, **columns):
    return [7.0] * len(completions)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, prompts, a reward function and a config."""
    folder = tmp_path_factory.mktemp("critic")
    save_tiny_model(folder / "model")
    (folder / "prompts.txt").write_text("a b\nthe cat\n\nonce upon\nb a c\nhm\n", encoding="utf-8")
    lines = [{"text": text, "topic": "x"} for text in ("a b", "the cat", "once upon")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "judge.py").write_text(REWARD, encoding="utf-8")
    labelled = [
        {"text": text, "label": label}
        for text, label in (("apple eagle", "good"), ("bark cart", "bad"))
        for _ in range(4)
    ]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labelled), encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings(folder)), encoding="utf-8")
    return folder


def settings(folder) -> dict:
    return {
        "model": str(folder / "model"),
        "prompts": str(folder / "prompts.txt"),
        "reward": f"{folder / 'judge.py'}:vowels",
        "num_iterations": 2,
        "rollouts_per_iteration": 12,
        "epochs_per_iteration": 2,
        "rollout_batch_size": 6,
        "eval_rollouts": 8,
        "max_new_tokens": 5,
        "per_device_train_batch_size": 4,
        "save_steps": 4,
        "disable_tqdm": True,
        "use_cpu": True,
    }


@pytest.fixture(scope="module")
def run(place, run_module):
    """A finished run, from a process of its own; a flag overrides the file."""
    output = run_module(
        "peft_ext.cli", "critic", "train", "--config", place / "config.yaml",
        "--output_dir", place / "run", "--num_iterations", "1", "--action_values", "true",
    )  # fmt: skip
    assert "explained variance" in output and output.startswith(" ")  # the table alone; Trainer's log is no result
    return place / "run"


def train(place, folder, **changes) -> int:
    flags = [str(part) for name, value in changes.items() for part in _flag(name, value)]
    return main(["train", "--config", str(place / "config.yaml"), "--output_dir", str(folder), *flags])


def _flag(name, value):
    return [f"--{name}", *(value if isinstance(value, list) else [value])]


def last_error(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_has_its_critic_rollouts_and_figures(place, run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 6  # one iteration of two epochs of three batches
    assert [row["position"] for row in metrics["positions"]] == list(range(6))
    assert {"eval_loss", "eval_calibration_error"} <= metrics["evaluation"].keys()
    assert len(read_rollouts(run / "rollouts")) == 12
    assert not list(run.glob("checkpoint-*"))
    assert "calibration error |" in (run / "critic" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    critic = Critic.from_pretrained(run / "critic").attach(model)
    assert critic.config.action_values and not (critic.head.weight == 0).all()


def test_the_same_arguments_show_a_finished_run_and_others_are_refused(place, run, capsys):
    assert train(place, run, num_iterations=1, action_values="true") == 0
    assert "is finished already" in capsys.readouterr().err
    assert train(place, run, num_iterations=2, action_values="true") == 2
    assert "other settings (num_iterations: was 1, is 2)" in last_error(capsys)


def test_a_stopped_run_goes_on(place, tmp_path, monkeypatch, capsys):
    assert train(place, tmp_path / "whole") == 0
    calls = []

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    from transformers import LlamaForCausalLM

    generate = LlamaForCausalLM.generate
    monkeypatch.setattr(LlamaForCausalLM, "generate", stops)
    assert train(place, tmp_path / "stopped") == 130  # Ctrl-C
    assert train(place, tmp_path / "stopped") == 0
    assert len(calls) == 4 + 1 + 2  # the last batch, and the evaluation's
    one, other = (Critic.from_pretrained(tmp_path / name / "critic") for name in ("whole", "stopped"))
    torch.testing.assert_close(one.head.weight, other.head.weight, atol=1e-5, rtol=1e-3)


def test_generate(place, run, capsys, monkeypatch):
    flags = ["--prompt", "a b", "once upon a time", "--max_new_tokens", "6"]
    texts = {}
    for strength in (0, 400):
        assert main(["generate", str(run), *flags, "--strength", str(strength)]) == 0
        texts[strength] = capsys.readouterr().out
    plain = _plain_text(place, ["a b", "once upon a time"], 6)
    assert texts[0] == plain and texts[400] != plain
    # the processor in generate, instead of the loop of its own
    assert main(["generate", str(run), *flags, "--strength", "400", "--num_beams", "2"]) == 0
    assert main(["generate", str(run), *flags, "--strength", "2", "--mode", "action-value"]) == 0
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("a b\n\nonce upon a time\n"))
    assert main(["generate", "--critic", str(run / "critic"), "--model", str(place / "model"), *flags[3:]][:5]
                + ["--max_new_tokens", "6", "--strength", "0"]) == 0  # fmt: skip
    assert capsys.readouterr().out == plain


def _plain_text(place, prompts, count) -> str:
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    tokens = model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    new = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return "".join(f"--- {prompt}\n{prompt}{text}\n\n" for prompt, text in zip(prompts, new))


def test_sampled_text_depends_on_the_seed(run, capsys):
    texts = []
    for seed in (1, 1, 2):
        flags = ["--prompt", "a b", "--do_sample", "true", "--seed", str(seed)]
        assert main(["generate", str(run), *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_evaluate(place, run, capsys, tmp_path):
    flags = ["--prompts", str(place / "prompts.txt"), "--reward", f"{place / 'judge.py'}:vowels", "--count", "48",
             "--max_new_tokens", "8", "--output", str(tmp_path / "result.json")]  # fmt: skip
    assert main(["evaluate", str(run), *flags, "--strengths", "0", "1"]) == 0
    output = capsys.readouterr().out
    assert "explained variance" in output and "mean reward" in output
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["rollouts"] == 48 and len(result["positions"]) == 9
    assert [row["strength"] for row in result["strengths"]] == [0.0, 1.0]
    assert result["strengths"][0]["reward_mean"] == pytest.approx(result["reward_mean"])


def test_evaluate_saved_rollouts(run, capsys, tmp_path):
    flags = ["--rollouts", str(run / "rollouts"), "--output", str(tmp_path / "result.json")]
    assert main(["evaluate", str(run), *flags]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["rollouts"] == 12


def test_control_codes(place, tmp_path, capsys):
    codes = {"control_codes": ["good", "bad"]}
    reward = {"reward": "", "labelled_texts": place / "labelled.jsonl"}
    pytest.importorskip("sklearn")
    prompts = {"prompts": place / "prompts.jsonl", "prompt_field": "text"}
    assert train(place, tmp_path / "run", num_iterations=1, **codes, **reward, **prompts) == 0
    rollouts = read_rollouts(tmp_path / "run" / "rollouts")
    assert {rollout.control_code for rollout in rollouts} == {"good", "bad"}
    assert {rollout.columns["topic"] for rollout in rollouts} == {"x"}
    flags = ["--prompt", "a b", "--max_new_tokens", "3"]
    assert main(["generate", str(tmp_path / "run"), *flags, "--control_code", "unseen"]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), *flags]) == 2
    assert "control_code is missing" in last_error(capsys)


def test_adapter_of_the_language_model(place, run, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    flags = ["--prompt", "a b", "--max_new_tokens", "8", "--strength", "0"]
    assert main(["generate", str(run), *flags, "--adapter", str(tmp_path / "adapter")]) == 0
    with_adapter = capsys.readouterr().out
    assert main(["generate", str(run), *flags]) == 0
    assert capsys.readouterr().out != with_adapter


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": "none.txt"}, "data='none.txt': there is no such file"),
        ({"reward": "judge:"}, "reward='judge:': pass package.module:function"),
        ({"reward": "nothing.py:f"}, "there is no file 'nothing.py'"),
        ({"reward": "json:no_such"}, "json has no 'no_such'"),
        ({"reward": ""}, "the reward is missing"),
        ({"classifier": "some/model"}, "named more than once"),
        ({"held_out": 1.5}, "held_out=1.5"),
        ({"model": "./nowhere"}, "./nowhere"),
        ({"adapter": "./nowhere"}, "adapter='./nowhere'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"head": "round"}, "head is 'round'; it must be one of"),
        ({"lam": 2}, "lam=2.0"),
        ({"temperature": 0}, "temperature=0.0"),
    ],
)
def test_bad_arguments_of_train(place, tmp_path, capsys, changes, message):
    assert train(place, tmp_path / "run", **changes) == 2
    error = last_error(capsys)
    assert message in error and error.startswith("peft-ext critic train: error: ")
    assert not (tmp_path / "run" / "critic").exists()


def test_a_bad_reward_ends_with_one_line(place, tmp_path, capsys):
    assert train(place, tmp_path / "run", reward=f"{place / 'judge.py'}:logits") == 2
    assert "the reward function logits returned 7.0" in last_error(capsys)


def test_bad_files(place, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n', encoding="utf-8")
    assert train(place, tmp_path / "run", prompts=tmp_path / "bad.jsonl") == 2
    assert "line 2 is no JSON" in last_error(capsys)
    assert train(place, tmp_path / "run", prompts=place / "prompts.jsonl") == 2
    assert "no 'prompt'; pass --prompt_field" in last_error(capsys)
    assert train(place, tmp_path / "bad.jsonl") == 2
    assert "is a file; pass a folder" in last_error(capsys)


STRANGE = "a\u2028b\u2029c\u0085d"


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_prompts_may_hold_any_character(tmp_path, name):
    texts = [STRANGE, "second"]
    lines = texts if name.endswith("txt") else [json.dumps({"text": t}, ensure_ascii=False) for t in texts]
    (tmp_path / name).write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
    rows = load_prompts(PromptArguments(str(tmp_path / name), "text"))
    assert [row["prompt"] for row in rows] == texts


def test_labelled_texts_may_hold_any_character(tmp_path):
    pytest.importorskip("sklearn")
    rows = [{"text": f"good {STRANGE}", "label": "x"}, {"text": "bad", "label": "y"}]
    path = tmp_path / "labelled"  # of any ending
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")
    reward = load_reward(RewardArguments(labelled_texts=str(path), label="x"))
    good, bad = reward(prompts=["", ""], completions=["good", "bad"])
    assert good > 0.5 > bad


def test_bad_arguments_of_generate_and_evaluate(place, run, tmp_path, capsys):
    assert main(["generate", "--prompt", "a b"]) == 2
    assert "critic is missing" in last_error(capsys)
    assert main(["generate", str(run), "--prompt", ""]) == 2
    assert "empty one" in last_error(capsys)
    assert main(["generate", str(run), "--prompt", "a", "--max_new_tokens", "0"]) == 2
    assert "max_new_tokens=0" in last_error(capsys)
    assert main(["generate", str(tmp_path), "--model", str(place / "model"), "--prompt", "a"]) == 2
    assert "there is no critic in that folder" in last_error(capsys)
    assert main(["generate", str(run), "--prompt", "a", "--control_code", "x"]) == 2
    assert "without control codes" in last_error(capsys)
    assert main(["generate", str(run), "--prompt", "a", "--mode", "quick"]) == 2
    assert main(["evaluate", str(run)]) == 2
    assert "data is missing" in last_error(capsys)
    assert main(["evaluate", str(run), "--rollouts", str(run / "rollouts"), "--strengths", "1"]) == 2
    assert "leave out --rollouts" in last_error(capsys)


def test_export(place, tmp_path, capsys):
    flags = {"num_iterations": 1, "action_values": "true", "action_form": "linear", "action_rank": 4}
    assert train(place, tmp_path / "run", **flags) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--strength", "8", "--output_dir", str(tmp_path / "out")]) == 0
    assert "a LoRA of rank 4 on the output head" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        before = model(ids).logits[:, -1]
        critic = Critic.from_pretrained(tmp_path / "run" / "critic").attach(model)
        with CriticLogitsProcessor(model, critic, before.shape[1], 8.0, mode="action-value") as processor:
            expected = processor(ids, before.clone()).log_softmax(-1)
        steered = PeftModel.from_pretrained(model, str(tmp_path / "out"))(ids).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)


def test_bad_arguments_of_export(run, tmp_path, capsys):
    assert main(["export", str(run)]) == 2
    assert "output_dir is missing" in last_error(capsys)
    assert main(["export", str(run), "--to", "onnx", "--output_dir", str(tmp_path / "out")]) == 2
    assert "to='onnx' is unknown" in last_error(capsys)
    assert main(["export", str(run), "--output_dir", str(tmp_path / "out")]) == 2
    assert "action_form='affine'" in last_error(capsys) and not (tmp_path / "out").exists()


def test_usage(capsys):
    assert main([]) == 0 and "train" in capsys.readouterr().out
    assert main(["fly"]) == 2
    assert "unknown command 'fly'" in capsys.readouterr().err
