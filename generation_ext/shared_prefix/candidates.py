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
import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import torch
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from peft_ext.language_model import CACHE_NAMES, cache_name, takes_masks, windows_of


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

    def after(self, hidden: torch.Tensor, cache: Optional[Cache] = None) -> Prefix:
        """The prefix with one more token, whose last hidden states are `hidden`."""
        return replace(
            self,
            cache=self.cache if cache is None else cache,
            length=self.length + 1,
            hidden=hidden,
            mask=None if self.mask is None else nn.functional.pad(self.mask, (0, 1), value=True),
            positions=None if self.positions is None else self.positions + 1,
        )


class Backbone:
    """A language model's backbone (see [`backbone`][generation_ext.critic.backbone]) and what its forward pass takes."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
        self.cache_name = cache_name(self.parameters)
        self.takes_positions = "position_ids" in self.parameters
        self.config = module.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        self.windows, self.other_layers = windows_of(self.config)

    def takes_trees(self, prefix: Prefix) -> bool:
        """Whether candidates can be a tree on this prefix."""
        own_positions = prefix.positions is None and prefix.mask is not None
        return (
            self.takes_positions
            and not own_positions
            and getattr(self.module, "_supports_attention_backend", False) is True
            and takes_masks(self.config)
            and not self.other_layers
            and type(prefix.cache) in _TREE_CACHES
            and all(type(layer) in _TREE_LAYERS and layer.is_initialized for layer in prefix.cache.layers)
        )

    def __call__(self, input_ids: torch.Tensor, cache: Cache, **kwargs: Any) -> torch.Tensor:
        """Last hidden states `[batch, tokens, hidden]`; watchers don't notice (see [`is_running`])."""
        kwargs[self.cache_name or CACHE_NAMES[0]] = cache
        with unwatched():
            output = self.module(input_ids=input_ids, use_cache=True, **kwargs)
        return output[0]


@dataclass
class Branches:
    """Candidates after a prefix.

    Attributes:
        hidden: Last hidden states after each candidate, `[batch, k, hidden]`.
    """

    backbone: Backbone
    prefix: Prefix
    hidden: torch.Tensor
    cache: Cache

    def chosen(self, choice: torch.Tensor) -> Prefix:
        """The prefix and one candidate of each row: its keys and values go into the prefix's cache.

        Args:
            choice: Which of the candidates, `[batch]`.
        """
        rows = torch.arange(len(choice), device=choice.device)
        if isinstance(self.cache, _PrefixView):
            self.cache.append(choice)
        else:
            own = self.cache.self_attention_cache if isinstance(self.cache, EncoderDecoderCache) else self.cache
            own.reorder_cache(rows * self.hidden.shape[1] + choice)
            _take_over(self.prefix.cache, self.cache)
        return self.prefix.after(self.hidden[rows, choice])


