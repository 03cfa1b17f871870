# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""BLEU, METEOR, ROUGE-L and chrF of generated texts against several references each."""

from __future__ import annotations

from collections.abc import Sequence

from generation_ext.granularity.metrics import METEOR_NOTE, wordnet


def nlg_metrics(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus BLEU and chrF (sacrebleu's defaults), mean METEOR (nltk) and ROUGE-L F1 (best reference), all 0 to 100."""
    try:
        import sacrebleu
        from nltk.translate.meteor_score import meteor_score
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("these metrics need: pip install 'peft-ext[bench]'") from error
    most = max(map(len, references))
    streams = [[group[i] if i < len(group) else None for group in references] for i in range(most)]
    rouge, synonyms = RougeScorer(["rougeL"], use_stemmer=True), wordnet()
    pairs = list(zip(texts, references))
    meteor = [
        meteor_score([reference.split() for reference in group], text.split(), wordnet=synonyms)
        for text, group in pairs
    ]
    return {
        "BLEU": sacrebleu.corpus_bleu(list(texts), streams).score,
        "METEOR": 100 * sum(meteor) / len(meteor),
        "ROUGE-L": 100 * sum(rouge.score_multi(list(g), t)["rougeL"].fmeasure for t, g in pairs) / len(pairs),
        "chrF": sacrebleu.corpus_chrf(list(texts), streams).score,
    }


__all__ = ["METEOR_NOTE", "nlg_metrics"]
