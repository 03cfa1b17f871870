# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A run keeps the settings that it was started with, and goes on after a kill."""

from __future__ import annotations

import json
import os

import pytest

from peft_ext import files
from peft_ext.rows import write_rows
from peft_ext.runs import RunFolder, StagedRun, differences, digest, open_file


def test_a_finished_stage_is_skipped_and_an_unfinished_one_goes_on(tmp_path):
    run = StagedRun(tmp_path / "run")
    write_rows(run.path("in.jsonl"), [{"id": 1}])
    assert run.begin("stage", {"a": 1}, ["in.jsonl"])
    assert run.begin("stage", {"a": 1}, ["in.jsonl"])
    write_rows(run.path("out.jsonl"), [{"id": 2}])
    run.finish("stage", ["out.jsonl"], {"rows": 1})
    assert not StagedRun(tmp_path / "run").begin("stage", {"a": 1}, ["in.jsonl"])
    assert run.manifest("stage")["counts"] == {"rows": 1}
    run.path("out.jsonl").unlink()
    assert run.begin("stage", {"a": 1}, ["in.jsonl"]), "what it wrote is gone"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"done": "true"}, "done is 'true'; it must be true or false"),
        ({"inputs": {"in.jsonl": 3}}, r"inputs\['in.jsonl'\] is 3"),
        ({"seconds": -1}, "seconds is -1"),
        ({"config": None}, "config is None"),
        ({"format": 2}, "format is 2.*later version"),
        ({"format": None}, "format is None.*new run directory"),
    ],
)
def test_a_manifest_that_is_damaged(change, message, tmp_path):
    run = StagedRun(tmp_path)
    run.begin("stage", {"a": 1})
    path = tmp_path / "manifest" / "stage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=f"manifest/stage.json'.*{message}"):
        run.begin("stage", {"a": 1})
    path.write_bytes(b"\xff{}")
    with pytest.raises(ValueError, match="stage.json' is damaged"):
        run.begin("stage", {"a": 1})


def test_the_time_before_an_interruption_counts(tmp_path):
    run = StagedRun(tmp_path)
    for seconds in (40, 2):  # two parts that a kill ended
        assert run.begin("a", {"x": 1})
        (tmp_path / "a.jsonl").write_text("{}\n")
        begun = (tmp_path / "manifest" / "a.json").stat().st_mtime
        os.utime(tmp_path / "a.jsonl", (begun + seconds, begun + seconds))
    assert run.begin("a", {"x": 1})
    run.finish("a", ["a.jsonl"], seconds=5.0)
    assert run.manifest("a")["seconds"] == pytest.approx(47, abs=0.1)
    (tmp_path / "a.jsonl").unlink()
    assert run.begin("a", {"x": 1})
    assert run.manifest("a")["seconds"] == 0, "it starts over"


def test_another_config_is_refused_with_what_differs(tmp_path):
    run = StagedRun(tmp_path / "run")
    run.begin("stage", {"a": 1, "deep": {"b": 2.5, "gone": True}})
    (tmp_path / "run-2").mkdir()
    with pytest.raises(ValueError) as error:
        run.begin("stage", {"a": 1, "deep": {"b": 3, "new": "x"}})
    message = str(error.value)
    assert "stage.deep.b: was 2.5, is 3" in message
    assert "stage.deep.gone: was true, is not set" in message and 'stage.deep.new: was not set, is "x"' in message
    assert "stage.a" not in message and "run-3" in message


def test_changed_inputs_are_refused(tmp_path):
    run = StagedRun(tmp_path)
    write_rows(run.path("in.jsonl"), [{"id": 1}])
    run.begin("stage", {}, ["in.jsonl"])
    write_rows(run.path("in.jsonl"), [{"id": 2}])
    with pytest.raises(ValueError, match="in.jsonl changed since"):
        run.begin("stage", {}, ["in.jsonl"])
    with pytest.raises(FileNotFoundError, match="missing.jsonl"):
        run.begin("other", {}, ["missing.jsonl"])


def test_a_folder_s_digest_depends_on_names_and_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = digest(tmp_path / "a")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    second = digest(tmp_path / "a")
    (tmp_path / "a" / "y").write_text("2")
    assert len({first, second, digest(tmp_path / "a")}) == 3


def test_differences_of_lists_and_types():
    assert differences({"a": [1, 2]}, {"a": [1, 2]}) == []
    assert differences({"a": [1, 2]}, {"a": [2, 1]}) == [("a", "[1, 2]", "[2, 1]")]
    assert differences({"a": {"b": 1}}, {"a": None}) == [("a", '{"b": 1}', "null")]


