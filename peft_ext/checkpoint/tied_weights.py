# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Packed layers have weights of their own, whatever a model ties."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel


def untie(model: PreTrainedModel, layers: Iterable[str]) -> None:
    """Give these layers weights of their own, whatever the model's config says of tied embeddings.

    Where the output layer isn't among them, the embeddings stay tied (Zamba ties whole blocks).
    """
    inside = tuple(f"{name}." for name in layers)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    kept = {key: value for key, value in tied.items() if not key.startswith(inside) and not value.startswith(inside)}
    if len(kept) < len(tied):
        model.all_tied_weights_keys = kept
    output = model.get_output_embeddings()
    if not any(module is output for name, module in model.named_modules() if f"{name}." in inside):
        return
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
