# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""TRL's SFTTrainer on examples that are tokens already, and whether its loss is the model's own."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from peft_ext.distillation.trainer import DistillationMixin
from peft_ext.examples import IGNORED, Example, Examples
from peft_ext.language_model import check_tokens, device_of, inference
from peft_ext.peqa import PeqaConfig
from peft_ext.peqa.layer import PeqaLinear
from peft_ext.perplexity import padded
from peft_ext.quant.kernel import KERNEL_VARIABLE, using
from peft_ext.token_mean import TokenMeanLoss


logger = logging.getLogger(__name__)


@dataclass
class TuneTrainingArguments(SFTConfig):
    """TRL's SFTConfig with defaults for scales: a high learning rate, no weight decay."""

    output_dir: Optional[str] = field(default=None, metadata={"help": "The run folder to write."})
    learning_rate: Optional[float] = field(
        default=None,
        metadata={"help": "Peak learning rate; 1e-2 for the relative scales of peqa and alphatuning, 2e-4 for lora."},
    )
    router_aux_loss_coef: Optional[float] = field(
        default=0.0,
        metadata={"help": "Weight of the loss that balances experts; 0 by default, since routers aren't trained."},
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
    model: nn.Module,
    args: TuneTrainingArguments,
    data: Examples,
    tokenizer: PreTrainedTokenizerBase,
    distillation: Optional[dict[str, Any]] = None,
) -> SFTTrainer:
    """An SFTTrainer on examples, whose loss has been compared with the model's own.

    Args:
        model: With its adapter.
        args: Of the run; what only concerns the making of examples is taken out of it.
        data: The training examples; see [`check_packing`].
        tokenizer: The model's.
        distillation: Arguments of [`DistillationMixin`], whose loss is the model's own; None: nothing is distilled.

    Returns:
        The trainer; of a model whose loss TRL's fused output layer doesn't get right, one that takes the model's own, with a
        warning.
    """
    check_tokens(model, (example.input_ids for example in data.examples), tokenizer, "example")
    # what was done to the examples already, and must not be asked of them again
    args.assistant_only_loss = args.completion_only_loss = False
    args.chat_template_path = None
    args.packing = bool(args.packing)
    if not args.packing:
        args.max_length = None
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # masked, so any token does
    columns = {name: [getattr(example, name) for example in data.examples] for name in Example._fields}
    train_dataset = Dataset.from_dict(columns)
    if distillation is not None:
        return _DistilledTrainer(
            model=model, args=args, train_dataset=train_dataset, processing_class=tokenizer, **distillation
        )
    trainer = SFTTrainer(model=model, args=args, train_dataset=train_dataset, processing_class=tokenizer)
    why = _wrong_loss(trainer, data.examples)
    if why is None:
        return trainer
    logger.warning("%s, so it is trained on its own.", why)
    return _OwnLossTrainer(model=model, args=args, train_dataset=train_dataset, processing_class=tokenizer)


class _DistilledTrainer(DistillationMixin, SFTTrainer):
    """SFTTrainer towards a teacher."""


