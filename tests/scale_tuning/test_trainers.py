# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Whole training runs: transformers' Trainer, TRL's SFTTrainer, a plain loop under `accelerate launch`."""

from __future__ import annotations

import json
import math

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_ext import AlphaTuningConfig, PeqaConfig
from tests.cases import adapter_parameters, assert_differs, assert_same, move_adapter, prefix_of
from tests.tiny.models import VOCAB, logits_of, tiny
from tests.tiny.tokenizers import tiny_tokenizer


CONFIG = {"bits": 3, "group_size": 16, "task_type": "CAUSAL_LM"}
BATCH = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])}


def _token_rows(rows: int = 24, length: int = 8) -> Dataset:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def _mean_loss(model) -> float:
    """Loss over all rows: single batches of random tokens are too unlike each other to show progress."""
    ids = torch.tensor(_token_rows()["input_ids"])
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def _arguments(folder, **overrides) -> dict:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        "dataloader_pin_memory": False,
        **overrides,
    }


def _losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _trainer(folder, config_cls=PeqaConfig, **overrides) -> Trainer:
    model = get_peft_model(tiny("llama"), config_cls(**CONFIG))
    return Trainer(model, TrainingArguments(**_arguments(folder, **overrides)), train_dataset=_token_rows())


@pytest.mark.parametrize(
    "saver",
    [
        {},
        {"bf16": True, "gradient_checkpointing": True},
        {"config_cls": AlphaTuningConfig, "bf16": True, "gradient_checkpointing": True},
    ],
    ids=["float32", "bf16-checkpointing", "alphatuning"],
)
def test_trainer_resumes_with_the_same_losses(saver, tmp_path):
    whole = _trainer(tmp_path / "whole", **saver)
    codes = {name: p.clone() for name, p in whole.model.named_parameters() if not p.requires_grad}
    start = _mean_loss(whole.model)
    whole.train()
    losses = _losses(whole)
    assert len(losses) == 6 and _mean_loss(whole.model) < start
    for name, parameter in whole.model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, codes[name]), name
    resumed = _trainer(tmp_path / "resumed", **saver)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert _losses(resumed)[-3:] == pytest.approx(losses[-3:], rel=1e-5)
    for name, parameter in adapter_parameters(whole.model).items():
        torch.testing.assert_close(adapter_parameters(resumed.model)[name].data, parameter.data, rtol=1e-4, atol=1e-6)


def test_trainer_writes_adapters_that_load(tmp_path):
    trainer = _trainer(tmp_path, max_steps=3)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").exists() and not (checkpoint / "model.safetensors").exists()
    trainer.model.eval()
    restored = PeftModel.from_pretrained(tiny("llama"), checkpoint)
    with torch.no_grad():
        assert_same(logits_of(restored, BATCH), logits_of(trainer.model, BATCH), tolerance=1e-5)


def test_trainer_loads_the_best_checkpoint(tmp_path):
    rows = _token_rows()
    model = get_peft_model(tiny("llama"), PeqaConfig(**CONFIG))
    arguments = _arguments(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=3, metric_for_best_model="eval_loss"
    )
    trainer = Trainer(model, TrainingArguments(**arguments), train_dataset=rows, eval_dataset=rows.select(range(4)))
    trainer.train()
    best = PeftModel.from_pretrained(tiny("llama"), trainer.state.best_model_checkpoint)
    with torch.no_grad():
        assert_same(logits_of(trainer.model.eval(), BATCH), logits_of(best, BATCH), tolerance=1e-5)


