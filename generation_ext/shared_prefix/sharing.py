# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which texts share what: any texts, into prefixes that are encoded once and trees that stand on them.

Sorted, texts that begin alike are neighbours. The places where neighbours part are the inner nodes of a tree of all
texts; at each node there is a choice, and the cheapest is taken: its beginning becomes a shared prefix, all of its texts
become one token tree, or its parts are treated by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from generation_ext.shared_prefix.token_tree import ROOT, TokenTree


# Tokens that a prefix of its own costs beside its own: its forward pass has a single row, and those of its texts end.
_PREFIX_OVERHEAD = 64
# Pairs of tokens whose attention costs as much as a token's products, per width of a hidden state: 24 h^2 over 4 h.
_PAIRS_PER_WIDTH = 6
# A node is tried as a prefix where it is so much longer than the last one tried, or has so much fewer texts.
_LONGER, _FEWER = 32, 0.9


class SharedTexts(NamedTuple):
    """Texts on one prefix.

    Attributes:
        prefix: The tokens with which all of them begin; may be empty.
        trees: Indices of the texts of each tree.
    """

    prefix: list[int]
    trees: list[list[int]]


class TextTree(NamedTuple):
    """A tree of several texts.

    Attributes:
        tree: It; all places that are read of any text are in its `reads`.
        reads: For each text the places in `tree.reads` of what is read of it, in order.
    """

    tree: TokenTree
    reads: list[list[int]]


class _Node:
    """A place where sorted texts part: those in `texts[start:end]` have their first `depth` tokens in common."""

    def __init__(self, depth: int, start: int, end: int, size: int, first_read: int, children: list[int]) -> None:
        self.depth, self.start, self.end, self.children = depth, start, end, children
        self.size = size  # tokens of all its texts, shared ones once
        self.prefix = min(depth, first_read)  # most tokens of a prefix that nothing is read of
        self.first = 0  # of its descendants, in post-order


def share(texts: Sequence[Sequence[int]], first_reads: Sequence[int], width: int) -> list[SharedTexts]:
    """Group texts so that little is computed twice.

    Args:
        texts: Token ids; each at least one.
        first_reads: For each text the place of the first token whose output is read.
        width: Of a hidden state, which says what attention costs beside products.

    Returns:
        Groups; every text in exactly one tree.
    """
    if not texts:
        return []
    order = sorted(range(len(texts)), key=lambda index: list(texts[index]))
    nodes = _nodes([texts[index] for index in order], [first_reads[index] for index in order])
    pairs = float(_PAIRS_PER_WIDTH * width)
    alone = _tree_costs(nodes, 0, len(nodes), 0, pairs)
    cost = [0.0] * len(nodes)
    is_prefix = [False] * len(nodes)
    tried = _candidates(nodes)
    for index, node in enumerate(nodes):
        cost[index] = alone[index]
        if node.children:
            cost[index] = min(cost[index], sum(cost[child] for child in node.children))
        if tried[index]:
            size = node.prefix
            below = _tree_costs(nodes, node.first, index + 1, size, pairs)[-1]
            with_prefix = _PREFIX_OVERHEAD + size + size * size / pairs + below
            if with_prefix < cost[index]:
                cost[index], is_prefix[index] = with_prefix, True
    groups: list[SharedTexts] = []
    without = SharedTexts([], [])
    pending = [len(nodes) - 1]
    while pending:
        index = pending.pop()
        node = nodes[index]
        if is_prefix[index]:
            trees = _trees(nodes, index, node.prefix, pairs)
            prefix = list(texts[order[node.start]][: node.prefix])
            groups.append(SharedTexts(prefix, [order[start:end] for start, end in trees]))
        elif cost[index] == alone[index]:
            without.trees.extend(order[start:end] for start, end in _trees(nodes, index, 0, pairs))
        else:
            pending.extend(node.children)
    return [*groups, without] if without.trees else groups


