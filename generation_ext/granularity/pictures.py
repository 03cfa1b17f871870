# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Granularities as pictures: a sentence's tokens layer by layer, in the terminal and as a heat map."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Union

import torch


SHADES = " ░▒▓█"


@torch.inference_mode()
def sentence_granularities(model: Any, tokenizer: Any, text: str) -> tuple[list[str], torch.Tensor]:
    """Tokens of a text, and z of each in every layer of the encoder, `[layers, tokens]`.

    Args:
        model: A [`CDNPGForConditionalGeneration`] with granularities.
        tokenizer: Its tokenizer.
        text: The text; a longer one is cut.

    Raises:
        ValueError: If the text is empty, or the model has no granularities.
    """
    if not text.strip():
        raise ValueError("text is empty: it has no tokens to show.")
    if getattr(model.config, "granularity_mode", None) is None:
        raise ValueError("the model has no granularities: it was trained with mode=none, or is no C-DNPG.")
    batch = tokenizer(text, return_tensors="pt", truncation=True)
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    output = model(**inputs, decoder_input_ids=inputs["input_ids"][:, :1], output_granularities=True)
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    return tokens, torch.cat(output.encoder_granularities).float().cpu()


def as_text(tokens: Sequence[str], granularities: torch.Tensor) -> str:
    """A line for each token, a column for each layer: shades and numbers."""
    width = max(map(len, tokens))
    head = " " * width + "".join(f"  layer {layer + 1:<5}" for layer in range(len(granularities)))
    lines = [
        f"{token:>{width}}" + "".join(f"  {_shade(z) * 4} {z:.3f}  " for z in column)
        for token, column in zip(tokens, granularities.T.tolist())
    ]
    return "\n".join([head, *lines])


def heat_map(tokens: Sequence[str], granularities: torch.Tensor, path: Union[str, os.PathLike]) -> None:
    """Write a picture: tokens to the right, layers upwards, z as colour.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need: pip install matplotlib") from error
    figure = Figure(figsize=(1.5 + 0.6 * len(tokens), 1.2 + 0.45 * len(granularities)))
    axes = figure.subplots()
    image = axes.imshow(granularities.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    axes.set_xticks(range(len(tokens)), list(tokens), rotation=45, ha="right")
    axes.set_yticks(range(len(granularities)), [str(layer + 1) for layer in range(len(granularities))])
    axes.set_ylabel("layer")
    figure.colorbar(image, label="z: 0 template, 1 detail")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _shade(z: float) -> str:
    return SHADES[min(len(SHADES) - 1, int(z * len(SHADES)))]
