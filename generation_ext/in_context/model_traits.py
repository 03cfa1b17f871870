# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What has to be known of a language model to share a prefix: its parts, its kind of attention, its widths."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import nn
from transformers import PreTrainedModel

from generation_ext.attention import (
    CACHE_NAMES,
    FULL,
    SLIDING,
    attention_implementation,
    cache_name,
    takes_masks,
    windows_of,
)


CAUSAL, ENCODER_DECODER, ENCODER = "causal", "encoder-decoder", "encoder"


class ModelTraits(NamedTuple):
    """A language model and how to run it on a shared prefix.

    Attributes:
        model: The transformers model, without PEFT's wrapper; tuned layers are inside.
        backbone: Its part without the output head; of an encoder-decoder model the encoder.
        kind: `"causal"`, `"encoder-decoder"` or `"encoder"`.
        positions: Whether `forward` takes positions.
        trees: Whether positions and a 4D mask can be given, so that several texts fit into one row.
        windows: Each kind of attention in the model -> how many tokens it sees; None: all.
        cache_argument: What `forward` calls its cache.
        max_length: Most tokens of a text; None: any number.
        widths: What a token costs, see [`Widths`].
    """

    model: PreTrainedModel
    backbone: nn.Module
    kind: str
    positions: bool
    trees: bool
    windows: dict[str, Optional[int]]
    cache_argument: str
    max_length: Optional[int]
    widths: Widths

    @property
    def device(self) -> torch.device:
        """Where token ids have to lie."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The float type of hidden states."""
        weight = self.model.get_input_embeddings().weight
        return weight.dtype if weight.is_floating_point() else torch.float32

    @property
    def eager(self) -> bool:
        """Whether masks have to be floats to be added."""
        return attention_implementation(_text_config(self.model)) == "eager"


class Widths(NamedTuple):
    """Numbers per token: of a hidden state, of the widest product, of all queries and all keys of a layer, of logits."""

    hidden: int
    widest: int
    queries: int
    keys: int
    heads: int
    vocabulary: int


def traits_of(model: nn.Module) -> ModelTraits:
    """Look at a model.

    Args:
        model: A transformers model, or a `PeftModel` of one.

    Raises:
        TypeError: If it is no transformers model.
        ValueError: If it has attention that a prefix can't be shared in (recurrent or chunked layers, flash attention,
            PEFT's prompt learning); the message names the way out.
    """
    core = _without_peft(model)
    if not isinstance(core, PreTrainedModel):
        raise TypeError(f"model must be a transformers model or a PeftModel of one, got {type(model).__name__}.")
    config = _text_config(core)
    parameters = inspect.signature(core.forward).parameters
    windows: dict[str, Optional[int]] = {FULL: None}
    if core.config.is_encoder_decoder:
        kind, backbone, trees = ENCODER_DECODER, core.get_encoder(), False
    elif not _is_causal(core, set(parameters)):
        kind, backbone, trees = ENCODER, core.base_model, False
    else:
        kind, backbone = CAUSAL, core.base_model
        windows = _windows(core, config)
        trees = _takes_trees(core, config, set(parameters))
        _check_attention(core, windows, trees)
    return ModelTraits(
        model=core,
        backbone=backbone,
        kind=kind,
        positions="position_ids" in parameters,
        trees=trees,
        windows=windows,
        cache_argument=cache_name(parameters) or CACHE_NAMES[-1],
        max_length=_max_length(config),
        widths=_widths(core, config),
    )


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients, and the model's own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _is_causal(model: PreTrainedModel, parameters: set[str]) -> bool:
    """Encoders such as BERT take a cache too, for their use as decoders; their attention tells."""
    flags = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    return cache_name(parameters) is not None and (not flags or any(flags))


def _without_peft(model: Any) -> Any:
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not hasattr(model, "get_base_model"):
        return model
    learns_prompt = any(getattr(config, "is_prompt_learning", False) for config in configs.values())
    if learns_prompt:
        raise ValueError(
            "model has an adapter of learned prompts (prefix or prompt tuning), which owns the start of the cache; use a "
            "tuner of weights (LoRA, PEQA, ...)."
        )
    return model.get_base_model()


def _windows(model: PreTrainedModel, config: Any) -> dict[str, Optional[int]]:
    """How far a causal model's layers look back."""
    windows, others = windows_of(config)
    if others:
        raise ValueError(
            f"model ({type(model).__name__}) has layers whose past can't be shared as keys and values: {others}; use a "
            "model with full or sliding attention."
        )
    return windows


def _takes_trees(model: PreTrainedModel, config: Any, parameters: set[str]) -> bool:
    """Not where positions follow from a 2D mask (ALiBi), or the causal mask lies in the layers (GPT-Neo)."""
    own_masks = any(
        buffer.ndim == 4 and buffer.shape[-1] == buffer.shape[-2] > 1 and not buffer.is_floating_point()
        for buffer in model.buffers()
    )
    return "position_ids" in parameters and not own_masks and not getattr(config, "alibi", False)


def _check_attention(model: PreTrainedModel, windows: dict[str, Optional[int]], trees: bool) -> None:
    config = _text_config(model)
    if not takes_masks(config):
        raise ValueError(
            f"model computes attention with {attention_implementation(config)!r}, which takes no mask of its own; load it with "
            "attn_implementation='sdpa' (or model.set_attn_implementation('sdpa'))."
        )
    if not trees and SLIDING in windows:
        raise ValueError(
            f"model ({type(model).__name__}) has sliding attention but takes no positions, so that a prefix can't be "
            "shared."
        )


def _max_length(config: Any) -> Optional[int]:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        # T5 has relative positions, and its n_positions is what it was trained on
        if isinstance(value, int) and value > 0 and not hasattr(config, "relative_attention_num_buckets"):
            return value
    return None


def _widths(model: PreTrainedModel, config: Any) -> Widths:
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or hidden // heads
    outer = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    matrices = [module.weight for module in model.modules() if id(module) not in outer and _is_product(module)]
    widest = max((max(weight.shape) for weight in matrices), default=4 * hidden)
    keys = head * (getattr(config, "num_key_value_heads", None) or heads)
    return Widths(hidden, widest, heads * head, keys, heads, config.vocab_size)


def _is_product(module: nn.Module) -> bool:
    return not isinstance(module, nn.Embedding) and getattr(getattr(module, "weight", None), "ndim", 0) == 2
