# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The chat format: the tokenizer's own template, or the paper's "Human: / Assistant:" where it has none."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Union

from transformers import PreTrainedTokenizerBase

from generation_ext.shared_prefix.encoding import TextEncoder
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
    tokenizer = with_chat_template(tokenizer)
    text = str(tokenizer.apply_chat_template(as_messages(prompt), tokenize=False, add_generation_prompt=True))
    # the paper's format has a space there, which a tokenizer without a template has as part of the next word
    return text + (f" {start}" if start and text.endswith(ASSISTANT) else start)


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """A whole conversation as text, with the special tokens of the format."""
    return str(with_chat_template(tokenizer).apply_chat_template(as_messages(messages), tokenize=False))


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> EncodedChat:
    """Tokens of a conversation, and which of them the assistant wrote: its answers and the special tokens that end them.

    Works with any template that shows a message's content unchanged; the template needs no `{% generation %}` marks.

    Raises:
        TypeError: If the tokenizer can't say where in the text a token lies.
        ValueError: If the template leaves out or changes what the assistant says.
    """
    if not tokenizer.is_fast:
        raise TypeError(
            f"tokenizer ({type(tokenizer).__name__}) is not a fast one, so it can't say which tokens the assistant "
            "wrote; load it with use_fast=True."
        )
    tokenizer = with_chat_template(tokenizer)
    messages = as_messages(messages)
    text = chat_text(tokenizer, messages)
    spans = _assistant_spans(tokenizer, messages, text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    labels = [
        token if any(first < end and last > start for start, end in spans) else -100
        for token, (first, last) in zip(ids, encoded["offset_mapping"])
    ]
    return EncodedChat(ids, labels)


def _assistant_spans(tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str) -> list[tuple[int, int]]:
    """From where the assistant is asked to speak to the special token that ends its turn, as places in the text."""
    special = sorted(map(re.escape, tokenizer.all_special_tokens), key=len, reverse=True)
    ending = re.compile(rf"\s*(?:{'|'.join(special)})") if special else re.compile("")
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = str(
            tokenizer.apply_chat_template(list(messages[:number]), tokenize=False, add_generation_prompt=True)
        )
        start = text.find(message["content"].strip(), len(before)) if text.startswith(before) else -1
        if start < 0:
            raise ValueError(
                f"the chat template changes or leaves out turn {number} ({message['content'][:60]!r}), so that the "
                "assistant's tokens can't be told; set another tokenizer.chat_template."
            )
        end = start + len(message["content"].strip())
        match = ending.match(text, end)
        spans.append((len(before), match.end() if match else end))
    return spans
