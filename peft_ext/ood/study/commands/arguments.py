# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What both verbs take: the study's file, and what takes its fields' place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from peft_ext.ood.study.grid import StudyConfig, read_config


@dataclass
class StudyArguments:
    """Which study. Its YAML isn't one of flags (see `peft_ext.ood.study.grid.StudyConfig`), so it is `--study` to the parser."""

    study: Optional[str] = field(default=None, metadata={"help": "The study's YAML file (or --config)."})
    output_dir: Optional[str] = field(
        default=None, metadata={"help": "Where everything goes, in place of the file's."}
    )
    data_dir: Optional[str] = field(
        default=None, metadata={"help": "Where the known data sets' folders lie, in place of the file's."}
    )

    def config(self) -> StudyConfig:
        """The study that the flags name.

        Raises:
            ValueError: If they name none.
        """
        if not self.study:
            raise ValueError("config is missing: pass --config, the study's YAML file.")
        return read_config(self.study, output_dir=self.output_dir, data_dir=self.data_dir)


ALIASES = {"config": "study"}
