# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`predict`: classes and probabilities of the texts of a file, by a saved classifier."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from generation_ext.data_files import columns_of, write_rows
from generation_ext.probing.commands.arguments import RUN, DataArguments, ModelArguments, labelled, load_model, parse
from generation_ext.probing.palp import PALPClassifier
from generation_ext.probing.saving import base_name, fields_of_template
from peft_ext.files import check_writable


@dataclass
class PredictArguments(DataArguments, ModelArguments):
    """Arguments of `predict`."""

    classifier: Optional[str] = field(
        default=None, metadata={"help": "Folder of a classifier (or the first argument)."}
    )
    output: Optional[str] = field(default=None, metadata={"help": "Predictions: .jsonl or .csv."})


def main(argv: Sequence[str]) -> None:
    """Predict, write, print a summary."""
    (args,) = parse(argv, PredictArguments, positional="classifier")
    for name in ("classifier", "data", "output"):
        if not getattr(args, name):
            raise ValueError(f"{name} is missing: pass --{name}.")
    folder, output = Path(args.classifier), Path(args.output)
    if output.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"output={args.output!r} must end in .jsonl or .csv.")
    check_writable(output, "output")
    base = base_name(folder)
    run: dict[str, Any] = (
        json.loads((folder / RUN).read_text(encoding="utf-8")) if (folder / RUN).is_file() else {"model": base}
    )
    # what the classifier was trained with, where no flag says otherwise
    args.model, args.adapter = args.model or run.get("model"), args.adapter or run.get("adapter")
    args.dtype = run.get("dtype", args.dtype) if args.dtype == "auto" else args.dtype
    columns = columns_of(fields_of_template(folder), args.fields or run.get("fields", []))
    texts, labels = labelled(args.data, "data", columns, args.label_column, args.limit)
    classifier = PALPClassifier.from_pretrained(folder, *load_model(args))
    classifier.set_params(memory_limit=args.memory_limit, progressbar=sys.stderr.isatty())
    probabilities = classifier.predict_proba(texts)
    classes = classifier.classes_.tolist()
    found = [classes[index] for index in probabilities.argmax(1)]
    rows: list[dict[str, Any]] = []
    for prediction, row in zip(found, probabilities.round(6).tolist()):
        each = dict(zip(map(str, classes), row))
        # a CSV has a column for each class
        rows.append({"prediction": prediction, **(each if output.suffix == ".csv" else {"probabilities": each})})
    write_rows(output, rows)
    print(f"{len(rows)} predictions in {output}")
    for name, count in Counter(found).most_common(10):
        print(f"  {name}: {count}")
    known = [str(prediction) == label for prediction, label in zip(found, labels) if label is not None]
    if known:
        print(f"accuracy: {100 * sum(known) / len(known):.1f} % of {len(known)} labelled texts")
