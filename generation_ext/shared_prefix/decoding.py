# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Steps of many texts behind one prefix: its keys and values are stored once and read once for all rows of a step.

Attention over a prefix and over a row's own tokens are computed apart and joined by their softmax's sums, which is exact
(Juravsky et al. 2024, "Hydragen"). A cache that repeats the prefix for each row is read, and copied, row by row instead.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Optional

import numpy as np
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from generation_ext.shared_prefix.cache import EMPTY, SharedPrefix, encode_prefix
from generation_ext.shared_prefix.sampling import Sampling
from generation_ext.shared_prefix.token_tree import padded
from peft_ext.language_model import CAUSAL, FULL, LanguageModel


# A text is searched for what ends it every so many tokens.
STOP_STEPS = 4
ATTENTION = "almost_shared_prefix"
# Scores of so many pairs of tokens are computed at once.
_MOST_SCORES = 1 << 25
# When so few of a batch's texts go on, the finished ones are dropped.
_LIVE_SHARE = 0.75
# The rows' own keys and values get room for so many more tokens at once.
_BUFFER_STEP = 64
_CACHE: ContextVar[Optional[Cache]] = ContextVar("almost_cache", default=None)
# By their ids, configs of models that decode at the moment: in how many threads, and the class that they have otherwise.
_configs: dict[int, tuple[int, Any]] = {}
_configs_lock = threading.Lock()


class DecodingBatch:
    """Texts that are written side by side.

    Args:
        model: A causal model.
        prefix: What all texts begin with, see [`encode_prefix`]; empty where the model can't share it.
        prompts: For each text the tokens after the prefix; at least one.
        samples: Texts that go on from each prompt.
    """

    def __init__(
        self,
        model: LanguageModel,
        prefix: SharedPrefix,
        prompts: Sequence[Sequence[int]],
        samples: int = 1,
    ) -> None:
        self.model, self.prefix, self.samples = model, prefix, samples
        self.shares = can_share(model)
        if len(prefix) and not self.shares:
            raise ValueError("prefix must be empty, since this model's attention can't be taken apart.")
        self.tokens, real = (part.to(model.device) for part in padded(prompts, 0, "left"))
        # [rows, own tokens]: which of a row's own columns are its text
        self.mask = real.bool()
        # what comes next stands here
        self.positions = real.sum(dim=1, keepdim=True) + len(prefix)
        if self.shares:
            self.cache = Cache(layers=[_BufferedLayer(*layer) for layer in _prefix_layers(model, prefix)])
        else:
            self.cache = DynamicCache(config=model.base.config)
        self._last_only = "logits_to_keep" in inspect.signature(model.base.forward).parameters

    def start(self) -> torch.Tensor:
        """Run the prompts; logits `[prompts * samples, vocabulary]` of what comes next."""
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0) + len(self.prefix)
        logits = self._run(self.tokens, positions)
        if self.samples > 1:
            self.cache.batch_repeat_interleave(self.samples)
            self.mask = self.mask.repeat_interleave(self.samples, dim=0)
            self.positions = self.positions.repeat_interleave(self.samples, dim=0)
        return logits.repeat_interleave(self.samples, dim=0)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Add a token `[rows]` to each text; logits `[rows, vocabulary]` of what comes next."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        logits = self._run(tokens[:, None], self.positions)
        self.positions = self.positions + 1
        return logits

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all texts but these (indices)."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def _run(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": True, self.model.cache_argument: self.cache}
        if self._last_only:
            inputs["logits_to_keep"] = 1
        if self.model.takes_positions:
            inputs["position_ids"] = positions
        if not self.shares:
            return self.model.base(**inputs, attention_mask=self.mask.long()).logits[:, -1]
        count = tokens.shape[1]
        causal = torch.ones(count, self.mask.shape[1], dtype=torch.bool, device=tokens.device)
        visible = causal.tril(self.mask.shape[1] - count) & self.mask[:, None]
        # a padding token sees itself, so that no softmax is over nothing
        visible = visible | torch.eye(self.mask.shape[1], dtype=torch.bool, device=tokens.device)[-count:]
        visible = torch.nn.functional.pad(visible, (0, _buffer_length(self.mask.shape[1]) - self.mask.shape[1]))
        with _attention(self.model, self.cache):
            return self.model.base(**inputs, attention_mask=visible[:, None]).logits[:, -1]


def can_share(model: LanguageModel) -> bool:
    """Whether a model's attention can be taken apart: full attention that goes through transformers' interface, without a
    cap or a sink in it."""
    own = getattr(model.base, "_can_set_attn_implementation", lambda: False)()
    plain = not getattr(model.config, "attn_logit_softcapping", None) and not hasattr(model.config, "attention_sink")
    kinds = {type(module).__name__ for module in model.base.modules() if hasattr(module, "sinks")}
    return bool(model.kind == CAUSAL and model.trees and set(model.windows) == {FULL} and own and plain and not kinds)


