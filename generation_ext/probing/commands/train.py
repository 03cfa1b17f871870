# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`train`: fit a classifier on labelled texts of a file, and write it into a folder."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np

from generation_ext.columns import columns_of
from generation_ext.probing.commands.arguments import RUN, DataArguments, ModelArguments, labelled
from generation_ext.probing.demonstrations import NONE
from generation_ext.probing.heads import AUTO
from generation_ext.probing.palp import PALPClassifier
from generation_ext.probing.reading import BEST
from generation_ext.prompts import Task
from peft_ext.command_line import parse, show
from peft_ext.files import check_folder_writable, write_json
from peft_ext.model_card import note_measured, write_card


@dataclass
class TrainArguments(DataArguments, ModelArguments):
    """Arguments of `train`."""

    output_dir: Optional[str] = field(default=None, metadata={"help": "Folder for the classifier."})
    template: str = field(
        default="{text}", metadata={"help": "Surroundings of a text, slots in braces; \\n is a new line."}
    )
    demonstrations: str = field(default=NONE, metadata={"help": "none, or per-class: one of each class is shown."})
    label_words: list[str] = field(
        default_factory=list, metadata={"help": "Words for classes in demonstrations, as CLASS=WORDS."}
    )
    permutations: int = field(default=20, metadata={"help": "Most orders of the demonstrations in training."})
    head: str = field(
        default=AUTO,
        metadata={"help": "ridge, logistic, svm, gda, knn or mlp; auto: ridge, or logistic if there are head_params."},
    )
    head_params: Optional[str] = field(default=None, metadata={"help": "For the head, as JSON."})
    label_scores: bool = field(
        default=True, metadata={"help": "Whether the ridge head adds the model's own scores of the label words."}
    )
    layer: str = field(
        default=AUTO,
        metadata={
            "help": "Whose hidden states: -1 the last ones, 0 the embeddings; best: by cross-validation; auto: several "
            "layers' together for the ridge head, the best one for others."
        },
    )
    pooling: str = field(default=AUTO, metadata={"help": "last or mean; auto: both, or the better one."})
    overflow: str = field(default="error", metadata={"help": "error, truncate_start or truncate_end."})
    max_length: Optional[int] = field(default=None, metadata={"help": "Most tokens of demonstrations and text."})
    validation: Optional[str] = field(default=None, metadata={"help": "Labelled texts to measure on."})
    keep_features: bool = field(default=False, metadata={"help": "Keep <output_dir>-features."})
    seed: int = field(default=0, metadata={"help": "Of the orders and the head."})


def main(argv: Sequence[str]) -> None:
    """Fit, save, print how well it does."""
    (args,) = parse(argv, TrainArguments)
    for name in ("data", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"{name} is missing: pass --{name}.")
    output = Path(args.output_dir)
    check_folder_writable(output, "output_dir")
    template = args.template.replace("\\n", "\n")
    columns = columns_of(Task(template, {"a": "a", "b": "b"}).fields, args.fields)
    texts, labels = _complete(args.data, "data", columns, args)
    validation = _complete(args.validation, "validation", columns, args) if args.validation else None
    options = _options(args, template)
    PALPClassifier(**options).check_options()
    model, tokenizer = args.load("auto")
    # what was encoded before a kill is not encoded again
    features = output.with_name(output.name + "-features")
    classifier = PALPClassifier(
        model,
        tokenizer,
        memory=features,
        memory_limit=args.memory_limit,
        progressbar=sys.stderr.isatty(),
        random_state=args.seed,
        **options,
    ).fit(texts, labels)
    classifier.save_pretrained(output)
    run = {name: getattr(args, name) for name in ("model", "adapter", "dtype", "fields", "label_column")}
    write_json(output / RUN, run)
    result: dict[str, Any] = {"texts": len(texts), "classes": len(classifier.classes_), "output_dir": str(output)}
    result.update(layer=classifier.layer_, pooling=classifier.pooling_, C=classifier.C_)
    result.update(blocks=[list(block) for block in classifier.blocks_], label_weight=classifier.label_weight_)
    lines = [f"{len(texts)} texts of {len(classifier.classes_)} classes: classifier in {output}"]
    lines.append(f"  {classifier.chosen}")
    for text, name in classifier.demonstrations_:
        lines.append(f"  shown for {name}: {' / '.join(classifier.task_.values(text).values())}")
    result["accuracy"] = float(classifier.score(texts, labels))
    note_measured(classifier, f"accuracy on {len(texts)} training texts", share=result["accuracy"])
    lines.append(f"accuracy on the training texts: {100 * result['accuracy']:.1f} %")
    if validation is not None:
        accuracy = float(np.mean(classifier.predict(validation[0]) == np.array(validation[1])))
        result["validation_accuracy"] = accuracy
        note_measured(classifier, f"accuracy on {len(validation[0])} validation texts", share=accuracy)
        lines.append(f"accuracy on {args.validation}: {100 * accuracy:.1f} % of {len(validation[0])} texts")
    write_card(classifier.model_card(), output)
    show(result, "\n".join(lines))
    if not args.keep_features:
        shutil.rmtree(features, ignore_errors=True)


def _options(args: TrainArguments, template: str) -> dict[str, Any]:
    """Arguments of the classifier that flags have in another form."""
    words: dict[str, str] = {}
    for text in args.label_words:
        name, sign, word = text.partition("=")
        if not (name and sign and word):
            raise ValueError(f"label_words={text!r}: write CLASS=WORDS.")
        words[name] = word if word[0].isspace() else f" {word}"
    params = None
    if args.head_params is not None:
        try:
            params = json.loads(args.head_params)
        except ValueError as error:
            raise ValueError(f"head_params={args.head_params!r} is no JSON: {error}") from error
        if not isinstance(params, dict):
            raise ValueError(f"head_params={args.head_params!r} must be an object, such as '{{\"C\": 1.0}}'.")
    names = ("demonstrations", "permutations", "head", "label_scores", "layer", "pooling", "overflow", "max_length")
    shared = {name: getattr(args, name) for name in names}
    if shared["layer"] not in (AUTO, BEST):
        try:
            shared["layer"] = int(args.layer)
        except ValueError:
            raise ValueError(f"layer={args.layer!r} must be an integer, {AUTO!r} or {BEST!r}.") from None
    return {**shared, "template": template, "label_words": words or None, "head_params": params}


def _complete(
    path: str, argument: str, columns: dict[str, str], args: TrainArguments
) -> tuple[list[dict[str, str]], list[Any]]:
    texts, labels = labelled(path, argument, columns, args)
    if None in labels:
        row = labels.index(None) + 1
        raise ValueError(
            f"{path}, row {row} has no {args.label_column!r}; say which column it is with --label_column."
        )
    return texts, labels
