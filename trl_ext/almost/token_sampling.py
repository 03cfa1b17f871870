# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Draws texts, as tokens, side by side: how they are drawn, and the loop that does it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch

from generation_ext.shared_prefix.cache import SharedPrefix
from generation_ext.shared_prefix.decoding import Rows
from generation_ext.shared_prefix.sampling import draw_tokens
from peft_ext.language_model import LanguageModel


# A text is searched for what ends it every so many tokens.
STOP_STEPS = 4
# When so few of a batch's texts go on, the finished ones are dropped.
_LIVE_SHARE = 0.75


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn; the paper's temperature and nucleus.

    Args:
        temperature: Logits are divided by it.
        top_p: Only the most probable tokens that have this much probability together.
        top_k: Only so many of the most probable tokens; 0: all.
        max_new_tokens: Most tokens of a text.
        samples: Texts for each request.
        stop: A text ends before the first of these that it holds.
        seed: Together with a request's key, what a text's random numbers depend on.

    Raises:
        ValueError: If a number is out of its range.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 0
    max_new_tokens: int = 128
    samples: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive; a small one is nearly greedy.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1.")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative; 0 turns it off.")
        if self.max_new_tokens < 1 or self.samples < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} and samples={self.samples} must be positive.")


def sample_tokens(
    traits: LanguageModel,
    prefix: SharedPrefix,
    prompts: Sequence[Sequence[int]],
    generators: Sequence[np.random.Generator],
    sampling: Sampling,
    ends: Collection[int],
    over: Optional[Callable[[Sequence[int]], bool]] = None,
) -> list[list[int]]:
    """New tokens of `len(generators)` texts, a whole number for each prompt; the last is one of `ends`, if the model has
    ended the text.

    Args:
        traits: A causal model, in inference mode.
        prefix: What all texts begin with; empty where the model can't share it.
        prompts: For each, the tokens after the prefix; at least one.
        generators: Each text's random numbers.
        sampling: Temperature, top-k, nucleus, length.
        ends: Tokens that end a text.
        over: Whether a text, by its tokens so far, has ended in another way; asked every `STOP_STEPS` tokens.
    """
    rows = Rows(traits, prefix, prompts, len(generators) // len(prompts))
    logits = rows.start()
    written: list[list[int]] = [[] for _ in generators]
    running, finished = list(range(len(generators))), set()
    for step in range(sampling.max_new_tokens):
        drawn = draw_tokens(
            logits, [generators[i].random() for i in running], sampling.temperature, sampling.top_k, sampling.top_p
        )
        for index, token in zip(running, drawn.tolist()):
            if index not in finished:
                written[index].append(token)
                if token in ends:
                    finished.add(index)
        if over is not None and step % STOP_STEPS == STOP_STEPS - 1:
            finished |= {index for index in running if index not in finished and over(written[index])}
        live = [place for place, index in enumerate(running) if index not in finished]
        if not live or step == sampling.max_new_tokens - 1:
            break
        if len(live) <= _LIVE_SHARE * len(running):
            kept = torch.tensor(live, device=drawn.device)
            rows.keep(kept)
            drawn, running = drawn[kept], [running[place] for place in live]
        logits = rows.step(drawn)
    return written
