# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""How the prior of the labels is estimated that scores are compared with, so that no label wins by its words alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Optional, Union

import numpy as np


# After inputs without content (Zhao et al. 2021), or as the mean over inputs without labels (Zhou et al. 2024).
BY_CONTENT_FREE, BY_BATCH = CALIBRATIONS = ("content_free", "batch")
# What stands for "no input" (Zhao et al. 2021, section 5).
CONTENT_FREE = ("N/A", "", "[MASK]")
# A mean over fewer inputs says more about them than about the labels.
FEW_INPUTS = 16


def calibration_named(calibrate: Union[bool, str]) -> Optional[str]:
    """Which of `CALIBRATIONS` an argument `calibrate` means; None: none.

    Raises:
        ValueError: If it is none of them.
    """
    if isinstance(calibrate, (bool, np.bool_)):
        return BY_CONTENT_FREE if calibrate else None
    if calibrate not in CALIBRATIONS:
        raise ValueError(f"calibrate={calibrate!r} is unknown; choose True, False or one of {CALIBRATIONS}.")
    return calibrate


def check_inputs(
    calibration: Optional[str], examples: Sequence[Any], shared: bool, unlabelled: Optional[Sequence[Any]]
) -> None:
    """Before anything runs: whether there are inputs whose mean means something; warns where they are few.

    Args:
        calibration: Of `CALIBRATIONS`, or None.
        examples: What is scored.
        shared: Whether all of it stands behind the same demonstrations.
        unlabelled: What the mean is over; None: the examples.

    Raises:
        TypeError, ValueError: If not.
    """
    if calibration != BY_BATCH:
        if unlabelled is not None:
            raise ValueError(
                f"unlabelled inputs are for calibrate={BY_BATCH!r}; with calibrate={calibration or False!r} leave them out."
            )
        return
    if isinstance(unlabelled, (str, bytes)):
        raise TypeError("unlabelled must be a sequence of examples, got a single string; pass [text].")
    if unlabelled is not None and not shared:
        raise ValueError("unlabelled inputs need demonstrations that all examples share; leave them out.")
    name, count = ("examples", len(examples)) if unlabelled is None else ("unlabelled", len(unlabelled))
    if not len(examples):
        return
    if count < 2:
        raise ValueError(
            f"calibrate={BY_BATCH!r} compares with a mean over inputs, but {name} has {count}; pass texts without "
            f"labels as unlabelled, or use calibrate={BY_CONTENT_FREE!r}."
        )
    if count < FEW_INPUTS:
        warnings.warn(
            f"calibrate={BY_BATCH!r} takes the labels' prior from {count} inputs, which is few; pass {FEW_INPUTS} or "
            "more texts without labels as unlabelled.",
            stacklevel=4,
        )


def check_strength(strength: float) -> None:
    """Whether a prior can be taken times it.

    Raises:
        ValueError: If not.
    """
    if not 0 < strength < float("inf"):
        raise ValueError(f"strength={strength!r} of the calibration must be above 0; calibrate=False is without one.")


def mean_prior(log_probs: np.ndarray) -> np.ndarray:
    """Logarithms `[C]` of the mean over inputs of the labels' probabilities among each other."""
    return np.log(np.exp(normalized(log_probs)).mean(axis=0))


def normalized(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities that sum to one over the labels."""
    top = scores.max(axis=1, keepdims=True)
    return scores - top - np.log(np.exp(scores - top).sum(axis=1, keepdims=True))
