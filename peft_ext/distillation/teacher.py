# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A teacher that runs beside the student: a model, on whatever device, and its distributions piece by piece."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import nn
from transformers.utils import cached_file

from peft_ext.distillation.loss import Outcomes
from peft_ext.distillation.output_head import OutputHead, output_head
from peft_ext.examples import IGNORED
from peft_ext.language_model import device_of, identity, inference, is_causal, text_config
from peft_ext.models import load, locate, resolve_model


# Of a weight file, so many pieces count for its digest, besides its size.
_SAMPLES, _SAMPLE_BYTES = 256, 4096


def supervised(labels: torch.Tensor) -> torch.Tensor:
    """Which tokens `[batch, tokens - 1]` are followed by one that the loss is on."""
    return labels[:, 1:] != IGNORED


def chosen(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Of values `[batch, tokens, ...]`, those of the tokens that are kept; on the meta device, where which isn't known, all."""
    return values.flatten(0, 1) if values.is_meta else values[kept]


class LiveTeacher:
    """A model whose distributions are computed for each batch.

    Args:
        model: A causal language model; frozen and in eval mode from now on.
        temperature: Of the objective.
        device: Where it runs; by default where it is.

    Raises:
        TypeError: If it is no causal language model.
    """

    def __init__(
        self, model: nn.Module, temperature: float = 1.0, device: Union[None, str, torch.device] = None
    ) -> None:
        if not is_causal(model):
            raise TypeError(f"teacher_model is a {type(model).__name__}; it must be a causal language model.")
        self.model = model.eval().requires_grad_(False)
        if device is not None and torch.device(device) != device_of(model):
            self.model.to(device)
        self.temperature, self.vocabulary = temperature, text_config(model).vocab_size
        self._head: Optional[OutputHead] = None
        self._compared = False

    def of(self, inputs: Mapping[str, Any]) -> LiveTeaching:
        """Its distributions for a batch with `labels`, as a trainer's collator makes it."""
        if not self._compared:
            self._head, self._compared = output_head(self.model), True
        device = device_of(self.model)
        kept = supervised(inputs["labels"]).to(device)
        batch = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
            if name != "labels"
        }
        batch["use_cache"] = False
        with inference(self.model):
            if self._head is None:
                return LiveTeaching(self, chosen(self.model(**batch).logits[:, :-1], kept))
            batch.pop("use_cache")
            return LiveTeaching(self, chosen(self._head.states_of(self.model, batch)[:, :-1], kept))

    @torch.no_grad()
    def log_probs(self, states: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[n, vocabulary]` of states, in float32, at the temperature."""
        logits = states if self._head is None else self._head(states)
        return logits.float().div_(self.temperature).log_softmax(-1)


class LiveTeaching:
    """A live teacher's distributions for the supervised tokens of a batch; made when they are asked for.

    Args:
        teacher: Makes them.
        states: Of the supervised tokens `[tokens, hidden]`, or their logits.
    """

    def __init__(self, teacher: LiveTeacher, states: torch.Tensor) -> None:
        self.teacher, self.states = teacher, states

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, tokens: slice) -> Outcomes:
        return Outcomes(self.teacher.log_probs(self.states[tokens]))


def load_teacher(name: str, dtype: Union[str, torch.dtype] = torch.bfloat16) -> Any:
    """A teacher by its name, see [`peft_ext.models.load`]; an adapter is merged where it can be."""
    try:
        return load(name, dtype=dtype, merge=True)
    except TypeError:  # on packed codes, which are never rounded again
        return load(name, dtype=dtype)


def teacher_digest(teacher: Union[str, nn.Module]) -> str:
    """What tells teachers apart, without loading one that is named: a digest of sizes and samples of its weight files."""
    if isinstance(teacher, nn.Module):
        return identity(teacher)
    base, adapter = locate(teacher)
    found = hashlib.sha256()
    for name in (base, *(() if adapter is None else (adapter,))):
        for path in _weight_files(name):
            size = path.stat().st_size
            found.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                for sample in range(_SAMPLES):
                    file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                    found.update(file.read(_SAMPLE_BYTES))
    return found.hexdigest()[:32]


def _weight_files(name: str) -> list[Path]:
    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").is_file():
        return [folder / "adapter_config.json", *sorted(folder.glob("*.safetensors"))]
    source = resolve_model(name)
    if source.gguf_file is not None:
        return [Path(source.name_or_path, source.gguf_file)]
    folder = Path(source.name_or_path)
    if not folder.is_dir():
        config = cached_file(source.name_or_path, "config.json")
        folder = Path(str(config)).parent
    return [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
