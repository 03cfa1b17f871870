# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext classify` on a tiny model: files in, files out, and errors that are one line."""

from __future__ import annotations

import json

import pytest

from generation_ext.in_context.classify import read_task
from generation_ext.in_context.scoring import LabelScorer
from generation_ext.in_context.self_generated import SelfGeneratedICL
from generation_ext.prompts import CB, SST2
from peft_ext import cli
from tests.tiny.byte_models import model
from tests.tiny.tokenizers import tokenizer


ROWS = [
    {"text": "good, fun", "label": "positive"},
    {"text": "a bore", "label": "negative"},
    {"text": "it", "label": None},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in_context")
    model("llama").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    model("t5").save_pretrained(folder / "t5")
    tokenizer(end=True).save_pretrained(folder / "t5")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "data.csv").write_text('kind,review\npositive,"good, fun"\nnegative,a bore\n')
    return folder


def call(folder, *arguments, name="model", data="data.jsonl"):
    output = folder / "out.jsonl"
    named = {"task": "sst2", "model": folder / name, "data": folder / data, "output": output}
    flags = [part for flag, value in named.items() for part in (f"--{flag}", value)]
    status = cli.main(["classify", *map(str, [*flags, *arguments])])
    if status:
        raise SystemExit(status)
    return [json.loads(line) for line in output.read_text().splitlines()]


def expected(scores):
    return [pytest.approx(dict(zip(scores.labels, row)), abs=1e-5) for row in scores.probabilities().tolist()]


def test_zero_shot(folder, capsys):
    found = call(folder, "--method", "zero-shot")
    scores = LabelScorer(model("llama"), tokenizer(), SST2, normalization="mean").score([row["text"] for row in ROWS])
    assert [row["prediction"] for row in found] == scores.predictions()
    assert [row["probabilities"] for row in found] == expected(scores)
    correct = sum(a == row["label"] for a, row in zip(scores.predictions(), ROWS))
    assert f"accuracy: {50 * correct:.1f} % of 2 labelled inputs" in capsys.readouterr().out


def test_encoder_decoder_and_csv(folder):
    columns = ["--fields", "text=review", "--label-column", "kind"]
    found = call(folder, "--method", "zero-shot", *columns, name="t5", data="data.csv")
    scores = LabelScorer(model("t5"), tokenizer(end=True), SST2, normalization="mean").score(["good, fun", "a bore"])
    assert [row["probabilities"] for row in found] == expected(scores)


@pytest.mark.parametrize("name", ["strange.jsonl", "strange.csv"])
def test_inputs_may_hold_any_character(folder, name):
    """As a sentence of RTE's test set does."""
    text = "in \u0085the city\u2028 of \u2029 X"
    if name.endswith("jsonl"):
        content = json.dumps({"text": text}, ensure_ascii=False) + "\r\n" + '{"text": "b"}'
    else:
        content = f"text\r\n{text}\r\nb\r\n"
    (folder / name).write_text(content, encoding="utf-8-sig", newline="")
    found = call(folder, "--method", "zero-shot", data=name)
    scores = LabelScorer(model("llama"), tokenizer(), SST2, normalization="mean").score([text, "b"])
    assert [row["probabilities"] for row in found] == expected(scores)


