# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Data settings of the study: in-distribution splits, and what lies outside. Nothing from outside is ever trained on, or
selected by."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from peft_ext.file_formats import check_fields, list_of, text
from peft_ext.files import read_json
from peft_ext.rows import read_rows


class Example(NamedTuple):
    """A text and its label."""

    text: str
    label: str


Splits = dict[str, list[Example]]


@dataclass(frozen=True)
class Source:
    """A labelled corpus: a folder of `data_dir`, or a data set of the hub.

    Attributes:
        folder: Folder with `train.jsonl`, `test.jsonl` and, if there is one, `validation.jsonl` (lines with `text` and
            `label`), and perhaps `domains.json` (domain -> labels).
        hub: Arguments of `datasets.load_dataset` if the folder isn't there.
        text, label: Columns.
        outside: Label of the corpus's own out-of-scope examples.
    """

    folder: str
    hub: tuple[str, ...] = ()
    text: str = "text"
    label: str = "label"
    outside: Optional[str] = None


SOURCES = {
    "clinc150": Source("clinc150", ("clinc_oos", "plus"), label="intent", outside="oos"),
    "banking77": Source("banking77", ("banking77",)),
    "snips": Source("snips", ("snips_built_in_intents",)),
}


@dataclass(frozen=True)
class Setting:
    """One row of the study's data.

    Attributes:
        name: For tables.
        source: Name in `SOURCES`, a folder, or a data set of the hub.
        outside: What is out-of-distribution: `"own"` (the corpus's out-of-scope examples), `"split"` (the classes outside
            a random share), `"leave_out"` (a number of classes), or another source, whose test examples are.
        ratio: Share of the classes that are in-distribution (`"split"`), the same in every domain if there are domains.
        leave_out: Number of classes outside (`"leave_out"`).
        split_seed: Of the choice of classes.
        per_class, validation_examples, test_examples: Cut the data to so many; None: all.
        validation_share: Of the training examples, where the corpus has no validation split.
        columns: Names of the text and label columns, for sources that aren't known.
    """

    name: str
    source: str
    outside: str = "own"
    ratio: float = 0.25
    leave_out: int = 2
    split_seed: int = 0
    per_class: Optional[int] = None
    validation_examples: Optional[int] = None
    test_examples: Optional[int] = None
    validation_share: float = 0.15
    columns: tuple[str, ...] = ("text", "label")


SETTINGS = {
    "clinc150_oos": Setting("clinc150_oos", "clinc150", "own"),
    "clinc150_near": Setting("clinc150_near", "clinc150", "split"),
    "banking77_near": Setting("banking77_near", "banking77", "split"),
    "snips_leave_2_out": Setting("snips_leave_2_out", "snips", "leave_out"),
    "clinc150_quarter": Setting("clinc150_quarter", "clinc150", "split", ratio=0.75),
    "banking77_quarter": Setting("banking77_quarter", "banking77", "split", ratio=0.75),
    "clinc150_far": Setting("clinc150_far", "clinc150", "banking77"),
}


@dataclass
class Data:
    """What a cell of the study trains and is tested on; labels are indices into `labels`."""

    labels: list[str]
    train: tuple[list[str], list[int]]
    validation: tuple[list[str], list[int]]
    test: tuple[list[str], list[int]]
    outside: list[str]


def make_setting(spec: Union[str, Mapping[str, Any]]) -> Setting:
    """A setting from its name, or from a mapping: a known `name` with changes, or one of its own with a `source`.

    Raises:
        ValueError: If the name is unknown (lists those known), or a value is bad.
        TypeError: If there is no such field.
    """
    values: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = values.get("name")
    base = values.pop("base", name)
    if base in SETTINGS:
        values = {**vars(SETTINGS[base]), **values}
    elif "source" not in values:
        raise ValueError(
            f"set {name!r} is unknown; choose one of {sorted(SETTINGS)}, or give a mapping with name, source and outside."
        )
    unknown = sorted(set(values) - set(Setting.__dataclass_fields__))
    if unknown:
        raise TypeError(f"set {name!r} has no field {unknown[0]!r}; it has {sorted(Setting.__dataclass_fields__)}.")
    values["columns"] = tuple(values.get("columns", Setting.columns))
    setting = Setting(**values)
    if not 0 < setting.ratio < 1:
        raise ValueError(f"set {name!r}: ratio={setting.ratio!r} must be between 0 and 1.")
    return setting


def load_setting(setting: Setting, data_dir: Optional[str] = None) -> Data:
    """Load a setting's texts and split its classes.

    Args:
        setting: The setting.
        data_dir: Where the known sources' folders lie; what isn't there comes from the hub.

    Raises:
        FileNotFoundError: If a folder isn't there.
        ValueError: If nothing is left inside or outside, or the test split has labels that are never trained on.
    """
    splits, domains, own = load_source(setting.source, data_dir, setting.columns)
    labels = sorted({example.label for example in splits["train"] if example.label != own})
    inside = _inside(setting, labels, domains)
    outside = _outside(setting, splits["test"], inside, own, data_dir)
    parts = {name: [example for example in examples if example.label in inside] for name, examples in splits.items()}
    if setting.outside not in ("split", "leave_out"):
        strange = sorted({example.label for example in splits["test"]} - inside - {own})
        if strange:
            raise ValueError(
                f"set {setting.name!r}: the test split has labels that are never trained on: {strange[:5]}."
            )
    generator = random.Random(setting.split_seed)
    if not parts.get("validation"):
        parts["train"], parts["validation"] = _stratified(parts["train"], setting.validation_share, generator)
    if setting.per_class:
        parts["train"] = _first_per_class(parts["train"], setting.per_class, generator)
    order = sorted(inside)
    data = Data(
        order,
        _indexed(parts["train"], order),
        _indexed(_cut(parts["validation"], setting.validation_examples, generator), order),
        _indexed(_cut(parts["test"], setting.test_examples, generator), order),
        [example.text for example in _cut(outside, setting.test_examples, generator)],
    )
    for name, texts in (("train", data.train[0]), ("test", data.test[0]), ("outside", data.outside)):
        if not texts:
            raise ValueError(f"set {setting.name!r}: no {name} examples are left; its source or its split is wrong.")
    return data


