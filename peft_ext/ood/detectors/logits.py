# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Detectors that look at the logits alone: maximum softmax probability and energy."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

from peft_ext.file_formats import number
from peft_ext.ood.detectors.base import Detector


class MSP(Detector):
    """The largest softmax probability (Hendrycks & Gimpel 2017, https://huggingface.co/papers/1610.02136)."""

    name = "msp"
    needs_features = False

    def _score(self, features, logits) -> np.ndarray:
        return np.exp(logits.max(axis=1) - logsumexp(logits, axis=1))


class Energy(Detector):
    """The negative energy `T logsumexp(logits / T)` (Liu et al. 2020, https://huggingface.co/papers/2010.03759).

    Args:
        temperature: T; the paper and the study use 1.
    """

    name = "energy"
    needs_features = False
    params = {"temperature": number(above=0)}

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature

    def _check_params(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature!r} must be a finite number greater than 0.")

    def _score(self, features, logits) -> np.ndarray:
        return self.temperature * logsumexp(logits / self.temperature, axis=1)