def text_tree(texts: Sequence[Sequence[int]], first_reads: Sequence[int]) -> TextTree:
    """Texts as one tree, shared beginnings once.

    Args:
        texts: Token ids, sorted; what comes behind a shared prefix.
        first_reads: As of [`share`], counted from the prefix's end.
    """
    tree = TokenTree()
    places: dict[int, int] = {}
    reads = []
    path: list[int] = []
    last: Sequence[int] = []
    for text, first_read in zip(texts, first_reads):
        path = path[: _common(last, text)]
        for token in text[len(path) :]:
            path.append(tree.append([token], path[-1] if path else ROOT))
        wanted = path[first_read:]
        for node in wanted:
            places.setdefault(node, len(places))
        reads.append([places[node] for node in wanted])
        last = text
    tree.reads = list(places)
    return TextTree(tree, reads)


def _nodes(texts: Sequence[Sequence[int]], first_reads: Sequence[int]) -> list[_Node]:
    """All places where sorted texts part, and the texts themselves, children before their parents."""
    nodes: list[_Node] = []
    open_nodes: list[tuple[int, int, list[int]]] = []  # depth, start, children that are finished

    def finish(depth: int, start: int, end: int, children: list[int]) -> int:
        size = depth + sum(nodes[child].size - depth for child in children)
        node = _Node(depth, start, end, size, min(first_reads[start:end]), children)
        node.first = nodes[children[0]].first
        nodes.append(node)
        return len(nodes) - 1

    for index, text in enumerate(texts):
        leaf = _Node(len(text), index, index + 1, len(text), first_reads[index], [])
        leaf.first = len(nodes)
        nodes.append(leaf)
        done = len(nodes) - 1
        # with the next text it has so much in common
        common = _common(text, texts[index + 1]) if index + 1 < len(texts) else 0
        start = index
        while open_nodes and open_nodes[-1][0] > common:
            depth, start, children = open_nodes.pop()
            done = finish(depth, start, index + 1, [*children, done])
        if index + 1 == len(texts):
            if open_nodes:
                _, start, children = open_nodes.pop()
                finish(0, start, index + 1, [*children, done])
        elif open_nodes and open_nodes[-1][0] == common:
            open_nodes[-1][2].append(done)
        else:
            open_nodes.append((common, start, [done]))
    return nodes


def _candidates(nodes: list[_Node]) -> list[bool]:
    """Which nodes are tried as prefixes; never so many above each other that trying takes long."""
    tried = [False] * len(nodes)
    above: dict[int, tuple[int, float]] = {}
    for index in range(len(nodes) - 1, -1, -1):
        node = nodes[index]
        longest, fewest = above.get(index, (0, float("inf")))
        count = node.end - node.start
        if node.children and node.prefix > 0:
            if node.prefix >= longest + _LONGER or count <= fewest * _FEWER:
                tried[index] = True
                longest, fewest = node.prefix, count
        for child in node.children:
            above[child] = longest, fewest
    return tried


def _tree_costs(nodes: list[_Node], first: int, end: int, prefix: int, pairs: float) -> list[float]:
    """For nodes `first` to `end`, subtrees whole, the least cost of trees for their texts behind a prefix."""
    costs: list[float] = []
    for index in range(first, end):
        node = nodes[index]
        whole = _tree_cost(node, prefix, pairs)
        if node.children:
            whole = min(whole, sum(costs[child - first] for child in node.children))
        costs.append(whole)
    return costs


def _tree_cost(node: _Node, prefix: int, pairs: float) -> float:
    size = node.size - prefix
    return size + size * (size + prefix) / pairs


def _trees(nodes: list[_Node], root: int, prefix: int, pairs: float) -> list[tuple[int, int]]:
    """The trees that [`_tree_costs`] has counted, as ranges of texts."""
    first = nodes[root].first
    costs = _tree_costs(nodes, first, root + 1, prefix, pairs)
    found, pending = [], [root]
    while pending:
        node = nodes[pending.pop()]
        if not node.children or _tree_cost(node, prefix, pairs) <= sum(costs[each - first] for each in node.children):
            found.append((node.start, node.end))
        else:
            pending.extend(node.children)
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginnings; by halves, as slices compare fast."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least