def load_source(
    name: str, data_dir: Optional[str], columns: Sequence[str] = ("text", "label")
) -> tuple[Splits, dict[str, list[str]], Optional[str]]:
    """A corpus: its splits, its domains (or none), and the label of its out-of-scope examples.

    Raises:
        FileNotFoundError: If it is neither a folder nor has a name of the hub.
    """
    source = SOURCES.get(name) or Source(name, (name,), *columns)
    for folder in (Path(data_dir) / source.folder if data_dir else None, Path(name)):
        if folder is not None and (folder / "train.jsonl").is_file():
            return _from_folder(folder, columns), _domains(folder), source.outside
    if Path(name).is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"source={name!r}: the folder has no train.jsonl.")
    return _from_hub(source), {}, source.outside


def _from_folder(folder: Path, columns: Sequence[str]) -> Splits:
    splits = {}
    for name in ("train", "validation", "test"):
        path = folder / f"{name}.jsonl"
        if path.is_file():
            splits[name] = [Example(str(row[columns[0]]), str(row[columns[1]])) for row in read_rows(path)]
    if "test" not in splits:
        raise FileNotFoundError(f"{str(folder)!r} has no test.jsonl.")
    return splits


def _domains(folder: Path) -> dict[str, list[str]]:
    path = folder / "domains.json"
    if not path.is_file():
        return {}
    domains = read_json(path)
    check_fields(domains, dict.fromkeys(domains, list_of(text())), repr(str(path)), "A domain has a list of labels.")
    return domains


def _from_hub(source: Source) -> Splits:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("data sets of the hub need: pip install datasets") from error
    corpus = load_dataset(*source.hub)
    splits = {}
    for name in set(corpus) & {"train", "validation", "test"}:
        part = corpus[name]
        names = getattr(part.features[source.label], "names", None)
        labels = [names[value] if names else str(value) for value in part[source.label]]
        splits[name] = [Example(text, label) for text, label in zip(part[source.text], labels)]
    if "test" not in splits:
        raise ValueError(f"data set {source.hub[0]!r} has no test split, only {sorted(corpus)}.")
    return splits


def _inside(setting: Setting, labels: list[str], domains: Mapping[str, Sequence[str]]) -> set[str]:
    """The in-distribution classes."""
    generator = random.Random(setting.split_seed)
    if setting.outside == "leave_out":
        if not 1 <= setting.leave_out < len(labels):
            raise ValueError(f"set {setting.name!r}: leave_out={setting.leave_out} of {len(labels)} classes.")
        return set(generator.sample(labels, len(labels) - setting.leave_out))
    if setting.outside != "split":
        return set(labels)
    groups = [sorted(set(group) & set(labels)) for group in domains.values()] or [labels]
    # as the study did: round(15 * 0.25) = 4 of each of CLINC150's ten domains, 19 of Banking77's 77 classes
    chosen = [name for group in groups for name in generator.sample(group, round(len(group) * setting.ratio))]
    if not chosen:
        raise ValueError(f"set {setting.name!r}: ratio={setting.ratio} leaves no class inside.")
    return set(chosen)


def _outside(
    setting: Setting, test: list[Example], inside: set[str], own: Optional[str], data_dir: Optional[str]
) -> list[Example]:
    if setting.outside == "own":
        if own is None:
            raise ValueError(
                f"set {setting.name!r}: {setting.source!r} has no out-of-scope examples of its own; choose outside: split, "
                "leave_out, or another source."
            )
        return [example for example in test if example.label == own]
    if setting.outside in ("split", "leave_out"):
        return [example for example in test if example.label not in inside and example.label != own]
    splits, _, other_own = load_source(setting.outside, data_dir, setting.columns)
    return [example for example in splits["test"] if example.label != other_own]


def _indexed(examples: list[Example], labels: list[str]) -> tuple[list[str], list[int]]:
    index = {label: number for number, label in enumerate(labels)}
    return [example.text for example in examples], [index[example.label] for example in examples]


def _stratified(
    examples: list[Example], share: float, generator: random.Random
) -> tuple[list[Example], list[Example]]:
    """Training and validation examples, the same share of every class (at least one)."""
    kept, held = [], []
    for label in sorted({example.label for example in examples}):
        group = [example for example in examples if example.label == label]
        generator.shuffle(group)
        count = max(1, round(len(group) * share)) if len(group) > 1 else 0
        held += group[:count]
        kept += group[count:]
    return kept, held


def _first_per_class(examples: list[Example], count: int, generator: random.Random) -> list[Example]:
    chosen, counts = [], Counter[str]()
    for example in generator.sample(examples, len(examples)):
        counts[example.label] += 1
        if counts[example.label] <= count:
            chosen.append(example)
    return chosen


def _cut(examples: list[Example], count: Optional[int], generator: random.Random) -> list[Example]:
    return examples if count is None or count >= len(examples) else generator.sample(examples, count)
