# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Texts grouped by what they begin with: nothing is lost, nothing read of a prefix, and little is computed twice."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generation_ext.shared_prefix.sharing import share, text_tree
from generation_ext.shared_prefix.token_tree import ROOT


WIDTH = 576


def path_of(tree, node):
    """The tokens from the tree's start to a node."""
    tokens = []
    while node != ROOT:
        tokens.append(tree.tokens[node])
        node = tree.parents[node]
    return tokens[::-1]


def check(texts, first_reads, width=WIDTH):
    """Every text can be put together again out of its group; returns the tokens that are computed."""
    groups = share(texts, first_reads, width)
    seen, computed = [], 0
    for group in groups:
        length = len(group.prefix)
        computed += length
        for indices in group.trees:
            tree, reads = text_tree(
                [texts[index][length:] for index in indices], [first_reads[index] - length for index in indices]
            )
            computed += len(tree)
            assert sorted(tree.reads) == sorted(set(tree.reads))
            for index, places in zip(indices, reads):
                text = list(texts[index])
                assert text[:length] == group.prefix
                nodes = [tree.reads[place] for place in places]
                # each place that is read of the text, with all that is before it
                assert [group.prefix + path_of(tree, node) for node in nodes] == [
                    text[: end + 1] for end in range(first_reads[index], len(text))
                ]
            seen += indices
    assert sorted(seen) == list(range(len(texts)))
    return computed


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_texts(data):
    texts = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=12))
    first_reads = [data.draw(st.integers(0, len(text) - 1)) for text in texts]
    # attention that costs next to nothing, and much
    check(texts, first_reads, width=data.draw(st.sampled_from([1, 1000])))


def drawn(generator, length):
    return [generator.randrange(1000) for _ in range(length)]


@pytest.mark.parametrize("labels", [[3], [2, 9, 30, 1]], ids=["one", "several"])
def test_shots_inputs_and_labels_are_computed_once(labels):
    generator = random.Random(0)
    shots = drawn(generator, 400)
    texts, reads = [], []
    for _ in range(50):
        context = shots + drawn(generator, 20)
        for length in labels:
            texts.append(context + drawn(generator, length))
            reads.append(len(context) - 1)
    # by chance some more tokens are the same
    assert 0.99 * (400 + 50 * (20 + sum(labels))) < check(texts, reads) <= 400 + 50 * (20 + sum(labels))


def test_shots_of_each_input_s_own():
    """Nothing but a few words in common: each input with its labels."""
    generator = random.Random(0)
    texts, reads = [], []
    for _ in range(20):
        context = [1, 2, 3, *drawn(generator, 300)]
        texts += [context + drawn(generator, 10) for _ in range(4)]
        reads += [302] * 4
    assert check(texts, reads) <= 20 * (303 + 40)


def test_one_that_has_nothing_in_common_costs_only_itself():
    generator = random.Random(0)
    shots = drawn(generator, 300)
    texts = [shots + drawn(generator, 5) for _ in range(30)] + [[9, 9, 9]]
    assert check(texts, [300] * 30 + [1]) <= 300 + 150 + 3


def test_subjects_with_shots_of_their_own_below_a_description():
    generator = random.Random(0)
    texts = []
    for _ in range(5):
        shots = [7, 7, *drawn(generator, 200)]
        texts += [shots + drawn(generator, 10) for _ in range(20)]
    assert check(texts, [201] * 100) <= 5 * (202 + 20 * 10)


def test_texts_that_go_on_from_each_other_do_not_take_long():
    generator = random.Random(0)
    longest = drawn(generator, 1000)
    texts = [longest[: end + 1] for end in range(1000)]
    assert check(texts, list(range(1000))) <= 2 * 1000


def test_what_is_read_is_in_no_prefix():
    texts = [[1, 2, 3, 4, 5, token] for token in range(20)]
    (group,) = share(texts, [2] * 20, WIDTH)
    assert len(group.prefix) <= 2


def test_nothing():
    assert share([], [], WIDTH) == []