@pytest.mark.parametrize(
    "config_cls, gradient_checkpointing", [(PeqaConfig, False), (PeqaConfig, True), (AlphaTuningConfig, True)]
)
def test_sft_trainer(config_cls, gradient_checkpointing, tmp_path):
    from trl import SFTConfig, SFTTrainer

    texts = [" ".join(f"w{token}" for token in row) for row in _token_rows()["input_ids"]]
    arguments = _arguments(tmp_path, bf16=True, gradient_checkpointing=gradient_checkpointing, max_length=16)
    trainer = SFTTrainer(
        model=tiny("llama"),
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tiny_tokenizer(),
        peft_config=config_cls(**CONFIG),
    )
    assert isinstance(trainer.model, PeftModel)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainable and all(f".{prefix_of(trainer.model)}" in name for name in trainable)
    start = _mean_loss(trainer.model)
    trainer.train()
    assert _mean_loss(trainer.model) < start
    trainer.save_model(tmp_path / "final")
    restored = PeftModel.from_pretrained(tiny("llama"), tmp_path / "final")
    fresh = adapter_parameters(get_peft_model(tiny("llama"), config_cls(**CONFIG)))
    for name, parameter in adapter_parameters(trainer.model).items():
        found = adapter_parameters(restored)[name].data
        torch.testing.assert_close(found, parameter.data.float(), rtol=1e-4, atol=1e-5)
        assert not torch.equal(found, fresh[name].data)


@pytest.mark.parametrize("processes", [1, 2])
def test_plain_loop_with_accelerate(processes, launch, run_module, tmp_path):
    """Under its launcher in mixed precision; on two processes, DistributedDataParallel takes frozen packed codes beside
    trained scales."""
    script = "tests.scale_tuning.accelerate_loop"
    if processes == 1:
        flags = ("--cpu", "--num_processes", 1, "--mixed_precision", "bf16", "--module")
        launch("accelerate.commands.launch", *flags, script, tmp_path)
    else:
        run_module(script, tmp_path, processes=2, ranks=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["processes"] == processes
    assert report["mean_loss_after"] < report["mean_loss_before"]
    assert report["codes_unchanged"] and report["scales_equal_on_all_processes"]
    restored = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter")
    with torch.no_grad():
        assert logits_of(restored, BATCH).sum().item() == pytest.approx(report["logits_sum"], rel=1e-2)


def _preference_trainer(method: str, model, folder):
    """One of TRL's trainers that make a frozen reference of an adapter, on three rows."""
    prompts = ["5 6", "7", "8 9"]
    common = {"output_dir": str(folder), "max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False}
    common |= {"gradient_checkpointing": False, "logging_steps": 1, "beta": 0.1}
    tokenizer = tiny_tokenizer()
    if method == "dpo":
        rows = Dataset.from_dict({"prompt": prompts, "chosen": ["1 2"] * 3, "rejected": ["3"] * 3})
        return trl.DPOTrainer(model, args=trl.DPOConfig(**common), train_dataset=rows, processing_class=tokenizer)
    if method == "kto":
        rows = Dataset.from_dict({"prompt": prompts, "completion": ["1 2"] * 3, "label": [True, False, True]})
        args = trl.KTOConfig(**common, per_device_train_batch_size=3)
        return trl.KTOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    config, trainer = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}[method]
    args = config(**common, per_device_train_batch_size=2, num_generations=2, max_completion_length=4)
    return trainer(
        model,
        args=args,
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo", "rloo"])
@pytest.mark.parametrize("config_cls", [PeqaConfig, AlphaTuningConfig])
def test_the_reference_of_a_tuned_adapter_is_that_adapter(config_cls, method, tmp_path):
    tuned = get_peft_model(tiny("llama"), config_cls(**CONFIG))
    move_adapter(tuned)
    tuned.save_pretrained(tmp_path / "tuned")
    policy = PeftModel.from_pretrained(tiny("llama"), tmp_path / "tuned", is_trainable=True)
    trainer = _preference_trainer(method, policy, tmp_path / "run")
    model = trainer.model.eval()
    with torch.no_grad():
        by_adapter = {}
        for name in ("ref", "default"):
            model.set_adapter(name)
            by_adapter[name] = logits_of(model, BATCH)
        with model.disable_adapter():
            assert_differs(by_adapter["ref"], logits_of(model, BATCH))
    assert_same(by_adapter["ref"], by_adapter["default"])
    if method == "dpo":
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
