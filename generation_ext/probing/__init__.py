# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Linear probing of frozen language models behind prompts: PALP (Cho et al. 2023)."""

from typing import TYPE_CHECKING, Any

from generation_ext.probing.features import FeatureExtractor


if TYPE_CHECKING:
    from generation_ext.probing.palp import PALPClassifier

__all__ = ["FeatureExtractor", "PALPClassifier"]


def __getattr__(name: str) -> Any:
    """Features need no scikit-learn."""
    if name == "PALPClassifier":
        from generation_ext.probing.palp import PALPClassifier

        return PALPClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
