# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which generated texts may become demonstrations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from generation_ext.in_context.scoring import LabelScorer
from generation_ext.prompts import CB
from tests.generation_ext.in_context.test_self_generated import TASK, TEXTS, sg_icl
from tests.tiny.byte_models import model
from tests.tiny.tokenizers import tokenizer_for


@pytest.fixture(scope="module")
def pools():
    return sg_icl().generate(TEXTS)


def test_only_consistent_texts_are_kept(pools):
    ours = sg_icl(self_consistent=True)
    kept = ours.consistent(pools)
    scorer = LabelScorer(model("llama"), tokenizer_for("llama"), TASK, normalization="mean")
    total = 0
    for before, after in zip(pools, kept):
        assert after.example == before.example and list(after.samples) == list(before.samples)
        for label, texts in before.samples.items():
            labelled = [scorer.score([text], calibrate=True).predictions()[0] for text in texts]
            assert after.samples[label] == [text for text, other in zip(texts, labelled) if text and other == label]
            total += len(after.samples[label])
    assert 0 < total < sum(len(texts) for pool in pools for texts in pool.samples.values())
    with pytest.warns(UserWarning, match="inputs have fewer than 4 demonstrations"):
        ours.score(TEXTS)


@pytest.mark.parametrize("shared", [True, False])
def test_the_surest_texts_are_kept(pools, shared):
    ours = sg_icl(keep=0.5, shared=shared, shots=2)
    kept = ours.surest(pools)
    texts = [pair for pool in pools for pair in pool.demonstrations(TASK)]
    scorer = LabelScorer(model("llama"), tokenizer_for("llama"), TASK, normalization="mean")
    chances = scorer.score([example for example, _ in texts]).probabilities()
    chances /= chances.mean(0)
    chances /= chances.sum(1, keepdims=True)
    for column, label in enumerate(TASK.labels):
        sure = {example["text"]: row[column] for (example, other), row in zip(texts, chances) if other == label}
        groups = [[text for pool in pools for text in pool.samples[label]]] if shared else []
        for group in groups or [pool.samples[label] for pool in pools]:
            best = sorted((text for text in group if text), key=lambda text: -sure[text])
            best = best[: -(-len(best) // 2)]
            found = {text for pool in kept for text in pool.samples[label]}
            assert set(best) <= found
            assert not shared or len(found) == len(best)
    assert [pool.example for pool in kept] == [pool.example for pool in pools]


def test_the_surest_of_pairs_share_their_premise():
    """Each pool's texts run behind their premise; the numbers are those of running them together."""
    task = replace(CB, max_new_tokens=6, min_new_tokens=3)
    ours = sg_icl(task=task, keep=0.4, shared=True, shots=3, samples=3)
    pools = ours.generate([{"premise": f"It rains {word}.", "hypothesis": "It is wet."} for word in ("here", "there")])
    texts = [pair for pool in pools for pair in pool.demonstrations(task)]
    log_probs = ours.scorer.score([example for example, _ in texts]).probabilities()
    sure = log_probs / log_probs.mean(0)
    sure /= sure.sum(1, keepdims=True)
    kept = [pair for pool in ours.surest(pools) for pair in pool.demonstrations(task)]
    for column, label in enumerate(task.labels):
        own = sorted((-row[column], str(pair)) for pair, row in zip(texts, sure) if pair[1] == label)
        best = {text for _, text in own[: -(-2 * len(own) // 5)]}
        assert {str(pair) for pair in kept if pair[1] == label} == best
