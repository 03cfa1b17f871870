# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext almost`, all stages or one of them, a module each; TRL's way, `accelerate launch -m trl_ext.scripts.almost_sft`,
works as well."""

from __future__ import annotations

from collections.abc import Sequence

from peft_ext.command_line import Command


COMMANDS = {
    "queries": Command("mine queries: a model continues a list of ten", "trl_ext.scripts.almost_queries"),
    "feedback": Command("answers of different ranks, and comparisons of them", "trl_ext.scripts.almost_feedback"),
    "reward": Command("train the reward model on comparisons", "trl_ext.scripts.almost_reward"),
    "self_play": Command("demonstrations: the best of several answers", "trl_ext.scripts.almost_self_play"),
    "sft": Command("fine-tune on demonstrations", "trl_ext.scripts.almost_sft"),
    "rlsf": Command("reinforcement learning by the reward model", "trl_ext.scripts.almost_rlsf"),
    "eval": Command("HHH, TruthfulQA and win rates of any models", "trl_ext.scripts.almost_eval"),
}


def main(argv: Sequence[str]) -> None:
    """All stages from one recipe."""
    from trl_ext.scripts import almost

    almost.main(argv)
