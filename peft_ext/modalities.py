# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The parts of a model that see or hear, beside the language model that writes about it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Optional

from peft.tuners.tuners_utils import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedModel

from peft_ext.language_model import cache_name, unwrapped


VISION, AUDIO, PROJECTOR = "vision tower", "audio tower", "projector"
PARTS = (VISION, AUDIO, PROJECTOR)
_TOWERS = {"image": VISION, "video": VISION, "audio": AUDIO}


def other_parts(model: nn.Module) -> dict[str, str]:
    """What a multimodal model has beside its language model: names of modules, mapped to what they are.

    These are `"vision tower"`, `"audio tower"` and `"projector"`: whatever lies between a tower and the language model
    (Gemma3's projector, PaliGemma's, Idefics3's connector, BLIP-2's Q-Former). A tower has a config of its own and the
    model a decoder beside it; so Whisper, whose encoder has the decoder's config, and CLIP, which writes nothing, are
    one part. Output heads are no such part. PEFT's wrapper is looked through.
    """
    base = unwrapped(model)
    if not isinstance(base, PreTrainedModel):
        return {}
    inner = {name: module for name, module in base.named_modules() if isinstance(module, PreTrainedModel) and name}
    own = {name: module for name, module in inner.items() if type(module.config) is not type(base.config)}
    towers = {name: kind for name, module in own.items() if (kind := _kind(module, base)) is not None}
    decoder = base.get_decoder()
    language = [name for name, module in inner.items() if module is decoder]
    if not towers or not language or language[0] in towers or not _writes(decoder):
        return {}
    # the outermost model around the decoder that sees nothing: T5 in BLIP-2, of which the decoder is a half
    around = [name for name in own if f"{language[0]}.".startswith(f"{name}.") and not _within(towers, name)]
    text = min(around, key=len, default=language[0])
    parts = {name: kind for name, kind in towers.items() if not _within(towers, name, strictly=True)}
    if any(f"{name}.".startswith(f"{text}.") for name in parts):
        return parts  # the decoder is the whole of it: what else belongs to the towers can't be told
    spared = (base.get_output_embeddings(), base.get_input_embeddings(), base.get_encoder())
    for name, module in _outside(base, [text, *parts]):
        if not any(module is one for one in spared) and name.rpartition(".")[2] not in SEQ_CLS_HEAD_NAMES:
            parts[name] = PROJECTOR
    return parts


def part_of(name: str, parts: Iterable[str]) -> Optional[str]:
    """The part that the module called `name` lies in."""
    return next((part for part in parts if f"{name}.".startswith(f"{part}.")), None)


def _writes(decoder: nn.Module) -> bool:
    """Whether a decoder writes text token by token, for which it takes a cache; CLIP's text tower doesn't."""
    return cache_name(inspect.signature(type(decoder).forward).parameters) is not None


def _kind(module: PreTrainedModel, base: PreTrainedModel) -> Optional[str]:
    """What kind of tower a module is, if it is one: as transformers finds it, or as it says of itself."""
    for modality, kind in _TOWERS.items():
        if modality != "video" and module is base.get_encoder(modality=modality):
            return kind
    modalities = module.input_modalities
    modalities = {modalities} if isinstance(modalities, str) else set(modalities)
    if "text" in modalities:
        return None
    return next((kind for modality, kind in _TOWERS.items() if modality in modalities), None)


def _within(names: Iterable[str], name: str, strictly: bool = False) -> bool:
    return any(f"{name}.".startswith(f"{other}.") and not (strictly and other == name) for other in names)


def _outside(base: nn.Module, known: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that neither are nor hold one of the known ones, and have parameters."""

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for child_name, child in module.named_children():
            name = f"{prefix}{child_name}"
            if name in known:
                continue
            if any(other.startswith(f"{name}.") for other in known):
                yield from walk(child, f"{name}.")
            elif next(child.parameters(), None) is not None:
                yield name, child

    return walk(base, "")