class _ModelsLossTrainer(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


class _OwnLossTrainer(TokenMeanLoss, _ModelsLossTrainer):
    """For models whose logits TRL's fused output layer doesn't know how to make."""


def _wrong_loss(trainer: SFTTrainer, examples: list[Example]) -> Optional[str]:
    """Whether TRL's loss of two short examples is another than that of the model's logits; None if it isn't."""
    if trainer.args.loss_type != "nll" or trainer.args.label_smoothing_factor:
        return None  # other losses on purpose
    chosen = _two(examples)
    name = type(getattr(trainer.model, "get_base_model", lambda: trainer.model)()).__name__
    with inference(trainer.model), using(**_EXACT):
        expected = -torch.cat([_log_probs(trainer.model, example) for example in chosen]).mean().item()
        batch = {key: value.to(device_of(trainer.model)) for key, value in padded(chosen).items()}
        try:
            found = trainer.compute_loss(trainer.model, batch).item()
        except Exception as error:  # whatever it is, it would end the training
            return f"SFTTrainer's fused loss fails on a {name} ({type(error).__name__}: {error})"
    if abs(found - expected) <= _tolerance(trainer.model, 1e-3, 1e-2) * max(1.0, expected):
        return None
    return f"SFTTrainer's fused loss of a {name} is {found:.4f}, the model's own {expected:.4f}"


def check_packing(model: nn.Module, args: TuneTrainingArguments, data: Examples) -> None:
    """Refuse packing where packed examples see each other: the log-probabilities of two in one row must be those of each alone.

    Args:
        model: Before any long work.
        args: Whether, and how, examples are packed.
        data: The training examples.

    Raises:
        ValueError: If they do.
    """
    if not args.packing or args.packing_strategy == "wrapped":
        return
    chosen = _two(data.examples)
    row: dict[str, Any] = {
        name: [token for each in chosen for token in getattr(each, name)] for name in Example._fields
    }
    row["seq_lengths"] = [len(example.input_ids) for example in chosen]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row])
    labels = batch.pop("labels")
    with inference(model), using(**_EXACT):
        alone = torch.cat([_log_probs(model, example) for example in chosen])
        device = device_of(model)
        inputs = {key: part.to(device) if isinstance(part, torch.Tensor) else part for key, part in batch.items()}
        together = _chosen_log_probs(model(**inputs, use_cache=False).logits, labels)
    difference = (alone - together).abs().max().item()
    if difference > _tolerance(model, 1e-3, 0.25):
        raise ValueError(
            f"packing=True: in a {type(model).__name__}, examples of one row see each other (a token's log-probability is "
            f"off by {difference:.3f}); leave --packing out, or pass --packing_strategy wrapped, where they are meant to."
        )


def keep_product_where_needed(model: PeftModel, data: Examples) -> None:
    """Let PEQA keep its product where the model changes a layer's output in place, as Falcon's does: found by a backward.

    Args:
        model: With its adapter, before training.
        data: The training examples.
    """
    config = model.active_peft_config
    if not isinstance(config, PeqaConfig) or config.keep_product:
        return
    tokens = torch.tensor([_short(data.examples[0]).input_ids], device=device_of(model))
    try:
        with torch.enable_grad():
            model(input_ids=tokens, use_cache=False).logits.float().mean().backward()
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        config.keep_product = True
        for module in model.modules():
            if isinstance(module, PeqaLinear):
                module.keep_product = True
        logger.warning("The model changes outputs of layers in place, so PEQA keeps its product (keep_product=True).")
    model.zero_grad()


# The kernel's rounding depends on how many rows it is given.
_EXACT = {KERNEL_VARIABLE: "torch"}


def _tolerance(model: nn.Module, float32: float, half: float) -> float:
    narrow = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters())
    return half if narrow else float32


def _two(examples: list[Example]) -> list[Example]:
    """The first two examples, short."""
    chosen = [_short(example) for example in examples[:2]]
    return [example for example in chosen if example.trained] or [examples[0]]


def _short(example: Example) -> Example:
    """The end of an example's first part that is trained: some 64 tokens."""
    first = next((index for index, label in enumerate(example.labels) if index and label != IGNORED), 1)
    part = slice(max(0, first - 32), first + 32)
    return Example(example.input_ids[part], example.labels[part])


def _log_probs(model: nn.Module, example: Example) -> torch.Tensor:
    """Of the trained tokens of an example, alone."""
    inputs = padded([example])
    return _chosen_log_probs(
        model(input_ids=inputs["input_ids"].to(device_of(model)), use_cache=False).logits, inputs["labels"]
    )


def _chosen_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits, labels = logits[0, :-1], labels[0, 1:].to(logits.device)
    kept = labels != IGNORED
    return logits[kept].float().log_softmax(-1).gather(1, labels[kept, None])[:, 0].cpu()
