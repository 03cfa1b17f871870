# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Rows as examples: the tokens and labels that TRL makes of them, and what TRL refuses."""

from __future__ import annotations

import datasets
import pytest
import torch
from trl import SFTConfig, SFTTrainer
from trl import chat_template_utils as templates

from peft_ext.data import Record
from peft_ext.examples import (
    IGNORED,
    Columns,
    Encoder,
    Example,
    assistant_mask,
    assistant_spans,
    marked_template,
    shape_of,
)
from peft_ext.perplexity import example_perplexity, perplexity
from tests.tiny.models import tiny
from tests.tiny.tokenizers import byte_tokenizer, chat_tokenizer


TALK = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A model.\n"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]
CHATS = [TALK, [{"role": "system", "content": "Be brief."}, *TALK[:2]], [*TALK, {"role": "user", "content": "Wait!"}]]
# An end token behind the whole alone, as Phi has it.
ENDED = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_start|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
# Reasoning of earlier turns is left out, as Qwen3 has it.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def records(rows: list[dict]) -> list[Record]:
    return [Record(row, f"data.jsonl, row {number}") for number, row in enumerate(rows, start=1)]


def encoded(rows: list[dict], tokenizer=None, **options) -> list[Example]:
    found = records(rows)
    encoder = Encoder(tokenizer or chat_tokenizer(), **options)
    return encoder(found, shape_of(found[0], Columns())).examples


def of_trl(rows: list[dict], tokenizer, folder, **options) -> list[Example]:
    """What SFTTrainer makes of the rows."""
    model = tiny("llama")
    args = SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, **options)
    data = datasets.Dataset.from_list(rows)
    made = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer).train_dataset
    return [Example(row["input_ids"], row["labels"]) for row in made]


MESSAGES = [{"messages": chat} for chat in CHATS]
PLAIN = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "a", "completion": "b<eos>"}]
CONVERSATIONAL = [{"prompt": TALK[:1], "completion": TALK[1:2]}, {"prompt": TALK[:3], "completion": TALK[3:]}]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([{"text": "one"}, {"text": "two two"}], {}),
        (PLAIN, {}),
        (PLAIN, {"completion_only_loss": False}),
        (CONVERSATIONAL, {}),
        (CONVERSATIONAL, {"assistant_only_loss": True}),
        (MESSAGES, {"assistant_only_loss": True}),
        (MESSAGES, {"assistant_only_loss": False}),
        ([{"text": "a long text " * 9}], {"max_length": 20}),
    ],
)
def test_examples_are_those_of_sft_trainer(rows, options, tmp_path):
    tokenizer = chat_tokenizer() if rows not in (PLAIN,) else byte_tokenizer()
    tokenizer.chat_template = templates.qwen2_5_chat_template  # TRL knows where its assistant speaks
    assert encoded(rows, tokenizer, **options) == of_trl(rows, tokenizer, tmp_path, **options)


def by_hand(tokenizer, chat: list[dict]) -> Example:
    """SmolLM2's template, piece by piece."""
    if chat[0]["role"] != "system":
        greeting = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        chat = [{"role": "system", "content": greeting}, *chat]
    ids, labels = [], []
    for message in chat:
        pieces = [f"<|im_start|>{message['role']}\n", f"{message['content']}<|im_end|>", "\n"]
        for piece, text in enumerate(pieces):
            tokens = tokenizer(text)["input_ids"]
            ids += tokens
            labels += tokens if piece == 1 and message["role"] == "assistant" else [IGNORED] * len(tokens)
    return Example(ids, labels)


def test_without_markers_the_assistants_turns_are_found_all_the_same():
    tokenizer = chat_tokenizer()
    assert marked_template(tokenizer) is None
    assert encoded(MESSAGES) == [by_hand(tokenizer, chat) for chat in CHATS]


def test_spans_agree_with_markers():
    """A template with markers around what is between the header and behind the end token."""
    marked = chat_tokenizer()
    marked.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for chat in CHATS:
        assert assistant_mask(marked, chat, marked_template(marked)) == assistant_mask(marked, chat)


def test_an_end_token_behind_the_whole():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = ENDED
    text, spans = assistant_spans(tokenizer, TALK)
    assert text.endswith("<|im_start|>\n<|im_end|>")
    assert [text[start:end] for start, end in spans] == ["A model.\n<|im_start|>", "See you<|im_start|>"]


def test_a_template_that_forgets_is_refused():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(ValueError, match="data.jsonl, row 1: the chat template renders the messages before number 2"):
        encoded(MESSAGES, tokenizer)
    assert all(example.trained for example in encoded(MESSAGES, tokenizer, assistant_only_loss=False))


