# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The settings of a critic's training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Optional

from transformers import TrainingArguments

from generation_ext.critic.losses import LOSSES


@dataclass
class CriticConfig(TrainingArguments):
    """transformers' TrainingArguments with defaults for a critic, and what is its own.

    Training goes in iterations: collect roll-outs, then fit the critic on them for some epochs. So `num_train_epochs`
    is `num_iterations * epochs_per_iteration`, and can't be set otherwise; `max_steps` may end training earlier, or go on
    for longer. A batch (`per_device_train_batch_size`) is of roll-outs, each with all its states.

    The paper's own settings: `temperature=2.0` (its code: 2.0 for sentiment, 2.8 for topics), `gamma=0.99`, `lam=0.95`,
    `cliprange_value=0.2`, and rewards in logits. The defaults are the plain regression on the final reward, in
    probabilities.
    """

    output_dir: Optional[str] = field(
        default=None, metadata={"help": "Folder for checkpoints, roll-outs and the critic."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Roll-outs per step and device."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the critic."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the critic."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Schedule of the learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two losses in the log."})
    save_steps: float = field(default=100, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: Optional[int] = field(default=1, metadata={"help": "Checkpoints to keep."})
    report_to: str = field(default="none", metadata={"help": "Where to report to; none by default."})
    remove_unused_columns: Optional[bool] = field(
        default=False, metadata={"help": "Must be False; further columns of the prompts go to the reward function."}
    )

    ddp_find_unused_parameters: Optional[bool] = field(
        default=False, metadata={"help": "False: all parameters have gradients, also those used outside of forward."}
    )

    num_iterations: int = field(default=4, metadata={"help": "Times to collect roll-outs and fit the critic on them."})
    rollouts_per_iteration: int = field(
        default=256, metadata={"help": "Roll-outs to collect in an iteration, over all processes."}
    )
    epochs_per_iteration: int = field(default=10, metadata={"help": "Passes over an iteration's roll-outs."})
    rollout_batch_size: int = field(default=32, metadata={"help": "Roll-outs to sample at a time."})
    max_new_tokens: int = field(default=24, metadata={"help": "Tokens of a roll-out at most."})
    max_prompt_length: int = field(
        default=256, metadata={"help": "Tokens of a prompt; of a longer one the last ones are kept."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of sampling; 1 is the language model itself, the paper takes 2."}
    )
    top_k: int = field(default=0, metadata={"help": "Sample from so many most likely tokens; 0: from all."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the tokens of this share of probability."})
    steered_strength: float = field(
        default=0.0,
        metadata={
            "help": "From the second iteration on, sample every second batch of roll-outs under the critic as it is then, at "
            "this strength and among its candidates alone, so that it learns values of texts as it steers them; 0: none."
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount of the reward per token, in [0, 1]."})
    lam: float = field(
        default=1.0, metadata={"help": "GAE's lambda, in [0, 1]; 1 regresses on the reward, 0 on the next value."}
    )
    value_loss: str = field(default="squared_error", metadata={"help": f"One of {LOSSES}."})
    cliprange_value: Optional[float] = field(
        default=None,
        metadata={"help": "Clip a value's move since the roll-outs were taken (the paper: 0.2); of squared_error."},
    )
    closed_form: bool = field(
        default=True,
        metadata={
            "help": "Begin a new linear head as the ridge regression of the first roll-outs' outcomes, its penalty chosen on "
            "held-out prompts; False: at the mean outcome."
        },
    )
    l2: Optional[float] = field(
        default=None,
        metadata={
            "help": "Penalty of the squares of the value head's weights; None: the ridge regression's, 0 without one."
        },
    )
    action_value_coef: float = field(
        default=1.0, metadata={"help": "Weight of the action-value head's loss, if the critic has that head."}
    )
    action_value_candidates: int = field(
        default=0,
        metadata={
            "help": "Teach the action-value head the exact values of so many likeliest tokens, too, at one state of each "
            "roll-out; 0: of the tokens that were sampled alone."
        },
    )
    eval_rollouts: int = field(default=256, metadata={"help": "Roll-outs to evaluate on, from the eval_dataset."})
    save_rollouts: bool = field(
        default=True,
        metadata={"help": "Write roll-outs to <output_dir>/rollouts; without them, a resumed run samples them again."},
    )

    def __post_init__(self) -> None:
        if not self.output_dir:  # transformers would choose a folder by itself
            raise ValueError("output_dir is missing: pass the folder for checkpoints, roll-outs and the critic.")
        self._check()
        self.num_train_epochs = float(self.num_iterations * self.epochs_per_iteration)
        super().__post_init__()

    def _check(self) -> None:
        for name in (
            "per_device_train_batch_size",
            "num_iterations",
            "rollouts_per_iteration",
            "epochs_per_iteration",
            "rollout_batch_size",
            "max_new_tokens",
            "max_prompt_length",
            "eval_rollouts",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1].")
        if self.value_loss not in LOSSES:
            raise ValueError(f"value_loss={self.value_loss!r} is unknown; choose one of {LOSSES}.")
        if self.cliprange_value is not None and not self.cliprange_value > 0:
            raise ValueError(f"cliprange_value={self.cliprange_value} must be above 0; None doesn't clip.")
        if self.cliprange_value is not None and self.value_loss != "squared_error":
            raise ValueError(
                f"cliprange_value={self.cliprange_value} is for value_loss='squared_error', not {self.value_loss!r}; "
                "leave one of them out."
            )
        if not math.isfinite(self.steered_strength):
            raise ValueError(f"steered_strength={self.steered_strength} must be a finite number; 0 doesn't steer.")
        if self.steered_strength and not self.save_rollouts:
            raise ValueError(
                f"steered_strength={self.steered_strength} with save_rollouts=False: a resumed run would sample them again under "
                "a critic that has learnt since; leave one of them out."
            )
        if self.l2 is not None and not 0 <= self.l2 < math.inf:
            raise ValueError(f"l2={self.l2} must be a number of at least 0, or None.")
        if self.action_value_coef < 0:
            raise ValueError(f"action_value_coef={self.action_value_coef} must not be below 0.")
        if self.action_value_candidates < 0:
            raise ValueError(f"action_value_candidates={self.action_value_candidates} must not be below 0.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would take roll-outs apart; leave it out.")