class Room:
    """Keys and values of all layers in one tensor with free slots, which a cache of plain dynamic layers is moved into:
    candidates are then written behind the text, and nothing of the text is copied."""

    def __init__(self) -> None:
        self.states = torch.empty(0)  # [layers, keys or values, batch, heads, slots, size]
        self.slots: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def move_in(self, cache: Cache, length: int, count: int) -> bool:
        """Move a cache of `length` tokens in, and see that `count` more have room; False if it isn't of that kind."""
        if type(cache) is not DynamicCache or cache.offloading:
            return False
        layers: list[Any] = cache.layers
        if len(layers) != len(self.slots) or self.states.shape[-2] < length + count:
            if not self._allocate(layers, length, count):
                return False
        elif all(layer.keys is keys and layer.values is values for layer, (keys, values) in zip(layers, self._given)):
            return True
        elif not self._alike(layers):
            return False
        for (key_slots, value_slots), layer in zip(self.slots, layers):
            key_slots[:, :, :length] = layer.keys
            value_slots[:, :, :length] = layer.values
        self.give(cache, length)
        return True

    def give(self, cache: Cache, length: int) -> None:
        """Let the cache be the first `length` slots."""
        self._given = [(keys.narrow(2, 0, length), values.narrow(2, 0, length)) for keys, values in self.slots]
        for layer, (keys, values) in zip(cache.layers, self._given):
            layer.keys, layer.values = keys, values

    def _allocate(self, layers: list[Any], length: int, count: int) -> bool:
        first = layers[0].keys
        # more by half each time, so that a text is copied a few times at most
        slots = length + count + max(64, length // 2)
        self.states = first.new_empty((len(layers), 2, *first.shape[:2], slots, first.shape[-1]))
        self.slots = [(pair[0], pair[1]) for pair in self.states]
        return self._alike(layers)

    def _alike(self, layers: list[Any]) -> bool:
        """Whether all layers' keys and values fit into the slots."""
        free = self.states
        return all(
            type(layer) is DynamicLayer
            and states.shape[:2] == free.shape[2:4]
            and states.shape[-1] == free.shape[-1]
            and states.device == free.device
            and states.dtype == free.dtype
            for layer in layers
            for states in (layer.keys, layer.values)
        )


def branch(
    backbone: Backbone, prefix: Prefix, candidates: torch.Tensor, keep: bool = False, room: Optional[Room] = None
) -> Branches:
    """Encode candidates for the next token. The prefix and its cache stay as they are.

    Args:
        backbone: What has encoded the prefix.
        prefix: The text so far.
        candidates: Tokens `[batch, k]`.
        keep: Whether [`Branches.chosen`] will be called; the candidates' keys and values are kept for it.
        room: Where the prefix's cache may be moved to, which keeps its contents; with `keep`.
    """
    candidates = candidates.to(prefix.hidden.device)
    if backbone.takes_trees(prefix):
        return _tree(backbone, prefix, candidates, keep, room)
    return _expanded(backbone, prefix, candidates)


def can_branch(cache: Cache) -> bool:
    """Whether candidates can be encoded on a cache; not on quantised layers, whose rows can't be repeated, or on kinds
    of static layers that this file doesn't know."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return not isinstance(own, QuantizedCache) and all(
        type(layer) in _STATIC_LAYERS or not isinstance(layer, StaticLayer) for layer in own.layers
    )


def is_running() -> bool:
    """Whether the forward pass that now runs in this thread is one of this file's."""
    return getattr(_running, "depth", 0) > 0


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Within it, [`is_running`] is true, and watchers note nothing."""
    _running.depth = getattr(_running, "depth", 0) + 1
    try:
        yield
    finally:
        _running.depth -= 1


def _tree(backbone: Backbone, prefix: Prefix, candidates: torch.Tensor, keep: bool, room: Optional[Room]) -> Branches:
    windows = backbone.windows
    of_layers = _windows_of_layers(backbone, windows, prefix.cache)
    view: _PrefixView
    if room is not None and not any(of_layers) and room.move_in(prefix.cache, prefix.length, candidates.shape[1]):
        view = _RoomView(prefix.cache, prefix.length, of_layers, keep, room)
    else:
        view = _PrefixView(prefix.cache, prefix.length, of_layers, keep)
    masks = {kind: _tree_mask(prefix, candidates.shape[1], view.visible(window)) for kind, window in windows.items()}
    positions = prefix.positions
    if positions is None:
        positions = torch.tensor([[prefix.length]], device=candidates.device)
    hidden = backbone(
        candidates,
        view,
        attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
        position_ids=positions.expand(*positions.shape[:-2], *candidates.shape),
        **prefix.cross,
    )
    return Branches(backbone, prefix, hidden, view)


def _windows_of_layers(backbone: Backbone, windows: dict[str, Optional[int]], cache: Cache) -> list[Optional[int]]:
    types = getattr(backbone.config, "layer_types", None)
    if types is None:
        return list(windows.values()) * len(cache.layers)
    return [windows[kind] for kind in types[: len(cache.layers)]]


def _tree_mask(prefix: Prefix, count: int, visible: int) -> torch.Tensor:
    """What is added to attention scores, `[batch or 1, 1, k, visible + k]`: each candidate sees the last `visible`
    tokens, if they are real, and itself."""
    hidden = prefix.hidden
    hide = torch.finfo(hidden.dtype).min
    rows = 1 if prefix.mask is None else len(prefix.mask)
    mask = hidden.new_full((rows, 1, count, visible + count), hide)
    mask[..., visible:].diagonal(dim1=-2, dim2=-1).zero_()
    if prefix.mask is None:
        mask[..., :visible] = 0
    else:
        real = prefix.mask[:, None, None, prefix.length - visible :]
        mask[..., :visible].masked_fill_(real, 0)
    return mask


class _PrefixView(Cache):
    """A cache whose `update` returns the prefix and what is new, and stores neither."""

    def __init__(self, cache: Cache, length: int, windows: list[Optional[int]], keep: bool) -> None:
        super().__init__(layers=cache.layers)
        self.length = length
        self.windows = windows
        self.keep = keep
        self.updated: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def visible(self, window: Optional[int]) -> int:
        """How many tokens of the prefix a candidate sees in a layer with this window."""
        return self.length if window is None else min(self.length, window - 1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._prefix(layer_idx)
        if keys.device != key_states.device:  # an offloaded layer
            keys, values = keys.to(key_states.device), values.to(key_states.device)
        keys = torch.cat([keys, key_states], dim=-2)
        values = torch.cat([values, value_states], dim=-2)
        if self.keep:
            self.updated[layer_idx] = (keys, values)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def append(self, choice: torch.Tensor) -> None:
        """Put one of the new tokens of each row into the cache that this is a view of."""
        rows = torch.arange(len(choice), device=choice.device)
        for layer_idx, both in self.updated.items():
            layer = self.layers[layer_idx]
            seen = self.visible(self.windows[layer_idx])
            keys, values = (states[rows, :, seen + choice].unsqueeze(-2) for states in both)
            if type(layer) is DynamicLayer and seen == layer.keys.shape[-2]:
                # the copy that attention needed serves as the cache, as it does in DynamicLayer.update
                for states, new in zip(both, (keys, values)):
                    states[:, :, seen : seen + 1] = new
                layer.keys, layer.values = (states[:, :, : seen + 1] for states in both)
            else:
                layer.update(keys, values)
        self.updated = {}

    def _prefix(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that a candidate sees, without those of slots that aren't filled yet."""
        layer = self.layers[layer_idx]
        if isinstance(layer, StaticLayer):
            stored = min(self.length, layer.max_cache_len)
        else:
            stored = layer.keys.shape[-2]
        seen = self.visible(self.windows[layer_idx])
        start = stored - seen
        return layer.keys[:, :, start:stored], layer.values[:, :, start:stored]


class _RoomView(_PrefixView):
    """A view of a cache that lies in a room with free slots behind it, which the new tokens are written to."""

    def __init__(self, cache: Cache, length: int, windows: list[Optional[int]], keep: bool, room: Room) -> None:
        super().__init__(cache, length, windows, keep)
        self.room = room

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = key_states.shape[-2]
        key_slots, value_slots = self.room.slots[layer_idx]
        key_slots.narrow(2, self.length, count).copy_(key_states)
        value_slots.narrow(2, self.length, count).copy_(value_states)
        return key_slots.narrow(2, 0, self.length + count), value_slots.narrow(2, 0, self.length + count)

    def append(self, choice: torch.Tensor) -> None:
        states = self.room.states
        rows = torch.arange(len(choice), device=choice.device)
        chosen = states[:, :, rows, :, self.length + choice]  # rows come first: [batch, layers, 2, heads, size]
        states.select(-2, self.length).copy_(chosen.movedim(0, 2))
        self.room.give(self, self.length + 1)


def _expanded(backbone: Backbone, prefix: Prefix, candidates: torch.Tensor) -> Branches:
    batch, count = candidates.shape
    rows = torch.arange(batch, device=candidates.device).repeat_interleave(count)
    cache = _copied(prefix.cache, prefix.length)
    cache.reorder_cache(rows)
    kwargs = {name: _rows_of(value, rows, batch) for name, value in prefix.cross.items()}
    if prefix.mask is not None:
        kwargs["attention_mask"] = nn.functional.pad(prefix.mask, (0, 1), value=True)[rows].long()
    if prefix.positions is not None and backbone.takes_positions:
        positions = prefix.positions
        kwargs["position_ids"] = positions.index_select(-2, rows) if positions.shape[-2] == batch else positions
    hidden = backbone(candidates.reshape(-1, 1), cache, **kwargs)
    return Branches(backbone, prefix, hidden[:, -1].unflatten(0, (batch, count)), cache)


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
