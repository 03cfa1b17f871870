# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Granularities for a pretrained model: it starts as exactly what it was, and learns from there."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional, TypeVar, Union

import torch
from torch import nn

from generation_ext.granularity.attention import (
    GranularityConfig,
    GranularityHead,
    add_granularity,
    check_implementation,
)
from generation_ext.granularity.masks import EARLIER_FLOOR
from peft_ext.file_formats import FLOATS, Tensor, check_tensors
from peft_ext.files import read_json
from peft_ext.tensor_files import check_digest, open_tensors


Model = TypeVar("Model", bound=nn.Module)

# Attention classes of transformers that call the attention interface, by name, since relatives copy them.
KNOWN_ATTENTIONS = (
    "BartAttention",
    "MBartAttention",
    "PegasusAttention",
    "T5Attention",
    "MT5Attention",
    "BertSelfAttention",
    "BertCrossAttention",
    "RobertaSelfAttention",
    "RobertaCrossAttention",
    "LlamaAttention",
    "MistralAttention",
    "Qwen2Attention",
    "Qwen3Attention",
    "Qwen3MoeAttention",
    "Qwen3NextAttention",
    "Qwen2_5_VLAttention",
    "MixtralAttention",
    "Gemma3Attention",
    "Phi3Attention",
    "Olmo2Attention",
    "Cohere2Attention",
    "SmolLM3Attention",
    "GraniteAttention",
    "GPTJAttention",
    "OPTAttention",
    "JambaAttention",
    "BambaAttention",
    "FalconH1Attention",
    "Lfm2Attention",
)
HEAD = "granularity"


def convert_to_granularity_attention(model: Model, config: Optional[GranularityConfig] = None) -> Model:
    """Add a granularity head to every attention of a pretrained model, in place.

    With the default config all granularities are exactly 0, so the model computes what it did; gradients move them from
    there. The heads are called `granularity`: `LoraConfig(..., modules_to_save=["granularity"])` trains and saves them with
    a LoRA, [`granularity_parameters`] alone. `model.save_pretrained` writes them with the rest; load the folder as the model
    it was, convert it, and [`load_granularities`] from the folder.

    Args:
        model: A BART, T5, BERT, Llama, Mistral, Qwen, Gemma 3, Phi 3 or another one with attentions of `KNOWN_ATTENTIONS`;
            not a `PeftModel` (convert the base first).
        config: See [`GranularityConfig`]; None: `link="rectified"`, `initial=0`, and the model's own longest text as
            `max_length`.

    Returns:
        The model.

    Raises:
        ValueError: If no attention of a known class is in it (lists those known); if it is converted already; if its
            attention implementation takes no float mask; if `max_length` can't be told from its config.
    """
    attentions = {name: module for name, module in model.named_modules() if type(module).__name__ in KNOWN_ATTENTIONS}
    if not attentions:
        classes = sorted({type(m).__name__ for m in model.modules() if "Attention" in type(m).__name__})
        raise ValueError(
            f"model is a {type(model).__name__} with the attention classes {classes}, none of which is known; known are "
            f"{KNOWN_ATTENTIONS}."
        )
    if any(hasattr(module, HEAD) for module in attentions.values()):
        raise ValueError("model is converted already.")
    model_config: Any = model.config
    if config is None:
        config = GranularityConfig(link="rectified", initial=0.0, max_length=_longest(model_config))
    implementation = check_implementation(model_config._attn_implementation)
    example = next(model.parameters())
    # a step of AdamW is lost in a bfloat16 weight; PEFT keeps adapters in float32, too
    dtype = torch.float64 if example.dtype == torch.float64 else torch.float32
    for name, module in attentions.items():
        cross = _is_cross(name, module)
        if cross and not config.cross_attention:
            continue
        add_granularity(module, _input_size(module), config, not cross and _looks_back(module))
        module.granularity.to(device=example.device, dtype=dtype)
    for module in model.modules():
        each: Any = getattr(module, "config", None)
        if hasattr(each, "_attn_implementation"):
            each._attn_implementation = implementation
    model_config.granularity = asdict(config)
    model.saved_whole = True  # type: ignore[assignment]  # for peft_ext.whole_saves and peft_ext.sealing
    return model


