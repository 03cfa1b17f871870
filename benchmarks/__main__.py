# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`python -m benchmarks <task> [<experiment> ...]`: the table of tasks; everything else is `benchmarks.core.runner`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Optional

from benchmarks.core import runner
from benchmarks.core.runner import Entry
from peft_ext.command_line import run_main


# Name -> what it is about, and its module. The order of `all`.
TASKS = {
    "peqa_quality": Entry(
        "Perplexity after tuning scales, against LoRA, QLoRA and rounding", "benchmarks.peqa_quality"
    ),
    "critic_cost": Entry("What a steered token costs, by way of steering", "benchmarks.critic_cost"),
    "critic_control": Entry(
        "A critic's steering of sentiment, topics and toxicity, judged independently", "benchmarks.critic_control"
    ),
    "scoring": Entry(
        "Labels scored behind shared demonstrations, against lm-evaluation-harness", "benchmarks.scoring"
    ),
    "sgicl": Entry("SG-ICL against zero-shot and gold demonstrations", "benchmarks.sgicl"),
    "palp": Entry("PALP against linear probing, in-context learning and LoRA", "benchmarks.palp"),
    "ood": Entry("Out-of-distribution detection behind all tuning methods", "benchmarks.ood"),
    "ood_detectors": Entry("Time and memory of the detectors", "benchmarks.ood_detectors"),
    "ga_attention": Entry("What GA-Attention costs, against SDPA with a float mask", "benchmarks.ga_attention"),
    "paraphrase": Entry("C-DNPG's paraphrases against a Transformer's of its size", "benchmarks.paraphrase"),
    "almost": Entry("ALMoST from end to end on SmolLM2, its ablations and its speed", "benchmarks.almost"),
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return run_main(lambda rest: runner.main(rest, TASKS), argv, runner.PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
