# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Rows survive kills, full disks, and whatever characters JSON allows."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from peft_ext.file_formats import text, whole
from peft_ext.rows import (
    CHECK,
    RowFile,
    append_rows,
    keep_rows,
    read_grown_rows,
    read_json_lines,
    read_lines,
    read_rows,
    write_rows,
)


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


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [lines[0], lines[1].replace(b"one", b"own"), *lines[2:]],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines[:2], lines[1], *lines[2:]],
    ],
    ids=["edited", "removed", "swapped", "doubled"],
)
def test_rows_that_are_not_what_was_written(damage, tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"id": 0, "text": "none"}, {"id": 1, "text": "one", "number": 0.1}], checked=True)
    append_rows(path, ({"id": number, 3: "x" * 9000} for number in (2, 3)), checked=True)
    rows = read_json_lines(path)
    assert rows[:2] == [{"id": 0, "text": "none"}, {"id": 1, "text": "one", "number": 0.1}]
    assert rows == read_grown_rows(path, key="id") == list(RowFile(path).rows.values()) and CHECK in path.read_text()
    path.write_bytes(b"\n".join(damage(path.read_bytes().split(b"\n"))))
    for read in (read_rows, read_grown_rows, RowFile):
        with pytest.raises(ValueError, match=r"rows.jsonl, line [1-3] isn't what was written there"):
            read(path)
    unchecked = [{name: value for name, value in json.loads(line).items() if name != CHECK} for line in open(path)]
    write_rows(path, unchecked)
    assert read_rows(path) == unchecked  # an edit that is meant


def test_rows_of_before_get_no_check_and_later_ones_do(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n')
    RowFile(path).append([{"id": 2}])
    file = RowFile(path)
    assert list(file.rows.values()) == [{"id": 1}, {"id": 2}] and path.read_text().count(CHECK) == 1
    file.sort(key=lambda row: row["id"])
    assert path.read_text() == '{"id": 1}\n{"id": 2}\n'


def test_blank_lines_are_no_rows_that_are_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    for count, kept in (
        (0, b""),
        (1, b'{"a": 1}\n'),
        (2, b'{"a": 1}\n\n{"a": 2}\n'),
        (None, b'{"a": 1}\n\n{"a": 2}\n\n'),
    ):
        path.write_bytes(b'{"a": 1}\n\n{"a": 2}\n\n{"a"')
        keep_rows(path, count)
        assert path.read_bytes() == kept


def test_fields_of_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1, "query": "a"}\n{"id": 2, "query": 3}\n')
    fields = {"id": whole(), "query": text()}
    for read in (lambda: read_rows(path, fields=fields), lambda: RowFile(path, fields)):
        with pytest.raises(ValueError, match="rows.jsonl, row 2: query is 3; it must be a text"):
            read()
    path.write_text("[" * 10_000 + "\n")
    with pytest.raises(ValueError, match="rows.jsonl, line 1 is nested too deeply"):
        read_rows(path)
    path.write_text('{"id": []}\n{"id": 2}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: id is \[\]"):
        RowFile(path)


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


# str.splitlines() takes all of these for ends of lines; JSON only a line feed, and that escaped
ENDS = "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=strategies.text(strategies.characters(exclude_categories=["Cs"]) | strategies.sampled_from(ENDS + "\r\n")))
def test_any_text_comes_back(tmp_path, text):
    for name, write in (("rows.jsonl", write_rows), ("rows.csv", write_rows), ("grown.jsonl", append_rows)):
        path = tmp_path / name
        path.unlink(missing_ok=True)
        if name.endswith("csv") and "\x00" in text:
            continue  # Python 3.10's csv can't read it
        write(path, [{"text": text, "other": "x"}, {"text": "second", "other": "y"}])
        assert read_rows(path) == [{"text": text, "other": "x"}, {"text": "second", "other": "y"}]
    assert read_grown_rows(tmp_path / "grown.jsonl", cut=True) == read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_files_of_other_editors(tmp_path, name):
    line = '{"text": "a b"}\r\n\r\n{"text": "c"}' if name.endswith("jsonl") else "text\r\na b\r\nc\r\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + line.encode())
    assert read_rows(tmp_path / name) == [{"text": "a b"}, {"text": "c"}]


def test_what_is_no_file_of_rows(tmp_path):
    for name, content, message in (
        ("a.txt", "x", "must end in .jsonl, .json, .csv or .parquet"),
        ("a.jsonl", "\n", "has no rows"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl, line 2 is no object"),
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', "a.jsonl, line 3 is no JSON"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="missing.csv"):
        read_rows(tmp_path / "missing.csv")
    (tmp_path / "a.jsonl").write_text("")
    assert read_rows(tmp_path / "a.jsonl", may_be_empty=True) == read_grown_rows(tmp_path / "none.jsonl") == []


def test_rows_that_several_processes_append(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": "\u2028"}\n{"a"', encoding="utf-8")
    assert read_grown_rows(path, skip_damaged=True) == [{"a": 1}, {"a": "\u2028"}]
    assert path.read_text(encoding="utf-8").endswith('{"a"'), "nobody else's line is cut"


def test_the_first_rows_are_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"a": 1}, {"a": "\u2028"}, {"a": 3}])
    with path.open("ab") as file:
        file.write(b'{"a": 4')
    keep_rows(path, None)
    assert len(read_rows(path)) == 3
    keep_rows(path, 2)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == [
        {"a": 1},
        {"a": "\u2028"},
    ]


def test_lines_of_a_text_file(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes(f"\ufefffirst\u2028line\r\n\n second{ENDS}\n \nlast".encode())
    assert read_lines(path) == ["first\u2028line", f" second{ENDS}", "last"]
    path.write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match="lines.txt, line 2 is not UTF-8"):
        read_lines(path)
    with pytest.raises(FileNotFoundError, match="^prompts='none.txt': there is no such file"):
        read_lines("none.txt", "prompts")


def test_a_torn_end_is_passed_over_where_it_may_be(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}\n{"a": 2}')
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]
    assert read_json_lines(path, may_be_torn=True) == [{"a": 1}]
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        read_json_lines(path, may_be_torn=True)
