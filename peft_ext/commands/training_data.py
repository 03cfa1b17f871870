# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which data the commands read, and the examples that become of them: to train on, to calibrate on, and held out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from peft_ext.data import PYTHON_DOCS, Records, check_share, hold_out, load_records
from peft_ext.examples import TEXTS, Columns, Encoder, Examples, blocks_as_examples, shape_of
from peft_ext.text import split_texts, token_blocks


_T = TypeVar("_T")


@dataclass
class DataArguments:
    """Which data, and what is held out of them."""

    data: Optional[str] = field(
        default=None,
        metadata={
            "help": "File (.jsonl, .json, .csv, .parquet; .txt, .md, .rst), folder of such files, hub data set id, or "
            f"{PYTHON_DOCS} (the default)."
        },
    )
    text_field: str = field(default="text", metadata={"help": "Column that holds a text."})
    messages_field: str = field(
        default="messages", metadata={"help": "Column that holds a conversation: messages with role and content."}
    )
    prompt_field: str = field(default="prompt", metadata={"help": "Column that holds a prompt: text or messages."})
    completion_field: str = field(
        default="completion", metadata={"help": "Column that holds its completion: text or messages."}
    )
    data_config: Optional[str] = field(default=None, metadata={"help": "Configuration of the hub data set."})
    split: Optional[str] = field(default=None, metadata={"help": "Split to train on; train by default."})
    eval_data: Optional[str] = field(
        default=None, metadata={"help": "Held-out data of their own: what --data takes; all of them are held out."}
    )
    eval_split: Optional[str] = field(
        default=None, metadata={"help": "Split to hold out; validation (valid, val, dev) by default."}
    )
    block_size: int = field(default=256, metadata={"help": "Of texts: tokens per block."})


@dataclass
class ExampleArguments:
    """How rows become examples, as TRL's SFTConfig names it."""

    max_length: Optional[int] = field(
        default=1024, metadata={"help": "Of examples that aren't blocks: longer ones are truncated."}
    )
    truncation_mode: str = field(default="keep_start", metadata={"help": "What is kept then; or keep_end."})
    packing: Optional[bool] = field(
        default=None,
        metadata={"help": "Of texts: False makes an example of each instead of joining them and cutting blocks."},
    )
    assistant_only_loss: Optional[bool] = field(
        default=None,
        metadata={"help": "Of messages: the loss on the assistant's turns alone (the default), or on everything."},
    )
    completion_only_loss: Optional[bool] = field(
        default=None, metadata={"help": "Of prompts: the loss on the completion alone (the default)."}
    )
    chat_template_path: Optional[str] = field(
        default=None, metadata={"help": "A .jinja file with another chat template."}
    )


class TrainingData(NamedTuple):
    """Examples to train on, in random order, and held-out ones."""

    train: Examples
    held_out: Examples
    blocks: bool

    def lines(self) -> list[str]:
        """What is read, for the user."""
        if self.blocks:
            return []
        return [self.train.summary("training data"), self.held_out.summary("held-out data")]


def training_data(
    data: DataArguments,
    options: Any,
    tokenizer: PreTrainedTokenizerBase,
    held_out: float,
    seed: int = 0,
    at_most: Optional[int] = None,
    held_out_at_most: Optional[int] = None,
) -> TrainingData:
    """Read the data and turn them into examples.

    Texts are joined and cut into blocks of `block_size` tokens with the loss on all of them, unless `packing` is set:
    then, as with TRL, each is an example.

    Args:
        data: Which data.
        options: [`ExampleArguments`], or TRL's SFTConfig, which has fields of the same names.
        tokenizer: The model's; `chat_template_path` is put into it.
        held_out: Share that is held out where the data have no validation split and there is no `eval_data`.
        seed: Of the order of the training examples.
        at_most, held_out_at_most: How many examples are needed; of a large data set, the other rows aren't tokenised.
            Texts always are.

    Raises:
        FileNotFoundError: If there are no such data.
        ValueError: If a row can't be read, or a part is empty; names file and row.
    """
    reader = _Reader(data, options, tokenizer, held_out)
    return TrainingData(reader.train(seed, at_most), reader.held_out(held_out_at_most), reader.blocks)