def granularity_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of the heads, to train them alone."""
    heads = [module for module in model.modules() if isinstance(module, GranularityHead)]
    return [parameter for head in heads for parameter in head.parameters()]


def load_granularities(model: Model, folder: Union[str, os.PathLike]) -> Model:
    """Load the heads that `save_pretrained` of a converted model wrote into a folder; converts the model if need be.

    A model that is converted already takes over the folder's `mask_floor`, which folders of earlier versions don't name.

    Raises:
        FileNotFoundError: If the folder has no config.
        ValueError: If it is not of a converted model, or lacks a head; if the model was converted with other settings.
    """
    folder = Path(folder)
    settings = read_json(folder / "config.json").get("granularity")
    if settings is None:
        raise ValueError(f"folder={str(folder)!r} is not of a converted model: its config has no 'granularity'.")
    stored = _config_of(settings, folder / "config.json")
    heads_of_model = [module for module in model.modules() if isinstance(module, GranularityHead)]
    if heads_of_model:
        _take_over(model, heads_of_model, stored, folder)
    else:
        convert_to_granularity_attention(model, stored)
    names = {name for name in model.state_dict() if f".{HEAD}." in name}
    heads: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        check_digest(path)
        with open_tensors(path) as file:
            found = {name: file.get_tensor(name) for name in names.intersection(file.keys())}
        described = {name: Tensor(FLOATS, model.state_dict()[name].shape) for name in found}
        check_tensors(found, described, repr(str(path)))
        heads.update(found)
    missing = sorted(names - set(heads))
    if missing:
        raise ValueError(
            f"folder={str(folder)!r} lacks {len(missing)} of {len(names)} heads, the first {missing[0]!r}."
        )
    model.load_state_dict(heads, strict=False)
    return model


def _config_of(settings: Any, path: Path) -> GranularityConfig:
    try:
        # a folder that was saved before there was a choice was trained with that floor
        return GranularityConfig(**{"mask_floor": EARLIER_FLOOR, **settings})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r}: granularity is {settings!r}, which is no such config ({error}).") from error


def _take_over(model: Any, heads: list[GranularityHead], stored: GranularityConfig, folder: Path) -> None:
    """Give a converted model's heads the config that a folder's were trained with, if only the floor differs."""
    own = {**asdict(heads[0].config), "initial": stored.initial, "mask_floor": stored.mask_floor}
    other = [f"{name}={value!r}" for name, value in asdict(stored).items() if own[name] != value]
    if other:
        raise ValueError(
            f"folder={str(folder)!r} was converted with {', '.join(other)}, this model otherwise; convert it alike, or pass it "
            "as it was before."
        )
    for head in heads:
        head.config = stored
    model.config.granularity = asdict(stored)


def _is_cross(name: str, module: nn.Module) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last in ("encoder_attn", "EncDecAttention") or "Cross" in type(module).__name__


def _looks_back(module: Any) -> bool:
    """Whether an attention's tokens see only those before them; of whole models, see `language_model.is_causal`."""
    decoder = getattr(module, "is_decoder", None)
    if type(module).__name__ in ("T5Attention", "MT5Attention"):
        return bool(decoder)
    return bool(getattr(module, "is_causal", decoder))


def _input_size(module: Any) -> int:
    for name in ("q_proj", "q", "query", "qkv_proj"):
        if hasattr(module, name):
            return getattr(module, name).in_features
    raise ValueError(f"{type(module).__name__} has no projection of queries that is known.")


def _longest(config: Any) -> int:
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 2:
            return value
    raise ValueError("the model's config names no longest text; pass config=GranularityConfig(max_length=..., ...).")
