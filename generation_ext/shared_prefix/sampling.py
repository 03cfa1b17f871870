# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Several sampled continuations of many prompts, the same whatever prompts are sampled beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Optional

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from generation_ext.shared_prefix.batching import Planner, check_memory_limit, free_bytes
from generation_ext.shared_prefix.encoding import TextEncoder
from peft_ext.language_model import ENCODER_DECODER, LanguageModel, inference


_CPU_ROWS, _ACCELERATOR_ROWS = 128, 1024
# So many of the most probable tokens are sorted before the whole vocabulary is.
_FIRST_SORTED = 512


@dataclass(frozen=True)
class Decoding:
    """How demonstrations are sampled; the defaults are those of SG-ICL's code.

    Args:
        temperature: Logits are divided by it.
        top_k: Only the most probable tokens are drawn from; 0: all. transformers' default of 50 applied in the paper.
        top_p: Only the most probable tokens that have this much probability together.
        no_repeat_ngram_size: No sequence of so many tokens occurs twice, in prompt and text together; 0: any may.
        ban_commas: No token that is a comma.

    Raises:
        ValueError: If a number is out of its range.
    """

    temperature: float = 0.5
    top_k: int = 50
    top_p: float = 1.0
    no_repeat_ngram_size: int = 2
    ban_commas: bool = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive; a small one is nearly greedy.")
        if self.top_k < 0 or self.no_repeat_ngram_size < 0:
            raise ValueError(
                f"top_k={self.top_k} and no_repeat_ngram_size={self.no_repeat_ngram_size} must not be negative; 0 turns "
                "them off."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1.")

    def settings(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


class Sampler:
    """Samples texts with `generate`.

    A prompt goes through a causal model once, however many texts go on from it. Every text has random numbers of its
    own, so that it depends on its key alone, not on the batch.

    Args:
        traits, encoder: The model and its tokenizer.
        tokenizer: To turn tokens back into text.
        decoding: How to sample.
        min_new_tokens, max_new_tokens: Of a text.
        memory_limit: Bytes that a batch may take; None: a quarter of what is free.
    """

    def __init__(
        self,
        traits: LanguageModel,
        encoder: TextEncoder,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        min_new_tokens: int,
        max_new_tokens: int,
        memory_limit: Optional[int] = None,
    ) -> None:
        if not traits.model.can_generate():
            raise TypeError(f"model ({type(traits.model).__name__}) can't generate; load it as a language model.")
        check_memory_limit(memory_limit)
        self.traits, self.encoder, self.tokenizer, self.decoding = traits, encoder, tokenizer, decoding
        self.max_new_tokens, self.memory_limit = max_new_tokens, memory_limit
        ends = getattr(traits.model.generation_config, "eos_token_id", None)
        end = tokenizer.eos_token_id if ends is None else ends
        self.pad = next(t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if t is not None)
        self.config = GenerationConfig(
            do_sample=False,  # the processor draws
            num_beams=1,
            min_new_tokens=min_new_tokens,
            max_new_tokens=max_new_tokens,
            no_repeat_ngram_size=decoding.no_repeat_ngram_size or None,
            suppress_tokens=self._banned() or None,
            eos_token_id=end,
            pad_token_id=self.pad,
            bos_token_id=tokenizer.bos_token_id,
            decoder_start_token_id=getattr(traits.model.config, "decoder_start_token_id", None),
        )

    def batches(self, prompts: Sequence[Sequence[int]], samples: int) -> list[list[int]]:
        """Prompts of about the same length, as many as the memory limit has room for; at least one."""
        traits, order = self.traits, sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        most_rows = _CPU_ROWS if traits.device.type == "cpu" else _ACCELERATOR_ROWS
        limit = free_bytes(traits.device) // 4 if self.memory_limit is None else self.memory_limit
        planner = Planner(traits, limit)
        size = torch.finfo(traits.dtype).bits // 8
        layers = traits.model.config.get_text_config(decoder=True).num_hidden_layers
        batches: list[list[int]] = []
        for index in order:
            longest = len(prompts[batches[-1][0] if batches else index])
            rows = samples * (1 + len(batches[-1])) if batches else samples
            # every step, a layer's grown cache is there beside the one that it replaces
            cache = rows * (longest + self.max_new_tokens) * 2 * traits.widths.keys * (layers + 2) * size
            fits = rows <= most_rows and cache + planner.bytes(rows // samples, longest, rows) <= limit
            if batches and fits:
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches

    def sample(self, prompts: Sequence[Sequence[int]], keys: Sequence[str], samples: int) -> list[list[str]]:
        """Texts that go on after prompts of one batch.

        Args:
            prompts: Token ids.
            keys: What a prompt's random numbers depend on.
            samples: Texts for each.

        Returns:
            For each prompt its texts, on one line each, without white space around them; some may be empty.
        """
        try:
            return self._sample(prompts, keys, samples)
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise
        half = len(prompts) // 2
        return self.sample(prompts[:half], keys[:half], samples) + self.sample(prompts[half:], keys[half:], samples)

    def _sample(self, prompts: Sequence[Sequence[int]], keys: Sequence[str], samples: int) -> list[list[str]]:
        model, device = self.traits.model, self.traits.device
        longest = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
        mask = (torch.arange(longest, device=device) >= longest - lengths).long()
        rows = [f"{key}/{number}" for key in keys for number in range(samples)]
        processors = LogitsProcessorList([SeededSampling(self.decoding, rows)])
        with inference(model):
            inputs = self._past(ids, mask, samples)
            output = model.generate(
                input_ids=ids.repeat_interleave(samples, dim=0),
                attention_mask=mask.repeat_interleave(samples, dim=0),
                generation_config=self.config,
                logits_processor=processors,
                **inputs,
            )
        start = 0 if self.traits.kind == ENCODER_DECODER else longest
        texts = self.tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)
        texts = [" ".join(text.split()) for text in texts]
        return [texts[i : i + samples] for i in range(0, len(texts), samples)]

    def _past(self, ids: torch.Tensor, mask: torch.Tensor, samples: int) -> dict[str, Any]:
        """Keys and values of the prompts but their last tokens, for all samples."""
        if self.traits.kind == ENCODER_DECODER or ids.shape[1] < 2:
            return {}
        cache = DynamicCache(config=self.traits.model.config)
        inputs: dict[str, Any] = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], "use_cache": True}
        inputs[self.traits.cache_argument] = cache
        if self.traits.positions:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, :-1]
        self.traits.backbone(**inputs)
        cache.batch_repeat_interleave(samples)
        return {self.traits.cache_argument: cache}

    def _banned(self) -> list[int]:
        """Tokens that hold a line break or a tab, and commas (SG-ICL bans the words; here no token slips through)."""
        size = min(len(self.tokenizer), self.traits.widths.vocabulary)
        special = set(self.tokenizer.all_special_ids)
        texts = self.tokenizer.batch_decode([[token] for token in range(size)])
        return [
            token
            for token, text in enumerate(texts)
            if token not in special
            and (any(c in text for c in "\n\r\t") or (self.decoding.ban_commas and text.strip() == ","))
        ]


