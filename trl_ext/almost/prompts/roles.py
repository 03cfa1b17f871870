# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Prompts of all roles: the assistant in several styles and shots, a person who asks on, a miner of queries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from transformers import PreTrainedTokenizerBase

from peft_ext.files import read_json
from peft_ext.rows import read_rows
from trl_ext.almost.prompts.chat import ASSISTANT, HUMAN, Messages, Prompt, as_messages, before_marks, request_text
from trl_ext.almost.prompts.demonstrations import (
    FAITHFUL,
    HHH,
    HHH_PREAMBLE,
    MINING_PREAMBLE,
    USER,
    USER_PREAMBLE,
    Demonstration,
)


SEPARATOR = "-----"
QUERY = "Query:"
AUTO, CHAT, PLAIN = "auto", "chat", "plain"
# The prompt that is no prompt: the chat template alone, as the model is asked in use.
OWN = "own"
DEFAULT_SHOTS = 3
FORMATS = (AUTO, CHAT, PLAIN)
# Where a role's turn ends at the latest.
ASSISTANT_STOPS = ("Human:", SEPARATOR)
OWN_STOPS = (HUMAN,)
USER_STOPS = ("Assistant:", "Human:", SEPARATOR)
MINING_STOPS = ("\n",)
# A mark, with quotes and brackets that close behind it, before white space or the end; scripts without spaces need none.
_SENTENCE_END = re.compile(r"(?<![0-9])[.!?…।۔]+[\"')\]*»”’]*(?=\s|$)|[。！？]+[」』”’）]*")
_USER_TASK = (
    "You write the messages of a person who talks to an AI assistant. Reply with the person's next message only: one or two "
    "sentences that build on what the assistant has just said."
)


class Style(NamedTuple):
    """How an assistant is shown to answer.

    Attributes:
        preamble: What stands before the dialogues; None: nothing, so that a chat template says what it says by itself.
        demonstrations: Pairs of query and answer; n shots are the first n.
    """

    preamble: Optional[str]
    demonstrations: tuple[Demonstration, ...]


STYLES = {"hhh": Style(HHH_PREAMBLE, HHH), "faithful": Style(HHH_PREAMBLE, FAITHFUL), OWN: Style(None, ())}


