# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""In-context classification with frozen language models: label scoring on a shared prefix, and SG-ICL (Kim et al. 2022)."""

from typing import TYPE_CHECKING

from generation_ext.lazy import found_in


if TYPE_CHECKING:
    from generation_ext.in_context.sampler import Decoding
    from generation_ext.in_context.scoring import LabelScorer, LabelScores
    from generation_ext.in_context.self_generated import SelfGeneratedICL
    from generation_ext.prompts import CB, RTE, SST2, SST5, TASKS, Task


__all__ = [
    "CB",
    "Decoding",
    "LabelScorer",
    "LabelScores",
    "RTE",
    "SST2",
    "SST5",
    "SelfGeneratedICL",
    "TASKS",
    "Task",
]

__getattr__ = found_in(__name__, "generation_ext.prompts", ".sampler", ".scoring", ".self_generated")
