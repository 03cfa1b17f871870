# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Rows as training examples: tokens, and which of them the loss is on.

The shapes are TRL's, and so are the tokens: a text and a completion end with the end token, a conversation goes through
the tokenizer's chat template. What TRL does where a template has no `{% generation %}` markers (an error) is done here by
[`assistant_spans`].
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from peft_ext.data import TEXT, Record
from peft_ext.text import text_of


logger = logging.getLogger(__name__)
# A token that the loss is not on, as everywhere in transformers.
IGNORED = -100
TEXTS, PROMPTS, CONVERSATIONS = "text", "prompt/completion", "messages"
# What ShareGPT's files call the two sides.
_ROLES = {"human": "user", "gpt": "assistant"}


class Example(NamedTuple):
    """Token ids, and the labels of the same length: the token, or -100 where the loss is not on it."""

    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """How many tokens the loss is on; the first has nothing before it to be predicted from."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Columns:
    """What the columns of the user's data are called."""

    text: str = TEXT
    messages: str = CONVERSATIONS
    prompt: str = "prompt"
    completion: str = "completion"


@dataclass
class Examples:
    """Examples of one part of the data, and what became of the rows.

    Args:
        examples: In the order of the rows.
        shape: `"text"`, `"prompt/completion"` or `"messages"`.
        truncated: How many were cut to the longest length.
        dropped: Reason -> how many rows were left out.
        of: How many rows there are; no more of them were read than are needed.
    """

    examples: list[Example]
    shape: str
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    of: Optional[int] = None

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def trained(self) -> int:
        """The tokens that the loss is on."""
        return sum(example.trained for example in self.examples)

    def summary(self, name: str) -> str:
        """One line for the user, such as `training: 90 rows of messages, 1,234 tokens, loss on 567 of them`."""
        rest = (self.of or 0) - len(self.examples) - sum(self.dropped.values())
        chosen = f" (of {self.of:,}: as many as are used)" if rest > 0 else ""
        line = f"{name}: {len(self.examples):,} rows of {self.shape}{chosen}, {self.tokens:,} tokens, "
        line += f"loss on {self.trained:,} of them"
        notes = [f"{self.truncated:,} too long and truncated"] if self.truncated else []
        notes += [f"{count:,} dropped ({reason})" for reason, count in self.dropped.items()]
        return "; ".join([line, *notes])


def blocks_as_examples(blocks: torch.Tensor) -> Examples:
    """Blocks of tokens `[blocks, block_size]` as examples with the loss on every token."""
    rows = blocks.tolist()
    return Examples([Example(row, row) for row in rows], TEXTS)


def shape_of(record: Record, columns: Columns) -> str:
    """What kind of row it is; where several would fit, TRL's order: prompt and completion, messages, text.

    A column that the user has named decides before those that happen to be there.

    Raises:
        ValueError: If no kind fits; names the row and the columns that it has.
    """
    if record.raw:
        return TEXTS
    row, standard = record.row, Columns()
    fits = {
        PROMPTS: columns.prompt in row and columns.completion in row,
        CONVERSATIONS: columns.messages in row or (columns.messages == standard.messages and "conversations" in row),
        TEXTS: columns.text in row,
    }
    named = {
        PROMPTS: (columns.prompt, columns.completion) != (standard.prompt, standard.completion),
        CONVERSATIONS: columns.messages != standard.messages,
        TEXTS: columns.text != standard.text,
    }
    for shape, is_named in named.items():
        if is_named and not fits[shape]:
            raise ValueError(_missing(record, columns, shape))
    found = [shape for shape in fits if named[shape]] or [shape for shape in fits if fits[shape]]
    if not found:
        raise ValueError(
            f"{record.where}: no column {columns.messages!r}, no {columns.prompt!r} with {columns.completion!r}, and no "
            f"{columns.text!r}; it has {sorted(row)}. Name yours: --messages_field, --prompt_field with "
            "--completion_field, or --text_field."
        )
    return found[0]


