# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext ood run --config study.yaml`: works off a study's cells; start it twice for two workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers.utils import logging

from peft_ext.command_line import note, parse, show
from peft_ext.files import check_folder_writable
from peft_ext.ood.study.cell import processes
from peft_ext.ood.study.commands.arguments import ALIASES, StudyArguments
from peft_ext.ood.study.manifest import FAILED, Manifest
from peft_ext.ood.study.report import write_report
from peft_ext.ood.study.runner import run


@dataclass
class RunArguments(StudyArguments):
    """Which study, and what is run of it."""

    retry: bool = field(default=False, metadata={"help": "Run failed and skipped cells once more."})


def main(argv: Sequence[str]) -> int:
    """Run what is left, then write the report; returns 1 if a cell of the study has failed, in this run or before.

    Raises:
        ValueError, TypeError, OSError: If the file or the output folder can't be used.
    """
    (args,) = parse(argv, RunArguments, positional="study", aliases=ALIASES)
    config = args.config()
    check_folder_writable(Path(config.output_dir), "output_dir")
    logging.disable_progress_bar()  # a hundred cells load a hundred times; `run` logs a line for each
    logging.set_verbosity_error()
    counts = run(config, retry=args.retry)
    failed = Manifest(config.output_dir).jobs(FAILED) & {cell.id for cell in config.cells()}
    if processes().is_main_process:
        report = write_report(config)
        text = ", ".join(f"{count} {status}" for status, count in counts.items())
        show({"cells": counts, "report": str(report)}, f"{text}\nreport: {report}")
        if failed:
            count = f"{len(failed)} cell" + "s" * (len(failed) > 1)
            note(f"{count} of the study failed: reasons are in the report, --retry runs them again")
    return 1 if failed else 0
