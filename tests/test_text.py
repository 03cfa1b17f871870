# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Every way to name a text, and every way to get it wrong."""

from __future__ import annotations

import json

import pytest

from peft_ext.models import load_tokenizer
from peft_ext.text import PYTHON_DOCS, load_text, token_blocks
from tests.tiny.folders import save_tiny_model


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(save_tiny_model(tmp_path_factory.mktemp("model"))))


def test_python_docs_are_split_by_topic():
    first, second = load_text(PYTHON_DOCS), load_text(PYTHON_DOCS)
    assert first == second
    assert not set(first.train) & set(first.held_out)
    assert 0.05 < len(first.held_out) / (len(first.train) + len(first.held_out)) < 0.15
    assert load_text(PYTHON_DOCS, seed=1).held_out != first.held_out


def test_files_and_folders(tmp_path):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    splits = load_text(str(tmp_path / "a.jsonl"), held_out=0.2)
    assert (len(splits.train), len(splits.held_out)) == (16, 4)
    (tmp_path / "b.txt").write_text("one line\n" * 100)
    splits = load_text(str(tmp_path / "b.txt"))
    assert len(splits.train[0]) + len(splits.held_out[0]) == 900
    assert len(load_text(str(tmp_path)).train) == 19  # both files


def test_a_folder_with_splits_is_used_as_it_is(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(f"the {name} text")
    assert load_text(str(tmp_path)) == (["the train text"], ["the valid text"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"text": "a"}\n{"text": ', "line 2 is no JSON"),
        ('{"body": "a"}', r"no field 'text'; pass text_field, one of \['body'\]"),
        ('{"text": 3}', "is a int, not a string"),
        ("[1]", "line 1 is no object"),
    ],
)
def test_bad_json_lines(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_text(str(path))


def test_documents_may_hold_any_character(tmp_path):
    text = "a\u2028b\u2029c\u0085d"
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{text}{i}"}, ensure_ascii=False) + "\r\n" for i in range(20)),
        encoding="utf-8-sig",
    )
    splits = load_text(str(tmp_path / "a.jsonl"))
    assert sorted(splits.train + splits.held_out) == sorted(f"{text}{i}" for i in range(20))
    (tmp_path / "b.txt").write_text(text * 20, encoding="utf-8-sig")
    assert "".join(documents[0] for documents in load_text(str(tmp_path / "b.txt"))) == text * 20


def test_missing_and_unreadable(tmp_path):
    for name in ("missing.txt", "missing.jsonl", "some/deep/path"):
        with pytest.raises(FileNotFoundError, match=name):
            load_text(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="holds no .txt, .md, .rst, .jsonl, .json, .csv or .parquet file"):
        load_text(str(tmp_path))
    (tmp_path / "x.xml").write_text("<a/>")
    with pytest.raises(ValueError, match="only .txt, .md, .rst, .jsonl, .json, .csv and .parquet"):
        load_text(str(tmp_path / "x.xml"))
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_text(str(tmp_path / "x.txt"))
    with pytest.raises(ValueError, match="held_out=1.5"):
        load_text(PYTHON_DOCS, held_out=1.5)


def test_blocks_hold_the_text_in_order(tokenizer):
    texts = ["first document", "second one"]
    blocks = token_blocks(tokenizer, texts, 4)
    joined = tokenizer.decode(blocks.flatten())
    assert ("first document" + tokenizer.eos_token + "second one").startswith(joined)
    assert blocks.shape[1] == 4


def test_text_shorter_than_a_block(tokenizer):
    with pytest.raises(ValueError, match=r"the held-out text has \d+ tokens, less than one block of block_size=256"):
        token_blocks(tokenizer, ["short"], 256, name="held-out text")
    with pytest.raises(ValueError, match="block_size=1"):
        token_blocks(tokenizer, ["short"], 1)


def test_a_hub_data_set(monkeypatch):
    """What load_dataset returns is a DatasetDict; the hub itself can't be had in tests."""
    import datasets

    def splits(**texts):
        return datasets.DatasetDict(
            {
                name: datasets.Dataset.from_dict({"text": lines, "label": [0] * len(lines)})
                for name, lines in texts.items()
            }
        )

    asked, whole = [], splits(train=["one", "  ", "two"], validation=["three"], test=["four"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or whole)
    found = load_text("owner/name", data_config="small")
    assert asked == [("owner/name", "small")]
    assert found.train == ["one", "two"] and found.held_out == ["three"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: splits(train=[f"text {i}" for i in range(20)]))
    found = load_text("owner/name", held_out=0.1)
    assert len(found.held_out) == 2 and not set(found.train) & set(found.held_out)
    with pytest.raises(ValueError, match="content"):
        load_text("owner/name", text_field="content")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: splits(test=["four"]))
    with pytest.raises(ValueError, match="no split 'train', only .'test'"):
        load_text("owner/name")