def _missing(record: Record, columns: Columns, shape: str) -> str:
    names = {PROMPTS: (columns.prompt, columns.completion), CONVERSATIONS: (columns.messages,), TEXTS: (columns.text,)}
    missing = next(name for name in names[shape] if name not in record.row)
    return f"{record.where}: no column {missing!r}; it has {sorted(record.row)}."


class Encoder:
    """Turns rows into examples.

    Args:
        tokenizer: The model's.
        columns: What the columns are called.
        assistant_only_loss: Of conversations: the loss on the assistant's turns alone. None: of `messages`, yes; of a
            prompt and completion, the loss is on the completion.
        completion_only_loss: Of prompts and completions: the loss on the completion alone.
        max_length: Longer examples are cut; None: never.
        keep_end: Cut the start instead of the end.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        columns: Optional[Columns] = None,
        *,
        assistant_only_loss: Optional[bool] = None,
        completion_only_loss: Optional[bool] = None,
        max_length: Optional[int] = None,
        keep_end: bool = False,
    ) -> None:
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length={max_length} must be at least 2: one token to see and one to predict.")
        self.tokenizer, self.columns = tokenizer, columns or Columns()
        self.assistant_only_loss, self.completion_only_loss = assistant_only_loss, completion_only_loss
        self.max_length, self.keep_end = max_length, keep_end

    def __call__(
        self, records: Sequence[Record], shape: str, name: str = "data", at_most: Optional[int] = None
    ) -> Examples:
        """The examples of rows of one shape: all, or the first so many.

        Raises:
            ValueError: If a row lacks a column or holds something else than its shape says, there is no chat template,
                or no row is left; names the row.
        """
        for record in records:
            self._check_columns(record, shape)
        result = Examples([], shape, of=len(records))
        encode = {TEXTS: self._text, PROMPTS: self._prompt, CONVERSATIONS: self._conversation}[shape]
        reason = {TEXTS: "empty", PROMPTS: "an empty completion", CONVERSATIONS: "no turn of the assistant's"}[shape]
        for record in records:
            if len(result.examples) == at_most:
                break
            example = encode(record)
            if example.trained == 0:
                result.dropped[reason] = result.dropped.get(reason, 0) + 1
                continue
            if self.max_length is not None and len(example.input_ids) > self.max_length:
                kept = slice(-self.max_length, None) if self.keep_end else slice(self.max_length)
                example = Example(example.input_ids[kept], example.labels[kept])
                if example.trained == 0:
                    late = f"nothing to learn in {self.max_length} tokens"
                    result.dropped[late] = result.dropped.get(late, 0) + 1
                    continue
                result.truncated += 1
            result.examples.append(example)
        if not result.examples:
            why = "; ".join(f"{count} x {reason}" for reason, count in result.dropped.items()) or "no rows"
            raise ValueError(f"the {name} is empty: no row of {shape} is left ({why}).")
        return result

    def _text(self, record: Record) -> Example:
        text = text_of(record, self.columns.text)
        if not text.strip():
            return Example([], [])
        ids = self.tokenizer(self._ended(text), verbose=False)["input_ids"]
        return Example(ids, list(ids))

    def _check_columns(self, record: Record, shape: str) -> None:
        """Of every row, also of those that aren't needed: an error in the data is one."""
        if shape == PROMPTS and not {self.columns.prompt, self.columns.completion} <= record.row.keys():
            raise ValueError(_missing(record, self.columns, PROMPTS))
        if shape == CONVERSATIONS and self._talk_column(record) not in record.row:
            raise ValueError(_missing(record, self.columns, CONVERSATIONS))
        if shape == TEXTS:
            text_of(record, self.columns.text)

    def _talk_column(self, record: Record) -> str:
        column = self.columns.messages
        other = column == CONVERSATIONS and column not in record.row and "conversations" in record.row
        return "conversations" if other else column

    def _prompt(self, record: Record) -> Example:
        row = record.row
        prompt, completion = row[self.columns.prompt], row[self.columns.completion]
        if isinstance(prompt, str) and isinstance(completion, str):
            if not completion.strip():
                return Example([], [])
            masks: list[Sequence[int]] = []
            prompt_ids = self.tokenizer(prompt, verbose=False)["input_ids"]
            ids = self.tokenizer(prompt + self._ended(completion), verbose=False)["input_ids"]
        else:
            prompt = _messages(prompt, record, self.columns.prompt)
            completion = _messages(completion, record, self.columns.completion)
            options = self._template_options(row)
            prompt_ids = self._render(prompt, record, add_generation_prompt=True, tokenize=True, **options)
            masks = []
            if self.assistant_only_loss:
                ids, mask = self._masked(prompt + completion, record, options)
                masks.append(mask)
            else:
                ids = self._render(prompt + completion, record, tokenize=True, **options)
        if self.completion_only_loss is not False:
            start = common_prefix_length(prompt_ids, ids)
            masks.append([0] * start + [1] * (len(ids) - start))
        return _labelled(ids, masks)

    def _conversation(self, record: Record) -> Example:
        column = self._talk_column(record)
        messages = _messages(record.row[column], record, column)
        options = self._template_options(record.row)
        if self.assistant_only_loss is False:
            return _labelled(self._render(messages, record, tokenize=True, **options), [])
        if not any(message["role"] == "assistant" for message in messages):
            return Example([], [])
        ids, mask = self._masked(messages, record, options)
        return _labelled(ids, [mask])

    @functools.cached_property
    def _marked_template(self) -> Optional[str]:
        return marked_template(self.tokenizer)

    def _ended(self, text: str) -> str:
        end = self.tokenizer.eos_token
        return text if not end or text.endswith(end) else text + end

    def _masked(
        self, messages: list[dict[str, Any]], record: Record, options: dict[str, Any]
    ) -> tuple[list[int], list[int]]:
        if self.tokenizer.chat_template is None:
            raise ValueError(_no_template(record))
        try:
            return assistant_mask(self.tokenizer, messages, self._marked_template, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"{record.where}: {error}") from error

    def _render(self, messages: list[dict[str, Any]], record: Record, **options: Any) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise ValueError(_no_template(record))
        try:
            return self.tokenizer.apply_chat_template(messages, return_dict=False, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"{record.where}: the chat template refuses it: {error}") from error

    @staticmethod
    def _template_options(row: Mapping[str, Any]) -> dict[str, Any]:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools
        return {"tools": tools or None, **(row.get("chat_template_kwargs") or {})}


