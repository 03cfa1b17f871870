# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What this package needs to know of a language model, whatever wraps it: where its last hidden state comes from, how wide
that is, which model it is."""

from __future__ import annotations

import hashlib
from typing import Any, Optional

import torch
from torch import nn
from transformers import PretrainedConfig


_SAMPLED_ROWS = 64


def backbone(model: nn.Module) -> nn.Module:
    """The module whose forward gives the last hidden state that the output head reads: of a causal model everything
    below its head, of an encoder-decoder model the decoder. PEFT's wrappers are looked through.

    Raises:
        TypeError: If `model` is not a language model of transformers.
    """
    base = unwrapped(model)
    if not hasattr(base, "get_decoder"):
        raise TypeError(f"model is a {type(base).__name__}; it must be a language model of transformers.")
    decoder = base.get_decoder()
    if decoder is None or decoder is base:
        raise TypeError(
            f"model is a {type(base).__name__} without an output head above it; load it as a language model, such as "
            "AutoModelForCausalLM or AutoModelForSeq2SeqLM."
        )
    return decoder


def base_fingerprint(model: nn.Module) -> str:
    """A short name of a language model's architecture and weights, such as `"llama-30x576-0b1a5c4d2e8f"`.

    It hashes the signs of the first rows of the token embeddings (which quantisation, adapters and a cast to another float
    type leave as they are) and the shape of the model. Two fine-tunes of one model have different ones where training
    moved the embeddings.
    """
    config = text_config(model)
    shape = [
        str(getattr(config, name, None))
        for name in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    ]
    digest = hashlib.sha256("/".join(shape).encode())
    weight = embedding_weight(token_embedding(model))
    if weight.device.type != "meta":
        # the first rows are the same after the vocabulary was extended
        signs = torch.signbit(weight.detach()[:_SAMPLED_ROWS].float()).to("cpu", torch.uint8)
        digest.update(bytes(signs.flatten().tolist()))
    layers = getattr(config, "num_hidden_layers", None)
    return f"{config.model_type}-{layers}x{hidden_size(model)}-{digest.hexdigest()[:12]}"


def unwrapped(model: Any) -> Any:
    """The model under PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(model: nn.Module) -> PretrainedConfig:
    """Of a model of several parts, the config of what writes text."""
    return unwrapped(model).config.get_text_config(decoder=True)


def base_name(model: nn.Module) -> Optional[str]:
    """Where the model was loaded from, if that is known."""
    config = getattr(unwrapped(model), "config", None)
    return getattr(config, "_name_or_path", None) or None


def hidden_size(model: nn.Module) -> int:
    """Width of the output head's input; OPT's differs from its config's hidden size."""
    config = text_config(model)
    for module in (unwrapped(model).get_output_embeddings(), getattr(unwrapped(model), "lm_head", None)):
        features = getattr(module, "in_features", None)
        if isinstance(features, int):
            return features
    return config.hidden_size


def token_embedding(model: nn.Module) -> nn.Module:
    """What makes vectors of the input's tokens.

    Raises:
        TypeError: If `model` is not a language model of transformers.
    """
    base = unwrapped(model)
    if not hasattr(base, "get_input_embeddings"):
        raise TypeError(f"model is a {type(model).__name__}; it must be a language model of transformers.")
    return base.get_input_embeddings()


def embedding_weight(embedding: nn.Module) -> torch.Tensor:
    """The base model's own weight, under whatever adapter lies on it."""
    for wrapper in ("original_module", "base_layer"):
        embedding = getattr(embedding, wrapper, embedding)
    return embedding.weight  # type: ignore[return-value]
