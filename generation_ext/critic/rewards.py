# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Rewards of finished texts: any function in TRL's shape, made from plain functions and classifiers, and checked when
called.

A reward is the probability that a text has the attribute (`r_end = P(a | x)` in the paper), so it lies in [0, 1].
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional


# TRL's shape: called with the keywords prompts, completions, completion_ids and the data set's other columns, all lists
# of one length; a None leaves that text out. Besides TRL's columns there is `control_code` if the critic has any.
RewardFunc = Callable[..., Sequence[Optional[float]]]

# A softmax in float32 sums to one within this.
_ROUNDING = 1e-5


def from_texts(score: Callable[[list[str]], Sequence[float]]) -> RewardFunc:
    """A reward function from a function of whole texts.

    Args:
        score: Takes a list of texts, each the prompt and its continuation, and returns as many numbers in [0, 1].
    """
    if not callable(score):
        raise TypeError(f"score={score!r} can't be called; pass a function from a list of texts to numbers in [0, 1].")

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> Sequence[float]:
        return score(_texts(prompts, completions))

    return _named(reward, score)


def from_classifier(classifier: Any, label: Any = None) -> RewardFunc:
    """A reward function from a scikit-learn classifier (or pipeline) of texts: the probability of one label.

    Args:
        classifier: A fitted estimator with `predict_proba` and `classes_`, which takes a list of texts.
        label: One of `classes_`; None: each text's control code names it, so one classifier serves many attributes.

    Raises:
        ValueError: If the classifier has no such label or isn't fitted.
        TypeError: If it gives no probabilities.
    """
    if not callable(getattr(classifier, "predict_proba", None)):
        raise TypeError(
            f"classifier={classifier!r} has no predict_proba; pass one that gives probabilities (of the linear ones, "
            "LogisticRegression does, or wrap it in CalibratedClassifierCV)."
        )
    classes = list(getattr(classifier, "classes_", []))
    if not classes:
        raise ValueError(f"classifier={classifier!r} has no classes_: it isn't fitted; call fit first.")
    columns_of = {str(name): column for column, name in enumerate(classes)}
    if label is not None:
        _check_label(str(label), columns_of)

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        probabilities = classifier.predict_proba(_texts(prompts, completions))
        wanted = _wanted(label, columns_of, len(prompts), columns.get("control_code"))
        return [float(row[columns_of[name]]) for row, name in zip(probabilities, wanted)]

    return _named(reward, classifier)


def from_pipeline(pipeline: Any, label: Optional[str] = None, batch_size: int = 16) -> RewardFunc:
    """A reward function from a transformers text-classification pipeline: the score of one label.

    Args:
        pipeline: `transformers.pipeline("text-classification", ...)`. Texts that are too long for it are cut.
        label: A label of the pipeline's model; None: each text's control code names it.
        batch_size: Texts per forward pass of the classifier.

    Raises:
        ValueError: If the model has no such label.
        TypeError: If it is another kind of pipeline.
    """
    if getattr(pipeline, "task", None) != "text-classification":
        raise TypeError(
            f"pipeline={pipeline!r} is no text-classification pipeline; for anything else, write a function from texts "
            "to numbers and pass from_texts(function)."
        )
    names = list(pipeline.model.config.id2label.values())
    if label is not None:
        _check_label(label, names)

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        rows = pipeline(_texts(prompts, completions), top_k=None, truncation=True, batch_size=batch_size)
        wanted = _wanted(label, names, len(prompts), columns.get("control_code"))
        return [{entry["label"]: entry["score"] for entry in row}[name] for row, name in zip(rows, wanted)]

    return _named(reward, pipeline)


def name_of(reward: Any) -> str:
    """What messages call a reward function."""
    return getattr(reward, "__name__", None) or type(reward).__name__


def score(
    reward: RewardFunc,
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    columns: Optional[Mapping[str, list[Any]]] = None,
) -> list[Optional[float]]:
    """Call a reward function and check what it returns.

    Args:
        reward: In TRL's shape.
        prompts, completions, completion_ids: One entry a text.
        columns: Further columns of the data, by name.

    Returns:
        Numbers in [0, 1], or None where the reward function has nothing to say of a text.

    Raises:
        ValueError: If it raises (the cause is kept), returns another number of rewards, NaN or a value out of [0, 1].
        TypeError: If it can't be called, is asynchronous, or returns something else than numbers.
    """
    check_callable(reward)
    try:
        result = reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **(columns or {}))
    except Exception as error:
        raise ValueError(
            f"the reward function {name_of(reward)} raised {type(error).__name__}: {error}. It is called with the "
            f"keywords prompts, completions, completion_ids{''.join(f', {name}' for name in columns or {})} and must "
            "take them all (a **kwargs takes what it doesn't need)."
        ) from error
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(
            f"the reward function {name_of(reward)} returned {values!r}; it must return a list of numbers."
        )
    if len(values) != len(prompts):
        raise ValueError(
            f"the reward function {name_of(reward)} returned {len(values)} rewards for {len(prompts)} texts; it must "
            "return one for each."
        )
    return [
        _checked(value, reward, prompt, completion) for value, prompt, completion in zip(values, prompts, completions)
    ]


def check_callable(reward: Any) -> None:
    """Refuse what can't be a reward function, before any long work.

    Raises:
        TypeError: Says what it is and how a function must look.
    """
    if not callable(reward):
        raise TypeError(
            f"reward={reward!r} can't be called; pass a function in TRL's shape, or make one with from_texts, "
            "from_classifier or from_pipeline."
        )
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None)):  # noqa: B004
        raise TypeError(
            f"the reward function {name_of(reward)} is asynchronous; wrap it in a plain one that calls asyncio.run."
        )


def _checked(value: Any, reward: RewardFunc, prompt: str, completion: str) -> Optional[float]:
    if value is None:
        return None
    text = f"for the text {prompt + completion!r}" if isinstance(prompt, str) and isinstance(completion, str) else ""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"the reward function {name_of(reward)} returned {value!r} {text}; it must return numbers."
        ) from None
    if math.isnan(number):
        raise ValueError(
            f"the reward function {name_of(reward)} returned NaN {text}; return None to leave a text out."
        )
    if not -_ROUNDING <= number <= 1.0 + _ROUNDING:
        raise ValueError(
            f"the reward function {name_of(reward)} returned {number} {text}; a reward is the probability of the "
            "attribute and lies in [0, 1]. Put logits through a sigmoid, or rescale scores."
        )
    return min(max(number, 0.0), 1.0)


def _texts(prompts: list[str], completions: list[str]) -> list[str]:
    return [prompt + completion for prompt, completion in zip(prompts, completions)]


def _wanted(label: Any, labels: Any, count: int, codes: Optional[list[Optional[str]]]) -> list[str]:
    """The label of each text."""
    if label is not None:
        return [str(label)] * count
    if codes is None:
        raise ValueError(
            f"no label was given and the texts have no control code; pass label=, one of {sorted(labels)}."
        )
    for code in codes:
        _check_label(str(code), labels)
    return [str(code) for code in codes]


def _check_label(label: str, labels: Any) -> None:
    if label not in labels:
        raise ValueError(f"label={label!r} is not one of the classifier's labels; choose one of {sorted(labels)}.")


def _named(reward: RewardFunc, source: Any) -> RewardFunc:
    reward.__name__ = name_of(source)
    return reward
