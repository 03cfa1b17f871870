# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`train`: a critic from prompts and a reward, in a run folder.

config.yaml    the arguments
rollouts/      the texts that were sampled, with their rewards
critic/        the critic, for `Critic.from_pretrained`
metrics.json   what was measured; there once the run is complete

Started again with the same arguments, a run goes on where it was stopped, and a finished one only prints its table.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import yaml
from transformers import set_seed

from generation_ext.critic.commands.arguments import (
    ModelArguments,
    PromptArguments,
    aligned,
    as_json,
    figure,
    load_model,
    load_prompts,
    parse,
    write_whole,
)
from generation_ext.critic.commands.reward_arguments import RewardArguments, load_reward
from generation_ext.critic.rollouts import schedule
from generation_ext.critic.training import CriticConfig, CriticTrainer
from generation_ext.critic.value import Critic


@dataclass
class TrainArguments(ModelArguments, PromptArguments, RewardArguments):
    """What to train, on which prompts and which reward."""

    held_out: float = field(
        default=0.2, metadata={"help": "Share of the prompts that the critic is evaluated on instead of trained."}
    )
    head: str = field(default="linear", metadata={"help": "The critic's head: linear or mlp."})
    mlp_size: int = field(default=256, metadata={"help": "Width of an MLP head."})
    lora_rank: int = field(default=0, metadata={"help": "Rank of the critic's own LoRA; 0: none."})
    action_values: bool = field(default=False, metadata={"help": "Train the action-value head, too."})
    control_codes: list[str] = field(
        default_factory=list, metadata={"help": "Attributes, by the names that come before the prompt."}
    )
    prompt_template: str = field(
        default="{code}: {prompt}", metadata={"help": "How a control code comes before a prompt."}
    )


def main(argv: Sequence[str]) -> None:
    """Check everything, then train and evaluate."""
    args, training = parse(argv, TrainArguments, CriticConfig)
    run = _check_output(args, training)
    if (run / "metrics.json").is_file():
        print(f"{run} is finished already; its figures:")
        print(table(json.loads((run / "metrics.json").read_text(encoding="utf-8"))))
        return
    prompts, held_out = _split(load_prompts(args), args.held_out, training.seed)
    reward = load_reward(args)
    model, tokenizer = load_model(args)
    set_seed(training.seed)
    critic = _critic(args, model)
    training.output_dir = str(run)
    trainer = CriticTrainer(critic, training, model, reward, prompts, held_out, tokenizer)
    with training.main_process_first(desc="writing the arguments"):
        if trainer.is_world_process_zero():
            run.mkdir(parents=True, exist_ok=True)
            write_whole(run / "config.yaml", yaml.safe_dump(_arguments(args, training)))
    goes_on = (run / "rollouts" / "settings.json").is_file() or any(run.glob("checkpoint-*"))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=True if goes_on else None)
    seconds = time.perf_counter() - start
    metrics = _measure(trainer, args, seconds)
    if trainer.is_world_process_zero():
        _finish(critic, run, metrics)
        print(table(metrics))
        print(
            f"\nThe run is in {run}. Next: python -m generation_ext.critic generate {run} --prompt '...' --strength 2"
        )


def table(metrics: dict[str, Any]) -> str:
    """The figures of a run by position, as text."""
    head = ["tokens", "roll-outs", "explained variance", "calibration error", "mean V", "mean reward"]
    names = ("explained_variance", "calibration_error", "value", "outcome")
    rows = [
        [str(row["position"]), str(row["count"]), *(figure(row[name]) for name in names)]
        for row in metrics["positions"]
    ]
    return aligned([head, *rows]) + f"\n\n{metrics['steps']} steps in {metrics['seconds']:.0f} s."


def _critic(args: TrainArguments, model: Any) -> Critic:
    return Critic.for_model(
        model,
        head=args.head,
        mlp_size=args.mlp_size,
        lora_rank=args.lora_rank,
        action_values=args.action_values,
        control_codes=args.control_codes,
        prompt_template=args.prompt_template,
    )


def _split(rows: list[dict[str, Any]], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Prompts to train and to evaluate on; both are all of them if there is only one."""
    if not 0 < share < 1:
        raise ValueError(f"held_out={share} must be between 0 and 1.")
    if len(rows) == 1:
        return rows, rows
    mixed = schedule(rows, [], len(rows), seed)
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    return mixed[count:], mixed[:count]


def _check_output(args: TrainArguments, training: CriticConfig) -> Path:
    """The run folder: new, empty, or of a run with the same arguments."""
    run = Path(str(training.output_dir)).expanduser().resolve()
    if run.exists() and not run.is_dir():
        raise FileExistsError(f"output_dir={str(run)!r} is a file; pass a folder.")
    if run.is_dir() and any(run.iterdir()):
        file = run / "config.yaml"
        theirs = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
        if theirs != _arguments(args, training):
            raise FileExistsError(
                f"output_dir={str(run)!r} is not empty and not a run with these arguments; pass another folder, or the "
                "same arguments to continue that run."
            )
        return run
    parent = next(path for path in (run, *run.parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"output_dir={str(run)!r} can't be written: no permission.")
    return run


def _measure(trainer: CriticTrainer, args: TrainArguments, seconds: float) -> dict[str, Any]:
    evaluation = trainer.evaluate()
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "reward_mean" in entry]
    return {
        "model": args.model,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "evaluation": evaluation,
        "positions": trainer.evaluate_positions(),
        "history": history,
    }


def _finish(critic: Critic, run: Path, metrics: dict[str, Any]) -> None:
    """Write what makes the run complete; the metrics come last."""
    partial = run / ".critic-partial"
    shutil.rmtree(partial, ignore_errors=True)
    critic.save_pretrained(partial)
    shutil.rmtree(run / "critic", ignore_errors=True)
    partial.replace(run / "critic")
    write_whole(run / "metrics.json", as_json(metrics))
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def _arguments(args: TrainArguments, training: CriticConfig) -> dict[str, Any]:
    """What the run's result depends on, and a second run must repeat."""
    own = [name for name in CriticConfig.__annotations__ if name not in _FREE]
    names = (*own, "seed", "max_steps", "gradient_accumulation_steps", "warmup_steps", "max_grad_norm", "bf16", "fp16")
    values: dict[str, Optional[Any]] = {name: getattr(training, name) for name in names}
    plain = {name: getattr(value, "value", value) for name, value in values.items()}
    return {**asdict(args), **plain}


# what may differ between the start of a run and its going on
_FREE = ("output_dir", "logging_steps", "save_steps", "save_total_limit", "report_to", "remove_unused_columns")
