# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The shared prefix: demonstrations are encoded once, and every text of a batch attends to their keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from transformers.cache_utils import Cache, DynamicLayer

from generation_ext.shared_prefix.token_tree import PackedRows, TokenTree, pack, unfold
from peft_ext.language_model import LanguageModel


class SharedPrefix(NamedTuple):
    """A prefix and what a causal model keeps of it.

    Attributes:
        tokens: Its token ids.
        keys: For each layer `[1, heads, tokens, head size]`; empty for an empty prefix.
        values: As `keys`.
    """

    tokens: tuple[int, ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def cache(self) -> Cache:
        """A transformers cache for one forward pass of any batch size; it never grows."""
        return Cache(layers=[_SharedLayer(*layer) for layer in zip(self.keys, self.values)])


EMPTY = SharedPrefix((), (), ())


def common_prefix(texts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all texts begin, leaving at least one of each text."""
    # in lexicographic order, all others lie between these two
    first, last = min(map(tuple, texts)), max(map(tuple, texts))
    shortest = min(len(text) for text in texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return list(first[: min(length, shortest - 1)])


def encode_prefix(traits: LanguageModel, tokens: Sequence[int]) -> SharedPrefix:
    """Run a causal model over a prefix once.

    Args:
        traits: The model, see [`language_model`].
        tokens: Token ids; may be empty.

    Returns:
        Keys and values of all its tokens, of sliding layers too.
    """
    if not tokens:
        return EMPTY
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    run_backbone(traits, layout(traits, [TokenTree.chain(tokens)]), EMPTY, cache=cache)
    layers = cache.layers
    return SharedPrefix(tuple(tokens), tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers))


def layout(
    traits: LanguageModel, trees: Sequence[TokenTree], rows: Optional[Sequence[Sequence[int]]] = None
) -> PackedRows:
    """Lay trees out as the model takes them: packed into `rows` (by default one each), or a row for each leaf."""
    if not traits.trees:
        return unfold(trees)
    return pack(trees, [[index] for index in range(len(trees))] if rows is None else rows)


def run_backbone(
    traits: LanguageModel, rows: PackedRows, prefix: SharedPrefix, cache: Optional[Cache] = None, **kwargs: Any
) -> Any:
    """Hidden states of packed rows after a shared prefix.

    Args:
        traits: A causal model.
        rows: What to run, see [`layout`].
        prefix: What comes before every tree.
        cache: Filled with the rows' own keys and values, if there is no prefix.
        **kwargs: Passed to the model's `forward`.

    Returns:
        The backbone's output, `last_hidden_state` `[R, L, hidden]`.
    """
    return traits.backbone(**_inputs(traits, rows, prefix, cache), **kwargs)


def read_logits(traits: LanguageModel, rows: PackedRows, prefix: SharedPrefix) -> torch.Tensor:
    """Logits `[N, vocabulary]` at `rows.places`; the output head sees these tokens alone."""
    places = rows.places.to(traits.device)
    with NarrowedHead(traits, places):
        output = traits.model(**_inputs(traits, rows, prefix, None))
    return output.logits[0]


class NarrowedHead:
    """While it is entered, a model's output head computes chosen places only.

    A hook on the head, not a call of it, because models scale or cap what it gives in ways of their own.

    Args:
        traits: The model.
        places: int64 `[N, 2]`: rows and columns; the model's logits become `[1, N, vocabulary]`.
    """

    def __init__(self, traits: LanguageModel, places: torch.Tensor) -> None:
        self.head = traits.model.get_output_embeddings()
        if self.head is None:
            raise TypeError(f"model ({type(traits.model).__name__}) has no output head; load it as a language model.")
        self.places = places

    def __enter__(self) -> None:
        self.handle = self.head.register_forward_pre_hook(self._narrow)

    def __exit__(self, *exception: Any) -> None:
        self.handle.remove()

    def _narrow(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0]
        places = self.places.to(hidden.device)
        return (hidden[places[:, 0], places[:, 1]][None], *args[1:])


class _SharedLayer(DynamicLayer):
    """A layer whose past is one row for the whole batch and stays as it is."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        past = (len(key_states), -1, -1, -1)
        keys = torch.cat([self.keys.expand(past), key_states], dim=-2)
        return keys, torch.cat([self.values.expand(past), value_states], dim=-2)


def _inputs(traits: LanguageModel, rows: PackedRows, prefix: SharedPrefix, cache: Optional[Cache]) -> dict[str, Any]:
    device = traits.device
    if len(prefix):
        cache = prefix.cache()
    inputs: dict[str, Any] = {"input_ids": rows.tokens.to(device), "use_cache": cache is not None}
    inputs[traits.cache_argument] = cache
    if rows.visible is None:
        inputs["attention_mask"] = _flat_mask(rows, len(prefix)).to(device)
    else:
        inputs["attention_mask"] = _masks(traits, rows, rows.visible, len(prefix))
        inputs["position_ids"] = (rows.depths + len(prefix)).to(device)
    return inputs


def _flat_mask(rows: PackedRows, prefix_length: int) -> torch.Tensor:
    """int64 `[R, prefix + L]`."""
    columns = torch.arange(rows.tokens.shape[1])
    own = (columns < rows.lengths[:, None]).long()
    return torch.cat([own.new_ones(len(own), prefix_length), own], dim=1)


def _masks(traits: LanguageModel, rows: PackedRows, visible: torch.Tensor, prefix_length: int) -> Any:
    """A 4D mask; a dict of them for a model that mixes kinds of attention."""
    masks = {kind: _mask(traits, rows, visible, prefix_length, window) for kind, window in traits.windows.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _mask(
    traits: LanguageModel, rows: PackedRows, visible: torch.Tensor, prefix_length: int, window: Optional[int]
) -> torch.Tensor:
    """`[R, 1, L, prefix + L]`: bool, or for eager attention floats to be added."""
    device = traits.device
    depths, own = rows.depths.to(device), visible.to(device)
    past = torch.ones(*depths.shape, prefix_length, dtype=torch.bool, device=device)
    if window is not None:
        before = torch.arange(-prefix_length, 0, device=device)
        past = depths[:, :, None] - before < window
        own = own & (depths[:, :, None] - depths[:, None, :] < window)
    mask = torch.cat([past, own], dim=-1)[:, None]
    if not traits.eager:
        return mask
    return torch.where(mask, 0.0, torch.finfo(traits.dtype).min).to(traits.dtype)
