# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Linear probing of frozen language models behind prompts: PALP (Cho et al. 2023)."""

from typing import TYPE_CHECKING

from generation_ext.lazy import found_in


if TYPE_CHECKING:
    from generation_ext.probing.features import FeatureExtractor
    from generation_ext.probing.palp import PALPClassifier


__all__ = [
    "FeatureExtractor",
    "PALPClassifier",
]

__getattr__ = found_in(__name__, ".features", ".palp")  # features need no scikit-learn
