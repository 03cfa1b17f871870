# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Everything that a `--data` argument may name, as rows."""

from __future__ import annotations

import json

import datasets
import pytest

from peft_ext.data import hold_out, load_records
from peft_ext.rows import read_rows, write_rows


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": 'Hello, "you"\nthere'}]
ROWS = [{"id": number, "messages": TALK} for number in range(3)]


def write(path, rows=ROWS):
    """The rows in a file of the format that its ending names."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8-sig")
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        write_rows(path, [{"id": row["id"], "messages": json.dumps(row["messages"])} for row in rows])
    else:
        write_rows(path, rows)
    return str(path)


def plain(rows):
    """Cells of CSV are texts."""
    talks = [json.loads(row["messages"]) if isinstance(row["messages"], str) else row["messages"] for row in rows]
    return [{"id": int(row["id"]), "messages": talk} for row, talk in zip(rows, talks)]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_files_of_rows(ending, tmp_path):
    path = write(tmp_path / f"a.{ending}")
    records = load_records(path).train
    assert plain([record.row for record in records]) == ROWS == plain(read_rows(path))
    assert records[1].where == f"{path}, row 2"
    (tmp_path / f"broken.{ending}").write_bytes(b'{"a": \xff' if ending != "csv" else b"a,b\n1,2,3\n")
    with pytest.raises(ValueError, match=f"broken.{ending}"):
        load_records(str(tmp_path / f"broken.{ending}"))


def test_json_lines_that_are_called_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [record.row["text"] for record in load_records(str(path)).train] == ["one", "two"]
    path.write_text('[{"text": "one"}, 2]')
    with pytest.raises(ValueError, match="row 2 is no object"):
        load_records(str(path))


def test_long_cells_of_csv(tmp_path):
    write_rows(tmp_path / "a.csv", [{"text": "long " * 100_000}])
    assert len(load_records(str(tmp_path / "a.csv")).train[0].row["text"]) == 500_000


def test_a_folder_with_splits(tmp_path):
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation.jsonl", "test.jsonl"):
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("About the data.")
    found = load_records(str(tmp_path))
    assert len(found.train) == 6 and len(found.held_out) == 3
    assert load_records(str(tmp_path), eval_split="test").held_out[0].where.endswith("test.jsonl, row 1")
    found = load_records(str(tmp_path), split="test")
    assert found.train[0].where.endswith("test.jsonl, row 1") and len(found.held_out) == 3
    with pytest.raises(ValueError, match=r"no split 'dev', only \['test', 'train', 'validation'\]"):
        load_records(str(tmp_path), eval_split="dev")


def test_a_folder_of_files(tmp_path):
    write(tmp_path / "a.jsonl"), write(tmp_path / "b.csv")
    for name in ("notes.md", "more.rst", "README.md", "LICENSE.txt"):
        (tmp_path / name).write_text(name)
    found = load_records(str(tmp_path))
    assert found.held_out is None
    assert [record.row["text"] for record in found.train if record.raw] == ["more.rst", "notes.md"]
    assert len(found.train) == 8
    with pytest.raises(ValueError, match="split='train': data=.* has no splits"):
        load_records(str(tmp_path), split="train")


def test_what_datasets_saved(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    assert [record.row for record in load_records(str(tmp_path / "one")).train] == ROWS
    datasets.DatasetDict(train=data, validation=data.select([0])).save_to_disk(tmp_path / "two")
    found = load_records(str(tmp_path / "two"))
    assert [record.row for record in found.train] == ROWS and len(found.held_out) == 1


def test_a_hub_id(monkeypatch):
    """The hub itself can't be had in tests."""
    whole = datasets.DatasetDict(train_sft=datasets.Dataset.from_list(ROWS), test_sft=datasets.Dataset.from_list(ROWS))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: whole)
    found = load_records("owner/name", split="train_sft", eval_split="test_sft")
    assert [record.row for record in found.train] == ROWS
    assert found.held_out[0].where == "owner/name, test_sft, row 1"
    with pytest.raises(ValueError, match=r"no split 'train', only \['test_sft', 'train_sft'\]"):
        load_records("owner/name")


def test_a_share_is_held_out():
    train, held_out = hold_out(range(20), 0.1)
    assert sorted(train + held_out) == list(range(20)) and len(held_out) == 2
    assert hold_out("ab", 0.01)[1] and hold_out(range(20), 0.1) == (train, held_out)
    with pytest.raises(ValueError, match="there is 1 row, and one has to be held out"):
        hold_out("a", 0.1)
