# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The chat format: the tokenizer's own template, or the paper's "Human: / Assistant:" where it has none."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Union

from transformers import PreTrainedTokenizerBase

from generation_ext.shared_prefix.encoding import TextEncoder
from peft_ext.chat_format import chat_prompt
from peft_ext.examples import assistant_mask
from peft_ext.language_model import ENCODER


Message = Mapping[str, str]
Messages = Sequence[Message]
# A query, or a conversation that ends with one.
Prompt = Union[str, Messages]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
# START and END are the special tokens that the tokenizer itself puts around a text.
FALLBACK_TEMPLATE = (
    "{{ START }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\n\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\n\nAssistant: ' + message['content'] + END }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class EncodedChat(NamedTuple):
    """A conversation as tokens.

    Attributes:
        input_ids: Token ids, special tokens included.
        labels: The same, -100 at whatever the assistant did not write.
    """

    input_ids: list[int]
    labels: list[int]


def with_chat_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer if it has a chat template, else a copy with the paper's: "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    if tokenizer.chat_template is not None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    encoder = TextEncoder(tokenizer, ENCODER)  # of such a model, a text has an end, too
    start, end = ("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (encoder.lead, encoder.tail))
    end = end or tokenizer.eos_token or ""
    tokenizer.chat_template = FALLBACK_TEMPLATE.replace("START", repr(start)).replace("END", repr(end))
    return tokenizer


def as_messages(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as messages: a string is a user's query.

    Raises:
        TypeError: If it is neither a string nor messages.
        ValueError: If there is no message, or one lacks its role or content.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages = [message for message in prompt if isinstance(message, Mapping)] if isinstance(prompt, Sequence) else []
    if not isinstance(prompt, Sequence) or len(messages) < len(prompt):
        raise TypeError(f"prompt={prompt!r} must be a string or a list of messages.")
    if not messages:
        raise ValueError("prompt has no messages.")
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(f"message={dict(message)!r} must have a 'role' and a 'content', both strings.")
    return [dict(message) for message in messages]


def dialogue(text: str) -> list[dict[str, str]]:
    """Messages of a text in the paper's format, whose first turn may lack its "Human:"."""
    parts = _TURN.split(text if text.startswith((HUMAN, ASSISTANT)) else f"{HUMAN} {text}")
    turns = zip(parts[1::2], parts[2::2])
    return [{"role": _ROLES[who], "content": content.strip()} for who, content in turns]


def before_marks(text: str, marks: Sequence[str]) -> str:
    """A text up to the first of several marks that it holds."""
    ends = [end for end in (text.find(mark) for mark in marks) if end >= 0]
    return text[: min(ends)] if ends else text


def request_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, start: str = "") -> str:
    """A prompt as the text after which the assistant speaks.

    Args:
        tokenizer: Of the model that is to answer; without a chat template, the paper's format is used.
        prompt: A query, or messages.
        start: How the answer begins.
    """
    text = chat_prompt(with_chat_template(tokenizer), as_messages(prompt))
    # the paper's format has a space there, which a tokenizer without a template has as part of the next word
    return text + (f" {start}" if start and text.endswith(ASSISTANT) else start)


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """A whole conversation as text, with the special tokens of the format."""
    return str(with_chat_template(tokenizer).apply_chat_template(as_messages(messages), tokenize=False))


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> EncodedChat:
    """Tokens of a conversation, and which of them the assistant wrote: its answers and the special tokens that end them,
    see [`peft_ext.examples.assistant_mask`].

    Raises:
        ValueError: If the template renders a turn differently once others follow.
    """
    ids, written = assistant_mask(with_chat_template(tokenizer), as_messages(messages))
    return EncodedChat(ids, [token if own else -100 for token, own in zip(ids, written)])
