# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A prefix that is only read: it is encoded once, and every text of a batch attends to its keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Optional

import torch
from transformers.cache_utils import Cache, DynamicLayer

from generation_ext.shared_prefix.token_tree import PackedRows, TokenTree, pack, unfold
from peft_ext.language_model import ENCODER_DECODER, LanguageModel
from peft_ext.threads import hooks_of_this_thread


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
        return Cache(layers=[PrefixLayer(*layer) for layer in zip(self.keys, self.values)])


EMPTY = SharedPrefix((), (), ())


def common_prefix(texts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all texts begin, leaving at least one of each text."""
    # in lexicographic order, all others lie between these two
    first, last = min(map(tuple, texts)), max(map(tuple, texts))
    shortest = min(len(text) for text in texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return list(first[: min(length, shortest - 1)])


def encode_prefix(model: LanguageModel, tokens: Sequence[int]) -> SharedPrefix:
    """Run a causal model over a prefix once.

    Args:
        model: See [`language_model`].
        tokens: Token ids; may be empty.

    Returns:
        Keys and values of all its tokens, of sliding layers too.
    """
    if not tokens:
        return EMPTY
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    run_backbone(model, layout(model, [TokenTree.chain(tokens)]), EMPTY, cache=cache)
    layers = cache.layers
    return SharedPrefix(tuple(tokens), tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers))


def layout(
    model: LanguageModel, trees: Sequence[TokenTree], rows: Optional[Sequence[Sequence[int]]] = None
) -> PackedRows:
    """Lay trees out as the model takes them: packed into `rows` (by default one each), or a row for each leaf (encoders
    too)."""
    if not model.trees:
        return unfold(trees)
    return pack(trees, [[index] for index in range(len(trees))] if rows is None else rows)


def run_backbone(
    model: LanguageModel, rows: PackedRows, prefix: SharedPrefix, cache: Optional[Cache] = None, **kwargs: Any
) -> Any:
    """Hidden states of packed rows after a shared prefix.

    Args:
        model: A causal model.
        rows: What to run, see [`layout`].
        prefix: What comes before every tree.
        cache: Filled with the rows' own keys and values, if there is no prefix.
        **kwargs: Passed to the model's `forward`.

    Returns:
        The backbone's output, `last_hidden_state` `[R, L, hidden]`.
    """
    return model.backbone(**_inputs(model, rows, prefix, cache), **kwargs)


def encode_whole(model: LanguageModel, rows: PackedRows, **kwargs: Any) -> tuple[Any, torch.Tensor]:
    """What an encoder, or the one of an encoder-decoder model, gives for unfolded rows, and their mask `[R, L]`."""
    encoder = model.base.get_encoder() if model.kind == ENCODER_DECODER else model.backbone
    mask = _flat_mask(rows, 0).to(model.device)
    return encoder(input_ids=rows.tokens.to(model.device), attention_mask=mask, **kwargs), mask


def read_logits(model: LanguageModel, rows: PackedRows, prefix: SharedPrefix) -> torch.Tensor:
    """Logits `[N, vocabulary]` at `rows.places`; the output head sees these tokens alone."""
    places = rows.places.to(model.device)
    with narrowed_head(model, places):
        output = model.base(**_inputs(model, rows, prefix, None))
    return output.logits[0]


@contextmanager
def narrowed_head(model: LanguageModel, places: torch.Tensor) -> Iterator[None]:
    """Inside, a model's output head computes chosen places only, in this thread.

    A hook on the head, not a call of it, because models scale or cap what it gives in ways of their own.

    Args:
        model: The model.
        places: int64 `[N, 2]`: rows and columns; the model's logits become `[1, N, vocabulary]`.

    Raises:
        TypeError: If the model has no output head.
    """
    head = model.base.get_output_embeddings()
    if head is None:
        raise TypeError(f"model ({type(model.base).__name__}) has no output head; load it as a language model.")

    def narrow(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0]
        of_hidden = places.to(hidden.device)
        return (hidden[of_hidden[:, 0], of_hidden[:, 1]][None], *args[1:])

    with hooks_of_this_thread([(head, narrow)], before=True):
        yield


class PrefixLayer(DynamicLayer):
    """One layer's view of a prefix, for one forward pass: `update` gives the prefix and what is new, and the prefix stays
    as it is.

    Args:
        keys, values: `[rows or 1, heads, tokens, head size]`: of the prefix what the layer sees.
        length: Tokens of the prefix, seen or not; None: all are seen.
        keep: Whether `updated` is wanted afterwards.
        slots: Tensors whose beginning the keys and values are, with room behind them that new ones are written to;
            otherwise both are copied together.

    Attributes:
        updated: What `update` gave.
    """

    updated: tuple[torch.Tensor, torch.Tensor]

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        length: Optional[int] = None,
        keep: bool = False,
        slots: Optional[tuple[torch.Tensor, torch.Tensor]] = None,
    ) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.length, self.keep, self.slots = keys.shape[-2] if length is None else length, keep, slots
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.slots is not None:
            keys, values = (_written(*each, self.length) for each in zip(self.slots, (key_states, value_states)))
        else:
            keys, values = _behind(self.keys, key_states), _behind(self.values, value_states)
        if self.keep:
            self.updated = keys, values
        return keys, values

    def get_seq_length(self) -> int:
        return self.length


def _behind(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    # an offloaded layer is elsewhere
    return torch.cat([past.to(new.device).expand(len(new), -1, -1, -1), new], dim=-2)


def _written(slots: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
    slots.narrow(2, length, new.shape[-2]).copy_(new)
    return slots.narrow(2, 0, length + new.shape[-2])


def _inputs(model: LanguageModel, rows: PackedRows, prefix: SharedPrefix, cache: Optional[Cache]) -> dict[str, Any]:
    device = model.device
    if len(prefix):
        cache = prefix.cache()
    inputs: dict[str, Any] = {"input_ids": rows.tokens.to(device), "use_cache": cache is not None}
    inputs[model.cache_argument] = cache
    if rows.visible is None:
        inputs["attention_mask"] = _flat_mask(rows, len(prefix)).to(device)
    else:
        inputs["attention_mask"] = masks(
            model, partial(_visible, rows, rows.visible, len(prefix), device), model.dtype if model.eager else None
        )
        inputs["position_ids"] = (rows.depths + len(prefix)).to(device)
    return inputs


def _flat_mask(rows: PackedRows, prefix_length: int) -> torch.Tensor:
    """int64 `[R, prefix + L]`."""
    columns = torch.arange(rows.tokens.shape[1])
    own = (columns < rows.lengths[:, None]).long()
    return torch.cat([own.new_ones(len(own), prefix_length), own], dim=1)


def masks(
    model: LanguageModel,
    visible: Callable[[Optional[int]], tuple[torch.Tensor, torch.Tensor]],
    dtype: Optional[torch.dtype] = None,
) -> Any:
    """4D masks `[R, 1, L, prefix + L]` of tokens behind a prefix; a dict of them for a model that mixes kinds of attention.

    Args:
        model: Which it is.
        visible: For a window, what the tokens see of the prefix, bool `[R, L, prefix]`, and of each other, `[R, L, L]`.
        dtype: Of masks that are added to attention's scores; None: bool.
    """
    by_kind = {}
    for kind, window in model.windows.items():
        mask = torch.cat(visible(window), dim=-1)[:, None]
        by_kind[kind] = mask if dtype is None else torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
    return by_kind if len(by_kind) > 1 else next(iter(by_kind.values()))


def _visible(
    rows: PackedRows, visible: torch.Tensor, prefix_length: int, device: torch.device, window: Optional[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What [`masks`] asks for."""
    depths, own = rows.depths.to(device), visible.to(device)
    past = torch.ones(*depths.shape, prefix_length, dtype=torch.bool, device=device)
    if window is not None:
        past = depths[:, :, None] - torch.arange(-prefix_length, 0, device=device) < window
        own = own & (depths[:, :, None] - depths[:, None, :] < window)
    return past, own
