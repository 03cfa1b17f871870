# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext tune` on conversations, prompts and texts; by LoRA; on what is packed already; and what reads the run."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_ext import PeqaConfig
from peft_ext.cli import main
from peft_ext.commands.sft import TuneTrainingArguments, check_packing, keep_product_where_needed, sft_trainer
from peft_ext.examples import IGNORED, Encoder, Example, Examples
from peft_ext.models import load, load_tokenizer
from peft_ext.perplexity import example_perplexity
from peft_ext.quant.linear import PackedLinear
from peft_ext.rows import write_rows
from tests.conftest import ROOT
from tests.test_examples import records
from tests.tiny import families
from tests.tiny.folders import save_chat_model
from tests.tiny.tokenizers import chat_tokenizer


WORDS = ["red", "green", "blue", "black", "white"]


def talk(number: int) -> list[dict[str, str]]:
    word = WORDS[number % 5]
    return [{"role": "user", "content": f"Colour {number}?"}, {"role": "assistant", "content": f"It is {word}."}]


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("tune") / "chat")


@pytest.fixture
def flags(chat_folder, tmp_path):
    common = {
        "model": chat_folder,
        "max_steps": 2,
        "init_method": "minmax",
        "held_out_blocks": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": tmp_path / "run",
    }
    return [part for name, value in common.items() for part in (f"--{name}", str(value))]


def tuned(run) -> dict:
    return json.loads((run / "metrics.json").read_text())


def test_conversations(flags, tmp_path, capsys):
    rows = [{"messages": talk(number)} for number in range(20)]
    write_rows(tmp_path / "chat.jsonl", [*rows, {"messages": talk(1)[:1]}])
    arguments = [*flags, "--data", str(tmp_path / "chat.jsonl"), "--init_method", "calibrated", "--bits", "3"]
    assert main(["tune", *arguments]) == 0
    out = "".join(capsys.readouterr())
    assert "training data: 18 rows of messages" in out and "1 dropped (no turn of the assistant's)" in out
    metrics = tuned(tmp_path / "run")
    assert metrics["shape"] == "messages" and metrics["held_out"]["rows"] == 2
    assert "measured on" in out and metrics["perplexity"]["quantized"] != metrics["perplexity"]["tuned"]
    # the perplexity is that of the assistant's turns, by the model that the run holds
    assert main(["eval", str(tmp_path / "run"), "--output", str(tmp_path / "e.json")]) == 0
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["trained_tokens"] == metrics["held_out"]["tokens"] < result["tokens"]
    assert result["perplexity"] == pytest.approx(metrics["perplexity"]["tuned"], rel=1e-3)
    (tmp_path / "run" / "checkpoints" / "checkpoint-1").mkdir(parents=True)  # as a kill behind the result leaves it
    assert main(["tune", *arguments]) == 0
    assert "is finished already" in capsys.readouterr().err and not (tmp_path / "run" / "checkpoints").exists()
    assert main(["tune", *arguments, "--assistant_only_loss", "False"]) == 2
    assert "assistant_only_loss: was null, is false" in capsys.readouterr().err
    # the template went along
    assert main(["generate", str(tmp_path / "run"), "--chat", "True", "--prompt", "Hi", "--max_new_tokens", "2"]) == 0


def test_only_what_is_trained_is_learnt(flags, tmp_path):
    """Twenty steps on a completion: its loss falls, the prompt's doesn't follow it."""
    write_rows(tmp_path / "p.csv", [{"question": "Who?", "answer": "aaaaaaaa"}] * 8)
    columns = ["--prompt_field", "question", "--completion_field", "answer", "--max_steps", "20"]
    assert main(["tune", *flags, "--data", str(tmp_path / "p.csv"), *columns, "--learning_rate", "0.1"]) == 0
    perplexities = tuned(tmp_path / "run")["perplexity"]
    assert perplexities["tuned"] < 0.5 * perplexities["quantized"]
    model, base = load(str(tmp_path / "run")), load(str(tmp_path / "run" / "base"))
    (example,) = Encoder(load_tokenizer(str(tmp_path / "run")))(records([{"text": "Who?Who?"}]), "text").examples
    assert example_perplexity(model, [example]) > 0.5 * example_perplexity(base, [example])


def test_held_out_data_of_their_own(flags, tmp_path, capsys):
    write_rows(tmp_path / "train.jsonl", [{"prompt": f"{n}?", "completion": " yes"} for n in range(8)])
    write_rows(tmp_path / "mine.jsonl", [{"prompt": f"{n}!", "completion": " no"} for n in range(3)])
    arguments = ["--data", str(tmp_path / "train.jsonl"), "--eval_data", str(tmp_path / "mine.jsonl")]
    assert main(["tune", *flags, *arguments]) == 0
    assert "held-out data: 3 rows of prompt/completion" in capsys.readouterr().err
    write_rows(tmp_path / "mine.jsonl", [{"other": "x"}])
    shutil.rmtree(tmp_path / "run")
    assert main(["tune", *flags, *arguments]) == 2
    assert "mine.jsonl, row 1: no column 'prompt'; it has ['other']" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packing(strategy, flags, tmp_path):
    write_rows(tmp_path / "chat.jsonl", [{"messages": talk(number)} for number in range(40)])
    packing = ["--packing", "True", "--packing_strategy", strategy, "--max_length", "256"]
    assert main(["tune", *flags, "--data", str(tmp_path / "chat.jsonl"), *packing]) == 0


