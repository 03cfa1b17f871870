# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What both commands take: the study's file, and what takes its fields' place."""

from __future__ import annotations

import argparse

from peft_ext.ood.study.grid import StudyConfig, read_config


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags of both commands."""
    made = argparse.ArgumentParser(prog=f"python -m peft_ext.ood {command}", description=description)
    made.add_argument(
        "--config", required=True, help="the study's YAML file (see peft_ext.ood.study.grid.StudyConfig)"
    )
    made.add_argument("--output_dir", help="where everything goes, in place of the file's")
    made.add_argument("--data_dir", help="where the known data sets' folders lie, in place of the file's")
    return made


def config_of(arguments: argparse.Namespace) -> StudyConfig:
    """The study that the flags name."""
    return read_config(arguments.config, output_dir=arguments.output_dir, data_dir=arguments.data_dir)
