# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`python -m peft_ext.ood report --config study.yaml`: tables and plots of what is finished so far."""

from __future__ import annotations

from collections.abc import Sequence

from peft_ext.ood.study.commands.arguments import config_of, parser
from peft_ext.ood.study.report import write_report


def main(argv: Sequence[str]) -> None:
    """Write `report.md`, `report.html` and `plots/` into the output folder."""
    arguments = parser("report", "Write tables and plots of what is finished so far.").parse_args(argv)
    print(f"report: {write_report(config_of(arguments))}")
