# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Training towards a teacher: a loss in pieces, a teacher that runs beside or lies on disk, a mixin for trainers."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    """Imported when asked for: transformers' Trainer takes seconds, and a plan of memory needs none of it."""
    if name in __all__:
        for module in ("loss", "teacher", "cached_logits", "trainer"):
            home = importlib.import_module(f"{__name__}.{module}")
            if hasattr(home, name):
                return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
