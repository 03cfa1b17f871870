# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`predict`: classes and probabilities of the texts of a file, by a saved classifier."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from generation_ext.columns import columns_of
from generation_ext.probing.commands.arguments import RUN, DataArguments, ModelArguments, labelled
from generation_ext.probing.palp import PALPClassifier
from generation_ext.probing.saving import base_name, fields_of_template
from peft_ext.command_line import parse, show
from peft_ext.files import check_writable
from peft_ext.hub import fetched
from peft_ext.rows import write_rows
from peft_ext.runs import read_settings


@dataclass
class PredictArguments(DataArguments, ModelArguments):
    """Arguments of `predict`."""

    classifier: Optional[str] = field(
        default=None, metadata={"help": "Folder or hub id of a classifier (or the first argument)."}
    )
    output: Optional[str] = field(default=None, metadata={"help": "Predictions: .jsonl or .csv."})


def main(argv: Sequence[str]) -> None:
    """Predict, write, print a summary."""
    (args,) = parse(argv, PredictArguments, positional="classifier")
    for name in ("classifier", "data", "output"):
        if not getattr(args, name):
            raise ValueError(f"{name} is missing: pass --{name}.")
    folder, output = fetched(args.classifier), Path(args.output)
    if output.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"output={args.output!r} must end in .jsonl or .csv.")
    check_writable(output, "output")
    base = base_name(folder)
    run = read_settings(folder / RUN) or {"model": base}
    # what the classifier was trained with, where no flag says otherwise
    args.model, args.adapter = args.model or run.get("model"), args.adapter or run.get("adapter")
    args.dtype = run.get("dtype", args.dtype) if args.dtype == "auto" else args.dtype
    columns = columns_of(fields_of_template(folder), args.fields or run.get("fields", []))
    texts, labels = labelled(args.data, "data", columns, args)
    classifier = PALPClassifier.from_pretrained(folder, *args.load("auto"))
    classifier.set_params(memory_limit=args.memory_limit, progressbar=sys.stderr.isatty())
    probabilities = classifier.predict_proba(texts)
    classes = classifier.classes_.tolist()
    predictions = [classes[index] for index in probabilities.argmax(1)]
    rows: list[dict[str, Any]] = []
    for prediction, row in zip(predictions, probabilities.round(6).tolist()):
        each = dict(zip(map(str, classes), row))
        # a CSV has a column for each class
        rows.append({"prediction": prediction, **(each if output.suffix == ".csv" else {"probabilities": each})})
    write_rows(output, rows)
    counts = dict(Counter(predictions).most_common(10))
    lines = [f"{len(rows)} predictions in {output}", *(f"  {name}: {count}" for name, count in counts.items())]
    result: dict[str, Any] = {"predictions": len(rows), "output": str(output), "counts": counts}
    correct = [str(prediction) == label for prediction, label in zip(predictions, labels) if label is not None]
    if correct:
        result["accuracy"] = sum(correct) / len(correct)
        lines.append(f"accuracy: {100 * result['accuracy']:.1f} % of {len(correct)} labelled texts")
    show(result, "\n".join(lines))
