# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Data settings: what is inside, what is outside, and that nothing from outside is ever trained on."""

from __future__ import annotations

import json

import pytest

from peft_ext.ood.study.data import Setting, load_setting, make_setting
from tests.ood.conftest import DOMAINS, LABELS


def _texts(data_dir, source: str, split: str, labels) -> set[str]:
    with open(f"{data_dir}/{source}/{split}.jsonl") as file:
        return {row["text"] for row in map(json.loads, file) if row["label"] in labels}


def test_own_out_of_scope_set(data_dir):
    data = load_setting(make_setting("clinc150_oos"), data_dir)
    assert data.labels == LABELS
    assert [len(part[0]) for part in (data.train, data.validation, data.test)] == [60, 24, 36]
    assert set(data.outside) == _texts(data_dir, "clinc150", "test", {"oos"})
    oos = set().union(*(_texts(data_dir, "clinc150", split, {"oos"}) for split in ("train", "validation")))
    assert not oos & {*data.train[0], *data.validation[0]}
    for texts, labels in (data.train, data.test):
        for text, label in zip(texts, labels):
            split = "train" if texts is data.train[0] else "test"
            assert text in _texts(data_dir, "clinc150", split, {data.labels[label]})


def test_split_is_balanced_by_domain(data_dir):
    data = load_setting(make_setting({"name": "clinc150_near", "ratio": 0.5}), data_dir)
    for labels in DOMAINS.values():
        assert len(set(labels) & set(data.labels)) == 1
    left = set(LABELS) - set(data.labels)
    assert set(data.outside) == _texts(data_dir, "clinc150", "test", left)
    assert not _texts(data_dir, "clinc150", "train", left) & set(data.train[0])
    assert not _texts(data_dir, "clinc150", "validation", {*left, "oos"}) & set(data.validation[0])
    again = load_setting(make_setting({"name": "clinc150_near", "ratio": 0.5}), data_dir)
    assert again == data
    seeds = [
        load_setting(make_setting({"name": "clinc150_near", "ratio": 0.5, "split_seed": s}), data_dir)
        for s in range(4)
    ]
    assert len({tuple(other.labels) for other in seeds}) > 1


def test_split_counts_are_the_studys():
    """4 of 15 intents of each of ten domains, 19 of 77 classes (the study's own files)."""
    from peft_ext.ood.study.data import _inside

    domains = {f"d{i}": [f"d{i}-{j}" for j in range(15)] for i in range(10)}
    clinc = make_setting("clinc150_near")
    assert len(_inside(clinc, sorted(sum(domains.values(), [])), domains)) == 40
    assert len(_inside(make_setting("banking77_near"), [str(i) for i in range(77)], {})) == 19


def test_a_corpus_without_validation_split(data_dir):
    data = load_setting(make_setting({"name": "banking77_near", "ratio": 0.5}), data_dir)
    assert len(data.labels) == 2 and len(data.train[0]) == 16 and len(data.validation[0]) == 4
    assert not set(data.train[0]) & set(data.validation[0])
    assert sorted(set(data.validation[1])) == [0, 1], "not every class is in the validation part"


def test_leave_out_and_another_sets_test(data_dir):
    data = load_setting(make_setting("snips_leave_2_out"), data_dir)
    assert len(data.labels) == 1 and len(data.outside) == 12
    far = load_setting(make_setting("clinc150_far"), data_dir)
    assert far.labels == LABELS
    assert set(far.outside) == _texts(data_dir, "banking77", "test", {"lost", "top", "fee", "rate"})


def test_a_folder_of_ones_own(data_dir):
    setting = make_setting({"name": "mine", "source": f"{data_dir}/snips", "outside": f"{data_dir}/clinc150"})
    data = load_setting(setting)
    assert data.labels == ["book", "music", "rain"] and len(data.outside) == 42


def test_cuts(data_dir):
    setting = make_setting({"name": "clinc150_oos", "per_class": 3, "validation_examples": 5, "test_examples": 4})
    data = load_setting(setting, data_dir)
    assert [data.train[1].count(label) for label in range(6)] == [3] * 6
    assert len(data.validation[0]) == 5 and len(data.test[0]) == 4 == len(data.outside)
    assert load_setting(setting, data_dir) == data


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        ("clinc", ValueError, "set 'clinc' is unknown.*banking77_near.*clinc150_oos"),
        ({"name": "clinc150_near", "ratio": 1.5}, ValueError, "ratio=1.5"),
        ({"name": "clinc150_near", "share": 0.5}, TypeError, "no field 'share'.*ratio"),
        ({"name": "snips_leave_2_out", "leave_out": 3}, ValueError, "leave_out=3 of 3"),
        ({"name": "clinc150_near", "ratio": 0.1}, ValueError, "ratio=0.1 leaves no class"),
        ({"name": "mine", "source": "snips", "outside": "own"}, ValueError, "no out-of-scope examples of its own"),
        ({"name": "mine", "source": "./nowhere", "outside": "split"}, FileNotFoundError, r"nowhere.*train\.jsonl"),
    ],
)
def test_bad_settings(spec, error, match, data_dir):
    with pytest.raises(error, match=match):
        load_setting(make_setting(spec), data_dir)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085"])
def test_texts_may_hold_any_character(tmp_path, character):
    """JSON leaves ends of lines unescaped that aren't `\\n`."""
    for split in ("train", "validation", "test"):
        rows = [{"text": f"{label}{character}{i}", "label": label} for label in "abc" for i in range(3)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="")
    data = load_setting(Setting("mine", str(tmp_path), outside="leave_out", leave_out=1))
    assert all(character in text for text in (*data.train[0], *data.test[0], *data.outside))


def test_labels_that_are_never_trained_on(tmp_path):
    for split, labels in (("train", "ab"), ("validation", "ab"), ("test", "abc")):
        rows = [json.dumps({"text": f"{label} {i}", "label": label}) for label in labels for i in range(3)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    setting = Setting("mine", str(tmp_path), outside=str(tmp_path))
    with pytest.raises(ValueError, match=r"never trained on: \['c'\]"):
        load_setting(setting)
