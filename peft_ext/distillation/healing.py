# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A packed model's scales, trained towards its float model and folded in: the same packed model, nearer to what it was."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from peft_ext import trainer_checkpoints
from peft_ext.distillation.trainer import DistillationTrainer
from peft_ext.examples import Example
from peft_ext.perplexity import padded
from peft_ext.quant.conversion import packed_layers
from peft_ext.scale_tuning.config import BASE, ScaleTuningConfig


def healed(
    model: PreTrainedModel,
    config_class: type[ScaleTuningConfig],
    examples: Sequence[Example],
    folder: Union[str, Path],
    *,
    tokenizer: Optional[PreTrainedTokenizerBase],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: Optional[str],
    distillation: dict[str, Any],
) -> tuple[Any, float]:
    """Train all scales of a packed model and fold them in.

    Args:
        model: With packed layers.
        config_class: Of the tuner that suits them.
        examples: To train on, in turn.
        folder: Of the checkpoints, from which a broken-off training goes on.
        tokenizer: The model's.
        steps, batch_size, learning_rate, seed: Of the training.
        device: `cpu` (the default), or a GPU.
        distillation: Arguments of [`DistillationMixin`][peft_ext.distillation.DistillationMixin].

    Returns:
        The model, still packed, and the seconds that this took.
    """
    start = time.perf_counter()
    set_seed(seed)
    options: dict[str, Any] = {"bits": BASE, "target_modules": list(packed_layers(model)), "task_type": "CAUSAL_LM"}
    if hasattr(config_class, "trained_alphas"):
        options["trained_alphas"] = "all"
    else:
        options["sym"] = None
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.0,
        logging_steps=max(1, steps // 10),
        save_steps=20,
        save_total_limit=1,
        report_to="none",
        seed=seed,
        use_cpu=device is None or torch.device(device).type == "cpu",
    )
    if device is not None and args.n_gpu > 1:
        args._n_gpu = 1  # one was named
    columns = {name: [getattr(example, name) for example in examples] for name in Example._fields}
    trainer = DistillationTrainer(
        model=get_peft_model(model, config_class(**options)),
        args=args,
        train_dataset=Dataset.from_dict(columns),
        data_collator=lambda rows: padded([Example(row["input_ids"], row["labels"]) for row in rows]),
        processing_class=tokenizer,
        **distillation,
    )
    trainer_checkpoints.train(trainer)
    tuned = trainer.accelerator.unwrap_model(trainer.model)
    return tuned.merge_and_unload().eval(), time.perf_counter() - start
