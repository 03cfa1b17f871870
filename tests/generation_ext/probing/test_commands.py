# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext probe` on a tiny model: files in, files out, and errors that are one line."""

from __future__ import annotations

import csv
import json

import pytest


pytest.importorskip("sklearn", reason="PALPClassifier is an estimator of scikit-learn")

from generation_ext.probing import FeatureExtractor, PALPClassifier  # noqa: E402
from peft_ext import cli  # noqa: E402
from tests.tiny.byte_models import model  # noqa: E402
from tests.tiny.tokenizers import tokenizer, tokenizer_for  # noqa: E402


def main(arguments):
    return cli.main(["probe", *arguments])


ROWS = [
    {"text": text, "label": label}
    for label, texts in {"good": ["fine, film", "great fun", "a joy"], "bad": ["a bore", "so poor", "waste"]}.items()
    for text in texts
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probing")
    for name in ("llama", "bert"):
        model(name).save_pretrained(folder / name)
        tokenizer_for(name).save_pretrained(folder / name)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with open(folder / "data.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["review", "kind"], *([row["text"], row["label"]] for row in ROWS)])
    return folder


def train(folder, output, *arguments, name="llama", data="data.jsonl"):
    flags = ["--model", folder / name, "--data", folder / data, "--output_dir", output, *arguments]
    return main(["train", *map(str, flags)])


def predict(folder, classifier, output, *arguments, data="data.jsonl"):
    return main(["predict", *map(str, [classifier, "--data", folder / data, "--output", output, *arguments])])


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_train_and_predict(folder, tmp_path, capsys, name):
    template = ["--template", r"Review: {text}\nSentiment:", "--demonstrations", "per-class"]
    words = ["--label_words", "good=great", "bad=poor"]
    status = train(folder, tmp_path / "palp", *template, *words, "--validation", folder / "data.jsonl", name=name)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "shown for bad:" in printed.out and "% of 6 texts" in printed.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["palp"]
    assert "| accuracy on 6 validation texts |" in (tmp_path / "palp" / "README.md").read_text()
    assert predict(folder, tmp_path / "palp", tmp_path / "out.jsonl") == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    lm, words = model(name), tokenizer_for(name)
    theirs = PALPClassifier(
        lm,
        words,
        template="Review: {text}\nSentiment:",
        demonstrations="per-class",
        label_words={"good": " great", "bad": " poor"},
        random_state=0,
    )
    theirs.fit([row["text"] for row in ROWS], [row["label"] for row in ROWS])
    probabilities = theirs.predict_proba([row["text"] for row in ROWS])
    for row, expected in zip(found, probabilities):
        assert row["probabilities"] == pytest.approx(dict(zip(["bad", "good"], expected)), abs=1e-3)
        assert row["prediction"] == max(row["probabilities"], key=row["probabilities"].get)


def test_csv_and_yaml(folder, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {folder / 'llama'}\nhead: knn\nhead_params: '{{\"n_neighbors\": 1}}'\n")
    columns = ["--fields", "text=review", "--label_column", "kind"]
    status = main(
        ["train", "--config", str(config), "--data", str(folder / "data.csv"), *columns]
        + ["--output_dir", str(tmp_path / "palp")]
    )
    assert status == 0, capsys.readouterr().err
    # columns are remembered, but for the labels'
    assert predict(folder, tmp_path / "palp", tmp_path / "out.csv", *columns[2:], data="data.csv") == 0
    assert "accuracy: 100.0 % of 6" in capsys.readouterr().out
    with open(tmp_path / "out.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == ["prediction", "bad", "good"]
    assert [row["prediction"] for row in found] == [row["label"] for row in ROWS]


def test_goes_on_after_a_kill(folder, tmp_path, monkeypatch, capsys):
    saved = PALPClassifier.save_pretrained
    monkeypatch.setattr(PALPClassifier, "save_pretrained", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train(folder, tmp_path / "palp") == 130  # Ctrl-C
    assert (tmp_path / "palp-features").is_dir()
    monkeypatch.setattr(PALPClassifier, "save_pretrained", saved)
    monkeypatch.setattr(FeatureExtractor, "_fill", lambda *args: pytest.fail("encoded again"))
    assert train(folder, tmp_path / "palp") == 0, capsys.readouterr().err
    assert not (tmp_path / "palp-features").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--template", "none"], "has no slot"),
        (["--head", "tree"], "head='tree' is unknown"),
        (["--head_params", "{"], "is no JSON"),
        (["--head_params", "3"], "must be an object"),
        (["--label_words", "good"], "write CLASS=WORDS"),
        (["--fields", "text=body"], "has no 'body'"),
        (["--fields", "body=text"], "there is no field 'body'"),
        (["--label_column", "class"], "has no 'class'"),
        (["--limit", "0"], "limit=0"),
        (["--validation", "none.jsonl"], "there is no such file"),
        (["--dtype", "int8"], "dtype='int8' is unknown"),
        (["--adapter", "nowhere"], "has no adapter_config.json"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, capsys, arguments, message):
    assert train(folder, tmp_path / "palp", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "palp").exists()


def test_mistakes_of_predict(folder, tmp_path, capsys):
    assert predict(folder, tmp_path, tmp_path / "out.jsonl") == 2
    assert "there is no palp.json" in capsys.readouterr().err
    assert train(folder, tmp_path / "palp") == 0
    assert predict(folder, tmp_path / "palp", tmp_path / "out.txt") == 2
    assert "must end in .jsonl or .csv" in capsys.readouterr().err
    other = model("bert")
    other.save_pretrained(tmp_path / "other")
    tokenizer(end=True).save_pretrained(tmp_path / "other")
    assert predict(folder, tmp_path / "palp", tmp_path / "out.jsonl", "--model", tmp_path / "other") == 2
    assert "was fitted on" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_one_class_alone(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "palp", "--limit", "3") == 2
    assert "error: y has one class alone, ['good']" in capsys.readouterr().err
