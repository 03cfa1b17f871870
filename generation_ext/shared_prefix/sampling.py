# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""How tokens are drawn: each text with random numbers of its own, the same whatever texts are drawn beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor


# So many of the most probable tokens are sorted before the whole vocabulary is.
_FIRST_SORTED = 512
# What a checkpoint's generation config can say about the choice of tokens and the end of a text.
_CHOOSES_TOKENS = frozenset(
    "assistant_confidence_threshold bad_words_ids begin_suppress_tokens diversity_penalty dola_layers early_stopping "
    "encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty "
    "forced_eos_token_id guidance_scale length_penalty max_time min_length min_new_tokens min_p no_repeat_ngram_size "
    "num_beam_groups num_beams num_return_sequences penalty_alpha prompt_lookup_num_tokens remove_invalid_values "
    "renormalize_logits repetition_penalty sequence_bias stop_strings suppress_tokens temperature top_h top_k top_p "
    "typical_p watermarking_config".split()
)
# Of these, `generate` wants a value.
_OFF = MappingProxyType(
    {"num_beams": 1, "num_return_sequences": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_length": 0}
)


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn; the defaults are ALMoST's temperature and nucleus.

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

    def draw(self, scores: torch.Tensor, generators: Sequence[np.random.Generator]) -> torch.Tensor:
        """Draw every row's token, int64 `[rows]`, from its logits `[rows, vocabulary]` with its own random numbers."""
        uniforms = [generator.random() for generator in generators]
        return draw_tokens(scores, uniforms, self.temperature, self.top_k, self.top_p)


class OwnGenerationConfig(GenerationConfig):
    """A generation config that a model's `generation_config.json` tells its special tokens and its cache, but not how to
    choose tokens: what isn't set here is off, so that texts are the model's own.

    (`generate` fills in whatever is None, so that a checkpoint's `repetition_penalty` or `min_p` would take part.)
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**_OFF, **kwargs})

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        """As the parent's; of a model's defaults, those that choose tokens are left out."""
        if defaults_only:
            kwargs = {name: value for name, value in kwargs.items() if name not in _CHOOSES_TOKENS}
        return super().update(defaults_only=defaults_only, allow_custom_entries=allow_custom_entries, **kwargs)


class SeededSampling(LogitsProcessor):
    """Draws every row's next token with the row's own random numbers, and leaves it as the only one possible.

    Args:
        sampling: Temperature, top-k and top-p.
        keys: One for each row.
    """

    def __init__(self, sampling: Sampling, keys: Sequence[str]) -> None:
        self.sampling = sampling
        self.generators = [row_generator(key) for key in keys]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Args and result as of every logits processor: `[rows, vocabulary]`."""
        chosen = self.sampling.draw(scores, self.generators)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


def row_generator(key: str) -> np.random.Generator:
    """Random numbers that depend on a key alone."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big")))


def draw_tokens(
    scores: torch.Tensor, uniforms: Sequence[float], temperature: float, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """Draw every row's token with the row's own random number.

    Args:
        scores: Logits `[rows, vocabulary]`.
        uniforms: For each row a number in [0, 1).
        temperature, top_k, top_p: As of [`Sampling`].

    Returns:
        int64 `[rows]`.
    """
    scaled = scores.float() / temperature
    vocabulary = scaled.shape[-1]
    count = min(top_k or vocabulary, vocabulary)
    if top_k or count <= _FIRST_SORTED:
        top, tokens = scaled.topk(count, dim=-1)
        return _inverse_cdf(top.softmax(dim=-1).double(), tokens, uniforms, top_p)[0]
    # sorting a whole vocabulary takes longer than a step of a small model, and the drawn token is nearly always near
    # the top
    total = scaled.logsumexp(dim=-1, keepdim=True)
    top, tokens = scaled.topk(_FIRST_SORTED, dim=-1)
    chosen, certain = _inverse_cdf((top - total).exp().double(), tokens, uniforms, top_p, whole=False)
    if not certain.all():
        rest = (~certain).nonzero()[:, 0]
        top, tokens = scaled[rest].sort(dim=-1, descending=True)
        probabilities = (top - total[rest]).exp().double()
        chosen[rest] = _inverse_cdf(probabilities, tokens, [uniforms[row] for row in rest.tolist()], top_p)[0]
    return chosen


def _inverse_cdf(
    probabilities: torch.Tensor, tokens: torch.Tensor, uniforms: Sequence[float], top_p: float, whole: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `[rows]`, and whether the most probable ones that are here (not the `whole` vocabulary) tell which."""
    cumulated = probabilities.cumsum(dim=-1)
    drawn = torch.tensor(uniforms, dtype=torch.float64).to(probabilities.device)[:, None]
    if top_p < 1:
        certain = cumulated[:, -1] >= top_p
        kept = cumulated - probabilities < top_p
        cumulated = (probabilities * kept).cumsum(dim=-1)
        threshold = drawn * cumulated[:, -1:]
    else:
        threshold = drawn * (cumulated[:, -1:] if whole else 1.0)
        certain = threshold[:, 0] < cumulated[:, -1]
    rank = (cumulated <= threshold).sum(dim=-1, keepdim=True).clamp(max=tokens.shape[-1] - 1)
    return tokens.gather(1, rank)[:, 0], certain