def sample_tokens(
    model: LanguageModel,
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
        model: A causal model, in inference mode.
        prefix: What all texts begin with; empty where the model can't share it.
        prompts: For each, the tokens after the prefix; at least one.
        generators: Each text's random numbers.
        sampling: Temperature, top-k, nucleus, length.
        ends: Tokens that end a text.
        over: Whether a text, by its tokens so far, has ended in another way; asked every `STOP_STEPS` tokens.
    """
    batch = DecodingBatch(model, prefix, prompts, len(generators) // len(prompts))
    logits = batch.start()
    written: list[list[int]] = [[] for _ in generators]
    running, finished = list(range(len(generators))), set()
    for step in range(sampling.max_new_tokens):
        drawn = sampling.draw(logits, [generators[index] for index in running])
        for index, token in zip(running, drawn.tolist()):
            if index not in finished:
                written[index].append(token)
                if token in ends:
                    finished.add(index)
        if over is not None and step % STOP_STEPS == STOP_STEPS - 1:
            finished |= {index for index in running if index not in finished and over(written[index])}
        live = [row for row, index in enumerate(running) if index not in finished]
        if not live or step == sampling.max_new_tokens - 1:
            break
        if len(live) <= _LIVE_SHARE * len(running):
            kept = torch.tensor(live, device=drawn.device)
            batch.keep(kept)
            drawn, running = drawn[kept], [running[row] for row in live]
        logits = batch.step(drawn)
    return written


class _BufferedLayer(DynamicLayer):
    """The rows' own keys and values at the beginning of a buffer; a prefix's beside them.

    Attention reads the buffer whole, its end hidden: products of bfloat16 with a slice of it, which isn't contiguous, take
    ten times as long on a CPU.
    """

    def __init__(self, prefix_keys: Optional[torch.Tensor], prefix_values: Optional[torch.Tensor]) -> None:
        super().__init__()
        self.prefix_keys, self.prefix_values, self.length = prefix_keys, prefix_values, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.length == 0:
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.is_initialized = True
        end = self.length + key_states.shape[-2]
        if end > self.keys.shape[-2]:
            self.keys, self.values = _longer(self.keys, end), _longer(self.values, end)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys, self.values

    def get_seq_length(self) -> int:
        past = 0 if self.prefix_keys is None else self.prefix_keys.shape[-2]
        return past + self.length


def _buffer_length(needed: int) -> int:
    return math.ceil(needed / _BUFFER_STEP) * _BUFFER_STEP


def _longer(buffer: torch.Tensor, needed: int) -> torch.Tensor:
    # zeros, as what is hidden is still multiplied by a weight of zero
    free = buffer.new_zeros(*buffer.shape[:2], _buffer_length(needed) - buffer.shape[-2], buffer.shape[-1])
    return torch.cat([buffer, free], dim=-2)


def _prefix_layers(
    model: LanguageModel, prefix: SharedPrefix
) -> list[tuple[Optional[torch.Tensor], Optional[torch.Tensor]]]:
    if len(prefix):
        return list(zip(prefix.keys, prefix.values))
    return [(None, None)] * model.config.num_hidden_layers


@contextlib.contextmanager
def _attention(model: LanguageModel, cache: Cache) -> Iterator[None]:
    """For one forward pass, the model's attention is ours; other threads' passes go on with the model's own."""
    config, token = model.config, _CACHE.set(cache)
    with _configs_lock:
        count, kind = _configs.get(id(config), (0, type(config)))
        _configs[id(config)] = (count + 1, kind)
        config.__class__ = _choosing(kind)
    try:
        yield
    finally:
        with _configs_lock:
            count, kind = _configs.pop(id(config))
            if count > 1:
                _configs[id(config)] = (count - 1, kind)
            else:
                config.__class__ = kind
        _CACHE.reset(token)


@functools.cache
def _choosing(kind: Any) -> Any:
    """A config's class whose attention is ours where a call has a cache of ours, and else what it says."""
    usual = kind._attn_implementation

    def implementation(self: Any) -> Any:
        return usual.fget(self) if _CACHE.get() is None else ATTENTION

    return type(kind.__name__, (kind,), {"_attn_implementation": property(implementation, usual.fset)})


def _shared_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
    scaling: Optional[float] = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers' interface; `[R, heads, L, size]` -> `[R, L, heads, size]`."""
    cache = _CACHE.get()
    if cache is None:
        raise ValueError(f"attn_implementation={ATTENTION!r} belongs to our decoding; load the model with 'sdpa'.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows, heads, length, size = query.shape
    groups = key.shape[1]
    # query heads of one group beside each other, as grouped-query attention wants it
    asked = query.reshape(rows, groups, heads // groups * length, size)
    hidden = None if attention_mask is None else ~attention_mask.repeat(1, 1, heads // groups, 1)
    own, own_sums = _attend(asked, key, value, scale, hidden)
    layer = cache.layers[module.layer_idx]
    if layer.prefix_keys is not None:
        flat = asked.transpose(0, 1).reshape(1, groups, -1, size)
        past, past_sums = _attend_in_pieces(flat, layer.prefix_keys, layer.prefix_values, scale)
        past = past.reshape(groups, rows, -1, size).transpose(0, 1)
        past_sums = past_sums.reshape(groups, rows, -1, 1).transpose(0, 1)
        share = torch.sigmoid(past_sums - own_sums).to(own.dtype)
        own = torch.lerp(own, past, share)
    return own.reshape(rows, heads, length, size).transpose(1, 2).contiguous(), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, hidden: Optional[torch.Tensor] = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention gives, and the logarithm `[..., 1]` of its softmax's sum."""
    scores = (query * scale) @ key.transpose(-1, -2)
    scores = scores.float()
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    most = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(most).exp_()
    sums = weights.sum(dim=-1, keepdim=True)
    return (weights.to(value.dtype) @ value) / sums.to(value.dtype), sums.log() + most


def _attend_in_pieces(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    size = max(1, _MOST_SCORES // (key.shape[1] * key.shape[2]))
    pieces = [_attend(piece, key, value, scale) for piece in query.split(size, dim=2)]
    return torch.cat([piece for piece, _ in pieces], dim=2), torch.cat([sums for _, sums in pieces], dim=2)


def prefix_of(model: LanguageModel, tokens: Sequence[int]) -> SharedPrefix:
    """Run a model over a prefix once; empty where its attention can't be taken apart."""
    return encode_prefix(model, tokens) if can_share(model) else EMPTY


AttentionInterface.register(ATTENTION, _shared_attention)
