# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext tune --distill`, `--recipe adapt-pack-heal` and `peft-ext quantize --distill`: teachers, stages, kills, mistakes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from peft_ext import trainer_checkpoints
from peft_ext.cli import main
from peft_ext.models import load, load_tokenizer
from peft_ext.quant.conversion import packed_layers
from peft_ext.rows import write_rows
from tests.commands.test_tune import talk
from tests.tiny.folders import save_chat_model, save_tiny_gpt2


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A float model, a packed one whose card doesn't say where it came from, and data."""
    folder = tmp_path_factory.mktemp("distill")
    save_chat_model(folder / "chat")
    write_rows(folder / "chat.jsonl", [{"messages": talk(number)} for number in range(20)])
    write_rows(folder / "texts.jsonl", [{"text": f"Text number {number}. " * 12} for number in range(40)])
    common = ["--model", folder / "chat", "--data", folder / "chat.jsonl", "--init_method", "minmax"]
    assert _run("quantize", *common, "--held_out_blocks", "2", "--output_dir", folder / "packed") == 0
    return folder


def _run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def flags(places, tmp_path):
    common = {
        "data": places / "chat.jsonl",
        "max_steps": 3,
        "init_method": "minmax",
        "held_out_blocks": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": tmp_path / "run",
    }
    return [part for name, value in common.items() for part in (f"--{name}", str(value))]


def _metrics(run) -> dict:
    return json.loads((run / "metrics.json").read_text())


class Killed(Exception):
    pass


@pytest.mark.parametrize("cached", [False, True])
def test_tune_towards_the_model_before_packing(places, flags, tmp_path, capsys, cached):
    flags = ["--model", str(places / "chat"), *flags, "--bits", "2", "--distill", "0.5"]
    if cached:
        flags += ["--teacher_logits", str(tmp_path / "kept"), "--teacher_top_k", "16"]
    assert main(["tune", *flags]) == 0
    assert "distilled from" in capsys.readouterr().out
    metrics = _metrics(tmp_path / "run")
    assert metrics["distilled"] == {"teacher": str(places / "chat"), "distill": 0.5, "steps": 3}
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "| distilled from | chat, by 0.5 of cross-entropy and 0.5 of KL to it, 3 steps |" in card
    assert ("teacher_logits" in metrics["bytes"]) is cached
    # where the teacher ran is of no matter, what it taught is
    assert main(["tune", *flags, "--teacher_device", "cpu"]) == 0
    assert main(["tune", *flags, "--distill", "0.7"]) == 2
    assert "distill: was 0.5, is 0.7" in capsys.readouterr().err


def test_what_another_teacher_changes(places, flags, tmp_path, capsys):
    """On a packed base that doesn't say what it was made from; a run's base does."""
    packed = ["--model", str(places / "packed"), *flags, "--distill", "1"]
    assert main(["tune", *packed]) == 2
    assert (
        "is packed and doesn't say what it was made from; name the float model: --teacher." in capsys.readouterr().err
    )
    assert main(["tune", *packed, "--teacher", str(places / "chat")]) == 0
    losses = dict(_metrics(tmp_path / "run")["losses"])
    assert losses[3] < losses[1]  # by the divergence alone
    own = ["--model", str(places / "chat"), *flags, "--output_dir", str(tmp_path / "first")]
    assert main(["tune", *own]) == 0
    again = ["--model", str(tmp_path / "first" / "base"), *flags, "--distill", "1"]
    assert main(["tune", *again, "--output_dir", str(tmp_path / "again")]) == 0
    assert _metrics(tmp_path / "again")["distilled"]["teacher"] == str(places / "chat")


def test_logits_made_elsewhere(places, flags, tmp_path):
    """A finished folder of logits, a packed base, and no float model."""
    kept = ["--distill", "0.5", "--teacher_logits", str(tmp_path / "kept")]
    assert main(["tune", "--model", str(places / "chat"), *flags, *kept]) == 0
    alone = ["--model", str(places / "packed"), *flags, "--output_dir", str(tmp_path / "alone"), *kept]
    assert main(["tune", *alone]) == 0
    assert _metrics(tmp_path / "alone")["distilled"]["teacher"] is None


