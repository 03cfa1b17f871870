# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""One forward pass of several candidates for the next token on the cache of the text so far, which it only reads.

Two ways, with the same results:

- As a tree: all candidates of a row are queries of one forward pass, at one position; each sees the text and itself.
  The cache is read through a view, so nothing is copied but what attention needs in one piece.
- Expanded: each candidate is a row of its own, on a copy of the cache. For models whose attention doesn't take such a
  mask or such positions (T5's relative positions, ALiBi, flash attention, recurrent layers).
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Optional

import torch
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from generation_ext.shared_prefix.cache import PrefixLayer, masks
from generation_ext.shared_prefix.inner_states import decoder_layers, states_of
from generation_ext.shared_prefix.running_states import RunningStates
from peft_ext.language_model import LanguageModel, takes_masks


_TREE_CACHES = (Cache, DynamicCache, StaticCache)
_STATIC_LAYERS = (StaticLayer, StaticSlidingWindowLayer)
_TREE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, *_STATIC_LAYERS)
_running = threading.local()


@dataclass
class Prefix:
    """The text so far, as a language model's backbone has encoded it.

    Attributes:
        cache: Keys and values of `length` tokens.
        length: Tokens in the cache.
        hidden: Last hidden states `[batch, hidden]`: the state that the next token is chosen in.
        running: What else is read of the text, see [`RunningStates`]; of candidates, the same is read.
        mask: True where a token is real, bool `[batch, length]`; None: everywhere.
        positions: Position of the next token, `[..., batch or 1, 1]`; None: the model finds it by itself.
        cross: What else the backbone takes: an encoder's states and mask.
    """

    cache: Cache
    length: int
    hidden: torch.Tensor
    mask: Optional[torch.Tensor] = None
    positions: Optional[torch.Tensor] = None
    cross: dict[str, Any] = field(default_factory=dict)
    running: RunningStates = field(default_factory=RunningStates)

    def after(self, hidden: torch.Tensor, running: RunningStates) -> Prefix:
        """The prefix with one more token, whose last hidden states are `hidden`."""
        return replace(
            self,
            length=self.length + 1,
            hidden=hidden,
            running=running,
            mask=None if self.mask is None else nn.functional.pad(self.mask, (0, 1), value=True),
            positions=None if self.positions is None else self.positions + 1,
        )


@dataclass
class Branches:
    """Candidates after a prefix.

    Attributes:
        prefix: What they were tried on.
        candidates: Their tokens, `[batch, k]`.
        running: What is read of the text with each candidate, `[batch, k, ...]`.
        hidden: Last hidden states after each candidate, `[batch, k, hidden]`; None where the pass ended before.
        append: Puts one candidate of each row, `[batch]`, into the prefix's cache.
    """

    prefix: Prefix
    candidates: torch.Tensor
    running: RunningStates
    hidden: Optional[torch.Tensor]
    append: Callable[[torch.Tensor], None]

    def chosen(self, choice: torch.Tensor) -> Prefix:
        """The prefix and one candidate of each row, `[batch]`: its keys and values go into the prefix's cache."""
        assert self.hidden is not None, "the candidates were tried without keep=True"
        self.append(choice)
        hidden = self.hidden[torch.arange(len(choice), device=choice.device), choice]
        return self.prefix.after(hidden, self.running.chosen(choice))


