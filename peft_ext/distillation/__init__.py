# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Training towards a teacher: a loss in pieces, a teacher that runs beside or lies on disk, a mixin for trainers."""

from peft_ext.distillation.cached_logits import CachedLogits
from peft_ext.distillation.loss import Objective, distillation_loss
from peft_ext.distillation.teacher import LiveTeacher
from peft_ext.distillation.trainer import DistillationMixin, DistillationTrainer


__all__ = [
    "CachedLogits",
    "DistillationMixin",
    "DistillationTrainer",
    "LiveTeacher",
    "Objective",
    "distillation_loss",
]
