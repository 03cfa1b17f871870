# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The paper's prompts letter by letter, and what a task refuses."""

from __future__ import annotations

import re

import pytest

from generation_ext.prompts import CB, RTE, SST2, SST5, TASKS, Task


LABELS = {"no": " no", "yes": " yes"}


def test_reviews():
    assert SST2.context("good fun ", [("a bore", "negative")]) == (
        "Review : a bore\nSentiment : negative\n\n\nReview : good fun\nSentiment :"
    )
    assert SST2.generation_prompt("good fun", "negative") == (
        'Generate a review : good fun\nGenerate a " negative" review :'
    )
    assert SST5.generation_prompt("good fun", "very positive", conditioned=False) == 'Generate a " great" review :'
    assert SST5.words == [" terrible", " bad", " okay", " good", " great"]
    assert (SST2.max_new_tokens, SST5.max_new_tokens, RTE.max_new_tokens, CB.max_new_tokens) == (25, 23, 25, 10)
    assert list(TASKS) == ["sst2", "sst5", "rte", "cb"]


def test_pairs():
    pair = {"premise": "It rains.", "hypothesis": "It is wet."}
    assert RTE.demonstration(pair, "not_entailment") == (
        "Premise : It rains.\nHypothesis : It is wet.\nTrue or False?  false"
    )
    assert CB.context(pair) == "Premise : It rains.\nHypothesis : It is wet.\nYes, No, or Neither?"
    assert CB.generation_prompt(pair, "neutral") == (
        'Premise : It rains.\nGenerate a Hypothesis : It is wet.\nGenerate a " neither" Hypothesis :'
    )
    assert CB.generated(pair, "It pours.") == {"premise": "It rains.", "hypothesis": "It pours."}


def test_braces_of_texts_stay():
    assert SST2.text("a {text} of {label}") == "Review : a {text} of {label}\nSentiment :"
    assert Task("{{x}} {text}", LABELS).text("a") == "{x} a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "Review :"}, "template='Review :' has no slot"),
        ({"template": "{}"}, "the slot {} has no name"),
        ({"template": "{text"}, "is no template: "),
        ({"template": "{text} {label}"}, "has a slot {label}"),
        ({"labels": {}}, "needs at least two"),
        ({"labels": {"one": " one"}}, "needs at least two"),
        ({"labels": {"a": " x", "b": " x"}}, "'a' and 'b' have the same word ' x'"),
        ({"labels": {"a": " ", "b": " x"}}, "the word of 'a' is ' '"),
        ({"generation_template": "Write : {text}"}, "generation_template='Write : {text}' has no slot {label}"),
        ({"class_only_template": "{label} {txt}"}, "nothing fills 'txt'"),
        ({"generated_field": "title"}, "generated_field='title' is no slot"),
        ({"min_new_tokens": 30}, "min_new_tokens=30"),
    ],
)
def test_tasks_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Task(**{"template": "{text} :", "labels": LABELS, **arguments})


def test_examples_that_are_refused():
    with pytest.raises(TypeError, match="has the fields .* pass a mapping"):
        RTE.text("a text")
    with pytest.raises(ValueError, match="lacks the field 'hypothesis'"):
        RTE.text({"premise": "a"})
    with pytest.raises(TypeError, match="field 'text' of an example must be a string, got NoneType"):
        SST2.text({"text": None})
    with pytest.raises(ValueError, match="has no generation_template"):
        Task("{text} :", LABELS).generation_prompt("a", "no")
