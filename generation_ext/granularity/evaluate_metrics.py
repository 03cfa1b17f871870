# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Measures of paraphrases as `evaluate.Metric`s that need no hub: `ParaphraseMetric().compute(...)`."""

from __future__ import annotations

from typing import Any, Optional


try:
    import datasets
    import evaluate
except ImportError as error:
    raise ImportError("evaluate's metrics need: pip install evaluate datasets") from error

from generation_ext.granularity.metrics import METEOR_NOTE, paraphrase_metrics


class ParaphraseMetric(evaluate.Metric):
    """BLEU-2, BLEU-4, iBLEU as defined and as the paper's code, ROUGE-L, METEOR, corpus BLEU and the share of copies.

    Args:
        name: One of them alone, as `config_name` of `evaluate.load`; None: all.
    """

    def __init__(self, name: Optional[str] = None, **kwargs: Any) -> None:
        self.measure = name
        super().__init__(config_name=name, **kwargs)

    def _info(self) -> Any:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=f"Paraphrases, near the reference and far from the source. {METEOR_NOTE}",
            citation="Gu et al., COLING 2022",
            inputs_description=str(paraphrase_metrics.__doc__),
            features=datasets.Features({"predictions": text, "references": text, "sources": text}),
        )

    def _compute(self, predictions: list[str], references: list[str], sources: list[str]) -> dict[str, float]:
        measures = paraphrase_metrics(predictions, references, sources)
        if self.measure is None:
            return measures
        if self.measure not in measures:
            raise ValueError(f"name={self.measure!r} is unknown; choose one of {list(measures)}.")
        return {self.measure: measures[self.measure]}