def marked_template(tokenizer: PreTrainedTokenizerBase) -> Optional[str]:
    """A chat template with `{% generation %}` markers: the tokenizer's own, or the copy of it that TRL keeps of well-known
    templates; None if there is neither."""
    from trl.chat_template_utils import (
        get_training_chat_template,
        has_generation_markers,
        is_chat_template_stop_token_trained,
    )

    template = tokenizer.chat_template
    template = template["default"] if isinstance(template, dict) else template
    marked = template if has_generation_markers(template) else None
    try:
        marked = get_training_chat_template(tokenizer) or marked
    except ValueError:  # none that TRL knows
        pass
    if marked is not None and not is_chat_template_stop_token_trained(tokenizer, chat_template=marked):
        logger.warning(
            "The chat template's {% generation %} markers leave out the token that ends the assistant's turn, so the "
            "model isn't trained to stop."
        )
    return marked


def assistant_mask(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], template: Optional[str] = None, **options: Any
) -> tuple[list[int], list[int]]:
    """The tokens of a conversation, and 1 for each that the assistant writes: its turns and the tokens that end them.

    Args:
        tokenizer: With a chat template.
        messages: Role and content.
        template: One with markers, see [`marked_template`]; without it, the turns are found by [`assistant_spans`].
        **options: Of `apply_chat_template`.

    Raises:
        ValueError: As [`assistant_spans`].
    """
    if template is not None:
        done = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, chat_template=template, **options
        )
        if any(done["assistant_masks"]):
            return done["input_ids"], done["assistant_masks"]
    text, spans = assistant_spans(tokenizer, messages, **options)
    ids = _tokens(tokenizer, text)
    mask = [0] * len(ids)
    for start, end in spans:
        first, last = (common_prefix_length(_tokens(tokenizer, text[:at]), ids) for at in (start, end))
        mask[first:last] = [1] * (last - first)
    return ids, mask


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and the parts of it that the assistant writes, as start and end.

    Found by rendering the beginnings of the conversation: a turn starts where the rendered messages before it, with the
    generation prompt, end; and it ends where the messages up to it end. White space that the template puts behind the
    end token isn't part of the turn, since nothing is generated after that token.

    Raises:
        ValueError: If the template renders a beginning differently once more messages follow, as those do that leave out
            earlier reasoning: then it can't be told what the assistant writes.
    """

    def render(count: int, **more: Any) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, **options, **more)

    text = render(len(messages))
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _beginning(render(index), text, tokenizer) if index else ""
        end = _beginning(render(index + 1), text, tokenizer)
        if before is None or end is None:
            raise ValueError(
                f"the chat template renders the messages before number {index + 1} differently when others follow, so "
                "the assistant's turns can't be told from the rest; pass --chat_template_path with a template that has "
                "{% generation %} markers, or --assistant_only_loss False to train on everything."
            )
        prompt = render(index, add_generation_prompt=True) if index else ""
        # a generation prompt may end in more than a finished turn starts with, such as an opened thought
        start = max(common_prefix_length(prompt, end), len(before))
        spans.append((start, _turn_end(tokenizer, end)))
    return text, spans


def _beginning(rendered: str, text: str, tokenizer: PreTrainedTokenizerBase) -> Optional[str]:
    """The rendered beginning of a conversation as it stands in the whole; some templates put an end token behind the whole
    alone. None if it stands there otherwise."""
    for beginning in (rendered, rendered.removesuffix(tokenizer.eos_token or "")):
        if text.startswith(beginning):
            return beginning
    return None


def _turn_end(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Where the turn ends that a rendered beginning ends with: behind its end token, if it has one."""
    special = (*tokenizer.all_special_tokens, *(str(token) for token in tokenizer.added_tokens_decoder.values()))
    stripped = text.rstrip()
    if not stripped.endswith(special):
        return len(text)
    of_turn = stripped.removesuffix(tokenizer.eos_token or "").rstrip()  # the other may stand behind the whole alone
    return len(of_turn) if of_turn.endswith(special) else len(stripped)


