# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Token trees and the shared prefix: every path through a tree is computed as if it stood alone."""

from __future__ import annotations

import pytest
import torch

from generation_ext.shared_prefix.batching import BatchPlanner, run_in_batches
from generation_ext.shared_prefix.cache import EMPTY, common_prefix, encode_prefix, layout, read_logits
from generation_ext.shared_prefix.token_tree import TokenTree, pack, unfold
from peft_ext.language_model import inference, language_model
from tests.tiny.byte_models import CAUSAL, model


def forest() -> list[TokenTree]:
    """A chain; a trunk with branches of one, two and forty tokens; a tree of two roots."""
    chain = TokenTree.chain(list(range(5, 30)))
    branched = TokenTree()
    trunk = branched.append([7, 8, 9])
    branched.append([11], trunk)
    fork = branched.append([12, 13], trunk)
    branched.append(list(range(40, 80)), fork)
    branched.append([14], fork)
    roots = TokenTree()
    roots.append([21, 22])
    roots.append([23, 24, 25])
    for tree in (branched, roots):
        tree.reads = list(range(len(tree)))[::-1]
    return [chain, branched, roots]


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("prefix", [[], list(range(100, 140))], ids=["no prefix", "prefix"])
def test_every_path_stands_alone(name, prefix):
    subject, trees = language_model(model(name)), forest()
    with inference(model(name)):
        rows = layout(subject, trees, [[0, 2], [1]])
        found = read_logits(subject, rows, encode_prefix(subject, prefix))
        expected = []
        for tree in trees:
            logits = {}
            for path in tree.paths():
                ids = torch.tensor([prefix + [tree.tokens[node] for node in path]])
                alone = model(name)(input_ids=ids, use_cache=False).logits[0, len(prefix) :]
                logits.update(zip(path, alone))
            expected += [logits[read] for read in tree.reads]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_prefix_is_not_copied_and_not_changed(name):
    subject = language_model(model(name))
    with inference(model(name)):
        prefix = encode_prefix(subject, list(range(60)))
        before = [keys.clone() for keys in prefix.keys]
        rows = layout(subject, forest())
        assert torch.equal(read_logits(subject, rows, prefix), read_logits(subject, rows, prefix))
    assert all(torch.equal(keys, old) for keys, old in zip(prefix.keys, before))
    assert all(keys.shape == (1, 2, 60, 8) for keys in prefix.keys), "sliding layers keep it whole too"
    assert prefix.cache().layers[0].keys is prefix.keys[0]


def test_common_prefix():
    assert common_prefix([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 9]]) == [1, 2]
    assert common_prefix([[1, 2], [1, 2, 3]]) == [1], "each text keeps a token to be read"
    assert common_prefix([[4, 5], [4, 5]]) == [4]
    assert common_prefix([[1], [2, 3]]) == []


def test_layouts():
    trees = forest()
    rows = pack(trees, [[1, 2], [0]])
    assert rows.tokens.shape == (2, len(trees[1]) + len(trees[2]))
    assert rows.depths[0, :7].tolist() == [0, 1, 2, 3, 3, 4, 5]
    assert rows.visible[0, 3].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert rows.tokens[tuple(rows.places.T)].tolist() == [t.tokens[read] for t in trees for read in t.reads]
    flat = unfold(trees)
    assert len(flat.tokens) == 1 + 3 + 2
    assert flat.tokens[tuple(flat.places.T)].tolist() == [t.tokens[read] for t in trees for read in t.reads]


@pytest.mark.parametrize("prefix", [0, 300])
def test_batches_are_whole_sorted_and_within_the_limit(prefix):
    subject = language_model(model("llama"))
    lengths = [7, 300, 20, 20, 90, 1, 45, 260, 12] * 20
    for limit in (10**6, 10**7, 10**9):
        planner = BatchPlanner(subject, limit, prefix)
        batches = planner.batches(lengths, [2] * len(lengths), range(len(lengths)))
        seen = [index for batch in batches for row in batch for index in row]
        assert sorted(seen) == list(range(len(lengths)))
        assert [lengths[index] for index in seen] == sorted(lengths, reverse=True)
        for batch in batches:
            longest = max(sum(lengths[index] for index in row) for row in batch)
            size = planner.bytes(len(batch), longest, sum(2 * len(row) for row in batch))
            assert size <= limit or len(batch) == 1
    assert len(batches) < len(lengths) / 4


def test_memory_runs_out_for_good():
    subject = language_model(model("llama"))

    def fail(indices, rows):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        list(run_in_batches(BatchPlanner(subject, None, 10), [5] * 20, [1] * 20, fail))


def test_empty_prefix():
    assert encode_prefix(language_model(model("llama")), []) is EMPTY and len(EMPTY) == 0
