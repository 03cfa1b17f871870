# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`OpenSetClassifier`: a classifier of scikit-learn with one class more, for what is none of the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Optional, Union

import numpy as np
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import check_cv
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import _safe_indexing, get_tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _num_samples, check_is_fitted, validate_data

from peft_ext.ood.detectors import Detector, make_detector
from peft_ext.ood.thresholds import COMMON, THRESHOLDS, Scored, choose_thresholds


class OpenSetClassifier(ClassifierMixin, BaseEstimator):
    """Encoder, head, and a detector that refuses: `predict` gives the class, or `unknown`.

    The thresholds are chosen on scores of examples that weren't trained on, by cross-validation: encoder (if it learns
    anything), head and detector are fitted on all folds but one and score that one. Then all three are fitted on
    everything. Without examples from outside, a share `id_recall` of the known classes' examples is accepted; with some,
    which have the label `unknown` in `y`, the thresholds with the most right answers are taken. These examples choose
    thresholds alone; nothing is trained on them.

    Args:
        encoder: A transformer of scikit-learn that turns `X` into features, such as [`TextFeatures`], `TfidfVectorizer`
            or `generation_ext.PALPClassifier`; None: `X` are features.
        head: A classifier of scikit-learn with `predict_proba`; None: logistic regression, on standardised features
            (`C=0.1`), or on sparse ones as they are (`C=10`).
        detector: Name, name with arguments, or a detector, see [`make_detector`]; those of features scale them to length 1
            first, as suits embeddings, unless they are told `{"name": "mahalanobis", "normalize": False}`. Sparse features
            take `"msp"` or `"energy"`.
        id_recall: Share of the known classes' examples that is to be accepted, where `y` has no examples from outside.
        thresholds: `"common"`, or `"per-class"`: each class has a threshold of its own, see [`choose_thresholds`].
        outside_share: Where `y` has examples from outside, how many of the texts in use come from there.
        unknown: The label for what is refused, and of examples from outside in `y`; None: `"unknown"` for classes that are
            texts, -1 for numbers, and `y` must not have it.
        cv: Folds, or a splitter of scikit-learn; a class with fewer examples than folds is in fewer of them.

    Attributes:
        classes_: The known classes, sorted, and `unknown` as the last, `[known + 1]`.
        encoder_, head_, detector_: Fitted on everything.
        thresholds_: The [`Thresholds`].
        out_of_fold_: Shares of the out-of-fold examples: `accepted` of the known classes', `right` (accepted under the
            right class), and with examples from outside `outside_accepted`.

    Example:

    ```py
    >>> model = OpenSetClassifier(TextFeatures("sentence-transformers/all-MiniLM-L6-v2")).fit(texts, intents)
    >>> model.predict(["book a table for two", "how tall is mount everest"])
    array(['book_table', 'unknown'], dtype=object)
    ```
    """

    def __init__(
        self,
        encoder: Any = None,
        head: Any = None,
        *,
        detector: Union[str, Mapping[str, Any], Detector] = "mahalanobis_cosine",
        id_recall: float = 0.95,
        thresholds: str = COMMON,
        outside_share: float = 0.5,
        unknown: Any = None,
        cv: Any = 5,
    ) -> None:
        self.encoder = encoder
        self.head = head
        self.detector = detector
        self.id_recall = id_recall
        self.thresholds = thresholds
        self.outside_share = outside_share
        self.unknown = unknown
        self.cv = cv

    def fit(self, X: Any, y: Any) -> OpenSetClassifier:
        """Fit encoder, head and detector, and choose the thresholds.

        Args:
            X: What the encoder takes, such as a list of texts; without an encoder features `[examples, size]`.
            y: Classes `[examples]`; those from outside have the label `unknown`.

        Raises:
            ValueError: Names the argument that is no good; if there are fewer than two classes, or no class has two
                examples.
        """
        if self.thresholds not in THRESHOLDS:
            raise ValueError(f"thresholds={self.thresholds!r} is unknown; choose one of {THRESHOLDS}.")
        _unfitted(self.detector)
        if y is None:
            raise ValueError("OpenSetClassifier requires y to be passed, but the target y is None.")
        labels = np.asarray(y)
        X = self._checked(X, labels)
        if labels.ndim == 2 and labels.shape[1] == 1:  # as scikit-learn's own do, with its own warning
            from sklearn.utils.validation import column_or_1d

            labels = column_or_1d(labels, warn=True)
        check_classification_targets(labels)
        unknown, outside = self._unknown(labels)
        known, codes = np.unique(labels[~outside], return_inverse=True)
        if len(known) < 2:
            raise ValueError(f"y has one class alone beside unknown, {known.tolist()}: it needs two or more.")
        rows = np.flatnonzero(~outside)
        others = _safe_indexing(X, np.flatnonzero(outside)) if outside.any() else None
        inside, beyond = self._out_of_fold(X, rows, known[codes], codes, others)
        chosen = choose_thresholds(
            inside,
            len(known),
            kind=self.thresholds,
            id_recall=self.id_recall,
            outside=beyond,
            outside_share=self.outside_share,
        )
        own = _safe_indexing(X, rows) if outside.any() else X
        fitted = _Parts(self, own, known[codes], codes)
        self.encoder_, self.head_, self.detector_ = fitted.encoder, fitted.head, fitted.detector
        self.thresholds_ = chosen
        self.classes_ = _joined(known, unknown)
        self.scale_ = _scale(inside, beyond, chosen, self.outside_share)
        accepted = inside.scores >= chosen.of(inside.classes)
        right = accepted & np.asarray(inside.right)
        self.out_of_fold_ = {"accepted": float(accepted.mean()), "right": float(right.mean())}
        if beyond is not None:
            self.out_of_fold_["outside_accepted"] = float((beyond.scores >= chosen.of(beyond.classes)).mean())
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each example, or `unknown`."""
        proba = self.predict_proba(X)
        return self.classes_[proba.argmax(1)]

    def predict_known(self, X: Any) -> np.ndarray:
        """The likeliest of the known classes, whether the detector accepts it or not."""
        head = self._scored(X)[1]
        return self.classes_[head.argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities `[examples, classes]` in the order of `classes_`; the last is that of `unknown`.

        Those of the known classes are the head's, scaled. The odds of `unknown` to the likeliest class grow by e with each
        step of a score below the threshold, a step being the spread of out-of-fold scores, or fitted where `y` had
        examples from outside. So the largest one is always what `predict` says.
        """
        scores, head = self._scored(X)
        margin = (self.thresholds_.of(head.argmax(1)) - scores) / self.scale_
        odds = np.exp(np.clip(margin, -700, 700))[:, None] * head.max(1, keepdims=True)
        proba = np.hstack([head, odds])
        return proba / proba.sum(1, keepdims=True)

    def score_samples(self, X: Any) -> np.ndarray:
        """The detector's scores `[examples]`, higher for what looks more like the known classes."""
        return self._scored(X)[0]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        if self.encoder is not None:
            tags.input_tags = get_tags(self.encoder).input_tags
        else:
            tags.input_tags.sparse = False
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "thresholds_")

    # ---- inside

    def _scored(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """The detector's scores, and the head's probabilities of the known classes."""
        check_is_fitted(self)
        if self.encoder is None:
            X = validate_data(self, X, reset=False)
        return _Parts.of(self.encoder_, self.head_, self.detector_).scores(X)

    def _checked(self, X: Any, labels: np.ndarray) -> Any:
        if self.encoder is None:
            X = validate_data(self, X, ensure_min_samples=2)
        elif isinstance(X, (str, bytes)):
            raise ValueError("X must be a sequence of texts, got a single one; pass [text].")
        elif not hasattr(self.encoder, "transform"):
            raise ValueError(f"encoder is a {type(self.encoder).__name__}, without transform; pass a transformer.")
        if _num_samples(X) != len(np.atleast_1d(labels)):
            raise ValueError(f"X has {_num_samples(X)} samples, but y {len(np.atleast_1d(labels))} labels.")
        return X

    def _unknown(self, labels: np.ndarray) -> tuple[Any, np.ndarray]:
        """The label of what is refused, and which examples have it."""
        if self.unknown is not None:
            return self.unknown, labels == self.unknown
        label: Any = -1 if labels.dtype.kind in "iuf" else "unknown"
        if (labels == label).any():
            raise ValueError(
                f"y has the label {label!r}, which stands for what is refused: pass unknown={label!r} if these are examples "
                "from outside, or another unknown if it is a class."
            )
        return label, np.zeros(len(labels), dtype=bool)

    def _out_of_fold(
        self, X: Any, rows: np.ndarray, names: np.ndarray, codes: np.ndarray, others: Any
    ) -> tuple[Scored, Optional[Scored]]:
        """Scores of examples that the parts weren't fitted on; of those from outside by the parts of every fold."""
        found: list[tuple[np.ndarray, ...]] = []
        beyond: list[tuple[np.ndarray, ...]] = []
        encoded = None
        if self.encoder is None or not get_tags(self.encoder).requires_fit:  # the same in all folds
            encoded = self.encoder
            X = X if encoded is None else _features(encoded, X)
            others = others if encoded is None or others is None else _features(encoded, others)
        learns = encoded is None and self.encoder is not None
        for train, test in self._folds(codes):
            part = _Parts(self, _safe_indexing(X, rows[train]), names[train], codes[train], encode=learns)
            seen = test[np.isin(codes[test], codes[train])]
            if len(seen):
                scores, proba = part.scores(_safe_indexing(X, rows[seen]))
                given = part.codes[proba.argmax(1)]
                found.append((scores, given, given == codes[seen]))
            if others is not None:
                scores, proba = part.scores(others)
                beyond.append((scores, part.codes[proba.argmax(1)]))
        if not found:
            raise ValueError(
                "y has no class with two examples, so none can be left out to choose a threshold on; get more."
            )
        inside = Scored(*(np.concatenate(each) for each in zip(*found)))
        return inside, Scored(*(np.concatenate(each) for each in zip(*beyond))) if beyond else None

    def _folds(self, codes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        cv = self.cv
        if isinstance(cv, (int, np.integer)) and not isinstance(cv, bool):
            if cv < 2:
                raise ValueError(f"cv={cv!r} must be at least 2 folds, or a splitter of scikit-learn.")
            cv = max(2, min(int(cv), int(np.bincount(codes).max())))
        if np.bincount(codes).max() < 2:
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The least populated class in y")
            folds = list(check_cv(cv, codes, classifier=True).split(np.zeros(len(codes)), codes))
        for train, test in folds:
            if len(np.unique(codes[train])) > 1:
                yield train, test


class _Parts:
    """Encoder, head and detector, fitted to the same examples."""

    def __init__(
        self, model: OpenSetClassifier, X: Any, names: np.ndarray, codes: np.ndarray, encode: Optional[bool] = None
    ) -> None:
        self.encoder = None
        if model.encoder is not None and encode is not False:
            self.encoder = clone(model.encoder).fit(X, names)
        features = _features(self.encoder, X)
        self.codes, local = np.unique(codes, return_inverse=True)
        self.head = _default_head(features) if model.head is None else clone(model.head)
        if not hasattr(self.head, "predict_proba"):
            raise ValueError(
                f"head={type(self.head).__name__} has no predict_proba; pass another, or put it into CalibratedClassifierCV."
            )
        self.head.fit(features, local)
        self.detector = _unfitted(model.detector)
        if issparse(features) and self.detector.needs_features:
            raise ValueError(
                f"detector={self.detector.name!r} needs dense features, the encoder's are sparse; take detector='energy' or "
                "'msp', or put TruncatedSVD behind the encoder."
            )
        if features.shape[1] == 1 and self.detector.needs_features and getattr(self.detector, "normalize", True):
            raise ValueError(
                f"there is 1 feature(s), and detector={self.detector.name!r} scales features to length 1, which leaves a sign; "
                "take detector={'name': 'mahalanobis', 'normalize': False}."
            )
        self.detector.fit(None if issparse(features) else features, self._logits(features), local)

    @classmethod
    def of(cls, encoder: Any, head: Any, detector: Detector) -> _Parts:
        """Parts that are fitted already."""
        parts = cls.__new__(cls)
        parts.encoder, parts.head, parts.detector = encoder, head, detector
        return parts

    def scores(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """The detector's scores `[examples]` and the head's probabilities `[examples, classes]`."""
        features = _features(self.encoder, X)
        logits = self._logits(features)
        scores = self.detector.score(None if issparse(features) else features, logits)
        return np.asarray(scores), self.head.predict_proba(features)

    def _logits(self, features: Any) -> np.ndarray:
        """`[examples, classes]`: the head's decision function, or the logarithms of its probabilities."""
        if hasattr(self.head, "decision_function"):
            logits = np.asarray(self.head.decision_function(features), dtype=np.float64)
            return np.stack([np.zeros_like(logits), logits], axis=1) if logits.ndim == 1 else logits
        if self.detector.name == "energy":
            raise ValueError(
                f"detector='energy' needs logits, and head={type(self.head).__name__} has no decision_function; take 'msp'."
            )
        return np.log(np.clip(self.head.predict_proba(features), 1e-12, None))


def _features(encoder: Any, X: Any) -> Any:
    features = X if encoder is None else encoder.transform(X)
    return features if issparse(features) else np.asarray(features, dtype=np.float64)


def _unfitted(detector: Union[str, Mapping[str, Any], Detector]) -> Detector:
    """A detector of these settings; each fold fits its own."""
    return type(detector)(**detector.get_params()) if isinstance(detector, Detector) else make_detector(detector)


def _default_head(features: Any) -> Any:
    if issparse(features):
        return LogisticRegression(C=10.0, max_iter=1000)
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))


def _joined(known: np.ndarray, unknown: Any) -> np.ndarray:
    """Classes and the label of what is refused, in an array of a type that holds both as they are."""
    if known.dtype.kind in "iuf" and isinstance(unknown, (int, float, np.number)) and not isinstance(unknown, bool):
        return np.append(known, unknown)
    joined = np.empty(len(known) + 1, dtype=object)
    joined[:-1], joined[-1] = known.tolist(), unknown
    return joined


def _scale(inside: Scored, outside: Optional[Scored], chosen: Any, share: float) -> float:
    """By how much a score must change for the odds of `unknown` to change by e."""
    margins = inside.scores - chosen.of(inside.classes)
    spread = float(margins.std()) or 1.0
    if outside is None:
        return spread
    others = outside.scores - chosen.of(outside.classes)
    values = np.concatenate([margins, others])[:, None] / spread
    truth = np.repeat([1, 0], [len(margins), len(others)])
    weight = np.repeat([(1 - share) / len(margins), share / len(others)], [len(margins), len(others)]) * len(truth)
    slope = LogisticRegression(fit_intercept=False, C=1.0).fit(values, truth, sample_weight=weight).coef_[0, 0]
    return spread / slope if slope > 1e-3 else spread
