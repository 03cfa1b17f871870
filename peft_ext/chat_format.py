# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A conversation, or a user's text, as the text after which the assistant speaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Union

from transformers import PreTrainedTokenizerBase


Messages = Sequence[Mapping[str, str]]


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Union[str, Messages]) -> str:
    """The text of the chat template after which the assistant speaks, its special tokens written out.

    Args:
        tokenizer: With a chat template.
        prompt: What a user says, or messages of a role and a content each.

    Raises:
        ValueError: If there is no chat template, or no messages.
        TypeError: If a message lacks its role or its content.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'!r} has no chat template; pass plain texts, or set "
            "tokenizer.chat_template."
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not messages:
        raise ValueError("the conversation has no messages.")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise TypeError(f"message {message!r} must have a 'role' and a 'content'.")
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
