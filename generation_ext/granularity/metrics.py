# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Measures of paraphrases: near the reference, far from the source. The paper's (sentence level), and sacrebleu's BLEU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


ALPHA = 0.8  # of iBLEU
# The paper's released evaluation compares with the first token of the source, not with the source; its tables show that.
PAPERS_IBLEU = "iBLEU (as the paper's code)"
METEOR_NOTE = "METEOR counts exact and stem matches; synonyms only where nltk's WordNet is installed."


def paraphrase_metrics(
    predictions: Sequence[str], references: Sequence[str], sources: Sequence[str]
) -> dict[str, float]:
    """All measures, in hundredths; the two iBLEU can be below 0.

    BLEU-2, BLEU-4, ROUGE-L and METEOR are means over sentences, words being lower-cased and split at white space, as in
    the paper's code. BLEU is smoothed by nltk's method 7, and at most 100, which that goes above on short texts. `iBLEU` is
    `0.8 BLEU-4(prediction, reference) - 0.2 BLEU-4(prediction, source)`; `iBLEU (as the paper's code)` takes the first word
    of the source for the source, which is what the paper's tables have: nearness to the source costs next to nothing in it,
    so that copying pays. `copies` are the predictions that are their source, case and white space aside: read it beside
    either. A prediction or reference without words counts
    as 0. `corpus BLEU` is sacrebleu's, which does not smooth single sentences and is far lower.

    Args:
        predictions, references, sources: Texts, one of each for every pair.

    Raises:
        ValueError: If there are none, or not as many of each.
        ImportError: Says what to install.
    """
    if not len(predictions) == len(references) == len(sources):
        raise ValueError(
            f"there are {len(predictions)} predictions, {len(references)} references and {len(sources)} sources; each "
            "prediction needs one of both."
        )
    if not predictions:
        raise ValueError("predictions is empty; there is nothing to measure.")
    try:
        import sacrebleu
        from nltk.translate.meteor_score import meteor_score
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("these metrics need: pip install 'peft-ext[metrics]'") from error
    rouge, synonyms = RougeScorer(["rougeL"], tokenizer=_AtWhiteSpace()), wordnet()
    rows = []
    for prediction, reference, source in zip(predictions, references, sources):
        said, wanted, given = (text.lower().split() for text in (prediction, reference, source))
        if not said or not wanted:
            rows.append((0.0,) * 7)
            continue
        four, *others = (sentence_bleu(said, words, 4) for words in (wanted, given, given[:1]))
        rows.append(
            (
                sentence_bleu(said, wanted, 2),
                four,
                *(ALPHA * four - (1 - ALPHA) * near for near in others),
                rouge.score(" ".join(wanted), " ".join(said))["rougeL"].fmeasure,
                meteor_score([wanted], said, wordnet=synonyms),
                float("".join(said) == "".join(given)),
            )
        )
    names = ("BLEU-2", "BLEU-4", "iBLEU", PAPERS_IBLEU, "ROUGE-L", "METEOR", "copies")
    means = dict(zip(names, (100 * np.mean(rows, 0)).tolist()))
    lower = [[text.lower() for text in texts] for texts in (predictions, references)]
    return {**means, "corpus BLEU": sacrebleu.corpus_bleu(lower[0], [lower[1]]).score}


def sentence_bleu(said: list[str], wanted: list[str], order: int) -> float:
    """BLEU of one sentence, 0 to 1, with n-grams up to `order`, smoothed by nltk's method 7; 0 without words."""
    from nltk.translate.bleu_score import SmoothingFunction
    from nltk.translate.bleu_score import sentence_bleu as bleu

    if not said or not wanted:
        return 0.0
    if len(said) == 1:  # method 7 divides by the logarithm of the length
        return float(said == wanted)
    score = bleu([wanted], said, (1 / order,) * order, smoothing_function=SmoothingFunction().method7)
    return min(float(score), 1.0)  # of short texts, method 7 makes more of the long n-grams than there can be


def wordnet() -> Any:
    """nltk's WordNet, or one without synonyms where it isn't installed."""
    import nltk

    for name in ("corpora/wordnet", "corpora/wordnet.zip"):  # either is what nltk itself reads
        try:
            nltk.data.find(name)
        except LookupError:
            continue
        from nltk.corpus import wordnet as installed

        return installed
    return _NoSynonyms()


class _AtWhiteSpace:
    """Splits texts for rouge_score, whose own tokenizer drops whatever isn't a to z or a digit."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


class _NoSynonyms:
    """Stands in for WordNet where it isn't installed."""

    def synsets(self, word: str) -> list[Any]:
        return []
