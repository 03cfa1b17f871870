# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`evaluate`: how well a critic foresees the reward by position, and the reward that it gains at each strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from generation_ext.critic.batches import values_of
from generation_ext.critic.commands.arguments import (
    OLD_FLAGS,
    CriticArguments,
    PromptArguments,
    critic_folders,
    load_critics,
    load_prompts,
)
from generation_ext.critic.commands.reward_arguments import RewardArguments, load_reward
from generation_ext.critic.diagnostics import by_position, calibration_table, explained_variance, finite
from generation_ext.critic.rollout_files import read_rollouts
from generation_ext.critic.rollouts import Rollout, RolloutSampler, schedule
from generation_ext.critic.value import Critic
from peft_ext.command_line import parse, show
from peft_ext.files import check_writable, write_json
from peft_ext.tables import aligned, figure


@dataclass
class EvaluateArguments(CriticArguments, PromptArguments, RewardArguments):
    """Arguments of `evaluate`."""

    rollouts: Optional[str] = field(
        default=None, metadata={"help": "Saved roll-outs (file or folder) to evaluate on, instead of prompts."}
    )
    strengths: list[float] = field(
        default_factory=list, metadata={"help": "Strengths at which to measure the reward of steered text."}
    )
    count: int = field(default=128, metadata={"help": "Texts to sample, at each strength."})
    batch_size: int = field(default=16, metadata={"help": "Texts to sample at a time."})
    max_new_tokens: int = field(default=24, metadata={"help": "Tokens of a text at most."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Probability mass to sample from."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})
    output: Optional[str] = field(default=None, metadata={"help": "JSON file to write the result to."})


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    (args,) = parse(argv, EvaluateArguments, positional="critic", aliases=OLD_FLAGS)
    for name in ("count", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} must be at least 1.")
    if args.output:
        check_writable(Path(args.output), "output")
    if args.rollouts and args.strengths:
        raise ValueError("strengths need prompts and a reward to sample anew; leave out --rollouts.")
    if len(args.critic) > 1:
        raise ValueError(f"critic={args.critic}: evaluate takes one critic.")
    folders = critic_folders(args.critic)
    saved = read_rollouts(args.rollouts) if args.rollouts else None
    rows = load_prompts(args) if saved is None else []
    reward = load_reward(args) if saved is None else None
    model, tokenizer = args.load()
    critic = load_critics(folders, model)[0]
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p")}
    sampler = RolloutSampler(model, tokenizer, reward, critic, **options)
    rows = schedule(rows, critic.config.control_codes, args.count, args.seed) if rows else []
    rollouts = saved if saved is not None else _sampled(sampler, rows, args)
    result = _foreseen(critic, model, [rollout for rollout in rollouts if rollout.reward is not None], args.batch_size)
    text = positions_table(result["positions"])
    if args.strengths:
        result["strengths"] = [_steered(sampler, rows, args, critic, strength) for strength in args.strengths]
        text += "\n\n" + _strengths_table(result["strengths"])
    show(finite(result), text)
    if args.output:
        write_json(Path(args.output), finite(result))


def _sampled(
    sampler: RolloutSampler, rows: list[dict[str, Any]], args: EvaluateArguments, **kwargs: Any
) -> list[Rollout]:
    rollouts: list[Rollout] = []
    for start in range(0, len(rows), args.batch_size):
        batch = rows[start : start + args.batch_size]
        rollouts += sampler.sample(batch, args.seed + start, with_hidden=not kwargs, **kwargs)
    return rollouts


def _foreseen(critic: Critic, model: Any, rollouts: list[Rollout], batch_size: int) -> dict[str, Any]:
    if not rollouts:
        raise ValueError("none of the roll-outs has a reward; there is nothing to evaluate on.")
    values, mask, rewards = values_of(critic, model, rollouts, batch_size)
    outcomes = rewards[:, None].expand(mask.shape)
    return {
        "rollouts": len(rollouts),
        "reward_mean": float(rewards.mean()),
        "explained_variance": explained_variance(values[mask], outcomes[mask]),
        "positions": by_position(values, outcomes, mask),
        "calibration": calibration_table(values[mask], outcomes[mask]),
    }


def _steered(
    sampler: RolloutSampler, rows: list[dict[str, Any]], args: EvaluateArguments, critic: Critic, strength: float
) -> dict[str, float]:
    with args.processor(sampler.model, [critic], strength) as processor:
        rollouts = _sampled(sampler, rows, args, logits_processor=[processor])
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    pairs = [pair for rollout in rollouts for pair in zip(rollout.completion_ids, rollout.completion_ids[1:])]
    return {
        "strength": strength,
        "reward_mean": _share(sum(rewards), rewards),
        "share_above_half": _share(sum(reward > 0.5 for reward in rewards), rewards),
        "distinct_2": _share(len(set(pairs)), pairs),
    }


def _share(count: float, of: Sequence[Any]) -> float:
    return count / len(of) if of else float("nan")


def positions_table(positions: list[dict[str, Any]]) -> str:
    """How well a critic foresees the reward by position, as text; see `diagnostics.by_position`."""
    head = ["tokens", "roll-outs", "explained variance", "calibration error", "mean V", "mean reward"]
    names = ("explained_variance", "calibration_error", "value", "outcome")
    rows = [[str(row["position"]), str(row["count"]), *(figure(row[name]) for name in names)] for row in positions]
    return aligned([head, *rows])


def _strengths_table(rows: list[dict[str, float]]) -> str:
    head = ["strength", "mean reward", "share above 1/2", "distinct pairs of tokens"]
    names = ("reward_mean", "share_above_half", "distinct_2")
    return aligned([head, *([f"{row['strength']:g}", *(figure(row[name]) for name in names)] for row in rows)])
