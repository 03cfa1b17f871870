# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""GA-Attention (Gu et al. 2022) under transformers' attention interface: an additive bias on the scores of any attention.

A head on an attention's input gives each token's granularity z; a hook takes it there, because the interface sees queries
and keys alone. `granularity_eager` and `granularity_sdpa` are ordinary entries of transformers' table of attention functions.
"""

from __future__ import annotations

import inspect
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Optional

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import initialization as init
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.bart.modeling_bart import eager_attention_forward  # noqa: F401 (of GranularityAttention)

from generation_ext.granularity.biased import biased_attention
from generation_ext.granularity.cache import past_granularities
from generation_ext.granularity.masks import check_mode, granularity_bias, granularity_mask
from peft_ext.language_model import CACHE_NAMES
from peft_ext.threads import PerCall


PREFIX = "granularity_"
KNOWN = ("eager", "sdpa")
LINKS = ("sigmoid", "rectified")
PLACEMENTS = ("before", "after")
# what the hook found for the attention function that runs next in this thread
_local = threading.local()
# where granularities are recorded, and under which names
_RECORDS: PerCall[tuple[dict[str, torch.Tensor], dict[nn.Module, str]]] = PerCall("granularities")


@dataclass
class GranularityConfig:
    """How attention uses granularities.

    Args:
        mode: `"R"` (resonance), `"S"` (scope), `"R*S"` or `"R+S"` (their mean).
        placement: `"before"` the softmax, in log space, so that weights are normalised again (as the paper's released
            code); `"after"` it (eq. 9), with eager attention alone.
        max_length: N of eq. 8: the most tokens of a text. Fixed, so that decoding step by step is teacher forcing.
        link: From the head's output u to z: `"sigmoid"`, or `"rectified"`, tanh(u / 2) where it is positive, which can
            be exactly 0 and still learns from there.
        initial: z at the start, by the head's bias; 0 with `"rectified"` alone.
        cross_attention: Whether cross-attention gets resonance too.
        mask_floor: The share of its weight that a key out of scope keeps before the softmax: 0, as in equations 7 to 9. A
            query for which no key is in scope (in cross-attention, or a padding token) attends as without granularities.
            Models saved before this setting have 1e-6, which is what they were trained with.

    Raises:
        ValueError: If a value is unknown or out of its range.
    """

    mode: str = "R*S"
    placement: str = "before"
    max_length: int = 20
    link: str = "sigmoid"
    initial: float = 0.5
    cross_attention: bool = True
    mask_floor: float = 0.0

    def __post_init__(self) -> None:
        check_mode(self.mode, self.max_length)
        if not 0 <= self.mask_floor < 1:
            raise ValueError(f"mask_floor={self.mask_floor} must be in [0, 1): the weight that is left out of scope.")
        for name, choices in (("placement", PLACEMENTS), ("link", LINKS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {choices}.")
        lowest = 0.0 if self.link == "rectified" else 1e-6
        if not lowest <= self.initial < 1:
            raise ValueError(
                f"initial={self.initial} must be in [0, 1), and above 0 with link='sigmoid'; link='rectified' starts at 0."
            )


class GranularityHead(nn.Module):
    """Granularities of tokens, one linear layer on an attention's input (eq. 4).

    Args:
        size: Of the hidden states.
        config: See [`GranularityConfig`].
        is_causal: Whether the attention looks back alone.
    """

    def __init__(self, size: int, config: GranularityConfig, is_causal: bool = False) -> None:
        super().__init__()
        self.config, self.is_causal = config, is_causal
        self.projection = nn.Linear(size, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small weights, and the bias that gives the initial z; exactly 0 with zero weights."""
        z = self.config.initial
        # transformers' initialisers leave what was loaded
        if self.config.link == "rectified":
            init.zeros_(self.projection.weight)
            init.constant_(self.projection.bias, 2 * math.atanh(z))
        else:
            init.normal_(self.projection.weight, std=0.02)
            init.constant_(self.projection.bias, math.log(z / (1 - z)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """z in [0, 1], float32 `[batch, tokens]` (float64 for float64)."""
        # a head may be float32 in a model of half precision
        u = self.projection(hidden_states.to(self.projection.weight.dtype)).squeeze(-1)
        u = u if u.dtype == torch.float64 else u.float()
        return torch.sigmoid(u) if self.config.link == "sigmoid" else _Rectified.apply(u)


class _Rectified(torch.autograd.Function):
    """max(0, tanh(u / 2)). Below 0, too, a gradient passes that asks for more: no token is lost because it fell to 0."""

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        z = torch.tanh(u / 2)
        ctx.save_for_backward(z)
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (z,) = ctx.saved_tensors
        (gradient,) = gradients
        passes = (z > 0) | (gradient < 0)
        return gradient * passes * (1 - z * z) / 2


class GranularityAttention(nn.Module):
    """Multi-head attention with granularities, for one's own model.

    Args:
        size: Of the hidden states.
        heads: Their number.
        config: See [`GranularityConfig`].
        is_causal: Whether tokens look back alone.
        dropout: Of the attention weights.
    """

    def __init__(
        self,
        size: int,
        heads: int,
        config: Optional[GranularityConfig] = None,
        is_causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if size % heads:
            raise ValueError(f"size={size} must be a multiple of heads={heads}.")
        self.heads, self.is_causal, self.dropout = heads, is_causal, dropout
        self.granularity = GranularityHead(size, config or GranularityConfig(), is_causal)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(size, size) for _ in range(4))

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            hidden_states: `[batch, tokens, size]`.
            key_value_states: What is looked at in cross-attention, `[batch, keys, size]`.
            attention_mask: `[batch, keys]`, 1 for real keys; or an additive or boolean mask `[batch, 1, q, k]`.

        Returns:
            `[batch, tokens, size]`.
        """
        others = hidden_states if key_value_states is None else key_value_states
        shape = (hidden_states.shape[0], -1, self.heads, hidden_states.shape[2] // self.heads)
        query, key, value = (
            projection(states).view(shape).transpose(1, 2)
            for projection, states in ((self.q_proj, hidden_states), (self.k_proj, others), (self.v_proj, others))
        )
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None, None].bool()
        cross = key_value_states is not None
        z = self.granularity(hidden_states)
        _local.tokens = Tokens(z, self.granularity(others) if cross else z, None if cross else 0)
        output, _ = _sdpa(self, query, key, value, attention_mask, dropout=self.dropout * self.training)
        return self.out_proj(output.flatten(2))


@dataclass
class Tokens:
    """What an attention's call knows of its tokens.

    Attributes:
        queries: Granularities `[batch, q]`.
        keys: `[batch, k]`, those in the cache included.
        past: How many tokens stand before the first query; None in cross-attention.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    past: Optional[Any]


def add_granularity(attention: nn.Module, size: int, config: GranularityConfig, is_causal: bool) -> None:
    """Give an attention module of transformers a head (`attention.granularity`) and the hook that runs it."""
    attention.granularity = GranularityHead(size, config, is_causal)
    attention.register_forward_pre_hook(_find_granularities, with_kwargs=True)


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Granularities of this thread's passes inside the block: name of the attention -> z of the queries `[batch, tokens]`."""
    granularities: dict[str, torch.Tensor] = {}
    heads = {name: module for name, module in model.named_modules() if hasattr(module, "granularity")}
    with _RECORDS.block((granularities, {module: name for name, module in heads.items()})):
        yield granularities


def check_implementation(name: Optional[str]) -> str:
    """The entry of transformers' table that takes a float mask, for an ordinary implementation's name.

    Raises:
        ValueError: If it takes no float mask.
    """
    plain = (name or "sdpa").removeprefix(PREFIX)
    if plain not in KNOWN:
        raise ValueError(
            f"attn_implementation={plain!r} takes no additive mask, which granularities are; choose one of {KNOWN}."
        )
    return PREFIX + plain


# ---- inside


def _find_granularities(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before an attention runs: z of its queries and keys, kept for the attention function."""
    config: Any = module.config
    if not str(config._attn_implementation).startswith(PREFIX):  # set_attn_implementation was called
        config._attn_implementation = check_implementation(config._attn_implementation)
    kind: Any = type(module)
    named = dict(zip(_names(kind), args))
    named.update(kwargs)
    hidden = named["hidden_states"]
    others = named.get("key_value_states")
    others = named.get("encoder_hidden_states") if others is None else others
    head: Any = module.granularity
    z = head(hidden)
    if others is not None:
        _local.tokens = Tokens(z, head(others), None)
    else:
        cache = next((named[name] for name in CACHE_NAMES if name in named), None)
        keys, past = past_granularities(cache, module, z)
        _local.tokens = Tokens(z, keys, past)
    _RECORDS.apply(_record, module, z)


def _record(records: tuple[dict[str, torch.Tensor], dict[nn.Module, str]], module: nn.Module, z: torch.Tensor) -> None:
    granularities, names = records
    if module in names:
        name = names[module]
        granularities[name] = torch.cat([granularities[name], z], 1) if name in granularities else z


@cache
def _names(kind: Any) -> tuple[str, ...]:
    """An attention's positional arguments."""
    return tuple(inspect.signature(inspect.unwrap(kind.forward)).parameters)[1:]


def _mask(
    head: Any, tokens: Tokens, attention_mask: Optional[torch.Tensor], dtype: torch.dtype
) -> tuple[Optional[torch.Tensor], torch.Tensor]:
    """What eq. 9 multiplies by (None before the softmax), and what is added to the scores, `[batch, 1, q, k]`."""
    config = head.config
    count = tokens.keys.shape[1]
    if tokens.past is not None and not torch.compiler.is_compiling() and count > config.max_length:
        raise ValueError(
            f"{count} tokens are more than max_length={config.max_length}, beyond which granularities have no scope; "
            "cut the texts (truncation=True, max_length=...), or set a larger max_length."
        )
    offsets: Any = None  # i - j, [q, k]
    if tokens.past is not None:
        size, device = tokens.queries.shape[1], tokens.queries.device
        offsets = (torch.arange(size, device=device) + tokens.past)[:, None] - torch.arange(count, device=device)
    distances = None if offsets is None else offsets.abs()
    lowest = torch.finfo(dtype).min
    after = None
    if config.placement == "after":
        after = granularity_mask(tokens.queries, tokens.keys, distances, config.mode, config.max_length)[:, None]
        bias = torch.zeros_like(after, dtype=dtype)
    else:
        # from z = 0, scope alone would never move
        leak = float(config.mode == "S" and config.link == "rectified")
        bias = granularity_bias(
            tokens.queries, tokens.keys, distances, config.mode, config.max_length, leak, config.mask_floor
        )
        bias = bias[:, None].to(dtype)
    plain = None  # what is added without granularities
    if attention_mask is not None:
        attention_mask = attention_mask[..., :count]
        if attention_mask.dtype == torch.bool:
            plain = torch.zeros((), dtype=dtype, device=bias.device).masked_fill(~attention_mask, lowest)
        else:
            plain = attention_mask.to(dtype).clamp(min=lowest)
    elif head.is_causal and offsets is not None and bias.shape[2] > 1:
        plain = torch.zeros((), dtype=dtype, device=bias.device).masked_fill(offsets < 0, lowest)
    if plain is not None or dtype in (torch.float16, torch.bfloat16):
        # a sum, or another dtype's lowest number, could leave the range
        bias = (bias if plain is None else bias + plain).clamp(min=lowest)
    sees_itself = offsets is not None and attention_mask is None  # and is always in its own scope
    if after is None and not config.mask_floor and not sees_itself:
        # without a key that is left, a softmax would be over nothing: plain attention stands in
        out_of_scope = max(lowest, torch.finfo(tokens.queries.dtype).min) / 2
        nothing = bias.detach().amax(-1, keepdim=True) <= out_of_scope
        bias = torch.where(nothing, 0.0 if plain is None else plain, bias)
    return (None if after is None else after.to(dtype)), bias


def _eager(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
    **kwargs: Any,
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """The model's own eager attention on biased scores; as it is where a module has no head."""
    if not hasattr(module, "granularity"):
        return sys.modules[type(module).__module__].eager_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
    after, bias = _mask(module.granularity, _tokens_of(key), attention_mask, query.dtype)
    plain = sys.modules[type(module).__module__].eager_attention_forward
    if after is None:
        return plain(module, query, key, value, bias, **kwargs)
    dropout, kwargs["dropout"] = kwargs.get("dropout", 0.0), 0.0
    _, weights = plain(module, query, key, value, bias, **kwargs)
    weights = weights * after
    value = repeat_kv(value, query.shape[1] // value.shape[1])
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _sdpa(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
    **kwargs: Any,
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """torch's scaled_dot_product_attention with the bias as its mask; without a head, as it is."""
    if not hasattr(module, "granularity"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if module.granularity.config.placement == "after":
        return _eager(module, query, key, value, attention_mask, **kwargs)
    _, bias = _mask(module.granularity, _tokens_of(key), attention_mask, query.dtype)
    if _learns(bias, kwargs.get("dropout", 0.0)) and kwargs.get("position_bias") is None:
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        return biased_attention(query, key, value, bias, kwargs.get("scaling")).transpose(1, 2).contiguous(), None
    kwargs["is_causal"] = False
    return sdpa_attention_forward(module, query, key, value, bias, **kwargs)


def _learns(bias: torch.Tensor, dropout: float) -> bool:
    """Whether SDPA would leave its fused kernel because of the bias alone."""
    return (
        bias.requires_grad
        and torch.is_grad_enabled()
        and bias.device.type == "cpu"
        and not dropout
        and not torch.compiler.is_compiling()
    )


def _tokens_of(key: torch.Tensor) -> Tokens:
    """What the hook found, as long as the keys are: a sliding window drops the first ones."""
    tokens: Any = getattr(_local, "tokens", None)
    # not kept: it would hold the graph of the last pass
    _local.tokens = None
    count = key.shape[2]
    dropped = tokens.keys.shape[1] - count
    if dropped > 0:
        tokens = Tokens(tokens.queries, tokens.keys[:, dropped:], tokens.past - dropped)
    elif dropped:
        raise ValueError(
            f"the cache gives {count} keys, but {tokens.keys.shape[1]} granularities are known: it holds tokens from "
            "before the conversion; start with an empty one."
        )
    return tokens


AttentionInterface.register(PREFIX + "eager", _eager)
AttentionInterface.register(PREFIX + "sdpa", _sdpa)
for _name in KNOWN:
    AttentionMaskInterface.register(PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])
