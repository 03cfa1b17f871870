# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext ood report --config study.yaml`: tables and plots of what is finished so far."""

from __future__ import annotations

from collections.abc import Sequence

from peft_ext.command_line import parse, show
from peft_ext.ood.study.commands.arguments import ALIASES, StudyArguments
from peft_ext.ood.study.report import write_report


def main(argv: Sequence[str]) -> None:
    """Write `report.md`, `report.html` and `plots/` into the output folder."""
    (args,) = parse(argv, StudyArguments, positional="study", aliases=ALIASES)
    path = write_report(args.config())
    show({"report": str(path)}, f"report: {path}")
