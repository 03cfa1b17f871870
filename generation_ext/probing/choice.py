# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which layers' states are read, by which pooling, and which C: by cross-validation on the training texts alone, where there
is a choice.

A block is what one layer and pooling give. Several are joined: means of eleven layers over the whole depth, and where a
template asks for the label, the last token of those of them that are in the last third, where a model is about to write it.
A ridge regression finds what it needs in them better than in the one block that cross-validation chooses: by 1 to 3 points on
texts of the benchmark's training pools that draws of 4 to 16 a class left over (eight sets, one to ten draws).

A single block is chosen by ridge regression on the classes, whose leave-one-out
predictions have a closed form: one eigendecomposition a block, no head is fitted. With few texts the best of sixty
blocks is best by luck, so the layers beside one count as well, and blocks that are expected to be good are given a start:
those of the last third of the layers' last token where a template asks there for the label, means of the middle third
elsewhere. The head's own C is then chosen by stratified folds on the block that was taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Optional

import numpy as np

from generation_ext.probing.heads import Head
from generation_ext.probing.ridge import FACTORS, Ridges, log_probability


Block = tuple[int, str]
# Layers whose means are joined.
LAYERS = 11
# Rows (texts in each of their forms) and bytes of joined states, above which the best block is read instead: the regression's
# time grows with the third power of the rows.
MOST_ROWS, MOST_JOINED_BYTES = 4000, 2**31
# Texts that blocks are compared on, and bytes that their states may take; of more, as many of each class as there is room for.
MOST_TEXTS, MOST_BYTES = 1500, 2**30
# The start of blocks that are expected to be good, in nats over all texts. (Compared on texts of the benchmark's training pools
# that draws of 4 to 16 a class left over: 0 to 9 on two sets, means over 1 to 11 layers at 2 and 4 on six.)
START = 2.0
# Folds for C, and rows of features times classes that heads are fitted on in all of them together: of many texts of many
# classes, fewer folds are run.
_FOLDS, _MOST_WORK = 5, 300_000


