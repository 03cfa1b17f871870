# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""One optimisation step on the same 8 examples, by any number of processes and accumulated batches; writes the loss and the
weights after it. Run by `test_losses.py`."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from generation_ext.granularity.modeling import CDNPGConfig, CDNPGForConditionalGeneration
from generation_ext.granularity.training import PairsTrainer
from peft_ext import PeqaConfig
from peft_ext.distillation import DistillationTrainer
from peft_ext.ood.classifier import PooledClassifier
from peft_ext.ood.study.training import TrainingOptions
from peft_ext.ood.study.training import _Trainer as OodTrainer
from tests.tiny.models import VOCAB, tiny


EXAMPLES, LENGTH = 8, 6
SMALL = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
    "d_model": 16,
    **{
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in {"layers": 1, "attention_heads": 2, "ffn_dim": 16}.items()
    },
    **{f"{name}dropout": 0.0 for name in ("", "attention_", "activation_")},
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def _rows() -> torch.Tensor:
    return torch.randint(4, VOCAB, (EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))


def _texts() -> Dataset:
    """Of labels of 1 to 6 tokens, so that a mean of batches' means isn't the mean over tokens."""
    ids = _rows()
    labels = ids.clone()
    for row in range(EXAMPLES):
        labels[row, 1 + row % LENGTH :] = -100
        labels[row, 0] = -100 if row % 2 else labels[row, 0]
        labels[row, 1] = ids[row, 1]
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}).with_format("torch")


def _classified() -> Dataset:
    classes = [row % 3 for row in range(EXAMPLES)]
    return Dataset.from_dict({"input_ids": _rows().tolist(), "labels": classes}).with_format("torch")


def _classifier() -> PooledClassifier:
    backbone = tiny("bert").base_model
    config = backbone.config
    config.pooling, config.num_labels = "mean", 3
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    return PooledClassifier(config, backbone)


def _ood_trainer(**given: Any) -> Trainer:
    trainer = OodTrainer(**given)
    trainer.options, trainer.head_learning_rate, trainer.recorded = TrainingOptions(), 0.1, {}
    trainer.create_optimizer = lambda *args, **kwargs: Trainer.create_optimizer(trainer)
    return trainer


KINDS = {
    "C-DNPG, transformers' trainer": lambda: (
        Seq2SeqTrainer,
        CDNPGForConditionalGeneration(CDNPGConfig(**SMALL)),
        _texts(),
    ),
    "C-DNPG": lambda: (PairsTrainer, CDNPGForConditionalGeneration(CDNPGConfig(**SMALL)), _texts()),
    "BART": lambda: (
        PairsTrainer,
        transformers.BartForConditionalGeneration(transformers.BartConfig(**SMALL)),
        _texts(),
    ),
    "classifier, transformers' trainer": lambda: (Trainer, _classifier(), _classified()),
    "classifier": lambda: (_ood_trainer, _classifier(), _classified()),
    "distillation": lambda: (
        lambda **given: DistillationTrainer(teacher_model=tiny("llama"), distill=0.5, **given),
        get_peft_model(tiny("llama"), PeqaConfig(bits=2, task_type="CAUSAL_LM")),
        _texts(),
    ),
}


class _Losses(TrainerCallback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.found += [logs["loss"]] if "loss" in (logs or {}) else []


def step(kind: str, accumulated: int, folder: Path) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    make, model, data = KINDS[kind]()
    losses = _Losses()
    args = Seq2SeqTrainingArguments(
        str(folder / "run"),
        max_steps=1,
        per_device_train_batch_size=EXAMPLES // world // accumulated,
        gradient_accumulation_steps=accumulated,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        ddp_find_unused_parameters=False,
    )
    trainer = make(model=model, args=args, train_dataset=data, callbacks=[losses])
    trainer.train()
    if trainer.is_world_process_zero():
        tensors = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        tensors["logged loss"] = torch.tensor(losses.found)
        save_file(tensors, folder / f"{kind}-{world}x{accumulated}.safetensors")
    trainer.accelerator.free_memory(trainer.model_wrapped)
    trainer.accelerator.wait_for_everyone()


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    gc.freeze()  # Trainer's every gc.collect() would walk all that has been imported
    for kind in KINDS:
        for accumulated in (1, 2):
            step(kind, accumulated, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