def _examples() -> Examples:
    """Eight of twelve tokens; the first four aren't trained."""
    tokens = torch.randint(3, 40, (8, 12)).tolist()
    return Examples([Example(row, [IGNORED] * 4 + row[4:]) for row in tokens], "prompt/completion")


def _arguments(folder, packing: bool) -> TuneTrainingArguments:
    """One step on all eight."""
    steps = {"max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
    return TuneTrainingArguments(output_dir=str(folder), use_cpu=True, packing=packing, max_length=128, **steps)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_neo", "falcon"])
def test_packed_examples_do_not_see_each_other(name, tmp_path):
    check_packing(families.build(name), _arguments(tmp_path, packing=True), _examples())


@pytest.mark.parametrize("name", ["bloom", "opt", "xglm", "mamba", "rwkv", "gpt_oss"])
def test_packing_is_refused_where_they_would(name, tmp_path):
    model, examples = families.build(name), _examples()
    check_packing(model, _arguments(tmp_path, packing=False), examples)
    with pytest.raises(ValueError, match="packing=True: in a .*, examples of one row see each other"):
        check_packing(model, _arguments(tmp_path, packing=True), examples)


@pytest.mark.parametrize("name", ["llama", "granite", "cohere", "mixtral", "granitemoe", "llama4", "jamba"])
def test_the_loss_is_the_models_own(name, tmp_path, caplog):
    """TRL makes the logits of known families itself, and fails on others; a step of the trainer gives the model's own loss."""
    model, examples = families.build(name), _examples()
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    trainer = sft_trainer(model, _arguments(tmp_path, packing=False), examples, chat_tokenizer())
    assert ("so it is trained on its own" in caplog.text) == (name == "llama4")
    trainer.train()
    # before its first step, LoRA changes nothing
    expected = math.log(example_perplexity(families.build(name), examples.examples))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("name", "needed"), [("falcon", True), ("llama", False)])
def test_a_model_that_changes_outputs_in_place(name, needed, tmp_path):
    model = get_peft_model(families.build(name), PeqaConfig(bits=4, task_type="CAUSAL_LM"))
    keep_product_where_needed(model, _examples())
    assert model.active_peft_config.keep_product is needed
    trainer = sft_trainer(model, _arguments(tmp_path, packing=False), _examples(), chat_tokenizer())
    trainer.train()
    assert trainer.state.global_step == 1


def test_texts_as_examples(flags, tmp_path, capsys):
    write_rows(tmp_path / "t.jsonl", [{"body": f"text number {number}" * 3} for number in range(12)])
    data = [
        "--data",
        str(tmp_path / "t.jsonl"),
        "--dataset_text_field",
        "body",
        "--packing",
        "False",
        "--max_length",
        "20",
    ]
    assert main(["tune", *flags, *data]) == 0
    assert "training data: 11 rows of text, 220 tokens, loss on 209 of them; 11 too long" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "run"), "--output", str(tmp_path / "e.json")]) == 0
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["tokens"] == 20 and result["perplexity"] == pytest.approx(
        tuned(tmp_path / "run")["perplexity"]["tuned"], rel=1e-3
    )


def test_lora_on_a_base_that_is_packed_first(flags, tmp_path, capsys):
    write_rows(tmp_path / "chat.jsonl", [{"messages": talk(number)} for number in range(20)])
    lora = ["--method", "lora", "--bits", "3", "--lora_r", "4", "--lora_alpha", "8", "--lora_dropout", "0"]
    assert main(["tune", *flags, "--data", str(tmp_path / "chat.jsonl"), *lora, "--learning_rate", "0.05"]) == 0
    run = tmp_path / "run"
    metrics, stored = tuned(run), yaml.safe_load((run / "config.yaml").read_text())
    assert metrics["perplexity"]["float"] and metrics["perplexity"]["quantized"] != metrics["perplexity"]["tuned"]
    assert (stored["lora_r"], stored["learning_rate"]) == (4, 0.05)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    model = load(str(run))
    assert isinstance(model, PeftModel)
    assert isinstance(model.base_model.model.model.layers[0].mlp.up_proj.get_base_layer(), PackedLinear)
    # codes are never rounded again; floats take it
    assert main(["export", str(run), "--to", "compressed-tensors", "--output_dir", str(tmp_path / "out")]) == 2
    assert "LORA on a packed base" in capsys.readouterr().err
    assert main(["export", str(run), "--to", "dequantized", "--output_dir", str(tmp_path / "out")]) == 0
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=tokens).logits
        assert torch.allclose(merged, model(input_ids=tokens).logits, atol=1e-4)


