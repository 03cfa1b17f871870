# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The baseline that changes the language model: RLOO on the task's reward with LoRA, by TRL."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import RLOOConfig, RLOOTrainer

from benchmarks.core.run import Run
from benchmarks.critic_tasks import Task


GENERATIONS = 4
PROMPTS_PER_STEP = 16


def tuned_by_rloo(run: Run, task: Task, fresh: Callable[[], Any], tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """A model of its own with a LoRA, tuned once and kept in the run's work folder.

    Args:
        run: The run.
        task: The task.
        fresh: Loads the model anew; the LoRA itself is float32.
        tokenizer: The model's.
    """
    folder = run.work / "rloo"
    if not (folder / "adapter_config.json").is_file():
        trainer = _trainer(run, task, fresh(), tokenizer, folder)
        trainer.train()
        trainer.save_model(str(folder))
    return PeftModel.from_pretrained(fresh(), folder).eval()


def _trainer(run: Run, task: Task, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> RLOOTrainer:
    rng = random.Random(run.seed)
    per_step = min(PROMPTS_PER_STEP, run.batch_size // GENERATIONS)
    prompts, codes = [], []
    for step in range(run.rloo_steps * per_step):
        code = task.codes[step % len(task.codes)]
        prompt = rng.choice(task.train_prompts)
        prompts.append(prompt if code is None else f"{code}: {prompt}")
        codes.append(code or "")

    def reward(prompts: Sequence[str], completions: Sequence[str], code: Sequence[str], **columns: Any) -> list[float]:
        plain = [prompt.removeprefix(f"{name}: ") for prompt, name in zip(prompts, code)]
        found = task.reward([prompt + text for prompt, text in zip(plain, completions)], list(code))
        return [float(value) for value in found]

    arguments = RLOOConfig(
        output_dir=str(folder) + "-training",
        per_device_train_batch_size=per_step * GENERATIONS,
        num_generations=GENERATIONS,
        max_steps=run.rloo_steps,
        max_completion_length=task.new_tokens,
        learning_rate=5e-4,
        beta=0.02,
        seed=run.seed,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
    )
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return RLOOTrainer(
        model,
        reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts, "code": codes}),
        processing_class=tokenizer,
        peft_config=lora,
    )
