# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Loads what writes texts: a model or a folder with an adapter, as it is or quantised, behind a backend."""

from __future__ import annotations

from typing import Any, Optional

import torch
from peft import get_peft_model
from transformers import PreTrainedTokenizerBase

from peft_ext import PeqaConfig, calibrate
from peft_ext.language_model import device_of
from peft_ext.models import DEFAULT_MODEL, load_tokenizer, locate
from trl_ext.almost.config import WritingConfig
from trl_ext.almost.models import chosen_device, load_chat_tokenizer, load_policy
from trl_ext.almost.prompts.demonstrations import USER
from trl_ext.almost.prompts.roles import STYLES, mining_prompt, seed_queries
from trl_ext.almost.writing.backends import Backend, TransformersBackend, VLLMBackend
from trl_ext.almost.writing.generators import Generator


BACKENDS = ("transformers", "vllm")


def backend_of(config: WritingConfig, generator: Optional[Generator] = None) -> Backend:
    """Who writes in a stage: the stage's own model, or a generator."""
    who = generator or Generator()
    model = who.model or config.model_name_or_path
    return load_backend(
        model, who.bits, who.group_size, config.backend, config.batch_size, config.dtype, device=config.device
    )


def load_backend(
    model: Optional[str] = None,
    bits: Optional[int] = None,
    group_size: int = 64,
    backend: str = "transformers",
    batch_size: int = 32,
    dtype: str = "auto",
    device: Optional[str] = None,
    **kwargs: Any,
) -> Backend:
    """What samples texts from a model.

    Args:
        model: See [`load_speaker`].
        bits, group_size: Quantise it first, see [`quantized`]; with vLLM, quantise beforehand
            (`peft-ext quantize`) and name the folder.
        backend: `"transformers"` or `"vllm"`.
        batch_size: Texts side by side.
        dtype: Float type of the weights.
        device: Where it writes: `"cpu"`, `"cuda:1"`, ...; None: an accelerator if there is one. vLLM chooses by itself.
        **kwargs: Passed to `from_pretrained` or `vllm.LLM`.

    Raises:
        ValueError: If the backend is unknown, can't quantise or can't be told a device, or there is no such device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {BACKENDS}.")
    if backend == "vllm":
        if bits is not None or model is None:
            raise ValueError(
                f"backend='vllm' takes a hub id or a folder (model={model!r}, bits={bits}); for a quantised generator, write a "
                "packed checkpoint with `peft-ext quantize` and name its folder as the model."
            )
        if device is not None:
            raise ValueError(
                f"device={device!r}: vLLM chooses its devices by itself; leave it out, and say CUDA_VISIBLE_DEVICES instead."
            )
        return VLLMBackend(model, dtype=dtype, **kwargs)
    loaded, tokenizer = load_speaker(model, dtype=dtype, device=device, **kwargs)
    if bits is not None:
        loaded = quantized(loaded, tokenizer, bits, group_size)
    return TransformersBackend(loaded, tokenizer, batch_size)


def load_speaker(
    model: Optional[str] = None, dtype: str = "auto", device: Optional[str] = None, **kwargs: Any
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, on the accelerator if there is one, and its tokenizer.

    Args:
        model: See [`load_policy`].
        dtype: Float type of the weights.
        device: Where to put it; None: an accelerator if there is one.
        **kwargs: Passed to `from_pretrained`.

    Raises:
        ValueError: If there is no such device.
    """
    where = chosen_device(device)
    loaded = load_policy(model, dtype=dtype, **kwargs)
    return loaded if "device_map" in kwargs else loaded.to(where), speaker_tokenizer(model)


def speaker_tokenizer(model: Optional[str] = None) -> PreTrainedTokenizerBase:
    """The tokenizer of what [`load_speaker`] loads, with a chat template if the model has been tuned to chat."""
    # without a template of its own a model has not been tuned to chat, and is shown the paper's plain dialogues
    is_tuned = locate(model or DEFAULT_MODEL)[1] is not None
    return load_chat_tokenizer(model) if is_tuned else load_tokenizer(model)


def quantized(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, bits: int, group_size: int = 64
) -> torch.nn.Module:
    """The model with weights of few bits, through PEQA's calibration on this package's own demonstrations.

    Args:
        model: A float model; changed.
        tokenizer: Its tokenizer.
        bits: Width of a weight.
        group_size: Inputs that share a scale; widths that it doesn't divide take one scale per channel.
    """
    widths = [m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear)]
    size = group_size if all(width % group_size == 0 for width in widths) else -1
    config = PeqaConfig(bits=bits, group_size=size, init_method="calibrated", task_type="CAUSAL_LM")
    tokens = tokenizer(_calibration_text(), verbose=False)["input_ids"]
    length = min(512, getattr(model.config, "max_position_embeddings", 512) or 512)
    device = device_of(model)
    blocks = [torch.tensor([tokens[i : i + length]], device=device) for i in range(0, len(tokens), length)]
    calibrated = calibrate(model, config, [{"input_ids": block} for block in blocks], progressbar=False)
    return get_peft_model(calibrated, config).merge_and_unload().eval()


def _calibration_text() -> str:
    dialogues = [turn for style in STYLES.values() for pair in style.demonstrations for turn in pair]
    turns = [turn for conversation in USER for turn in conversation]
    return "\n\n".join([*dialogues, *turns, mining_prompt(seed_queries())])
