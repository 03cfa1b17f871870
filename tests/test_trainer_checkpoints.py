# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A training goes on from its newest complete checkpoint, in whatever state a kill left the newer ones."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_ext.files import held
from peft_ext.trainer_checkpoints import drop_checkpoints, going_on, incomplete, last_checkpoint, resolve, train
from tests.tiny.models import tiny


ROWS = [{"input_ids": torch.arange(5) + row, "labels": torch.arange(5) + row} for row in range(8)]


def trainer(folder: Path, adapter: bool, steps: int = 4, **options) -> Trainer:
    torch.manual_seed(0)
    model = tiny("llama")
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        disable_tqdm=True, logging_strategy="no", **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=ROWS)


@pytest.fixture(scope="module", params=["adapter", "whole model", "shards"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    made = trainer(folder, adapter=request.param == "adapter")
    made.train()
    if request.param == "shards":
        for checkpoint in folder.glob("checkpoint-*"):
            (checkpoint / "model.safetensors").unlink()
            made.model.save_pretrained(checkpoint, max_shard_size="20KB")
            os.utime(checkpoint / "trainer_state.json")
    return folder


def in_order(checkpoint: Path) -> list[str]:
    """As the Trainer writes them."""
    names = {path.name for path in checkpoint.iterdir()}
    last = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    assert names > set(last)
    return sorted(names - set(last) - {"README.md"}) + last


def test_every_state_that_a_kill_can_leave(run, tmp_path, caplog):
    """No file may be missing or cut off that the Trainer reads, and none of the states may be taken."""
    newest = run / "checkpoint-4"
    assert incomplete(newest) is None
    order, states = in_order(newest), []
    for index in range(len(order)):
        states += [(order[index:], None), (order[index + 1 :], order[index])]
    read = {"generation_config.json", "training_args.bin", "README.md"}  # not these
    for missing, cut in states:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(run, tmp_path / "run")
        broken = tmp_path / "run" / "checkpoint-4"
        for name in missing:
            (broken / name).unlink()
        if cut is not None:
            os.truncate(broken / cut, (broken / cut).stat().st_size // 2)
        if not missing and cut in read:
            continue
        caplog.clear()
        assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2"), (missing, cut)
        assert "checkpoint-4 is incomplete" in caplog.text and "set aside as broken-checkpoint-4" in caplog.text
        assert sorted(os.listdir(tmp_path / "run")) == ["broken-checkpoint-4", "checkpoint-2"]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_each_file_counts(run, tmp_path, name):
    shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / name).unlink()
    assert name.partition(".")[0] in incomplete(tmp_path / "checkpoint-4")


def test_a_missing_shard(run, tmp_path):
    shards = sorted((run / "checkpoint-4").glob("model-*-of-*.safetensors"))
    if not shards:
        pytest.skip("of the run with shards")
    shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / shards[1].name).unlink()
    assert incomplete(tmp_path / "checkpoint-4") == f"{shards[1].name} is missing"


def test_the_run_ends_as_if_nothing_had_happened(tmp_path):
    def weights(made: Trainer) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in made.model.state_dict().items()}

    whole = trainer(tmp_path / "whole", adapter=True, steps=6)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    os.truncate(tmp_path / "cut" / "checkpoint-4" / "optimizer.pt", 100)
    again = trainer(tmp_path / "cut", adapter=True, steps=6)
    train(again)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())
    names = ["broken-checkpoint-4", "checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert sorted(os.listdir(tmp_path / "cut")) == names
    drop_checkpoints(tmp_path / "cut")
    assert not os.listdir(tmp_path / "cut")


def test_no_step_beyond_the_last(tmp_path):
    """From the checkpoint of the last step, transformers makes another one."""
    made = trainer(tmp_path, adapter=True, steps=3, save_only_model=False)
    made.args.save_steps = 1
    made.train()
    kept = {name: value.clone() for name, value in made.model.state_dict().items()}
    again = trainer(tmp_path, adapter=True, steps=3)
    assert last_checkpoint(tmp_path).endswith("-3")
    train(again)
    assert again.state.global_step == 3
    assert all(torch.equal(value, kept[name]) for name, value in again.model.state_dict().items())
    more = trainer(tmp_path, adapter=True, steps=5)
    train(more)
    assert more.state.global_step == 5


def test_only_the_model_was_saved(tmp_path):
    trainer(tmp_path, adapter=True, save_only_model=True).train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_another_process_may_be_writing_it(run, tmp_path, caplog, fresh_process):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").unlink()
    look = (
        f"from peft_ext.trainer_checkpoints import last_checkpoint; print(last_checkpoint({str(tmp_path / 'run')!r}))"
    )
    with held(tmp_path / "run"):
        assert fresh_process(look).strip().endswith("checkpoint-2")
        assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-2", "checkpoint-4"]


def test_what_resume_from_checkpoint_means(tmp_path):
    assert resolve(None, tmp_path) is None and resolve(False, tmp_path) is None and resolve("False", tmp_path) is None
    assert resolve(True, tmp_path) is None and resolve("true", tmp_path) is None
    made = trainer(tmp_path, adapter=True)
    made.train()
    for value in (True, "True", tmp_path / "checkpoint-4", str(tmp_path / "checkpoint-4")):
        assert resolve(value, tmp_path) == str(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="resume_from_checkpoint='elsewhere': there is no such folder"):
        resolve("elsewhere", tmp_path)
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="-4' is incomplete: optimizer is missing; .*checkpoint-2' is complete"):
        resolve(tmp_path / "checkpoint-4", tmp_path)
    made.args.resume_from_checkpoint = "True"  # as a flag of a command brings it
    with going_on(made) as checkpoint:
        assert checkpoint == str(tmp_path / "checkpoint-2")


def test_names_that_only_look_like_checkpoints(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for name in ("checkpoint-x", "checkpoint-3-old", "checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9").write_text("")
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "nowhere") is None and not caplog.text
    drop_checkpoints(tmp_path)
    assert len(os.listdir(tmp_path)) == 4