class PreallocatedCache:
    """Keys of all layers in one tensor with free slots, and their values in another, which a cache of plain dynamic layers
    is moved into: candidates are then written behind the text, and nothing of the text is copied."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []  # keys and values, [layers, batch, heads, slots, size]
        self.slots: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def move_in(self, cache: Cache, length: int, count: int) -> bool:
        """Move a cache of `length` tokens in, and see that `count` more have room; False if it isn't of that kind."""
        if type(cache) is not DynamicCache or cache.offloading:
            return False
        layers: list[Any] = cache.layers
        if len(layers) != len(self.slots) or self.states[0].shape[-2] < length + count:
            if not self._allocate(layers, length, count):
                return False
        elif all(layer.keys is keys and layer.values is values for layer, (keys, values) in zip(layers, self._given)):
            return True
        elif not self._alike(layers):
            return False
        for (key_slots, value_slots), layer in zip(self.slots, layers):
            key_slots[:, :, :length] = layer.keys
            value_slots[:, :, :length] = layer.values
        self._give(cache, length)
        return True

    def append(self, prefix: Prefix, choice: torch.Tensor) -> None:
        """Put one of the new tokens of each row, `[batch]`, into the prefix's cache, which was moved in."""
        rows = torch.arange(len(choice), device=choice.device)
        for states in self.states:
            # rows come first: [batch, layers, heads, size]
            chosen = states[:, rows, :, prefix.length + choice]
            states.select(-2, prefix.length).copy_(chosen.movedim(0, 1))
        self._give(prefix.cache, prefix.length + 1)

    def _give(self, cache: Cache, length: int) -> None:
        """Let a cache be the first `length` slots."""
        self._given = [(keys.narrow(2, 0, length), values.narrow(2, 0, length)) for keys, values in self.slots]
        for layer, (keys, values) in zip(cache.layers, self._given):
            layer.keys, layer.values = keys, values

    def _allocate(self, layers: list[Any], length: int, count: int) -> bool:
        # more by half each time, so that a text is copied a few times at most
        slots = length + count + max(64, length // 2)
        # keys and values may differ in width (DeepSeek's latent attention)
        self.states = [
            first.new_empty((len(layers), *first.shape[:2], slots, first.shape[-1]))
            for first in (layers[0].keys, layers[0].values)
        ]
        self.slots = list(zip(*self.states))
        return self._alike(layers)

    def _alike(self, layers: list[Any]) -> bool:
        """Whether all layers' keys and values fit into the slots."""
        return all(
            type(layer) is DynamicLayer
            and states.shape[:2] == free.shape[1:3]
            and states.shape[-1] == free.shape[-1]
            and states.device == free.device
            and states.dtype == free.dtype
            for layer in layers
            for states, free in zip((layer.keys, layer.values), self.states)
        )


def branch(
    model: LanguageModel,
    prefix: Prefix,
    candidates: torch.Tensor,
    keep: bool = False,
    preallocated: Optional[PreallocatedCache] = None,
) -> Branches:
    """Encode candidates for the next token. The prefix and its cache stay as they are.

    Args:
        model: What has encoded the prefix.
        prefix: The text so far.
        candidates: Tokens `[batch, k]`.
        keep: Whether [`Branches.chosen`] will be called; the candidates' keys and values are kept for it. Without it, the pass
            ends at the last layer that is read.
        preallocated: Where the prefix's cache may be moved to, which keeps its contents; with `keep`.
    """
    candidates = candidates.to(prefix.hidden.device)
    if takes_trees(model, prefix):
        return _tree(model, prefix, candidates, keep, preallocated)
    return _expanded(model, prefix, candidates, keep)


def takes_trees(model: LanguageModel, prefix: Prefix) -> bool:
    """Whether candidates can be a tree on this prefix."""
    own_positions = prefix.positions is None and prefix.mask is not None
    return (
        model.takes_positions
        and not own_positions
        and getattr(model.backbone, "_supports_attention_backend", False) is True
        and takes_masks(model.config)
        and not model.other_layers
        and type(prefix.cache) in _TREE_CACHES
        and all(type(layer) in _TREE_LAYERS and layer.is_initialized for layer in prefix.cache.layers)
    )


def can_branch(cache: Cache) -> bool:
    """Whether candidates can be encoded on a cache; not on quantised layers, whose rows can't be repeated, or on kinds
    of static layers that this file doesn't know."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return not isinstance(own, QuantizedCache) and all(
        type(layer) in _STATIC_LAYERS or not isinstance(layer, StaticLayer) for layer in own.layers
    )


def counts_tokens(cache: Cache) -> bool:
    """Whether a cache knows how many tokens it holds. One of recurrent layers alone doesn't; such a model takes the mask of a
    whole prompt, and none with the tokens after it."""
    try:
        cache.get_seq_length()
    except ValueError:
        return False
    return True


def is_running() -> bool:
    """Whether the forward pass that now runs in this thread is one of this file's."""
    return getattr(_running, "depth", 0) > 0


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Within it, [`is_running`] is true, and forward passes aren't recorded."""
    _running.depth = getattr(_running, "depth", 0) + 1
    try:
        yield
    finally:
        _running.depth -= 1


def run_unrecorded(model: LanguageModel, input_ids: torch.Tensor, cache: Cache, **kwargs: Any) -> torch.Tensor:
    """Last hidden states `[batch, tokens, hidden]` of a model's backbone, in a forward pass that isn't recorded."""
    kwargs[model.cache_argument] = cache
    with unrecorded():
        return model.backbone(input_ids=input_ids, use_cache=True, **kwargs)[0]


def run_reading(
    model: LanguageModel,
    input_ids: torch.Tensor,
    cache: Cache,
    wanted: Iterable[int],
    ends: bool = False,
    **kwargs: Any,
) -> tuple[Optional[torch.Tensor], dict[int, torch.Tensor]]:
    """The same, and the states of layers, see [`states_of`]; with `ends`, there may be no last ones."""
    last: list[torch.Tensor] = []

    def run() -> torch.Tensor:
        last.append(run_unrecorded(model, input_ids, cache, **kwargs))
        return last[0]

    states = states_of(decoder_layers(model), wanted, run, ends)
    return last[0] if last else None, states


def _tree(
    model: LanguageModel,
    prefix: Prefix,
    candidates: torch.Tensor,
    keep: bool,
    preallocated: Optional[PreallocatedCache],
) -> Branches:
    count, length = candidates.shape[1], prefix.length
    windows = windows_of_layers(model, prefix.cache)
    if preallocated is not None and not any(windows) and preallocated.move_in(prefix.cache, length, count):
        append: Callable[[torch.Tensor], None] = partial(preallocated.append, prefix)
        layers = [
            PrefixLayer(layer.keys, layer.values, length, slots=slots)
            for layer, slots in zip(prefix.cache.layers, preallocated.slots)
        ]
    else:
        layers = [
            PrefixLayer(*_visible_states(layer, length, window), length, keep)
            for layer, window in zip(prefix.cache.layers, windows)
        ]
        append = partial(_append, prefix.cache, layers)
    real = candidates.new_ones(1, length, dtype=torch.bool) if prefix.mask is None else prefix.mask
    apart = torch.eye(count, dtype=torch.bool, device=candidates.device).expand(len(real), -1, -1)
    mask = masks(
        model,
        lambda window: (real[:, None, length - _visible(length, window) :].expand(-1, count, -1), apart),
        prefix.hidden.dtype,
    )
    positions = prefix.positions
    if positions is None:
        positions = torch.tensor([[length]], device=candidates.device)
    hidden, states = run_reading(
        model,
        candidates,
        Cache(layers=layers),
        prefix.running.layers,
        ends=not keep,
        attention_mask=mask,
        position_ids=positions.expand(*positions.shape[:-2], *candidates.shape),
        **prefix.cross,
    )
    return Branches(prefix, candidates, prefix.running.branched(states), hidden, append)


def windows_of_layers(model: LanguageModel, cache: Cache) -> list[Optional[int]]:
    """How far each layer of a cache looks back; None: to the beginning."""
    kinds = getattr(model.config, "layer_types", None)
    if kinds is None:
        return list(model.windows.values()) * len(cache.layers)
    return [model.windows[kind] for kind in kinds[: len(cache.layers)]]


def _visible(length: int, window: Optional[int]) -> int:
    """How many tokens of a prefix a candidate sees in a layer with this window."""
    return length if window is None else min(length, window - 1)


def _visible_states(layer: Any, length: int, window: Optional[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values that a candidate sees, without those of slots that aren't filled yet."""
    stored = min(length, layer.max_cache_len) if isinstance(layer, StaticLayer) else layer.keys.shape[-2]
    start = stored - _visible(length, window)
    return layer.keys[:, :, start:stored], layer.values[:, :, start:stored]


def _append(cache: Cache, views: Sequence[PrefixLayer], choice: torch.Tensor) -> None:
    """Put one of the new tokens of each row, `[batch]`, into the cache that layers are views of."""
    rows = torch.arange(len(choice), device=choice.device)
    for layer, view in zip(cache.layers, views):
        visible = view.keys.shape[-2]
        keys, values = (states[rows, :, visible + choice].unsqueeze(-2) for states in view.updated)
        if type(layer) is DynamicLayer and visible == layer.keys.shape[-2]:
            # the copy that attention needed serves as the cache, as it does in DynamicLayer.update
            for states, new in zip(view.updated, (keys, values)):
                states[:, :, visible : visible + 1] = new
            layer.keys, layer.values = (states[:, :, : visible + 1] for states in view.updated)
        else:
            layer.update(keys, values)


def _expanded(model: LanguageModel, prefix: Prefix, candidates: torch.Tensor, keep: bool) -> Branches:
    batch, count = candidates.shape
    rows = torch.arange(batch, device=candidates.device).repeat_interleave(count)
    cache = _copied(prefix.cache, prefix.length)
    cache.reorder_cache(rows)
    kwargs = {name: _rows_of(value, rows, batch) for name, value in prefix.cross.items()}
    if prefix.mask is not None and counts_tokens(prefix.cache):
        kwargs["attention_mask"] = nn.functional.pad(prefix.mask, (0, 1), value=True)[rows].long()
    if prefix.positions is not None and model.takes_positions:
        positions = prefix.positions
        kwargs["position_ids"] = positions.index_select(-2, rows) if positions.shape[-2] == batch else positions
    layers = prefix.running.layers
    last, each = run_reading(model, candidates.reshape(-1, 1), cache, layers, ends=not keep, **kwargs)
    states = {index: state[:, -1].unflatten(0, (batch, count)) for index, state in each.items()}
    hidden = None if last is None else last[:, -1].unflatten(0, (batch, count))
    return Branches(
        prefix, candidates, prefix.running.branched(states), hidden, partial(_append_row, prefix.cache, cache, count)
    )


def _append_row(cache: Cache, expanded: Cache, count: int, choice: torch.Tensor) -> None:
    """Let a cache go on as one of the `count` rows for each of its own, `[batch]`, in which candidates were tried."""
    own = expanded.self_attention_cache if isinstance(expanded, EncoderDecoderCache) else expanded
    own.reorder_cache(torch.arange(len(choice), device=choice.device) * count + choice)
    _take_over(cache, expanded)


def _rows_of(value: Any, rows: torch.Tensor, batch: int) -> Any:
    return value.index_select(0, rows) if isinstance(value, torch.Tensor) and len(value) == batch else value


def _copied(cache: Cache, length: int) -> Cache:
    """A cache that can be reordered and go on, while the original keeps its tensors; nothing large is copied.

    Static layers, which may be full, become dynamic ones.
    """
    new = copy.copy(cache)
    if isinstance(cache, EncoderDecoderCache):
        new.self_attention_cache = _copied(cache.self_attention_cache, length)
        new.cross_attention_cache = copy.copy(cache.cross_attention_cache)  # only read
        new.cross_attention_cache.layers = [_twin(layer) for layer in cache.cross_attention_cache.layers]
        new.is_updated = dict(cache.is_updated)
        return new
    new.layers = [_dynamic(layer, length) if type(layer) in _STATIC_LAYERS else _twin(layer) for layer in cache.layers]
    return new


def _twin(layer: Any) -> Any:
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(twin, name, dict(value))
        elif isinstance(value, torch.Tensor) and value.ndim == 0:  # a length that is counted up in place
            setattr(twin, name, value.clone())
    return twin


def _dynamic(layer: Any, length: int) -> DynamicLayer:
    stored = min(length, layer.max_cache_len)
    keys, values = layer.keys[:, :, :stored], layer.values[:, :, :stored]
    if not isinstance(layer, StaticSlidingWindowLayer):
        new = DynamicLayer()
    else:
        window = layer.max_cache_len
        new = DynamicSlidingWindowLayer(sliding_window=window)
        new.cumulative_length = length
        start = max(stored - window + 1, 0)
        keys, values = keys[:, :, start:], values[:, :, start:]
    new.lazy_initialization(keys, values)
    new.keys, new.values = keys, values
    return new


def _take_over(cache: Cache, other: Cache) -> None:
    """Let a cache go on as another one did that was copied from it; its user may hold it."""
    if isinstance(cache, EncoderDecoderCache) and isinstance(other, EncoderDecoderCache):
        return _take_over(cache.self_attention_cache, other.self_attention_cache)
    for layer, new in zip(cache.layers, other.layers):
        if type(layer) in _STATIC_LAYERS:
            layer.update(new.keys[:, :, -1:], new.values[:, :, -1:])
        else:
            vars(layer).update(vars(new))