@pytest.fixture
def dies(monkeypatch):
    """Ends training stage number `dies.at`, after its checkpoint, as a kill would."""
    own = trainer_checkpoints.train

    class Dies:
        at = None
        stages: list[str] = []

    def train(trainer):
        Dies.stages.append(trainer.args.output_dir)
        if len(Dies.stages) == Dies.at:
            raise Killed
        return own(trainer)

    Dies.stages.clear()
    monkeypatch.setattr(trainer_checkpoints, "train", train)
    return Dies


def test_adapt_pack_heal(places, flags, tmp_path, capsys, dies):
    flags = ["--model", str(places / "chat"), *flags, "--bits", "2", "--recipe", "adapt-pack-heal"]
    flags += ["--adapt_steps", "4", "--adapt_learning_rate", "0.01"]
    run = tmp_path / "run"
    for dies.at, there in ((1, []), (3, ["adapted", "base"])):
        with pytest.raises(Killed):
            main(["tune", *flags])
        assert all((run / name / "config.json").is_file() for name in there)
    dies.at = None
    assert main(["tune", *flags]) == 0
    # adapted once, packed once, healed in the end
    assert [path.rpartition("/")[2] for path in dies.stages] == [
        "adapt_checkpoints",
        "adapt_checkpoints",
        *2 * ["checkpoints"],
    ]
    out = "".join(capsys.readouterr())
    assert "LoRA is merged" in out and "perplexity, adapted by LoRA" in out and "perplexity, untouched model" in out
    metrics = _metrics(run)
    figures = metrics["perplexity"]
    assert figures["float"] < figures["untouched"] and figures["tuned"] < figures["quantized"]
    assert metrics["model"] == str(places / "chat") and metrics["recipe"] == "adapt-pack-heal"
    assert metrics["distilled"]["teacher"] == str(run / "adapted") and metrics["distilled"]["distill"] == 0.5
    assert metrics["bytes"]["adapted_model"] > metrics["bytes"]["packed_base"]
    assert not list(run.glob("*checkpoints"))
    assert packed_layers(load(str(run), merge=True))
    shutil.rmtree(run / "adapted")
    assert main(["eval", str(run)]) == 0 and main(["tune", *flags]) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--distill", "1.5"], "distill=1.5 must be from 0 to 1"),
        (["--distill", "0.5", "--distill_temperature", "0"], "distill_temperature=0.0 must be above 0"),
        (["--distill", "0.5", "--distill_beta", "-1"], "distill_beta=-1.0 must be from 0 to 1"),
        (["--distill", "0.5", "--teacher_device", "cuda:7"], "device='cuda:7' can't be used here"),
        (["--distill", "0.5", "--teacher", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--distill", "0.5", "--teacher_logits", "x", "--teacher_top_k", "0"], "teacher_top_k=0 must be at least 1"),
        (["--teacher_logits", "x"], "teacher_logits='x' is for distillation; pass --distill, too."),
        (["--distill", "0.5", "--loss_type", "dft"], "loss_type='dft' is another loss than distillation's"),
        (["--recipe", "heal"], "recipe='heal' is unknown; choose adapt-pack-heal."),
        (["--recipe", "adapt-pack-heal", "--method", "lora"], "tunes scales in the end"),
        (["--recipe", "adapt-pack-heal", "--adapt_steps", "0"], "adapt_steps=0 must be at least 1"),
        (["--adapt_steps", "4"], "adapt_steps=4 is for --recipe adapt-pack-heal"),
    ],
)
def test_mistakes(places, flags, tmp_path, capsys, more, said):
    assert main(["tune", "--model", str(places / "chat"), *flags, *more]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_vocabulary(places, flags, tmp_path, capsys):
    other = str(save_tiny_gpt2(tmp_path / "other"))
    assert main(["tune", "--model", str(places / "chat"), *flags, "--distill", "0.5", "--teacher", other]) == 2
    assert "has another tokenizer than model=" in capsys.readouterr().err
    narrow = load(other)
    narrow.resize_token_embeddings(200)
    narrow.save_pretrained(tmp_path / "narrow")
    named = ["--distill", "0.5", "--teacher", str(tmp_path / "narrow")]
    assert main(["tune", "--model", str(places / "chat"), *flags, *named]) == 2
    assert "has a vocabulary of 200 tokens" in capsys.readouterr().err
    packed = ["--model", str(places / "packed"), *flags, "--recipe", "adapt-pack-heal"]
    assert main(["tune", *packed]) == 2
    assert "starts from a float model" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["pack-quantized", "bcq"])
