# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Fine-tunes a model on the demonstrations of self-play (step 2 of the paper), with TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, SFTTrainer

from peft_ext import command_line
from peft_ext.data import Record
from peft_ext.examples import Encoder, shape_of
from trl_ext.almost.models import load_chat_tokenizer, load_policy
from trl_ext.almost.prompts.chat import with_chat_template
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


PROGRAM = "almost_sft"


@dataclass
class AlmostSFTConfig(StageDefaults, SFTConfig):
    """TRL's SFTConfig with the paper's settings (64 demonstrations a step there)."""

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the demonstrations."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps (or the share of steps) of warm-up."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    max_length: Optional[int] = field(
        default=512, metadata={"help": "Most tokens of a demonstration; the end is cut off."}
    )


def parse(argv: Sequence[str]) -> tuple[Any, ...]:
    """What [`run`] takes, from flags and the YAML of `--config`."""
    return command_line.parse(argv, StageArguments, AlmostSFTConfig, AlmostModelConfig, aliases=TRAINING_FLAGS)


def run(script_args: StageArguments, training_args: SFTConfig, model_args: ModelConfig) -> dict[str, Any]:
    """Fine-tune a language model in `training_args.output_dir`, going on from its last checkpoint.

    The loss is on what the assistant says, at every turn, and on the tokens that end its turns (of a prompt and completion,
    on the completion).

    Args:
        script_args: Where the demonstrations are, in TRL's formats: `messages`, `prompt` and `completion`, or `text`.
        training_args: TRL's arguments.
        model_args: The language model to start from, and the adapter if any.

    Returns:
        What `training.json` holds: demonstrations and TRL's log.

    Raises:
        ValueError, OSError: If an argument or a file doesn't fit, or the folder holds another training.
    """
    done = start(training_args, script_args, model_args)
    if done is not None:
        return done
    rows, held_out = script_args.rows(), script_args.held_out_rows()
    tokenizer = load_chat_tokenizer(model_args.model_name_or_path)
    trainer = SFTTrainer(
        model=load_policy(model_args.model_name_or_path, dtype=model_args.dtype or "float32"),
        args=training_args,
        train_dataset=encode_demonstrations(tokenizer, rows),
        eval_dataset=encode_demonstrations(tokenizer, held_out) if held_out else None,
        processing_class=tokenizer,
        peft_config=adapter_config(model_args, "CAUSAL_LM"),
    )
    train(trainer, tokenizer, script_args.merge_adapter)
    return finish(trainer, {"demonstrations": len(rows)}, script_args.dataset_name)


def encode_demonstrations(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]]) -> Dataset:
    """Token ids and labels of rows in any of TRL's SFT formats, as SFTTrainer takes them.

    Raises:
        ValueError: If a row has none of their columns, or others than the first row; names it.
    """
    records = [Record(row, f"demonstration {number}") for number, row in enumerate(rows)]
    encode = Encoder(with_chat_template(tokenizer))
    examples = encode(records, shape_of(records[0], encode.columns), "demonstrations").examples
    return Dataset.from_list([example._asdict() for example in examples])