class SeededSampling(LogitsProcessor):
    """Draws every row's next token with the row's own random numbers, and leaves it as the only one possible.

    Args:
        decoding: Temperature, top-k and top-p.
        keys: One for each row.
    """

    def __init__(self, decoding: Decoding, keys: Sequence[str]) -> None:
        self.decoding = decoding
        self.generators = [row_generator(key) for key in keys]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Args and result as of every logits processor: `[rows, vocabulary]`."""
        uniforms = [generator.random() for generator in self.generators]
        decoding = self.decoding
        chosen = draw_tokens(scores, uniforms, decoding.temperature, decoding.top_k, decoding.top_p)
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
        temperature, top_k, top_p: As of [`Decoding`].

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
    chosen, found = _inverse_cdf((top - total).exp().double(), tokens, uniforms, top_p, whole=False)
    if not found.all():
        rest = (~found).nonzero()[:, 0]
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
        found = cumulated[:, -1] >= top_p
        kept = cumulated - probabilities < top_p
        cumulated = (probabilities * kept).cumsum(dim=-1)
        threshold = drawn * cumulated[:, -1:]
    else:
        threshold = drawn * (cumulated[:, -1:] if whole else 1.0)
        found = threshold[:, 0] < cumulated[:, -1]
    place = (cumulated <= threshold).sum(dim=-1, keepdim=True).clamp(max=tokens.shape[-1] - 1)
    return tokens.gather(1, place)[:, 0], found
