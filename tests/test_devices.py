# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`--device` of commands that train says the same as transformers' `use_cpu`, and what Trainer wouldn't do is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import pytest
import torch
from transformers import TrainingArguments

from peft_ext import devices
from peft_ext.cli import main
from peft_ext.command_line import BATCH_SIZE, parse


pytest.importorskip("trl")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


@dataclass
class Flags:
    device: Optional[str] = None


def parsed(*argv, tmp_path):
    return parse([*argv, "--output_dir", str(tmp_path)], Flags, TrainingArguments, aliases=BATCH_SIZE)


def test_cpu_is_use_cpu(tmp_path):
    flags, training = parsed("--device", "cpu", "--batch_size", "3", tmp_path=tmp_path)
    assert flags.device == "cpu" and training.use_cpu and training.device == torch.device("cpu")
    assert training.per_device_train_batch_size == 3
    (tmp_path / "c.yaml").write_text("device: cpu\n")
    assert parsed("--config", str(tmp_path / "c.yaml"), tmp_path=tmp_path)[1].use_cpu
    assert not parsed(tmp_path=tmp_path)[1].use_cpu  # transformers chooses


@needs_no_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "nowhere"])
def test_a_device_that_isnt_there(device, tmp_path):
    with pytest.raises(ValueError, match=f"device='{device}' can't be used here: ") as error:
        parsed("--device", device, tmp_path=tmp_path)
    assert "\n" not in str(error.value)


def test_two_words_for_two_devices(tmp_path):
    with pytest.raises(ValueError, match="device='cuda' and use_cpu=True contradict each other"):
        parsed("--device", "cuda", "--use_cpu", "True", tmp_path=tmp_path)


def test_what_trainer_would_not_take(monkeypatch):
    """Of several GPUs, as on a machine that has them: Trainer takes the first."""

    class Training:
        device, n_gpu, _n_gpu = torch.device("cuda:0"), 2, 2

    monkeypatch.setattr(devices, "usable", lambda device: device)
    with pytest.raises(ValueError, match="takes 'cuda:0' here; start with CUDA_VISIBLE_DEVICES=1 and --device cuda"):
        devices.check_training_device("cuda:1", Training)
    with pytest.raises(ValueError, match="takes 'cuda:0' here; leave --device out"):
        devices.check_training_device("mps", Training)
    devices.check_training_device("cuda", Training)
    assert Training._n_gpu == 1  # one was named: no DataParallel


@needs_no_gpu
@pytest.mark.parametrize(
    "words",
    [
        ["tune", "--output_dir", "{tmp}/run"],
        ["quantize", "--output_dir", "{tmp}/run"],
        ["critic", "train", "--output_dir", "{tmp}/run"],
        ["paraphrase", "train", "--data", "{tmp}/pairs.jsonl", "--output_dir", "{tmp}/run"],
        ["probe", "train", "--data", "{tmp}/pairs.jsonl", "--label_column", "target", "--output_dir", "{tmp}/run"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_every_command_says_it_before_any_work(words, hub, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text('{"source": "a", "target": "b", "text": "c"}\n' * 4)
    words = [word.format(tmp=tmp_path) for word in words]
    assert main([*words, "--device", "cuda:7"]) == 2
    shown = capsys.readouterr()
    assert "device='cuda:7' can't be used here" in shown.err and shown.out == ""
    assert not (tmp_path / "run").exists()


def test_a_run_may_go_on_elsewhere(tmp_path):
    from peft_ext.commands.sft import TuneTrainingArguments
    from peft_ext.commands.tune import TuneArguments, _settings

    training = TuneTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert _settings(TuneArguments(device="cpu"), training, None) == _settings(TuneArguments(), training, None)
