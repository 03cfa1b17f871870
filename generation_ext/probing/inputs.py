# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Texts, classes and label words as a user of scikit-learn passes them, checked, as examples of a task."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np

from generation_ext.prompts import Task


def classes_of(y: Any) -> tuple[np.ndarray, np.ndarray]:
    """The classes, sorted, and each text's as an integer from 0.

    Raises:
        ValueError: If there are none, one alone, or numbers that aren't classes.
    """
    from sklearn.utils.multiclass import check_classification_targets

    if y is None:
        raise ValueError("y is missing: a classifier requires y to be passed, a class for each text.")
    y = np.asarray(y)
    if y.ndim != 1:
        raise ValueError(f"y must have one class for each text, got an array of shape {y.shape}.")
    check_classification_targets(y)
    classes, codes = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"y has one class alone, {classes.tolist()}: there is nothing to decide; it needs two or more."
        )
    return classes, codes


def task_of(
    template: str, separator: str, words: Optional[Mapping[Any, str]], classes: Sequence[Any], shown: bool
) -> Task:
    """Template and label words.

    Args:
        template, separator: Of the task.
        words: Classes -> words; None: a space and the class's name.
        classes: Those of the texts.
        shown: Whether a sample of each class is shown, so that a class of `words` can't be without.

    Raises:
        ValueError: If a class has no words, or words no class.
    """
    if words is None:
        words = {name: f" {name}" for name in classes}
    words = _of_numbered(words, classes)
    missing = [name for name in classes if name not in words]
    if missing:
        raise ValueError(f"label_words={dict(words)!r} has no words for the class {missing[0]!r} of y.")
    empty = sorted(str(name) for name in words if name not in classes)
    if empty and shown:
        raise ValueError(f"label_words has the class {empty[0]!r}, but y has no sample of it.")
    return Task(template, {name: words[name] for name in classes}, separator=separator)


def _of_numbered(words: Mapping[Any, str], classes: Sequence[Any]) -> Mapping[Any, str]:
    """Words by the numbers that scikit-learn's `LabelEncoder` gives sorted classes, as its ensembles pass them on."""
    numbered = all(isinstance(name, str) for name in words) and classes == list(range(len(words)))
    if not numbered:
        return words
    names = sorted(words)
    warnings.warn(
        f"y has the classes {classes}, label_words {names}: taken in this order, as the ensembles of scikit-learn number "
        "classes.",
        stacklevel=5,
    )
    return {number: words[name] for number, name in enumerate(names)}


def examples_of(X: Any, fields: Sequence[str]) -> list[Any]:
    """Texts of a sequence, a data frame, or an array with a column for each of the template's slots.

    Raises:
        TypeError, ValueError: If it is none of these.
    """
    if isinstance(X, (str, bytes)):
        raise TypeError("X must be a sequence of texts, got a single one; pass [text].")
    if hasattr(X, "columns") and hasattr(X, "to_dict"):
        return X.to_dict("records")
    if getattr(X, "ndim", 1) == 2:
        if X.shape[1] != len(fields):
            raise ValueError(f"X has {X.shape[1]} columns, but the template the slots {fields}.")
        return [dict(zip(fields, map(str, row))) for row in X]
    if getattr(X, "ndim", 1) == 0:
        raise ValueError(f"X={X!r} is a single value; pass a sequence of texts.")
    # numpy's and pandas's strings are strings
    return list(X)
