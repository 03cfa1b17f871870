# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Out-of-distribution detectors with scikit-learn's manners: `fit(features, logits, labels)`, `score(features, logits)`.

A higher score means more in-distribution, for all of them.
"""

from peft_ext.ood.detectors.base import Detector, load_detector, make_detector
from peft_ext.ood.detectors.gaussian import Mahalanobis, MahalanobisCosine, RelativeMahalanobis
from peft_ext.ood.detectors.logits import MSP, Energy
from peft_ext.ood.detectors.neighbours import KNN, MaxCosine
from peft_ext.ood.detectors.vim import ViM


__all__ = [
    "Detector",
    "Energy",
    "KNN",
    "MSP",
    "Mahalanobis",
    "MahalanobisCosine",
    "MaxCosine",
    "RelativeMahalanobis",
    "ViM",
    "load_detector",
    "make_detector",
]
