# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""From which score on a text counts as in-distribution: one threshold for all classes or one for each; chosen by recall, or
by what is answered right where some out-of-distribution examples are known."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import numpy as np

from peft_ext.ood.metrics import threshold_for_recall


COMMON, PER_CLASS = THRESHOLDS = ("common", "per-class")
# How many examples the mean of all classes counts for in a class's own: on CLINC150's validation texts, 5 or 10 of each
# class, less lets more texts from outside pass and more leaves the classes' recalls as unequal as one threshold does.
PRIOR_EXAMPLES = 20.0


class Scored(NamedTuple):
    """Examples that were not trained on.

    Args:
        scores: A detector's, `[examples]`.
        classes: The indices of the classes that the classifier gives them, `[examples]`.
        right: Whether these are theirs, `[examples]`; None: all.
    """

    scores: np.ndarray
    classes: np.ndarray
    right: Optional[np.ndarray] = None


class Thresholds(NamedTuple):
    """`common + offsets[class]` is the threshold of a text that the classifier gives that class.

    A text is judged by the class that it is *given*, since nothing else is known of it.
    """

    common: float
    offsets: np.ndarray

    def of(self, classes: Any) -> np.ndarray:
        """The threshold of each text `[texts]`, by its class's index."""
        return self.common + self.offsets[np.asarray(classes, dtype=np.int64)]


def choose_thresholds(
    inside: Scored,
    num_classes: int,
    *,
    kind: str = COMMON,
    id_recall: float = 0.95,
    outside: Optional[Scored] = None,
    outside_share: float = 0.5,
) -> Thresholds:
    """Choose thresholds on examples that were not trained on.

    A class's own threshold lies as far above the common one as its examples score above all examples, drawn towards zero
    as if it had 20 more examples of the common mean: so it takes a few validation examples a class, and a class without
    any has the common threshold. The common part is chosen on scores less a class's mean without the example itself, so
    that recall on new texts is what was asked for. (A quantile of each class's own examples isn't: with 20 of each,
    `id_recall=0.95` gave 0.91.)

    Args:
        inside: In-distribution examples.
        num_classes: How many classes there are.
        kind: `"common"` or `"per-class"`.
        id_recall: Without `outside`, the share of `inside` that is accepted.
        outside: Out-of-distribution examples; then the threshold is chosen by [`best_threshold`].
        outside_share: Of [`best_threshold`].

    Raises:
        ValueError: Names the argument that is no good.
    """
    if kind not in THRESHOLDS:
        raise ValueError(f"thresholds={kind!r} is unknown; choose one of {THRESHOLDS}.")
    scores, classes = np.asarray(inside.scores, dtype=np.float64), np.asarray(inside.classes, dtype=np.int64)
    offsets, own = np.zeros(num_classes), np.zeros(len(scores))
    if kind == PER_CLASS:
        deviations = scores - scores.mean()
        sums = np.bincount(classes, deviations, minlength=num_classes)
        counts = np.bincount(classes, minlength=num_classes)
        offsets = sums / (counts + PRIOR_EXAMPLES)
        own = (sums[classes] - deviations) / (counts[classes] - 1 + PRIOR_EXAMPLES)
    if outside is None:
        return Thresholds(threshold_for_recall(scores - own, id_recall), offsets)
    out = np.asarray(outside.scores, dtype=np.float64) - offsets[np.asarray(outside.classes, dtype=np.int64)]
    return Thresholds(best_threshold(scores - own, out, right=inside.right, outside_share=outside_share), offsets)


def best_threshold(
    id_scores: Any, ood_scores: Any, *, right: Optional[Any] = None, outside_share: float = 0.5
) -> float:
    """The threshold with the largest share of right answers: the right class for an in-distribution example, a refusal
    for one from outside.

    Args:
        id_scores, ood_scores: Scores, higher meaning more in-distribution.
        right: Whether the classifier is right about each in-distribution example; None: about all. (Refusing one that
            would get a wrong class costs nothing.)
        outside_share: How many of the texts in use come from outside, whatever their share here; 0.5 weighs both kinds
            alike.

    Returns:
        The middle between two scores that lie next to each other, so that neither is at the edge.

    Raises:
        ValueError: If there are no examples of one kind, scores are NaN, or `outside_share` isn't between 0 and 1.
    """
    if not 0 < outside_share < 1:
        raise ValueError(f"outside_share={outside_share!r} must be greater than 0 and less than 1.")
    inside, outside = (np.asarray(scores, dtype=np.float64) for scores in (id_scores, ood_scores))
    for name, scores in (("id_scores", inside), ("ood_scores", outside)):
        if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
            raise ValueError(f"{name} has shape {scores.shape}; pass a flat array of finite numbers, at least one.")
    correct = np.ones(len(inside)) if right is None else np.asarray(right, dtype=np.float64)
    if correct.shape != inside.shape:
        raise ValueError(f"right has shape {correct.shape}, id_scores {inside.shape}; pass one truth for each score.")
    edges = np.unique(np.concatenate([inside, outside]))
    order = np.argsort(inside)
    # at edges[i], what scores edges[i] or more is accepted; the last candidate accepts nothing
    kept = np.append(0, np.cumsum(correct[order]))
    accepted = kept[-1] - kept[np.searchsorted(inside[order], edges, side="left")]
    refused = np.searchsorted(np.sort(outside), edges, side="left")
    gain = (1 - outside_share) * np.append(accepted, 0) / len(inside) + outside_share * np.append(
        refused, len(outside)
    ) / len(outside)
    best = int(np.flatnonzero(gain >= gain.max() - 1e-12)[0])  # of equals, the one that accepts most
    if best == 0:
        return float(edges[0])
    if best == len(edges):
        return float(np.nextafter(edges[-1], np.inf))
    middle = (edges[best - 1] + edges[best]) / 2
    return float(middle if middle > edges[best - 1] else edges[best])
