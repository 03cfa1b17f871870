# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The chat format: templates, requests, and which tokens the assistant wrote."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from tests.tiny.tokenizers import byte_tokenizer
from trl_ext.almost.prompts.chat import as_messages, chat_text, dialogue, encode_chat, request_text, with_chat_template


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello you"},
    {"role": "user", "content": "Hello you"},
    {"role": "assistant", "content": "  Hi "},
]


@pytest.fixture(scope="module")
def plain():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def chatml():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def test_without_a_template_the_papers_format_is_used(plain):
    text = chat_text(plain, TALK[:3])
    assert text == "\n\nHuman: Hi\n\nAssistant: Hello you<eos>\n\nHuman: Hello you"
    assert plain.chat_template is None, "the caller's tokenizer is left alone"


def test_the_papers_format_has_the_tokenizers_own_start_token():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    assert tokenizer("x")["input_ids"][0] == 0
    assert chat_text(tokenizer, TALK[:1]) == "<eos>\n\nHuman: Hi"


def test_a_request_ends_where_the_assistant_speaks(plain, chatml):
    assert request_text(plain, "Hi") == "\n\nHuman: Hi\n\nAssistant:"
    assert request_text(plain, "Hi", "Sure") == "\n\nHuman: Hi\n\nAssistant: Sure"
    assert request_text(chatml, TALK[:1], "Sure") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nSure"


@pytest.mark.parametrize("kind", ["plain", "chatml"])
def test_labels_are_what_the_assistant_says_and_the_end_of_its_turns(kind, request):
    tokenizer = request.getfixturevalue(kind)
    encoded = encode_chat(tokenizer, TALK)
    text = chat_text(tokenizer, TALK)
    assert tokenizer.decode(encoded.input_ids) == text
    trained = tokenizer.decode([token for token in encoded.labels if token != -100])
    assert trained == {"plain": " Hello you<eos>   Hi <eos>", "chatml": "Hello you<|im_end|>  Hi <|im_end|>"}[kind]
    assert all(label in (-100, token) for token, label in zip(*encoded))


def test_a_request_and_a_conversation_begin_with_the_same_tokens(chatml):
    """What the model is trained to go on from is what it is asked to go on from."""
    asked = chatml(request_text(chatml, TALK[:1]), add_special_tokens=False)["input_ids"]
    encoded = encode_chat(chatml, TALK[:2])
    assert encoded.input_ids[: len(asked)] == asked
    assert set(encoded.labels[: len(asked)]) == {-100} and -100 not in encoded.labels[len(asked) : -1]


def test_an_end_of_turn_that_is_no_named_special_token_is_learned():
    """As Gemma's <end_of_turn> and Phi's <|end|>, which the tokenizer knows as an added token alone."""
    words = byte_tokenizer()
    words.backend_tokenizer.add_special_tokens([AddedToken("<end_of_turn>", special=True)])
    words.chat_template = (
        "{% for m in messages %}<start>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
    )
    assert "<end_of_turn>" not in words.all_special_tokens
    encoded = encode_chat(words, TALK)
    trained = words.decode([token for token in encoded.labels if token != -100])
    assert trained == "Hello you<end_of_turn>Hi<end_of_turn>"


def test_a_template_that_shows_earlier_turns_otherwise_is_refused(chatml):
    changed = byte_tokenizer()
    changed.chat_template = with_chat_template(chatml).chat_template.replace(
        "m['content']", "(m['content'] if loop.last else m['content'] | upper)"
    )
    with pytest.raises(ValueError, match="differently when others follow"):
        encode_chat(changed, TALK)


def test_a_dialogue_is_split_at_its_turns():
    assert dialogue("fix this\n\nplease\n\nAssistant:  Sure.\n\nHuman: more ") == [
        {"role": "user", "content": "fix this\n\nplease"},
        {"role": "assistant", "content": "Sure."},
        {"role": "user", "content": "more"},
    ]
    assert dialogue("\n\nHuman: one") == [{"role": "user", "content": "one"}]


@pytest.mark.parametrize(
    ("prompt", "error", "match"),
    [
        (3, TypeError, "prompt=3"),
        ([], ValueError, "no messages"),
        (["Hi"], TypeError, "list of messages"),
        ([{"role": "user"}], ValueError, "'content'"),
    ],
)
def test_bad_prompts_are_named(prompt, error, match):
    with pytest.raises(error, match=match):
        as_messages(prompt)
