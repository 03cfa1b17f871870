# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`python -m peft_ext.ood run --config study.yaml`: works off a study's cells; start it twice for two workers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from peft_ext.files import check_folder_writable
from peft_ext.ood.study.cell import processes
from peft_ext.ood.study.commands.arguments import config_of, parser
from peft_ext.ood.study.manifest import FAILED, Manifest
from peft_ext.ood.study.report import write_report
from peft_ext.ood.study.runner import run


def main(argv: Sequence[str]) -> int:
    """Run what is left, then write the report; returns 1 if a cell of the study has failed, in this run or before.

    Raises:
        ValueError, TypeError, OSError: If the file or the output folder can't be used.
    """
    flags = parser("run", "Train the study's classifiers and measure all detectors behind them.")
    flags.add_argument("--retry", action="store_true", help="run failed and skipped cells once more")
    arguments = flags.parse_args(argv)
    config = config_of(arguments)
    check_folder_writable(Path(config.output_dir), "output_dir")
    logging.disable_progress_bar()  # a hundred cells load a hundred times; `run` logs a line for each
    logging.set_verbosity_error()
    counts = run(config, retry=arguments.retry)
    failed = Manifest(config.output_dir).jobs(FAILED) & {cell.id for cell in config.cells()}
    if processes().is_main_process:
        print(", ".join(f"{count} {status}" for status, count in counts.items()))
        print(f"report: {write_report(config)}")
        if failed:
            count = f"{len(failed)} cell" + "s" * (len(failed) > 1)
            print(f"{count} of the study failed: reasons are in the report, --retry runs them again", file=sys.stderr)
    return 1 if failed else 0
