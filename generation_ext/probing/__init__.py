# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Linear probing of frozen language models behind prompts: PALP (Cho et al. 2023)."""

from generation_ext.probing.features import FeatureExtractor


__all__ = ["FeatureExtractor"]