def load_style(name: str) -> Style:
    """A style by its name, or from a JSON file `{"preamble": ..., "demonstrations": [[query, answer], ...]}`.

    Raises:
        ValueError: If it is neither.
    """
    if name in STYLES:
        return STYLES[name]
    path = Path(name).expanduser()
    if path.suffix != ".json" or not path.is_file():
        raise ValueError(f"prompt={name!r} is unknown; choose one of {tuple(STYLES)} or a JSON file of your own.")
    try:
        value = read_json(path, "mend it")
        return Style(str(value["preamble"]), tuple((str(q), str(a)) for q, a in value["demonstrations"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"prompt={name!r} must hold a preamble and demonstrations, pairs of query and answer: {error!r}."
        ) from error


def uses_chat(tokenizer: PreTrainedTokenizerBase, chat_format: str = AUTO) -> bool:
    """Whether prompts go through the tokenizer's chat template.

    Raises:
        ValueError: If the format is unknown, or asks for a template that isn't there.
    """
    if chat_format not in FORMATS:
        raise ValueError(f"chat_format={chat_format!r} is unknown; choose one of {FORMATS}.")
    if chat_format == CHAT and tokenizer.chat_template is None:
        raise ValueError(
            "chat_format='chat' needs a chat template, and this tokenizer has none; use 'plain' or 'auto'."
        )
    return chat_format == CHAT or (chat_format == AUTO and tokenizer.chat_template is not None)


def chosen_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, shots: Optional[int] = None, chat_format: str = AUTO
) -> tuple[str, int]:
    """Which prompt and how many shots are meant, where a model is to answer as well as it can.

    Args:
        tokenizer: Of the model that writes.
        prompt: As of [`load_style`], or `"auto"`: the model's own chat format if it has one and `shots` is None, else
            `"faithful"`.
        shots: None: 3, of the own chat format none.
        chat_format: See [`assistant_prompt`].
    """
    if prompt == AUTO:
        prompt = OWN if shots is None and uses_chat(tokenizer, chat_format) else "faithful"
    return prompt, (0 if prompt == OWN else DEFAULT_SHOTS) if shots is None else shots


def assistant_prompt(
    tokenizer: PreTrainedTokenizerBase, conversation: Prompt, style: Style, shots: int, chat_format: str = AUTO
) -> str:
    """The text after which the assistant answers a conversation's last message.

    Args:
        tokenizer: Of the model that writes.
        conversation: A query, or messages that end with the user's.
        style, shots: What stands before it; 0 shots: the preamble alone.
        chat_format: `"chat"`: demonstrations are turns of the chat template; `"plain"`: the paper's text, for models
            that have not been tuned; `"auto"`: the former if there is a template.

    Raises:
        ValueError: If the style has fewer demonstrations, or is the chat template's own where prompts don't go through one.
    """
    if not 0 <= shots <= len(style.demonstrations):
        raise ValueError(f"shots={shots} must be between 0 and {len(style.demonstrations)}, what the prompt has.")
    messages = as_messages(conversation)
    turns = [turn for pair in style.demonstrations[:shots] for turn in pair]
    if uses_chat(tokenizer, chat_format):
        preamble = [] if style.preamble is None else [_system(style.preamble)]
        return request_text(tokenizer, [*preamble, *_messages(turns), *messages])
    if style.preamble is None:
        raise ValueError(
            f"prompt={OWN!r} needs a chat template, and this model's prompts go through none; use another prompt, such as "
            "'faithful'."
        )
    dialogues = [_plain(_messages(pair)) for pair in style.demonstrations[:shots]]
    return _join(style.preamble, [*dialogues, _plain(messages) + ASSISTANT])


def user_prompt(tokenizer: PreTrainedTokenizerBase, conversation: Messages, chat_format: str = AUTO) -> str:
    """The text after which the person says what comes next; `conversation` ends with the assistant's message."""
    messages = as_messages(conversation)
    if uses_chat(tokenizer, chat_format):
        # roles change sides: what the person says is what the model is to write
        flipped = [_flipped(message) for turns in USER for message in (_OPENING, *_messages(turns[:3]))]
        return request_text(tokenizer, [_system(_USER_TASK), *flipped, _OPENING_REQUEST, *map(_flipped, messages)])
    dialogues = [_plain(_messages(turns)) for turns in USER]
    return _join(USER_PREAMBLE, [*dialogues, _plain(messages) + HUMAN])


def mining_prompt(shots: Sequence[str]) -> str:
    """The text after which a new query follows, behind others; the same for tuned and other models."""
    lines = "".join(f"{QUERY} {' '.join(shot.split())}\n" for shot in shots)
    return f"{MINING_PREAMBLE}\n\n{lines}{QUERY}"


def clean_turn(text: str, stops: Sequence[str] = ASSISTANT_STOPS) -> str:
    """What a model wrote for a turn: up to the next turn or separator, without white space around it."""
    return before_marks(text, stops).strip()


def whole_sentences(text: str) -> str:
    """A text without an unfinished sentence at its end; as it is where no sentence ends in it. The number of a list's item
    ends none."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else text


def seed_queries(path: str = "") -> list[str]:
    """Queries to begin with: those of the package, or of a JSON-lines file.

    A row's `query`, or its `instruction` (with an empty `input`, as in self-instruct's seeds), is taken.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a row has neither, or all are empty.
    """
    file = Path(path).expanduser() if path else Path(__file__).with_name("seeds.jsonl")
    queries = []
    for number, row in enumerate(read_rows(file), start=1):
        text = row["query"] if "query" in row else "" if row.get("input") else row.get("instruction")
        if not isinstance(text, str):
            raise ValueError(f"{file}, row {number} has neither a query nor an instruction.")
        queries += [" ".join(text.split())] * bool(text.strip())
    if not queries:
        raise ValueError(f"seeds={path!r} holds no query.")
    return queries


_OPENING = {"role": "assistant", "content": "Start a new conversation."}
_OPENING_REQUEST = {"role": "user", "content": "Start a new conversation."}


def _system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def _messages(turns: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]


def _flipped(message: dict[str, str]) -> dict[str, str]:
    return {**message, "role": "assistant" if message["role"] == "user" else "user"}


def _plain(messages: Messages) -> str:
    marks = {"user": HUMAN, "assistant": ASSISTANT}
    return "".join(f"{marks[m['role']]} {m['content']}" if m["role"] in marks else m["content"] for m in messages)


def _join(preamble: str, dialogues: Sequence[str]) -> str:
    return preamble + "".join(f"\n\n{SEPARATOR}{dialogue}" for dialogue in dialogues)
