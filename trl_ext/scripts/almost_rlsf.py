# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Raises the reward of ALMoST's SFT policy on new queries: RLOO, or GRPO with `--trainer grpo`.

```bash
accelerate launch -m trl_ext.scripts.almost_rlsf \\
    --model_name_or_path run/sft --reward_model run/reward_model --use_peft \\
    --dataset_name run/rlsf_queries.jsonl \\
    --output_dir run/rlsf
```
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from peft_ext.command_line import parse, run_command
from trl_ext.almost.training.rlsf import RLSF_CONFIGS, RLSFArguments, train_rlsf
from trl_ext.almost.training.stage import AlmostModelConfig


def main(argv: Sequence[str]) -> None:
    """Parse the flags (and the YAML of `--config`), and train."""
    kinds = (RLSFArguments, RLSF_CONFIGS[trainer_of(argv)], AlmostModelConfig)
    result = train_rlsf(*parse(argv, *kinds, program="almost_rlsf"))
    for name in ("reward", "kl", "length"):
        if name in result:
            print(f"{name}: {result[name]['start']:.4g} at the start, {result[name]['end']:.4g} at the end")


def trainer_of(argv: Sequence[str]) -> str:
    """Which trainer the flags or the YAML ask for; it decides which further flags there are.

    Raises:
        ValueError: If there is no such trainer.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--trainer")
    parser.add_argument("--config")
    known, _ = parser.parse_known_args(list(argv))
    name = known.trainer
    if name is None and known.config is not None:
        name = (yaml.safe_load(Path(known.config).read_text(encoding="utf-8")) or {}).get("trainer")
    name = RLSFArguments.trainer if name is None else name
    if name not in RLSF_CONFIGS:
        raise ValueError(f"trainer={name!r} is unknown; choose one of {tuple(RLSF_CONFIGS)}.")
    return name


if __name__ == "__main__":
    sys.exit(run_command("trl_ext.scripts", "trl_ext.scripts", {"almost_rlsf": ""}, ["almost_rlsf", *sys.argv[1:]]))