def test_demonstrations(folder):
    rows = folder / "labelled.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2] * 3))
    found = call(folder, "--method", "demonstrations", "--demonstrations", rows, "--shots", 6, "--calibrate")
    assert sum(found[0]["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    zero_shot = call(folder, "--method", "zero-shot", "--calibrate")
    assert found != zero_shot


@pytest.mark.filterwarnings("ignore:.*fewer than")
def test_sg_icl(folder):
    pools = folder / "pools.jsonl"
    options = ["--shots", 3, "--samples", 2, "--pool-file", pools, "--limit", 2, "--overflow", "drop_then_truncate"]
    found = call(folder, *options)
    ours = SelfGeneratedICL(model("llama"), tokenizer(), SST2, shots=3, samples=2, overflow="drop_then_truncate")
    assert [row["probabilities"] for row in found] == expected(ours.score([row["text"] for row in ROWS[:2]]))
    before = pools.read_text()
    assert call(folder, *options) == found and pools.read_text() == before
    call(folder, *options, "--self-consistent", "--balanced")
    assert pools.read_text() == before


@pytest.mark.filterwarnings("ignore:.*fewer than")
def test_presets(folder):
    options = ["--preset", "recommended", "--shots", 3, "--samples", 2]
    found = call(folder, *options, "--overflow", "drop_then_truncate")
    given = {"shots": 3, "samples": 2, "overflow": "drop_then_truncate"}
    texts = [row["text"] for row in ROWS]
    ours = SelfGeneratedICL(model("llama"), tokenizer(), SST2, preset="recommended", **given)
    assert [row["probabilities"] for row in found] == expected(ours.score(texts))
    flags = ["--shared", "--pool_inputs", 2, "--draws", 3, "--calibrate", "--calibration", "batch", "--strength", 0.7]
    found = call(folder, *options[2:], *flags, "--overflow", "drop_then_truncate")
    flagged = {"shared": True, "pool_inputs": 2, "draws": 3, "calibrate": "batch", "strength": 0.7}
    ours = SelfGeneratedICL(model("llama"), tokenizer(), SST2, **given, **flagged)
    assert [row["probabilities"] for row in found] == expected(ours.score(texts))


def test_task_of_a_file(folder):
    path = folder / "topic.json"
    path.write_text(json.dumps({"template": "{title} :", "labels": {"a": " sports", "b": " art"}}))
    assert read_task(str(path)).fields == ("title",) and read_task(str(path)).name == "topic"
    assert read_task("cb") is CB
    path.write_text(json.dumps({"template": "{title} :", "labels": {"a": " x", "b": " y"}, "colour": 1}))
    with pytest.raises(ValueError, match="topic.json: .*colour"):
        read_task(str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nope"], "--task 'nope' is unknown; choose one of ['sst2', 'sst5', 'rte', 'cb']"),
        (["--task", "rte"], "row 1 has no 'premise', only ['text', 'label']; say with --fields"),
        (["--fields", "text"], "--fields 'text': write FIELD=COLUMN"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--data", "empty.jsonl"], "has no rows"),
        (["--data", "bad.jsonl"], "bad.jsonl, line 2 is no JSON"),
        (["--data", "data.txt"], "must end in .jsonl"),
        (["--output", "no/where.jsonl"], "does not exist"),
        (["--model", "./nowhere"], "there is no such folder"),
        (["--method", "demonstrations"], "--demonstrations FILE goes with"),
        (["--method", "demonstrations", "--demonstrations", "data.jsonl"], "has 3 rows, fewer than --shots 8"),
        (["--method", "demonstrations", "--demonstrations", "data.jsonl", "--shots", "3"], "label=None is none of"),
        (["--shots", "0"], "shots=0 must be a positive"),
        (["--preset", "best", "--model", "./nowhere"], "preset='best' is unknown"),  # before a model is looked for
        (["--keep", "2", "--model", "./nowhere"], "keep=2.0 must be above 0 and at most 1"),
        (["--calibration", "batches"], "calibration='batches' is unknown; choose one of content_free, batch"),
        (["--calibration", "batch"], "calibration='batch' goes with --calibrate; pass that too"),
    ],
)
def test_errors_are_one_line(folder, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (folder / "empty.jsonl").write_text("\n")
    (folder / "data.txt").write_text("a")
    with pytest.raises(SystemExit) as exit:
        call(folder, *arguments)
    shown = capsys.readouterr().err
    assert exit.value.code == 2 and message in shown
    assert len([line for line in shown.splitlines() if "error:" in line]) == 1 and "Traceback" not in shown


def test_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["classify", "--help"])
    assert "--self_consistent" in capsys.readouterr().out
