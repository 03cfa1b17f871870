# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Out-of-distribution detection behind text classifiers; `study/` compares how tuning methods and model size change it."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from peft_ext.ood.classifier import PooledClassifier
    from peft_ext.ood.contrastive import ByClass, supervised_contrastive_loss
    from peft_ext.ood.detectors import (
        KNN,
        MSP,
        Detector,
        Energy,
        Mahalanobis,
        MahalanobisCosine,
        MaxCosine,
        RelativeMahalanobis,
        ViM,
        load_detector,
        make_detector,
    )
    from peft_ext.ood.features import Features, extract
    from peft_ext.ood.metrics import (
        Interval,
        aupr_in,
        aupr_out,
        auroc,
        bootstrap,
        detection_error,
        fpr_at_recall,
        mean_interval,
        threshold_for_recall,
    )
    from peft_ext.ood.open_set import OpenSetClassifier
    from peft_ext.ood.pipeline import OODPipeline, Prediction
    from peft_ext.ood.text_features import TextFeatures
    from peft_ext.ood.thresholds import best_threshold, choose_thresholds


__all__ = [
    "ByClass",
    "Detector",
    "Energy",
    "Features",
    "Interval",
    "KNN",
    "MSP",
    "Mahalanobis",
    "MahalanobisCosine",
    "MaxCosine",
    "OODPipeline",
    "OpenSetClassifier",
    "PooledClassifier",
    "Prediction",
    "RelativeMahalanobis",
    "TextFeatures",
    "ViM",
    "aupr_in",
    "aupr_out",
    "auroc",
    "best_threshold",
    "bootstrap",
    "choose_thresholds",
    "detection_error",
    "extract",
    "fpr_at_recall",
    "load_detector",
    "make_detector",
    "mean_interval",
    "supervised_contrastive_loss",
    "threshold_for_recall",
]


def __getattr__(name: str) -> Any:
    """Imported when asked for: scikit-learn takes seconds, and `--help` needs none of it."""
    if name in __all__:
        for module in (
            "classifier",
            "contrastive",
            "features",
            "detectors",
            "metrics",
            "thresholds",
            "pipeline",
            "text_features",
            "open_set",
        ):
            home = importlib.import_module(f"{__name__}.{module}")
            if hasattr(home, name):
                return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
