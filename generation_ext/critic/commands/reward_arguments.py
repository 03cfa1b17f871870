# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Flags that name a reward function: one of the user's, a transformers classifier, or labelled texts to train one on."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from generation_ext.critic.rewards import RewardFunc, check_callable, from_classifier, from_pipeline
from peft_ext.rows import read_json_lines


@dataclass
class RewardArguments:
    """What the reward is: one of three."""

    reward: Optional[str] = field(
        default=None,
        metadata={"help": "A function in TRL's shape: package.module:function, or file.py:function (which is run)."},
    )
    classifier: Optional[str] = field(
        default=None, metadata={"help": "Hub id or folder of a transformers text classifier; with --label."}
    )
    labelled_texts: Optional[str] = field(
        default=None,
        metadata={"help": "JSON lines with text and label, to train a classifier of words on; with --label."},
    )
    text_field: str = field(default="text", metadata={"help": "Field of the labelled texts that holds the text."})
    label_field: str = field(default="label", metadata={"help": "Field of the labelled texts that holds the label."})
    label: Optional[str] = field(
        default=None,
        metadata={"help": "The reward is the probability of this label; without it, each control code is a label."},
    )


def load_reward(args: RewardArguments) -> RewardFunc:
    """The reward function that the arguments name.

    Raises:
        ValueError: If they name none or several, or there is no such function, label or field.
        FileNotFoundError, ImportError: If there is no such file or module.
    """
    names = [name for name in ("reward", "classifier", "labelled_texts") if getattr(args, name)]
    if len(names) != 1:
        raise ValueError(
            f"the reward is {'missing' if not names else 'named more than once, by ' + ', '.join(names)}: pass one of "
            "--reward module:function, --classifier model, --labelled_texts file."
        )
    if args.reward:
        return _function(args.reward)
    if args.classifier:
        from transformers import pipeline

        return from_pipeline(pipeline("text-classification", model=args.classifier), args.label)
    return from_classifier(_trained(args), args.label)


def _function(name: str) -> RewardFunc:
    source, _, function = name.rpartition(":")
    if not source or not function:
        raise ValueError(f"reward={name!r}: pass package.module:function or file.py:function.")
    if source.endswith(".py"):
        if not Path(source).is_file():
            raise FileNotFoundError(f"reward={name!r}: there is no file {source!r}.")
        spec = importlib.util.spec_from_file_location(Path(source).stem, source)
        if spec is None or spec.loader is None:
            raise ImportError(f"reward={name!r}: {source!r} can't be imported.")
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    if not hasattr(module, function):
        raise ValueError(f"reward={name!r}: {source} has no {function!r}.")
    check_callable(getattr(module, function))
    return getattr(module, function)


def _trained(args: RewardArguments) -> Any:
    """Logistic regression on TF-IDF of words and pairs of words."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise ImportError("labelled_texts needs scikit-learn: pip install scikit-learn") from error
    rows = read_json_lines(Path(str(args.labelled_texts)).expanduser(), "labelled_texts")
    for name in (args.text_field, args.label_field):
        if not rows or any(name not in row for row in rows):
            raise ValueError(
                f"labelled_texts={args.labelled_texts!r} has no field {name!r} in some line; pass --text_field and "
                "--label_field."
            )
    labels = [str(row[args.label_field]) for row in rows]
    if len(set(labels)) < 2:
        raise ValueError(f"labelled_texts={args.labelled_texts!r} has one label only; a classifier needs two.")
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    classifier = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000))
    return classifier.fit([row[args.text_field] for row in rows], labels)
