# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""In-context classification with frozen language models: label scoring on a shared prefix, and SG-ICL (Kim et al. 2022)."""

from generation_ext.in_context.sampler import Decoding
from generation_ext.in_context.scoring import LabelScorer, LabelScores
from generation_ext.in_context.self_generated import SelfGeneratedICL
from generation_ext.prompts import CB, RTE, SST2, SST5, TASKS, Task


__all__ = ["CB", "RTE", "SST2", "SST5", "TASKS", "Decoding", "LabelScorer", "LabelScores", "SelfGeneratedICL", "Task"]
