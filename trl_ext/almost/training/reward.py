# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Trains the reward model on comparisons (step 1 of the paper), with TRL's RewardTrainer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, RewardConfig, RewardTrainer

from peft_ext import command_line
from trl_ext.almost.data.preferences import preference_pairs
from trl_ext.almost.models import load_chat_tokenizer, load_classifier
from trl_ext.almost.prompts.chat import as_messages
from trl_ext.almost.rewards import PairScores, RewardModel, answer_text, encode_answer
from trl_ext.almost.training.length_control import (
    MOST_ANSWERS,
    control_head,
    correlations,
    covariates,
    explained,
    score_head,
)
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

    length_control: bool = field(
        default=False,
        metadata={
            "help": "The reward says what length and repetition don't: in training they count beside it, and what is left of "
            "them is taken out of its head."
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
        What `training.json` holds: pairs; accuracy on the held-out ones, and how their scores vary with length and repetition
        among equally good answers; with `length_control`, the same of the pairs trained on, before and after the head lost
        it; TRL's log.

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
    control = _Control(tokenizer, pairs, held_out, training_args.max_length) if script_args.length_control else None
    margins = control.margins if control else (None, None)
    training_args.remove_unused_columns = False  # else `length` is gone before batches are made by it
    trainer = RewardTrainer(
        model=load_classifier(model_args.model_name_or_path, dtype=model_args.dtype or "float32"),
        args=training_args,
        train_dataset=encode_pairs(tokenizer, pairs, training_args.max_length, margins[0]),
        eval_dataset=encode_pairs(tokenizer, held_out, training_args.max_length, margins[1]) if held_out else None,
        processing_class=tokenizer,
        peft_config=adapter_config(model_args, "SEQ_CLS"),
    )
    if control:
        control.check(trainer)
    model = train(trainer, tokenizer, script_args.merge_adapter, control.of(trainer) if control else None)
    result: dict[str, Any] = {"pairs": len(pairs), "held_out_pairs": len(held_out)}
    if held_out:
        scorer = RewardModel(
            model,
            tokenizer,
            max_length=training_args.max_length or 1 << 30,
            batch_size=training_args.per_device_eval_batch_size,
        )
        with trainer.accelerator.autocast():  # in the type that it was trained in
            scores = scorer.score_pairs(held_out)
        result["held_out_accuracy"] = scores.accuracy
        result["held_out_correlation"] = _correlation(tokenizer, held_out, scores)
    if control:
        result["length_control"] = control.found
    return finish(trainer, result, script_args.dataset_name)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[dict[str, Any]],
    max_length: Optional[int],
    margins: Optional[Sequence[float]] = None,
) -> Dataset:
    """Token ids as RewardTrainer takes them, with each pair's `margin` if there is one, and the longer answer's `length`, by
    which `--train_sampling_strategy group_by_length` makes batches; TRL itself would drop a pair that is too long."""
    rows = [
        {
            f"{key}_ids": encode_answer(tokenizer, pair["prompt"], pair[key], max_length)
            for key in ("chosen", "rejected")
        }
        for pair in pairs
    ]
    more: Sequence[dict[str, Any]] = [{}] * len(rows) if margins is None else [{"margin": float(m)} for m in margins]
    return Dataset.from_list([{**row, "length": max(map(len, row.values())), **m} for row, m in zip(rows, more)])


class _Control:
    """Length control of one training: the pairs' margins, then the head."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[dict[str, Any]],
        held_out: Sequence[dict[str, Any]],
        max_length: Optional[int],
    ) -> None:
        self.found: dict[str, Any] = {}
        self._tokenizer, self._max_length = tokenizer, max_length
        (chosen, rejected), held = _sides(tokenizer, pairs), _sides(tokenizer, held_out)
        logits = explained(chosen, rejected, [held[0] - held[1]])
        # TRL takes a margin off the difference of rewards
        self.margins = tuple((-each).tolist() for each in logits)
        self._read = pairs[: MOST_ANSWERS // 2]
        self._varying = np.concatenate([side[: len(self._read)] for side in (chosen, rejected)])

    def check(self, trainer: RewardTrainer) -> None:
        """Refuse before training what the head can't be changed in."""
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "length_control changes the trained head, which FSDP and DeepSpeed have in pieces; leave it out, or launch "
                "without them."
            )
        score_head(trainer.model)

    def of(self, trainer: RewardTrainer) -> Callable[[Any], None]:
        """What changes the trained model's head, and keeps what that did."""

        def change(model: Any) -> None:
            rows = [
                encode_answer(self._tokenizer, pair["prompt"], pair[key], self._max_length)
                for key in ("chosen", "rejected")
                for pair in self._read
            ]
            size = 2 * trainer.args.per_device_train_batch_size
            with trainer.accelerator.autocast():
                self.found = control_head(model, rows, self._varying, self._tokenizer.pad_token_id, size)

        return change


def _sides(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Covariates `[pairs, k]` of the chosen answers, and of the rejected ones."""
    chosen, rejected = (
        covariates(tokenizer, [answer_text(pair[key]) for pair in pairs]) for key in ("chosen", "rejected")
    )
    return chosen, rejected


def _correlation(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[dict[str, Any]], scores: PairScores
) -> dict[str, float]:
    """Of scores with length and repetition, among chosen and among rejected answers."""
    centred = [part - part.mean(axis=0) for part in _sides(tokenizer, pairs)]
    values = [np.array(part) - np.mean(part) for part in scores]
    return correlations(np.concatenate(values), np.concatenate(centred))


def half_of(prompt: Any) -> int:
    """1 or 2: which half of the queries a prompt belongs to; the same wherever and in whatever order it is read."""
    text = "\n".join(message["content"] for message in as_messages(prompt))
    return 1 + hashlib.sha256(text.encode("utf-8")).digest()[0] % 2
