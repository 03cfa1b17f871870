# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""SmolLM2-135M-Instruct and its tokens of Python's documentation, read once: out of a GGUF that takes 12 seconds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

from peft_ext.models import load, load_tokenizer
from peft_ext.text import PYTHON_DOCS, load_text, token_blocks


class Blocks(NamedTuple):
    """Token ids `[blocks, 128]`."""

    train: torch.Tensor
    held_out: torch.Tensor


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    try:
        return load_tokenizer()
    except ImportError as error:
        pytest.skip(f"needs the default model: {error}")


@pytest.fixture(scope="session")
def smollm2(tokenizer) -> Callable[[], PreTrainedModel]:
    """Each call gives a fresh copy, in float32."""
    model = load(dtype=torch.float32)
    return lambda: copy.deepcopy(model)


@pytest.fixture(scope="session")
def blocks(tokenizer) -> Blocks:
    splits = load_text(PYTHON_DOCS)
    return Blocks(*(token_blocks(tokenizer, text, 128) for text in (splits.train, splits.held_out)))
