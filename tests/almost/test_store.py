# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Rows survive kills and full disks; a run keeps one config."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal

import pytest

from trl_ext.almost.store import RowFile, Run, differences, digest, open_alone, read_rows, write_rows


def test_rows_come_back_once_each(tmp_path):
    path = tmp_path / "rows.jsonl"
    file = RowFile(path)
    assert file.append([{"id": 1, "text": "ä\n"}, {"id": "b"}]) == 2
    assert file.append([{"id": 1, "text": "other"}, {"id": 3}]) == 1
    assert list(RowFile(path).rows.values()) == [{"id": 1, "text": "ä\n"}, {"id": "b"}, {"id": 3}]
    assert read_rows(path) == list(RowFile(path).rows.values())


@pytest.mark.parametrize("torn", ['{"id": 2, "te', '{"id": 2}', "\x00\x00", '{"text": 1}\n', "no json\n"])
def test_a_damaged_last_line_is_cut_off_and_said(tmp_path, torn, caplog):
    path = tmp_path / "rows.jsonl"
    RowFile(path).append([{"id": 1}])
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    with caplog.at_level(logging.WARNING):
        file = RowFile(path)
    assert list(file.rows) == [1] and path.read_bytes() == whole
    assert "rows.jsonl" in caplog.text and torn.strip()[:5].replace("\x00", "") in caplog.text
    file.append([{"id": 2, "text": "again"}])
    assert read_rows(path) == [{"id": 1}, {"id": 2, "text": "again"}]


def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\nrubbish\n{"id": 3}\n')
    with pytest.raises(ValueError, match="rows.jsonl, line 2"):
        RowFile(path)
    path.write_text('{"id": 1}\n{"id": 1}\n')
    with pytest.raises(ValueError, match="line 2.*id 1 occurs twice"):
        RowFile(path)
    path.write_text('{"id": 1}\n{"id"')
    with pytest.raises(ValueError, match="line 2"):
        read_rows(path)  # of a stage that says it is done


def test_a_full_disk_keeps_what_was_there(tmp_path):
    path = tmp_path / "rows.jsonl"
    file = RowFile(path)
    file.append([{"id": 0, "text": "x" * 100}])
    before, size = path.read_bytes(), path.stat().st_size
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, limits[1]))
    try:
        with pytest.raises(OSError, match="2 new rows of .*rows.jsonl.* could not be written. The 1 rows .* kept"):
            file.append([{"id": 1, "text": "y" * 100}, {"id": 2}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and 1 not in file
    assert file.append([{"id": 1}]) == 1 and len(RowFile(path)) == 2


def test_order_does_not_depend_on_interruptions(tmp_path):
    path = tmp_path / "rows.jsonl"
    file = RowFile(path)
    file.append([{"id": 3}, {"id": 1}])
    file.append([{"id": 2}])
    file.sort(key=lambda row: row["id"])
    assert [row["id"] for row in read_rows(path)] == [1, 2, 3]
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]


def test_a_finished_stage_is_skipped_and_an_unfinished_one_goes_on(tmp_path):
    run = Run(tmp_path / "run")
    write_rows(run.path("in.jsonl"), [{"id": 1}])
    assert run.begin("stage", {"a": 1}, ["in.jsonl"])
    assert run.begin("stage", {"a": 1}, ["in.jsonl"])
    write_rows(run.path("out.jsonl"), [{"id": 2}])
    run.finish("stage", ["out.jsonl"], {"rows": 1})
    assert not Run(tmp_path / "run").begin("stage", {"a": 1}, ["in.jsonl"])
    assert run.manifest("stage")["counts"] == {"rows": 1}
    run.path("out.jsonl").unlink()
    assert run.begin("stage", {"a": 1}, ["in.jsonl"]), "what it wrote is gone"


def test_the_time_before_an_interruption_counts(tmp_path):
    run = Run(tmp_path)
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
    run = Run(tmp_path / "run")
    run.begin("stage", {"a": 1, "deep": {"b": 2.5, "gone": True}})
    (tmp_path / "run-2").mkdir()
    with pytest.raises(ValueError) as error:
        run.begin("stage", {"a": 1, "deep": {"b": 3, "new": "x"}})
    message = str(error.value)
    assert "stage.deep.b: was 2.5, is 3" in message
    assert "stage.deep.gone: was true, is not set" in message and 'stage.deep.new: was not set, is "x"' in message
    assert "stage.a" not in message and "run-3" in message


def test_changed_inputs_are_refused(tmp_path):
    run = Run(tmp_path)
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
    path = open_alone(str(tmp_path / "q.jsonl"), {"count": 1})
    assert open_alone(str(path), {"count": 1}) == path
    with pytest.raises(ValueError, match="count: was 1, is 2"):
        open_alone(str(path), {"count": 2})
    with pytest.raises(ValueError, match="output_file is missing"):
        open_alone(None, {})
    assert json.loads((tmp_path / "q.config.json").read_text()) == {"count": 1}
