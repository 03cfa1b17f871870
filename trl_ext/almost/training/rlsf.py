# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Reinforcement learning from synthetic feedback (step 3 of the paper), with TRL's RLOO or GRPO trainer.

The paper uses PPO; this TRL has no PPO trainer. RLOO is REINFORCE with the other answers to the same prompt as the
baseline and the KL penalty in the reward, so it needs no value model.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import yaml
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, RLOOConfig, RLOOTrainer

from peft_ext import command_line
from trl_ext.almost.config import check_repetition_weight
from trl_ext.almost.models import load_chat_tokenizer, load_policy, save_plain
from trl_ext.almost.prompts.chat import as_messages
from trl_ext.almost.repetition import RepetitionPenalty
from trl_ext.almost.rewards import RewardModel
from trl_ext.almost.training.rlsf_generation import MergedGRPOTrainer, MergedRLOOTrainer, check_merged_generation
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


PROGRAM = "almost_rlsf"
REFERENCE = "start"  # the policy that a whole policy's KL is measured from, while it trains
# What is reported of TRL's log, and under which name.
_REPORTED = {
    "reward": "reward",
    "rewards/repetition_penalty/mean": "repetition_penalty",
    "kl": "kl",
    "completions/mean_length": "length",
}
_SHARE = 0.1  # of the log, at each end, is averaged


@dataclass
class RLSFArguments(StageArguments):
    """Whose score is raised, and how."""

    trainer: str = field(default="rloo", metadata={"help": "rloo or grpo; see TRL's RLOOConfig and GRPOConfig."})
    reward_model: Optional[str] = field(
        default=None, metadata={"help": "The reward model: a folder or a hub id; its tokenizer may be another one."}
    )
    reward_max_length: int = field(
        default=1024, metadata={"help": "Most tokens of a text that the reward model sees; the beginning is cut off."}
    )
    reward_batch_size: int = field(default=16, metadata={"help": "Texts per forward pass of the reward model."})
    reward_dtype: str = field(default="float32", metadata={"help": "Float type of the reward model."})
    repetition_weight: float = field(
        default=0.0,
        metadata={"help": "This times the share of repeated word 3-grams is taken off a reward."},
    )
    merged_generation: bool = field(
        default=False,
        metadata={
            "help": "Write answers by a merged copy of the policy: several times sooner than TRL's generation without vLLM, for "
            "the memory of one more model."
        },
    )

    def __post_init__(self):
        check_repetition_weight(self.repetition_weight)


@dataclass
class _PolicyDefaults(StageDefaults):
    """Four answers to a prompt, a penalty on the KL divergence from the SFT policy, no dropout."""

    num_generations: Optional[int] = field(default=4, metadata={"help": "Answers to each prompt."})
    beta: float = field(default=0.05, metadata={"help": "Weight of the KL divergence from the SFT policy."})
    max_completion_length: Optional[int] = field(default=256, metadata={"help": "Most tokens of an answer."})
    disable_dropout: bool = field(default=True, metadata={"help": "Leave dropout out, as the KL estimate needs it."})


@dataclass
class AlmostRLOOConfig(_PolicyDefaults, RLOOConfig):
    """TRL's RLOOConfig with our defaults."""


@dataclass
class AlmostGRPOConfig(_PolicyDefaults, GRPOConfig):
    """TRL's GRPOConfig with our defaults."""


# `--trainer` -> the arguments that go with it.
RLSF_CONFIGS: dict[str, type] = {"rloo": AlmostRLOOConfig, "grpo": AlmostGRPOConfig}


def parse(argv: Sequence[str]) -> tuple[Any, ...]:
    """What [`run`] takes, from flags and the YAML of `--config`."""
    return command_line.parse(
        argv, RLSFArguments, RLSF_CONFIGS[trainer_of(argv)], AlmostModelConfig, aliases=TRAINING_FLAGS
    )


