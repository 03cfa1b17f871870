# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Trains the reward model on comparisons (step 1 of the paper), with TRL's RewardTrainer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, RewardConfig, RewardTrainer

from peft_ext import command_line
from trl_ext.almost.data.preferences import preference_pairs
from trl_ext.almost.models import load_chat_tokenizer, load_classifier
from trl_ext.almost.prompts.chat import as_messages
from trl_ext.almost.rewards import RewardModel, encode_answer
from trl_ext.almost.training.stage import (
    TRAINING_FLAGS,
    AlmostModelConfig,
    StageArguments,
    StageDefaults,
    adapter_config,
    finish,
    start,
    train,
)


PROGRAM = "almost_reward"


@dataclass
class RewardArguments(StageArguments):
    """What the reward model learns from."""

    half: int = field(
        default=0,
        metadata={
            "help": "0: all comparisons. 1 or 2: those of one half of the queries, for two reward models that share no "
            "query."
        },
    )

    def __post_init__(self):
        if self.half not in (0, 1, 2):
            raise ValueError(f"half={self.half} must be 0 (all), 1 or 2.")


@dataclass
class AlmostRewardConfig(StageDefaults, RewardConfig):
    """TRL's RewardConfig with the paper's settings (128 pairs a step there)."""

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the comparisons."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps (or the share of steps) of warm-up."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    max_length: Optional[int] = field(
        default=1024, metadata={"help": "Most tokens of a query with its answer; the beginning is cut off."}
    )


def parse(argv: Sequence[str]) -> tuple[Any, ...]:
    """What [`run`] takes, from flags and the YAML of `--config`."""
    return command_line.parse(argv, RewardArguments, AlmostRewardConfig, AlmostModelConfig, aliases=TRAINING_FLAGS)


def run(script_args: RewardArguments, training_args: RewardConfig, model_args: ModelConfig) -> dict[str, Any]:
    """Train a reward model in `training_args.output_dir`, going on from its last checkpoint.

    Args:
        script_args: Where the comparisons are, in any of TRL's preference formats, see [`preference_pairs`].
        training_args: TRL's arguments.
        model_args: The language model to start from, and the adapter if any.

    Returns:
        What `training.json` holds: pairs, accuracy on the held-out ones, TRL's log.

    Raises:
        ValueError, OSError: If an argument or a file doesn't fit, or the folder holds another training.
    """
    done = start(training_args, script_args, model_args)
    if done is not None:
        return done
    rows = preference_pairs(script_args.rows())
    pairs = [pair for pair in rows if script_args.half in (0, half_of(pair["prompt"]))]
    if not pairs:
        raise ValueError(f"dataset_name={script_args.dataset_name!r} has no comparisons in half {script_args.half}.")
    held_out = preference_pairs(script_args.held_out_rows())
    tokenizer = load_chat_tokenizer(model_args.model_name_or_path)
    set_seed(training_args.seed)  # of the new head
    trainer = RewardTrainer(
        model=load_classifier(model_args.model_name_or_path, dtype=model_args.dtype or "float32"),
        args=training_args,
        train_dataset=encode_pairs(tokenizer, pairs, training_args.max_length),
        eval_dataset=encode_pairs(tokenizer, held_out, training_args.max_length) if held_out else None,
        processing_class=tokenizer,
        peft_config=adapter_config(model_args, "SEQ_CLS"),
    )
    model = train(trainer, tokenizer, script_args.merge_adapter)
    result: dict[str, Any] = {"pairs": len(pairs), "held_out_pairs": len(held_out)}
    if held_out:
        scorer = RewardModel(
            model,
            tokenizer,
            max_length=training_args.max_length or 1 << 30,
            batch_size=training_args.per_device_eval_batch_size,
        )
        result["held_out_accuracy"] = scorer.score_pairs(held_out).accuracy
    return finish(trainer, result, script_args.dataset_name)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[dict[str, Any]], max_length: Optional[int]
) -> Dataset:
    """Token ids as RewardTrainer takes them, and the longer answer's `length`, by which
    `--train_sampling_strategy group_by_length` makes batches; TRL itself would drop a pair that is too long."""
    rows = [
        {
            f"{key}_ids": encode_answer(tokenizer, pair["prompt"], pair[key], max_length)
            for key in ("chosen", "rejected")
        }
        for pair in pairs
    ]
    return Dataset.from_list([{**row, "length": max(map(len, row.values()))} for row in rows])


def half_of(prompt: Any) -> int:
    """1 or 2: which half of the queries a prompt belongs to; the same wherever and in whatever order it is read."""
    text = "\n".join(message["content"] for message in as_messages(prompt))
    return 1 + hashlib.sha256(text.encode("utf-8")).digest()[0] % 2
