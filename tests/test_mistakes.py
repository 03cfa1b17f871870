# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The mistakes of docs/how-to/mistakes.md, made: each is answered in the line that the page has, and leaves nothing behind."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from generation_ext.critic import Critic
from peft_ext import PeqaConfig, load, load_tokenizer
from peft_ext.cli import main
from peft_ext.models import DEFAULT_VARIABLE
from tests.cases import move_adapter
from tests.commands.conftest import make_run
from tests.conftest import ROOT
from tests.tiny.folders import save_tiny_model


pytest.importorskip("trl")
PAGE = ROOT / "docs" / "how-to" / "mistakes.md"
_ROW = re.compile(r"^\| `(peft-ext [^`]*)` \| `([^`]+)` \|", re.MULTILINE)
ROWS = _ROW.findall(PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the page's commands name."""
    folder = tmp_path_factory.mktemp("mistakes")
    config = PeqaConfig(bits=3, group_size=32, task_type="CAUSAL_LM")
    make_run(folder / "run", save_tiny_model(folder / "model"), config)
    (folder / "run" / "config.yaml").write_text("bits: 3\nmodel: model\nmethod: peqa\n")
    other = load(str(folder / "model"))
    for parameter in other.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    get_peft_model(other, config).unload().save_pretrained(folder / "other")
    load_tokenizer(str(folder / "model")).save_pretrained(folder / "other")
    shutil.copytree(folder / "run", folder / "unfinished")
    (folder / "unfinished" / "metrics.json").unlink()
    shutil.copytree(folder / "run", folder / "damaged")
    weights = folder / "damaged" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    shutil.copytree(folder / "run" / "adapter", folder / "pickled")
    (folder / "pickled" / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "pickled" / "adapter_model.bin")
    shutil.copytree(folder / "run", folder / "lora-run")
    lora = get_peft_model(load(str(folder / "run" / "base")), LoraConfig(target_modules="all-linear"))
    move_adapter(lora)
    shutil.rmtree(folder / "lora-run" / "adapter")
    lora.save_pretrained(folder / "lora-run" / "adapter")
    Critic.for_model(load(str(folder / "model"))).save_pretrained(folder / "critic")
    _probe(folder)
    (folder / "texts.jsonl").write_text('{"text": "a joy"}\n')
    (folder / "prompts.txt").write_text("The film\nMy day\n")
    (folder / "rewards.py").write_text(
        "def something(prompts, completions, **columns):\n    return [0.5] * len(prompts)\n"
    )
    (folder / "broken.yaml").write_text("bits: [2")
    (folder / "empty.jsonl").touch()
    (folder / "prose.jsonl").write_text("It was a dark night.\n")
    (folder / "short.txt").write_text("short")
    (folder / "questions.csv").write_text("question,answer\nWhat?,That.\nWho?,She.\n")
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("precious")
    return folder


def _probe(folder):
    from generation_ext import PALPClassifier

    model, tokenizer = load(str(folder / "model")), load_tokenizer(str(folder / "model"))
    PALPClassifier(model, tokenizer).fit(["a joy", "a bore"], ["good", "bad"]).save_pretrained(folder / "probe")


def test_the_page_has_them():
    assert len(ROWS) >= 40


@pytest.mark.parametrize(("command", "message"), ROWS, ids=[command for command, _ in ROWS])
def test_a_mistake(command, message, workplace, hub, monkeypatch, capfd):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv(DEFAULT_VARIABLE, str(workplace / "model"))
    before = sorted(workplace.rglob("*"))
    assert main(shlex.split(command)[1:]) == 2
    shown = capfd.readouterr()
    assert shown.out == "" and "Traceback" not in shown.err
    said = [line for line in shown.err.splitlines() if ": error: " in line]
    assert len(said) == 1 and message in said[0] and shown.err.rstrip().endswith(said[0])
    assert sorted(workplace.rglob("*")) == before