def sample(codes: np.ndarray, size: int, itemsize: int = 4) -> np.ndarray:
    """Indices of the texts that blocks are compared on, in their order: all, or an equal share of each class.

    Args:
        codes: Classes as integers from 0, `[texts]`.
        size: Numbers of all blocks of a text.
        itemsize: Bytes of a number.
    """
    room = max(2, min(MOST_TEXTS, MOST_BYTES // (size * itemsize)))
    if len(codes) <= room:
        return np.arange(len(codes))
    own = [np.flatnonzero(codes == code) for code in range(int(codes.max()) + 1)]
    # round after round, a text of each class that has one left
    order = sorted((turn, index) for indices in own for turn, index in enumerate(indices.tolist()))
    return np.sort([index for _, index in order[:room]])


def joined(blocks: Mapping[Block, slice], asks_for_the_label: bool) -> list[Block]:
    """The blocks that are read together, those of means first.

    Args:
        blocks: All there are; of one pooling alone, if the other isn't wanted.
        asks_for_the_label: Whether the last token is where a causal model would write the label.
    """
    layers = sorted({layer for layer, _ in blocks})
    places = np.linspace(0, len(layers) - 1, min(LAYERS, len(layers)))
    read = [layers[round(place)] for place in places.tolist()]
    means = [(layer, "mean") for layer in read if (layer, "mean") in blocks]
    last = [(layer, "last") for layer in read if (layer, "last") in blocks and 3 * layer >= 2 * layers[-1]]
    return means + last if asks_for_the_label or not means else means


def fits(blocks: Mapping[Block, slice], read: Collection[Block], rows: int, itemsize: int = 4) -> bool:
    """Whether so many rows of these blocks are few enough to be joined."""
    size = sum(blocks[block].stop - blocks[block].start for block in read)
    return rows <= MOST_ROWS and rows * size * itemsize <= MOST_JOINED_BYTES


def leave_one_out(features: np.ndarray, codes: np.ndarray, classes: int) -> np.ndarray:
    """Scores of each text by ridge regressions on all others, `[penalties, texts, classes]`.

    Args:
        features: `[texts, size]`; standardised in here.
        codes: Classes as integers from 0, `[texts]`.
        classes: How many.
    """
    return Ridges(standardised(features), codes, classes).left_out()


def standardised(features: np.ndarray) -> np.ndarray:
    """Of mean 0 and deviation 1, float32."""
    features = np.asarray(features, np.float32)
    scale = features.std(0, dtype=np.float64).astype(np.float32)
    scale[scale < 1e-8] = 1.0
    return (features - features.mean(0, dtype=np.float64).astype(np.float32)) / scale


def scores_of(
    features: np.ndarray, blocks: Mapping[Block, slice], codes: np.ndarray, classes: int
) -> dict[Block, float]:
    """Log-probability of the right class of a text by what the others say, mean over texts, of each block.

    Args:
        features: `[texts, sizes of all blocks]`.
        blocks: Where each stands.
        codes: Classes as integers from 0, `[texts]`.
        classes: How many.
    """
    return {
        block: max(
            log_probability(factor * scores, codes)
            for scores in leave_one_out(features[:, place], codes, classes)
            for factor in FACTORS
        )
        for block, place in blocks.items()
    }


def best(scores: Mapping[Block, float], texts: int, expected: Collection[Block] = ()) -> Block:
    """The block to read: its score is taken together with those of the layers beside it, which see much the same.

    Args:
        scores: Of [`scores_of`].
        texts: How many they are means of.
        expected: Blocks that have a start; see [`expected_blocks`].
    """

    def smooth(block: Block) -> float:
        layer, pooling = block
        # its own counts twice
        near = [scores[each, pooling] for each in (layer - 1, layer, layer, layer + 1) if (each, pooling) in scores]
        return sum(near) / len(near)

    return max(scores, key=lambda block: texts * smooth(block) + START * (block in expected))


def expected_blocks(blocks: Collection[Block], asks_for_the_label: bool) -> list[Block]:
    """The blocks that are expected to be good before a text is seen.

    Args:
        blocks: All there are.
        asks_for_the_label: Whether the last token is where a causal model would write the label.
    """
    depth = max(layer for layer, _ in blocks)
    if asks_for_the_label:
        return [(layer, pooling) for layer, pooling in blocks if pooling == "last" and 3 * layer >= 2 * depth]
    return [(layer, pooling) for layer, pooling in blocks if pooling == "mean" and depth <= 3 * layer <= 2 * depth]


class Held(NamedTuple):
    """How a head does on texts that it wasn't fitted on.

    Attributes:
        right: Share of texts.
        log_probability: Of the right class, mean over texts.
        texts: How many.
    """

    right: float
    log_probability: float
    texts: int


def scores_of_C(
    head: type[Head],
    params: Mapping[str, Any],
    features: np.ndarray,
    codes: np.ndarray,
    classes: int,
    orders: int,
    seed: int,
) -> dict[float, Held]:
    """How a head does on held-out texts with each C of its grid; empty if each class has one text.

    Args:
        head, params: Of the head.
        features: `[orders * texts, size]`, standardised: of all texts behind the first order, and so on. A text is in
            one fold in all its forms, and is judged in the first.
        codes: Classes as integers from 0, `[texts]`.
        classes: How many.
        orders: Rows that a text has.
        seed: Of the folds and the head.
    """
    from sklearn.model_selection import StratifiedKFold

    count = len(codes)
    folds = min(_FOLDS, int(np.bincount(codes).max()))
    if folds < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that have fewer texts than there are folds
        splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(count), codes))
    splits = splits[: max(1, _MOST_WORK // (len(features) * classes))]
    judged = np.concatenate([held_out for _, held_out in splits])
    found = {}
    for C in head.grid:
        scores = []
        for training, held_out in splits:
            rows = (training + count * np.arange(orders)[:, None]).ravel()
            known, numbered = np.unique(np.tile(codes[training], orders), return_inverse=True)
            # a class that has no text in a fold is as good as ruled out there
            each = np.full((len(held_out), classes), -30.0)
            each[:, known] = 0.0
            if len(known) > 1:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of fits that would go on
                    fitted = head.fit(features[rows], numbered, len(known), {**params, "C": C}, seed)
                each[:, known] = fitted.scores(features[held_out])
            scores.append(each)
        all_scores = np.concatenate(scores)
        right = float((all_scores.argmax(1) == codes[judged]).mean())
        found[C] = Held(right, log_probability(all_scores, codes[judged]), len(judged))
    return found


def best_C(scores: Mapping[float, Held]) -> Optional[float]:
    """Of all C that get as many texts right as the best, up to a standard error, the one with the best probabilities;
    None without scores."""
    if not scores:
        return None
    most = max(each.right for each in scores.values())
    texts = next(iter(scores.values())).texts
    error = (most * (1 - most) / texts) ** 0.5
    good = {C: each for C, each in scores.items() if each.right >= most - error}
    return max(good, key=lambda C: good[C].log_probability)
