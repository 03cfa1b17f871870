# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Log-probabilities of continuations of contexts, any of them, with what their texts share computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

import torch

from generation_ext.shared_prefix.batching import BatchPlanner, run_in_batches
from generation_ext.shared_prefix.cache import encode_prefix, layout, read_logits
from generation_ext.shared_prefix.sharing import SharedTexts, share, text_tree
from peft_ext.language_model import LanguageModel, inference


class Continuation(NamedTuple):
    """Tokens behind a context, at least one of each."""

    context: Sequence[int]
    tokens: Sequence[int]


class Score(NamedTuple):
    """What a model says of a continuation.

    Attributes:
        log_prob: Natural logarithm of the probability of all its tokens.
        greedy: Whether each of them is the most likely one, so that greedy decoding writes it.
    """

    log_prob: float
    greedy: bool


def score_continuations(
    model: LanguageModel, continuations: Sequence[Continuation], memory_limit: Optional[int] = None
) -> Iterator[tuple[list[int], list[Score]]]:
    """Score continuations with a causal model; the numbers are those of encoding every text by itself.

    Beginnings that texts share (demonstrations, an input before several labels) are computed once, and only states that
    are read go through the output head.

    Args:
        model: See [`language_model`].
        continuations: What to score; texts that are too long for the model have to be cut before.
        memory_limit: Bytes that a pass may take beside the weights; None: a quarter of what is free.

    Yields:
        Indices of some continuations and their scores, forward pass by forward pass.
    """
    # the last token is predicted, never read from
    texts = [[*each.context, *each.tokens][:-1] for each in continuations]
    first_reads = [len(each.context) - 1 for each in continuations]
    with inference(model.base):
        for group in share(texts, first_reads, model.widths.hidden):
            yield from _score_group(model, continuations, texts, first_reads, group, memory_limit)


def _score_group(
    model: LanguageModel,
    continuations: Sequence[Continuation],
    texts: list[list[int]],
    first_reads: list[int],
    group: SharedTexts,
    memory_limit: Optional[int],
) -> Iterator[tuple[list[int], list[Score]]]:
    length = len(group.prefix)
    prefix = encode_prefix(model, group.prefix)
    trees = [
        text_tree([texts[index][length:] for index in tree], [first_reads[index] - length for index in tree])
        for tree in group.trees
    ]
    branches = 1 if model.trees else max(len(each.tree.paths()) for each in trees)
    planner = BatchPlanner(model, memory_limit, length, branches)

    def run(indices: list[int], rows: list[list[int]]) -> list[Score]:
        logits = read_logits(model, layout(model, [trees[index].tree for index in indices], rows), prefix)
        states: list[int] = []
        targets: list[int] = []
        counts: list[int] = []
        start = 0
        for index in indices:
            for text, places in zip(group.trees[index], trees[index].reads):
                states += [start + place for place in places]
                targets += continuations[text].tokens
                counts.append(len(places))
            start += len(trees[index].tree.reads)
        return _scores(logits, states, targets, counts)

    lengths, reads = [len(each.tree) for each in trees], [len(each.tree.reads) for each in trees]
    for indices, scores in run_in_batches(planner, lengths, reads, run):
        yield [text for index in indices for text in group.trees[index]], scores


def _scores(logits: torch.Tensor, states: list[int], targets: list[int], counts: list[int]) -> list[Score]:
    """Sums over each continuation of what its states `[N, vocabulary]` give its tokens."""
    at, wanted = torch.tensor(states, device=logits.device), torch.tensor(targets, device=logits.device)
    normalizers, likeliest = logits.float().logsumexp(dim=-1), logits.argmax(dim=-1)
    parts = (logits[at, wanted].float() - normalizers[at]).double().cpu().split(counts)
    hits = (likeliest[at] == wanted).cpu().split(counts)
    return [Score(float(part.sum()), bool(hit.all())) for part, hit in zip(parts, hits)]