def test_a_killed_run_of_lora_goes_on(flags, tmp_path, monkeypatch):
    """It ends where a run that wasn't killed ends."""
    from transformers import Trainer

    write_rows(tmp_path / "chat.jsonl", [{"messages": talk(number)} for number in range(20)])
    flags += ["--data", str(tmp_path / "chat.jsonl"), "--method", "lora", "--lora_dropout", "0", "--save_steps", "1"]
    original, steps = Trainer.training_step, []

    def killed(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", killed)
    assert main(["tune", *flags]) == 130  # Ctrl-C
    assert main(["tune", *flags]) == 0 == main(["tune", *flags, "--output_dir", str(tmp_path / "whole")])
    assert steps == [0, 1, 1, 0, 1]
    one, other = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("run", "whole"))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


@pytest.fixture(scope="module")
def packed_folder(chat_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune") / "packed"
    arguments = ["--model", str(chat_folder), "--bits", "3", "--group_size", "32", "--init_method", "minmax"]
    assert main(["quantize", *arguments, "--held_out_blocks", "1", "--output_dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("method", ["lora", "peqa"])
def test_what_is_packed_stays_as_it_is(method, flags, packed_folder, tmp_path, capsys):
    write_rows(tmp_path / "chat.jsonl", [{"messages": talk(number)} for number in range(20)])
    flags += ["--model", str(packed_folder), "--data", str(tmp_path / "chat.jsonl"), "--method", method]
    assert main(["tune", *flags, "--group_size", "64"]) == 2
    assert "group_size=64: model=" in capsys.readouterr().err
    assert main(["tune", *flags]) == 0
    assert "perplexity, packed base" in capsys.readouterr().out
    run = tmp_path / "run"
    base, before = load_file(run / "base" / "model.safetensors"), load_file(packed_folder / "model.safetensors")
    assert base.keys() == before.keys() and all(torch.equal(base[name], before[name]) for name in base)
    assert tuned(run)["perplexity"]["float"] is None and tuned(run)["bits"] == "base"
    assert main(["tune", *flags]) == 0  # prints
    assert main(["generate", str(run), "--prompt", "x", "--max_new_tokens", "2"]) == 0


def test_runs_of_earlier_versions(tmp_path, capsys, monkeypatch):
    """`tests/earlier` holds one: started again it prints, without its base it isn't made again, and it generates."""
    files = ROOT / "tests" / "earlier" / "files"
    shutil.copytree(files / "tune", tmp_path / "run")
    shutil.copytree(files / "base", tmp_path / "base")
    shutil.copy(files / "text.txt", tmp_path)
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert "lora_r" not in stored
    monkeypatch.chdir(tmp_path)
    again = ["--model", "base", "--data", "text.txt", "--bits", "3", "--max_steps", "2", "--block_size", "16"]
    again += ["--calibration_blocks", "4", "--held_out_blocks", "4", "--output_dir", "run", "--use_cpu", "True"]
    assert main(["tune", *again]) == 0
    assert "is finished already" in capsys.readouterr().err
    assert main(["tune", *again, "--max_length", "9"]) == 2
    assert "max_length: was not set, is 9" in capsys.readouterr().err
    assert main(["generate", "run", "--prompt", "w3", "--max_new_tokens", "2"]) == 0
    assert main(["eval", "run"]) == 0


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([{"a": "x"}] * 4, [], "d.jsonl, row 1: no column 'messages'"),
        ([{"messages": talk(0)}] * 4, ["--chat_template_path", "x.txt"], "chat_template_path='x.txt' is no .jinja"),
        ([{"messages": talk(0)}], [], "there is 1 row, and one has to be held out"),
        ([{"text": "x"}] * 20, ["--eos_token", "<none>"], "eos_token='<none>' isn't in"),
        ([{"text": "x" * 600}] * 20, ["--lora_r", "4"], "lora_r=4 is for method='lora'"),
        (
            [{"text": "x" * 600}] * 20,
            ["--method", "lora", "--lora_target_modules", "q_proj", "key"],
            "the model has no module 'key'",
        ),
        ([{"messages": talk(0)}] * 4, ["--max_length", "3"], "no row of messages is left (3 x nothing to learn in 3"),
    ],
)
def test_mistakes(rows, arguments, message, flags, tmp_path, capsys):
    write_rows(tmp_path / "d.jsonl", rows)
    assert main(["tune", *flags, "--data", str(tmp_path / "d.jsonl"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_messages_need_a_chat_template(flags, float_folder, tmp_path, capsys):
    write_rows(tmp_path / "d.jsonl", [{"messages": talk(number)} for number in range(9)])
    flags += ["--model", str(float_folder), "--data", str(tmp_path / "d.jsonl")]
    assert main(["tune", *flags]) == 2
    assert "has no chat template; pass --chat_template_path" in capsys.readouterr().err
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}")
    assert main(["tune", *flags, "--chat_template_path", str(tmp_path / "t.jinja")]) == 0
    assert load_tokenizer(str(tmp_path / "run" / "base")).chat_template.startswith("{% for m in")
    (tmp_path / "t.jinja").unlink()
    assert main(["eval", str(tmp_path / "run")]) == 0  # the template went along