def common_prefix_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many leading items two sequences share: where a completion starts, also where tokens merge across its border."""
    length = 0
    for a, b in zip(one, other):
        if a != b:
            break
        length += 1
    return length


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _labelled(ids: list[int], masks: Sequence[Sequence[int]]) -> Example:
    return Example(list(ids), [token if all(bits) else IGNORED for token, *bits in zip(ids, *masks)])


def _messages(value: Any, record: Record, column: str) -> list[dict[str, Any]]:
    """The messages in a column, with `role` and `content`; JSON in a CSV file's cell, and ShareGPT's names, are read."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(
                f"{record.where}: column {column!r} holds a text, not a list of messages with 'role' and 'content'."
            ) from None
    if not isinstance(value, list) or not value:
        raise ValueError(f"{record.where}: column {column!r} is no list of messages, or an empty one.")
    messages = []
    for number, message in enumerate(value, start=1):
        message = dict(message) if isinstance(message, Mapping) else {}
        if "from" in message and "role" not in message:
            role = message.pop("from")
            message = {"role": _ROLES.get(role, role), "content": message.pop("value", None), **message}
        # Parquet and datasets fill in columns that other messages of the file have
        message = {key: part for key, part in message.items() if part is not None or key == "content"}
        if not isinstance(message.get("role"), str) or ("content" not in message and "tool_calls" not in message):
            raise ValueError(
                f"{record.where}: message {number} of {column!r} has no 'role' and 'content'; it has {sorted(message)}."
            )
        if message.get("content") is None and "tool_calls" not in message:
            raise ValueError(f"{record.where}: message {number} of {column!r} has no content.")
        messages.append(message)
    return messages


def _no_template(record: Record) -> str:
    return (
        f"{record.where}: it holds messages, but the model's tokenizer has no chat template; pass --chat_template_path "
        "with a .jinja file, or data with prompt and completion, or text."
    )
