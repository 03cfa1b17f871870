# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Adapters that are weighted sums of others: what is asked of the parts, and the config of a sum's own layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper


def check_weighted(tuner: BaseTuner, adapters: list[str], weights: list[float]) -> None:
    """Refuse what can't be summed, in PEFT's words.

    Raises:
        ValueError: If an adapter doesn't exist, the lists differ in length, or several adapters have `modules_to_save`.
    """
    unknown = [name for name in adapters if name not in tuner.peft_config]
    if unknown:
        raise ValueError(f"Adapter {unknown[0]} does not exist")
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"got {len(adapters)} adapters and {len(weights)} weights; pass one weight per adapter.")
    wrappers = [module for module in tuner.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    if any(sum(name in wrapper._adapters for name in adapters) > 1 for wrapper in wrappers):
        raise ValueError("Cannot add weighted adapters targeting the same module with modules_to_save.")


def exactly(layers: Iterable[str]) -> dict[str, Any]:
    """Fields of a config that target these very layers, whatever rules chose them."""
    return {
        "target_modules": set(layers),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