def test_names_of_other_tools():
    talk = [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "A model.\n"}]
    assert encoded([{"conversations": talk}]) == encoded([{"messages": TALK[:2]}])
    # a cell of a CSV file; and what Parquet fills in
    text = '[{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A model.\\n"}]'
    assert encoded([{"messages": text}]) == encoded([{"messages": TALK[:2]}])
    filled = [{**message, "tool_calls": None} for message in TALK[:2]]
    assert encoded([{"messages": filled}]) == encoded([{"messages": TALK[:2]}])


def test_what_a_row_is():
    (record,) = records([{"messages": TALK, "text": "x", "prompt": "y", "completion": "z"}])
    assert shape_of(record, Columns()) == "prompt/completion"
    assert shape_of(record, Columns(text="prompt")) == "text"
    (record,) = records([{"messages": TALK, "text": "x"}])
    assert shape_of(record, Columns()) == "messages"


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"a": 1, "b": 2}], Columns(), r"row 1: no column 'messages', .*it has \['a', 'b'\]. Name yours"),
        ([{"text": "x"}, {"body": "x"}], Columns(), r"row 2: no field 'text'.*\['body'\]"),
        ([{"text": "x"}, {"text": None}], Columns(), "row 2: field 'text' is a NoneType"),
        ([{"q": "x"}], Columns(prompt="q", completion="a"), r"row 1: no column 'a'; it has \['q'\]"),
        ([PLAIN[0], {"prompt": "x"}], Columns(), r"row 2: no column 'completion'; it has \['prompt'\]"),
        ([{"messages": "hello"}], Columns(), "row 1: column 'messages' holds a text"),
        ([{"messages": []}], Columns(), "row 1: column 'messages' is no list of messages, or an empty one"),
        ([{"messages": [{"role": "user"}]}], Columns(), "row 1: message 1 of 'messages' has no 'role' and 'content'"),
        ([{"messages": TALK[:1]}], Columns(), r"no row of messages is left \(1 x no turn of the assistant's\)"),
        ([{"prompt": "x", "completion": " "}], Columns(), r"is left \(1 x an empty completion\)"),
    ],
)
def test_rows_that_cannot_be_read(rows, columns, message):
    found = records(rows)
    with pytest.raises(ValueError, match=message):
        Encoder(chat_tokenizer(), columns)(found, shape_of(found[0], columns))


def test_no_chat_template():
    for rows in (MESSAGES, CONVERSATIONAL):
        with pytest.raises(
            ValueError, match="row 1: it holds messages, but the model's tokenizer has no chat template"
        ):
            encoded(rows, byte_tokenizer())


def test_long_rows_are_counted():
    rows = [{"prompt": "p" * 5, "completion": "c" * 5}, {"prompt": "p" * 30, "completion": "c"}, PLAIN[0]]
    made = Encoder(byte_tokenizer(), max_length=9)(records(rows), "prompt/completion")
    assert [len(example.input_ids) for example in made.examples] == [9, 9]
    assert (made.truncated, made.dropped) == (2, {"nothing to learn in 9 tokens": 1})
    assert made.summary("training data") == (
        "training data: 2 rows of prompt/completion, 18 tokens, loss on 6 of them; 2 too long and truncated; "
        "1 dropped (nothing to learn in 9 tokens)"
    )
    some = Encoder(byte_tokenizer())(records(rows), "prompt/completion", at_most=2)
    assert len(some.examples) == 2
    assert some.summary("x").startswith("x: 2 rows of prompt/completion (of 3: as many as are used), ")
    with pytest.raises(ValueError, match="row 4: no column 'prompt'"):  # not needed, and an error all the same
        Encoder(byte_tokenizer())(records([*rows, {"text": "x"}]), "prompt/completion", at_most=2)
    ends = Encoder(byte_tokenizer(), max_length=9, keep_end=True)(records(rows), "prompt/completion")
    assert [example.trained for example in ends.examples] == [6, 2, 3]


def test_perplexity_of_what_is_trained():
    """Each trained token counts once, whatever the batch; one example at a time, by hand."""
    model, examples = tiny("llama").eval(), [Example([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8]), Example([3, 9], [3, 9])]
    losses = []
    for example in examples:
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        losses += [-log_probs[at - 1, t].item() for at, t in enumerate(example.labels) if at and t != IGNORED]
    expected = torch.tensor(losses).mean().exp().item()
    for batch_size in (1, 2):
        assert example_perplexity(model, examples, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)
    block = torch.tensor([[5, 6, 7, 8], [3, 4, 5, 9]])
    whole = [Example(row, row) for row in block.tolist()]
    assert example_perplexity(model, whole) == pytest.approx(perplexity(model, block), rel=1e-5)
    with pytest.raises(ValueError, match="no token that is trained"):
        example_perplexity(model, [Example([5, 6], [5, IGNORED])])
