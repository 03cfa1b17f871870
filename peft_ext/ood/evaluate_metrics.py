# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The measures of `metrics.py` as `evaluate.Metric`s, which need no network: `Auroc().compute(...)`.

`predictions` are scores (higher: more in-distribution), `references` 1 for in-distribution examples and 0 for others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np


try:
    import evaluate
except ImportError as error:
    raise ImportError("these metrics need: pip install evaluate") from error

from peft_ext.ood import metrics


class _Metric(evaluate.Metric):
    value_type = "float64"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # without files in a cache: nothing here is too large for memory
        super().__init__(*args, **{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        kind = "int64" if self.value_type == "int64" else "float64"
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=__doc__ or "",
            features=datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value("int64")}),
        )


class _DetectionMetric(_Metric):
    measure: Callable[..., float]
    result_name: str

    def _compute(self, predictions: Any, references: Any, **kwargs: Any) -> dict[str, float]:
        scores, truth = np.asarray(predictions), np.asarray(references)
        unknown = sorted(set(truth.tolist()) - {0, 1})
        if unknown:
            raise ValueError(f"references hold {unknown[0]!r}; pass 1 for in-distribution examples and 0 for others.")
        value = type(self).measure(scores[truth == 1], scores[truth == 0], **kwargs)
        return {self.result_name: value}


class Auroc(_DetectionMetric):
    """Area under the ROC curve, in-distribution examples as positives."""

    measure, result_name = staticmethod(metrics.auroc), "auroc"


class AuprIn(_DetectionMetric):
    """Average precision, in-distribution examples as positives."""

    measure, result_name = staticmethod(metrics.aupr_in), "aupr_in"


class AuprOut(_DetectionMetric):
    """Average precision, out-of-distribution examples as positives."""

    measure, result_name = staticmethod(metrics.aupr_out), "aupr_out"


class FprAtRecall(_DetectionMetric):
    """False positive rate at an in-distribution recall of 95 %, or of `compute(..., recall=...)`; in-distribution examples
    are the positives, or the others with `compute(..., positive="out")`, as pytorch-ood has it."""

    measure, result_name = staticmethod(metrics.fpr_at_recall), "fpr_at_recall"


class DetectionError(_DetectionMetric):
    """The least mean of the two error rates over all thresholds."""

    measure, result_name = staticmethod(metrics.detection_error), "detection_error"


class IdAccuracy(_Metric):
    """Accuracy of the classifier on in-distribution examples; `predictions` and `references` are classes."""

    value_type = "int64"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"id_accuracy": metrics.id_accuracy(predictions, references)}