def trainer_of(argv: Sequence[str]) -> str:
    """Which trainer the flags or the YAML ask for; it decides which further flags there are.

    Raises:
        ValueError: If there is no such trainer.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--trainer")
    parser.add_argument("--config")
    flags, _ = parser.parse_known_args(list(argv))
    name = flags.trainer
    if name is None and flags.config is not None:
        name = (yaml.safe_load(Path(flags.config).read_text(encoding="utf-8")) or {}).get("trainer")
    name = RLSFArguments.trainer if name is None else name
    if name not in RLSF_CONFIGS:
        raise ValueError(f"trainer={name!r} is unknown; choose one of {tuple(RLSF_CONFIGS)}.")
    return name


def run(
    script_args: RLSFArguments, training_args: Union[RLOOConfig, GRPOConfig], model_args: ModelConfig
) -> dict[str, Any]:
    """Raise a policy's reward on new queries, in `training_args.output_dir`, going on from its last checkpoint.

    The reference of the KL term is the policy that training starts from: an SFT adapter is merged first, so that the
    model with its new LoRA disabled is the SFT policy (with PEQA: the SFT policy as it was quantised); a policy that is
    trained whole gets a frozen copy.

    Args:
        script_args: Where the queries are (`query`, or `prompt` as a string or messages), and the reward model.
        training_args: TRL's arguments; their class chooses the trainer.
        model_args: The SFT policy, and the adapter if any.

    Returns:
        What `training.json` holds: prompts; reward (less the penalty of repetitions, if it counts), that penalty before its
        weight, KL per token and length in tokens at the start and at the end; TRL's log.

    Raises:
        ValueError, OSError: If an argument or a file doesn't fit, or the folder holds another training.
        ValueError: If a reward is NaN; names the row.
    """
    if not script_args.reward_model:
        raise ValueError("reward_model is missing: pass --reward_model, a folder or a hub id.")
    if script_args.merged_generation:
        check_merged_generation(training_args)
    if script_args.repetition_weight and training_args.reward_weights is not None:
        raise ValueError(
            f"reward_weights={training_args.reward_weights} and repetition_weight={script_args.repetition_weight} say the same "
            "thing twice: the reward model weighs 1 and the penalty repetition_weight; leave reward_weights out."
        )
    done = start(training_args, script_args, model_args)
    if done is not None:
        return done
    rows = script_args.rows()
    if script_args.repetition_weight:
        training_args.reward_weights = [1.0, script_args.repetition_weight]
    trainer = _trainer(script_args, training_args, model_args, prompts_of(rows))
    train(trainer, trainer.processing_class, script_args.merge_adapter)
    if trainer.is_world_process_zero():
        shutil.rmtree(Path(str(training_args.output_dir)) / REFERENCE, ignore_errors=True)
    result = {"prompts": len(rows), **summary(trainer.state.log_history)}
    return finish(trainer, result, script_args.dataset_name)


def prompts_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with a `prompt` of messages.

    Raises:
        ValueError: If a row has neither a query nor a prompt; names it.
    """
    prompts = []
    for number, row in enumerate(rows):
        prompt = row.get("prompt", row.get("query"))
        if not prompt:
            raise ValueError(f"row {number} has neither 'query' nor 'prompt', only {list(row)}.")
        prompts.append({"prompt": as_messages(prompt)})
    return prompts


def summary(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Reward, penalty of repetitions, KL and length at the start and at the end of a log: the means over its first and last
    tenth."""
    result: dict[str, Any] = {}
    for key, name in _REPORTED.items():
        values = [entry[key] for entry in history if key in entry]
        if values:
            count = max(1, round(_SHARE * len(values)))
            ends = {"start": values[:count], "end": values[-count:]}
            result[name] = {end: sum(part) / len(part) for end, part in ends.items()}
    return result


def _trainer(
    script_args: RLSFArguments,
    training_args: Union[RLOOConfig, GRPOConfig],
    model_args: ModelConfig,
    prompts: Sequence[dict[str, Any]],
) -> Any:
    name, dtype = model_args.model_name_or_path, model_args.dtype or "float32"
    peft_config = adapter_config(model_args, "CAUSAL_LM")
    if peft_config is None:  # TRL loads the reference by the policy's name
        with training_args.main_process_first(desc="writing the reference policy"):
            name = save_plain(name, Path(str(training_args.output_dir)) / REFERENCE, dtype=dtype)
    tokenizer = load_chat_tokenizer(name)
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    reward_model = RewardModel.from_pretrained(
        str(script_args.reward_model),
        dtype=script_args.reward_dtype,
        device=training_args.device,
        policy_tokenizer=tokenizer,
        max_length=script_args.reward_max_length,
        batch_size=script_args.reward_batch_size,
    )
    plain, merged = (
        (GRPOTrainer, MergedGRPOTrainer) if isinstance(training_args, GRPOConfig) else (RLOOTrainer, MergedRLOOTrainer)
    )
    trainer_class = merged if script_args.merged_generation else plain
    return trainer_class(
        model=load_policy(name, dtype=dtype),
        reward_funcs=[reward_model, RepetitionPenalty()] if script_args.repetition_weight else reward_model,
        args=training_args,
        train_dataset=Dataset.from_list(list(prompts)),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