def test_quantize_heals(places, tmp_path, capsys, dies, form):
    """Scales alone move, by the divergence; a killed one goes on; the card and the config say it."""
    common = ["--model", places / "chat", "--data", places / "texts.jsonl", "--block_size", "32", "--bits", "2"]
    common += ["--format", form, "--init_method", "minmax" if form == "pack-quantized" else "greedy", "--seed", "1"]
    common += ["--held_out_blocks", "8", "--group_size", "16"]
    assert _run("quantize", *common, "--output_dir", tmp_path / "plain") == 0
    healing = [*common, "--distill", "--distill_steps", "20", "--distill_learning_rate", "0.03"]
    healing += ["--output_dir", tmp_path / "healed", "--json"]
    dies.at = 1
    with pytest.raises(Killed):
        _run("quantize", *healing)
    work = tmp_path / "healed.healing"
    assert not (tmp_path / "healed").exists() and (work / "base" / "config.json").is_file()
    dies.at = None
    # in the meantime, other settings are refused
    assert _run("quantize", *healing, "--distill_steps", "5") == 2
    assert "distill_steps: was 20, is 5" in capsys.readouterr().err
    assert _run("quantize", *healing) == 0
    found = json.loads(capsys.readouterr().out)
    assert not work.exists() and found["distilled"]["steps"] == 20 and found["distilled"]["distill"] == 1
    plain, after = (load(str(tmp_path / name)) for name in ("plain", "healed"))
    assert after.config.distilled == {"teacher": "chat", "distill": 1.0, "steps": 20}
    card = (tmp_path / "healed" / "README.md").read_text()
    assert "| distilled from | chat, by KL to it alone, 20 steps |" in card and "healed" in card
    for name, layer in packed_layers(after).items():
        before = packed_layers(plain)[name]
        assert torch.equal(before.codes(), layer.codes()) and not torch.equal(before.scale, layer.scale)
    teacher = load(str(places / "chat"))
    tokens = load_tokenizer(str(places / "chat"))(["Text number 7. Text number 3"] * 2, return_tensors="pt")
    log_probs = [model(tokens["input_ids"]).logits.log_softmax(-1) for model in (teacher, plain, after)]
    divergences = [torch.nn.functional.kl_div(each, log_probs[0], log_target=True) for each in log_probs[1:]]
    assert divergences[1] < divergences[0]


def test_mistakes_of_healing(places, tmp_path, capsys):
    common = ["--model", places / "chat", "--data", places / "texts.jsonl", "--output_dir", tmp_path / "out"]
    assert _run("quantize", *common, "--distill_steps", "5") == 2
    assert "distill_steps=5 is for distillation; pass --distill, too." in capsys.readouterr().err
    assert _run("quantize", *common, "--distill", "--distill_steps", "0") == 2
    assert "distill_steps=0 must be above 0" in capsys.readouterr().err
    assert _run("quantize", *common, "--teacher_logits", "x") == 2
    assert "teacher_logits='x' is for distillation" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
