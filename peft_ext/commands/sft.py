# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""TRL's SFTTrainer on examples that are tokens already, and whether its loss is the model's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from peft_ext.examples import IGNORED, Example, Examples
from peft_ext.language_model import device_of, inference
from peft_ext.perplexity import padded


@dataclass
class TuneTrainingArguments(SFTConfig):
    """TRL's SFTConfig with defaults for scales: a high learning rate, no weight decay."""

    output_dir: Optional[str] = field(default=None, metadata={"help": "The run folder to write."})
    learning_rate: Optional[float] = field(
        default=None,
        metadata={"help": "Peak learning rate; 1e-2 for the relative scales of peqa and alphatuning, 2e-4 for lora."},
    )
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Blocks or examples per step and device."})
    max_steps: int = field(default=100, metadata={"help": "Training steps; -1: num_train_epochs of the data."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps (or the share of steps) of warm-up."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay: towards the untuned scales."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two losses in the log."})
    save_steps: float = field(default=20, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: Optional[int] = field(default=1, metadata={"help": "Checkpoints to keep."})
    report_to: str = field(default="none", metadata={"help": "Where to report to; none by default."})
    gradient_checkpointing: Optional[bool] = field(default=None, metadata={"help": "Less memory for more time."})
    bf16: Optional[bool] = field(default=False, metadata={"help": "Train in mixed precision (bfloat16)."})
    packing: Optional[bool] = field(
        default=None,
        metadata={
            "help": "True: several examples in a row of max_length, as TRL's packing_strategy says. By default texts are "
            "joined and cut into blocks, and other examples stand alone; False: texts, too."
        },
    )
    assistant_only_loss: Optional[bool] = field(
        default=None,
        metadata={"help": "Of messages: the loss on the assistant's turns alone (the default), or on everything."},
    )

    def __post_init__(self):
        if not self.output_dir:  # transformers would choose a folder by itself
            raise ValueError("output_dir is missing: pass --output_dir, the folder to write the run to.")
        if self.per_device_train_batch_size < 1:
            raise ValueError(f"per_device_train_batch_size={self.per_device_train_batch_size} must be at least 1.")
        if getattr(self.eval_strategy, "value", self.eval_strategy) != "no":
            raise ValueError(
                f"eval_strategy={self.eval_strategy!r}: tune measures held-out perplexity before and after; leave it out."
            )
        if self.padding_free and not self.packing:
            raise ValueError("padding_free=True is for --packing True, which is padding-free by itself; leave it out.")
        if self.packing and self.max_length is None:
            raise ValueError("packing=True fills rows of max_length tokens; pass --max_length.")
        super().__post_init__()


def sft_trainer(
    model: nn.Module, args: TuneTrainingArguments, data: Examples, tokenizer: PreTrainedTokenizerBase
) -> SFTTrainer:
    """An SFTTrainer on examples, whose loss has been compared with the model's own.

    Args:
        model: With its adapter.
        args: Of the run; what only concerns the making of examples is taken out of it.
        data: The training examples.
        tokenizer: The model's.

    Raises:
        ValueError: If packed examples see each other in this model, or its loss isn't what TRL computes.
    """
    # what was done to the examples already, and must not be asked of them again
    args.assistant_only_loss = args.completion_only_loss = False
    args.chat_template_path = None
    args.packing = bool(args.packing)
    if not args.packing:
        args.max_length = None
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # masked, so any token does
    columns = {name: [getattr(example, name) for example in data.examples] for name in Example._fields}
    trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer)
    _check_loss(trainer, data.examples)
    return trainer


def _check_loss(trainer: SFTTrainer, examples: list[Example]) -> None:
    """Compare the trainer's loss of two short examples, in one batch or packed, with the model's logits for each alone."""
    chosen = [_short(example) for example in examples[:2]]
    chosen = [example for example in chosen if example.trained] or [examples[0]]
    packed = trainer.args.packing and trainer.args.packing_strategy != "wrapped"
    features: list[dict[str, Any]] = [example._asdict() for example in chosen]
    if packed:
        lengths = [len(example.input_ids) for example in chosen]
        row = {name: [token for feature in features for token in feature[name]] for name in Example._fields}
        features = [{**row, "seq_lengths": lengths}]
    device = device_of(trainer.model)
    with inference(trainer.model):
        batch = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in trainer.data_collator(features).items()
        }
        found = trainer.compute_loss(trainer.model, batch).item()
        total = sum(_loss_alone(trainer.model, example, device) for example in chosen)
    expected = total / sum(example.trained for example in chosen)
    # rounding makes a hundred-thousandth in float32; a text in front of another, a hundredth and more
    if trainer.args.loss_type == "nll" and abs(found - expected) > 0.005 * max(1.0, expected):
        name = type(trainer.model.get_base_model()).__name__
        if packed:
            raise ValueError(
                f"packing=True: in a {name}, examples of one row see each other (loss {found:.3f} packed, {expected:.3f} "
                "alone); leave --packing out, or pass --packing_strategy wrapped, where they are meant to."
            )
        raise ValueError(f"SFTTrainer's loss of a {name} is {found:.3f}, the model's own {expected:.3f}.")


def _short(example: Example) -> Example:
    """The end of an example's first part that is trained: some 64 tokens."""
    first = next((index for index, label in enumerate(example.labels) if index and label != IGNORED), 1)
    part = slice(max(0, first - 32), first + 32)
    return Example(example.input_ids[part], example.labels[part])


def _loss_alone(model: nn.Module, example: Example, device: torch.device) -> float:
    inputs = padded([example])
    labels = inputs["labels"][0, 1:].to(device)
    logits = model(input_ids=inputs["input_ids"].to(device), use_cache=False).logits[0, :-1]
    kept = labels != IGNORED
    return nn.functional.cross_entropy(logits[kept].float(), labels[kept], reduction="sum").item()
