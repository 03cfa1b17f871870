# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext paraphrase`: train, kill, go on, paraphrase, evaluate, show; mistakes are one line."""

from __future__ import annotations

import json
import shutil

import pytest

from peft_ext import cli
from peft_ext.files import written_whole


def main(arguments):
    return cli.main(["paraphrase", *arguments])


STRANGE = {"source": "how do i\u2028 make\u2029 a\u0085 song?", "target": "what is the best way to make a song?"}
PAIRS = [
    {"source": f"how do i {verb} a {noun}?", "target": f"what is the best way to {verb} a {noun}?"}
    for verb in ("learn", "make", "find", "sell")
    for noun in ("song", "cake", "house", "trick")
] + [STRANGE]
SMALL = ["--hidden_size", "36", "--layers", "2", "--ffn_size", "40", "--vocab_size", "80", "--batch_size", "4"]
SMALL += ["--learning_rate", "3e-3", "--warmup_steps", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("granularity")
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in PAIRS)
    (folder / "pairs.jsonl").write_text(lines, encoding="utf-8-sig")
    rows = "".join(f'"{pair["source"]}","{pair["target"]}"\n' for pair in PAIRS)
    (folder / "pairs.csv").write_text("question,other\n" + rows, encoding="utf-8")
    assert train(folder, folder / "run") == 0
    assert train(folder, folder / "plain", "--mode", "none", steps=2) == 0
    return folder


def train(folder, run, *arguments, steps=6, data="pairs.jsonl"):
    flags = ["--data", folder / data, "--output_dir", run, "--max_steps", steps, "--eval_steps", 3, *SMALL, *arguments]
    return main(["train", *map(str, flags)])


def test_a_run_folder(folder, capsys):
    assert sorted(path.name for path in (folder / "run").iterdir()) == [
        "config.yaml",
        "metrics.json",
        "model",
        "tokenizer",
    ]
    assert "held-out pairs |" in (folder / "run" / "model" / "README.md").read_text()
    assert train(folder, folder / "run") == 0
    assert "is finished already" in capsys.readouterr().err
    assert train(folder, folder / "run", "--seed", "3") == 2
    assert "holds a run with other settings (seed: was 0, is 3)" in capsys.readouterr().err


def test_goes_on_after_a_kill(folder, tmp_path, monkeypatch):
    from transformers import Seq2SeqTrainer

    def die(self, *args, **kwargs):
        if self.state.global_step >= 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    step = Seq2SeqTrainer.training_step
    monkeypatch.setattr(Seq2SeqTrainer, "training_step", die)
    assert train(folder, tmp_path / "run") == 130  # Ctrl-C
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    monkeypatch.setattr(Seq2SeqTrainer, "training_step", step)
    # the same tokenizer: training one on several threads breaks ties at random
    shutil.copytree(tmp_path / "run", tmp_path / "whole", ignore=shutil.ignore_patterns("checkpoint-*"))
    assert train(folder, tmp_path / "run") == 0 and train(folder, tmp_path / "whole") == 0
    whole, resumed = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "run"))
    assert resumed["steps"] == 6 and resumed["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-4)


def test_a_checkpoint_that_a_kill_left_incomplete_is_not_gone_on_from(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("generation_ext.granularity.commands.train.written_whole", stopped_at("model"))
    assert train(folder, tmp_path / "run") == 130  # Ctrl-C
    monkeypatch.undo()
    (tmp_path / "run" / "checkpoint-6" / "trainer_state.json").unlink()
    assert train(folder, tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 6


def stopped_at(name):
    def write(target):
        if target.name == name:
            raise KeyboardInterrupt
        return written_whole(target)

    return write


def test_paraphrase(folder, tmp_path, capsys):
    command = ["paraphrase", str(folder / "run"), "--num_beams", "2"]
    assert main([*command, "--texts", "how do i make a cake?", "how do i sell a house?"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2
    output = tmp_path / "out.jsonl"
    columns = ["--fields", "source=question", "target=other"]
    assert main([*command, "--data", str(folder / "pairs.csv"), *columns, "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row["source"] for row in rows] == [pair["source"] for pair in PAIRS]


def test_evaluate(folder, tmp_path, capsys):
    output = tmp_path / "metrics.json"
    arguments = ["--data", str(folder / "pairs.jsonl"), "--num_beams", "2", "--output", str(output)]
    assert main(["evaluate", str(folder / "run"), *arguments]) == 0
    assert "iBLEU" in capsys.readouterr().out
    assert json.loads(output.read_text())["pairs"] == len(PAIRS)


def test_show(folder, tmp_path, capsys):
    picture = tmp_path / "z.png"
    assert main(["show", str(folder / "run"), "--text", "how do i make a cake?", "--output", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "layer 1" in shown and "[CLS]" in shown and picture.stat().st_size > 3000
    assert main(["show", str(folder / "plain"), "--text", "how do i make a cake?"]) == 2
    assert "has no granularities" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, message",
    [
        (["train", "--data", "pairs.jsonl"], "output_dir is missing"),
        (["train", "--output_dir", "new"], "data is missing"),
        (["train", "--data", "none.jsonl", "--output_dir", "new"], "there is no such file"),
        (["train", "--data", "pairs.jsonl", "--output_dir", "new", "--mode", "Q"], "mode='Q' is unknown"),
        (["train", "--data", "pairs.jsonl", "--output_dir", "new", "--max_length", "-1"], "max_length=-1"),
        (["train", "--data", "pairs.jsonl", "--output_dir", "new", "--hidden_size", "37"], "multiple of heads=9"),
        (["train", "--data", "pairs.csv", "--output_dir", "new"], "has no 'source'"),
        (["paraphrase", "nowhere", "--texts", "a"], "there is no model"),
        (["paraphrase", "run"], "either --texts or --data"),
        (["paraphrase", "run", "--texts", " "], "text 0 is empty"),
        (["evaluate", "run", "--data", "pairs.jsonl", "--limit", "0"], "limit=0"),
        (["show", "run"], "text is missing"),
        (["show", "run", "--text", "a", "--output", "a.gif"], "must end in .png"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, monkeypatch, command, message):
    monkeypatch.chdir(folder)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (folder / "new").exists()
