# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What is measured of generated texts whatever they are about: perplexity under a language model, diversity,
repetition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


@torch.no_grad()
def continuation_perplexity(
    model: nn.Module, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], batch_size: int = 32
) -> float:
    """Perplexity of continuations given their prompts, over all their tokens.

    Args:
        model: A causal language model that steered nothing.
        prompts, continuations: Tokens; empty continuations are left out.
    """
    pairs = [(list(p), list(c)) for p, c in zip(prompts, continuations) if len(c)]
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    loss, count = 0.0, 0
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        width = max(len(p) + len(c) for p, c in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for row, (prompt, continuation) in enumerate(batch):
            length = len(prompt) + len(continuation)
            ids[row, :length] = torch.tensor(prompt + continuation)
            mask[row, :length] = 1
            labels[row, len(prompt) : length] = torch.tensor(continuation)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        loss += nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
        count += int((labels[:, 1:] != -100).sum())
    return math.exp(loss / count) if count else math.nan


def distinct(continuations: Sequence[Sequence[int]], n: int) -> float:
    """Dist-n: different n-grams of tokens over all n-grams, of all texts together."""
    grams = [gram for tokens in continuations for gram in _grams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(continuations: Sequence[Sequence[int]], n: int = 3) -> float:
    """Share of n-grams that stood in the same text before."""
    repeated = total = 0
    for tokens in continuations:
        grams = _grams(tokens, n)
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated / total if total else math.nan


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