def test_a_stage_alone_keeps_its_config_beside_its_file(tmp_path):
    path = open_file(str(tmp_path / "q.jsonl"), {"count": 1})
    assert open_file(str(path), {"count": 1}) == path
    with pytest.raises(ValueError, match="count: was 1, is 2"):
        open_file(str(path), {"count": 2})
    with pytest.raises(ValueError, match="output_file is missing"):
        open_file(None, {})
    assert json.loads((tmp_path / "q.config.json").read_text()) == {"count": 1}


@pytest.mark.parametrize("settings_file", ["config.yaml", "settings.json"])
def test_a_run_s_folder_goes_on_with_the_same_settings_alone(tmp_path, settings_file):
    settings = {"rate": 0.5, "path": tmp_path, "deep": {"a": [1, 2]}}
    run = RunFolder(tmp_path / "run", settings_file)
    assert run.check(settings) is None and not run.folder.exists(), "a check writes nothing"
    assert run.open(settings) is None
    (run.folder / ".base-partial-x").mkdir()
    assert RunFolder(tmp_path / "run", settings_file).open(settings) is None
    assert not (run.folder / ".base-partial-x").exists(), "what a kill left is swept"
    with pytest.raises(FileExistsError, match=r"output_dir=.*run'.*rate: was 0.5, is 1[;)].*another folder.*run-2"):
        run.check({**settings, "rate": 1, "deep": {"a": [2, 1]}})
    run.finish({"loss": 0.25})
    (run.folder / "checkpoint-3").mkdir()
    assert RunFolder(tmp_path / "run", settings_file).open(settings) == {"loss": 0.25}
    assert not (run.folder / "checkpoint-3").exists(), "a kill behind the result left it"


def test_settings_under_which_nothing_was_made_may_change(tmp_path):
    run = RunFolder(tmp_path)
    (tmp_path / ".config.yaml-partial-x").mkdir()
    assert run.open({"data": "mistyped"}) is None, "what a kill left of writing the settings is none"
    assert run.open({"data": "right"}, begun=False) is None
    assert run.settings == {"data": "right"} and [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    with pytest.raises(FileExistsError, match="data: "):
        run.open({"data": "other"})


def test_settings_by_a_name_of_before_are_the_same_settings(tmp_path):
    StagedRun(tmp_path).begin("stage", {"old": [1]})
    run = StagedRun(tmp_path, {"old": "new"})
    assert run.begin("stage", {"new": [1]})
    path = open_file(tmp_path / "q.jsonl", {"old": 1})
    assert open_file(path, {"new": 1}, renamed={"old": "new"}) == path
    StagedRun(tmp_path / "later").begin("stage", {"old": [1]})
    run = StagedRun(tmp_path / "later", {"old": "new"})
    with pytest.raises(ValueError, match=r"stage.new: was \[1\], is \[2\]"):
        run.begin("stage", {"new": [2]})
    with pytest.raises(ValueError, match="new: was 1, is 2"):
        open_file(path, {"new": 2}, renamed={"old": "new"})


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="output_dir=.* is not empty and holds no run of ours"):
        RunFolder(tmp_path).check({})
    with pytest.raises(FileExistsError, match="is a file"):
        RunFolder(tmp_path / "notes.txt").check({})
    with pytest.raises(ValueError, match="run_dir is missing: pass --run_dir"):
        RunFolder(None, argument="run_dir")
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="config.yaml' is damaged"):
        RunFolder(tmp_path).check({})


def test_what_a_finished_stage_wrote_has_changed(tmp_path):
    run = StagedRun(tmp_path / "run")
    assert run.begin("first", {"a": 1})
    write_rows(run.path("out.jsonl"), [{"id": number} for number in range(100)])
    run.path("model").mkdir()
    (run.path("model") / "weights").write_text("x")
    run.finish("first", ["out.jsonl", "model"])
    assert not run.begin("first", {"a": 1})
    lines = run.path("out.jsonl").read_text().splitlines(True)
    run.path("out.jsonl").write_text("".join(lines[:10]))
    for again in (run, StagedRun(tmp_path / "run")):
        with pytest.raises(
            ValueError, match="stage 'first' .* is done, but what it wrote has changed since: out.jsonl. "
        ):
            again.begin("first", {"a": 1})
    run.path("out.jsonl").write_text("".join(lines))
    (run.path("model") / "weights").write_text("y")
    with pytest.raises(ValueError, match="has changed since: model. .*or delete it, and the stage makes it again"):
        run.begin("first", {"a": 1})
    (run.path("model") / "weights").unlink()
    run.path("model").rmdir()
    assert run.begin("first", {"a": 1}), "it is gone, so it is made again"


def test_two_processes_on_one_run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.open({"a": 1})
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        files._HOLDS.clear()  # as in a process that wasn't forked off
        try:
            RunFolder(tmp_path / "run").check({"a": 1})
        except BlockingIOError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(process, 0)
    assert "another process works in it" in os.read(reader, 1000).decode()
    run.finish({"figure": 1})
    assert RunFolder(tmp_path / "run").check({"a": 1}) == {"figure": 1}