def held_out_data(
    data: DataArguments,
    options: Any,
    tokenizer: PreTrainedTokenizerBase,
    held_out: float,
    whole: bool = False,
    at_most: Optional[int] = None,
) -> Examples:
    """The held-out examples alone, in order; with `whole`, those of all rows. See [`training_data`]."""
    reader = _Reader(data, options, tokenizer, held_out)
    return reader.whole(at_most) if whole else reader.held_out(at_most)


class _Reader:
    """Rows that are read, and the two ways in which they become examples: blocks, or an example a row."""

    def __init__(self, data: DataArguments, options: Any, tokenizer: PreTrainedTokenizerBase, held_out: float) -> None:
        _set_chat_template(tokenizer, options.chat_template_path)
        if options.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"truncation_mode={options.truncation_mode!r} is unknown; choose keep_start or keep_end.")
        records, self.name = _records(data, held_out), data.data or PYTHON_DOCS
        if not records.train:
            raise ValueError(f"data={self.name!r} is empty: it has no rows.")
        self.data, self.options, self.tokenizer = data, options, tokenizer
        columns = Columns(data.text_field, data.messages_field, data.prompt_field, data.completion_field)
        self.shape = shape_of(records.train[0], columns)
        self.blocks = self.shape == TEXTS and options.packing is None
        if self.blocks:
            self.texts = split_texts(records, self.name, held_out=held_out, text_field=data.text_field)
            return
        self.train_records, self.held_out_records = records.train, records.held_out
        if self.held_out_records is None:
            self.train_records, self.held_out_records = hold_out(records.train, held_out)
        self.encoder = Encoder(
            tokenizer,
            columns,
            assistant_only_loss=options.assistant_only_loss,
            completion_only_loss=options.completion_only_loss,
            max_length=options.max_length,
            keep_end=options.truncation_mode == "keep_end",
        )

    def train(self, seed: int, at_most: Optional[int]) -> Examples:
        if self.blocks:
            train = self._blocks(self.texts.train, "training text")
            train.examples = _shuffled(train.examples, seed)
            return train
        if self.options.packing:
            at_most = None  # how many fill a row isn't known
            if getattr(self.options, "packing_strategy", "bfd") != "bfd":
                self.encoder.max_length = None  # packing cuts what is too long, and keeps all of it
        train = self.encoder(_shuffled(self.train_records, seed), self.shape, "training data", at_most)
        self.encoder.max_length = self.options.max_length
        return train

    def held_out(self, at_most: Optional[int]) -> Examples:
        if self.blocks:
            return self._blocks(self.texts.held_out, "held-out text", at_most)
        assert self.held_out_records is not None
        return self.encoder(self.held_out_records, self.shape, "held-out data", at_most)

    def whole(self, at_most: Optional[int]) -> Examples:
        if self.blocks:
            return self._blocks([*self.texts.train, *self.texts.held_out], "text", at_most)
        records = [*self.train_records, *(self.held_out_records or ())]
        return self.encoder(records, self.shape, at_most=at_most)

    def _blocks(self, texts: list[str], name: str, at_most: Optional[int] = None) -> Examples:
        blocks = token_blocks(self.tokenizer, texts, self.data.block_size, name=name)
        return blocks_as_examples(blocks[:at_most])


def _shuffled(items: list[_T], seed: int) -> list[_T]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return [items[index] for index in order]


def _records(data: DataArguments, held_out: float) -> Records:
    """All rows, and those of `--eval_data` as the held-out ones: of its `eval_split`, its validation split, or all."""
    check_share(held_out)
    own = data.eval_data is not None
    records = load_records(
        data.data or PYTHON_DOCS,
        data_config=data.data_config,
        split=data.split,
        eval_split=None if own else data.eval_split,
    )
    if data.eval_data is None:
        return records
    other = load_records(data.eval_data, data_config=data.data_config, split=data.eval_split, argument="eval_data")
    return Records(records.train, other.train if other.held_out is None or data.eval_split else other.held_out)


def _set_chat_template(tokenizer: PreTrainedTokenizerBase, path: Optional[str]) -> None:
    if path is None:
        return
    if not path.endswith((".jinja", ".j2")) or not Path(path).expanduser().is_file():
        raise ValueError(f"chat_template_path={path!r} is no .jinja file.")
    tokenizer.chat_template = Path(path).expanduser().read_text(encoding="utf-8")
