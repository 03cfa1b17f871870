# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What is written is there whole or not at all; links, other formats, other people's files, other processes."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_ext import files
from peft_ext.files import allocate, check_digests, digests, held, scratch, sweep, written_whole


def write(folder: Path, **contents: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def replace(target: Path, **contents: str) -> None:
    with written_whole(target) as new:
        write(new, **contents)


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    return request.param


def test_a_folder_takes_the_place_of_a_folder(tmp_path, way):
    replace(tmp_path / "a", x="1", y="2")
    os.chmod(tmp_path / "a", 0o750)
    replace(tmp_path / "a", x="3")
    assert content(tmp_path) == {"a/x": "3"} and (tmp_path / "a").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("old, new", [("file", "folder"), ("folder", "file")])
def test_another_kind_takes_its_place(tmp_path, way, old, new):
    for kind in (old, new):
        with written_whole(tmp_path / "a") as path:
            write(path, x=kind) if kind == "folder" else path.write_text(kind)
    assert content(tmp_path) == ({"a/x": "folder"} if new == "folder" else {"a": "file"})


@pytest.mark.parametrize("there", [True, False], ids=["its target is there", "its target isn't"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_link_stays_a_link(tmp_path, way, kind, there):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "real")
    for text in ("old", "new")[0 if there else 1 :]:
        with written_whole(tmp_path / "link") as path:
            write(path, x=text) if kind == "folder" else path.write_text(text)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "elsewhere") == ({"real/x": "new"} if kind == "folder" else {"real": "new"})


def test_what_fails_leaves_the_old_version(tmp_path, way):
    replace(tmp_path / "a", x="old")
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "a") as new:
        write(new, x="new")
        raise KeyboardInterrupt
    assert content(tmp_path) == {"a/x": "old"} and os.listdir(tmp_path) == ["a"]


def test_files_of_others_stay_and_older_ones_of_ours_go(tmp_path, way):
    folder = write(tmp_path / "a", config="1", shard="2", notes="mine")
    write(folder / "sub", mine="3", config="4")
    (folder / "link").symlink_to("notes")
    with written_whole(folder, keep=True, stale=lambda name: name in ("shard", "sub/config")) as new:
        write(new, config="5")
        write(new / "sub", weights="6")
    assert content(folder) == {
        "config": "5", "notes": "mine", "link": "mine", "sub/mine": "3", "sub/weights": "6"
    }  # fmt: skip
    assert (folder / "link").is_symlink() and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("keep", [True, False])
def test_a_folder_that_has_to_stay(tmp_path, monkeypatch, keep):
    """The working directory can't change places with another, or the process would stand in one that is gone."""
    folder = write(tmp_path / "a", config="1", notes="mine")
    write(folder / "sub", old="2")
    monkeypatch.chdir(folder)
    inode = folder.stat().st_ino
    with written_whole(Path("."), keep=keep) as new:
        write(new, config="3")
        write(new / "sub", new="4")
    kept = {"notes": "mine", "sub/old": "2"} if keep else {}
    assert content(folder) == {"config": "3", "sub/new": "4", **kept} and folder.stat().st_ino == inode
    assert sorted(os.listdir(".")) == sorted({*(name.partition("/")[0] for name in kept), "config", "sub"})


def test_a_mount_point_is_filled_in_place(tmp_path, monkeypatch):
    folder = write(tmp_path / "a", config="1")

    def busy(*args):
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(files, "_exchanged", busy)
    replace(folder, config="2", more="3")
    assert content(tmp_path) == {"a/config": "2", "a/more": "3"}


def forked(work: Callable[[], None]) -> int:
    """Run something in a process of its own; returns its number."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    return process


def killed(target: Path, step: str, exchange: bool = True) -> None:
    """Replace a folder, and be killed at a step of it."""

    def work() -> None:
        def kill(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)

        if not exchange:
            files._exchanged = lambda one, other: False
        if step == "between":
            own, done = os.rename, []
            os.rename = lambda one, other: kill() if done else done.append(own(one, other))
        if step == "after":
            files.shutil.rmtree = kill
        with written_whole(target) as new:
            write(new, x="new")
            if step == "while written":
                kill()

    _, status = os.waitpid(forked(work), 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


@pytest.mark.parametrize(
    "step, exchange, left",
    [
        ("while written", True, "old"),
        ("after", True, "new"),
        ("between", False, "old"),
        ("after", False, "new"),
    ],
)
def test_a_kill_leaves_one_version_and_is_swept(tmp_path, step, exchange, left):
    target = tmp_path / "a"
    replace(target, x="old")
    killed(target, step, exchange)
    assert len(os.listdir(tmp_path)) == 2 - (step == "between"), "the partial folder is there"
    sweep(tmp_path)
    assert content(tmp_path) == {"a/x": left} and os.listdir(tmp_path) == ["a"]
    replace(target, x="newer")
    assert content(tmp_path) == {"a/x": "newer"}


def test_the_next_write_sweeps_what_a_kill_left_of_the_same_file(tmp_path):
    killed(tmp_path / "a", "while written")
    left = os.listdir(tmp_path)
    assert len(left) == 1 and left[0].startswith(".a-partial-")
    with written_whole(tmp_path / "b") as path:
        path.write_text("")
    assert set(os.listdir(tmp_path)) == {left[0], "b"}
    replace(tmp_path / "a", x="1")
    assert set(os.listdir(tmp_path)) == {"a", "b"}


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    write(tmp_path / "run")
    (goes_on, go_on), (ready, is_ready) = os.pipe(), os.pipe()

    def work() -> None:
        with written_whole(tmp_path / "a") as new, held(tmp_path / "run"):
            new.mkdir()
            os.write(is_ready, b"x")
            os.read(goes_on, 1)
            (new / "x").write_text("living")

    living = forked(work)
    os.read(ready, 1)
    sweep(tmp_path)
    replace(tmp_path / "a", x="ours")
    with pytest.raises(BlockingIOError, match="output_dir='.*run'.*another process works in it"):
        with held(tmp_path / "run", "output_dir"):
            pass
    os.write(go_on, b"x")
    os.waitpid(living, 0)
    assert content(tmp_path / "a") == {"x": "living"}
    with held(tmp_path / "run"), held(tmp_path / "run") as again:
        assert again
    with scratch("work", tmp_path) as folder:
        assert folder.is_dir()
    assert sorted(os.listdir(tmp_path)) == ["a", "run"]


def test_files_that_belong_together(tmp_path):
    folder = write(tmp_path / "a", weights="1")
    write(folder / "sub", more="2")
    stored = digests(folder)
    assert sorted(stored) == ["sub/more", "weights"]
    check_digests(folder, stored, "config.json")
    check_digests(folder, None, "config.json")
    (folder / "sub" / "more").write_text("3")
    with pytest.raises(ValueError, match="sub/more' isn't the file that was saved with config.json"):
        check_digests(folder, stored, "config.json")
    (folder / "sub" / "more").unlink()
    with pytest.raises(ValueError, match="sub/more' is missing"):
        check_digests(folder, stored, "config.json")
    with pytest.raises(ValueError, match="outside the folder"):
        check_digests(folder, {"../a/weights": "x"}, "config.json")
    with pytest.raises(ValueError, match="files is 3"):
        check_digests(folder, 3, "config.json")


def test_a_full_disk_is_noticed_before_a_file_is_mapped(tmp_path, monkeypatch):
    allocate(tmp_path / "a", 5000)
    assert (tmp_path / "a").read_bytes() == bytes(5000) and (tmp_path / "a").stat().st_blocks * 512 >= 5000

    def full(descriptor, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left on device: '.*b' needs 5,000 bytes") as raised:
        allocate(tmp_path / "b", 5000)
    assert raised.value.errno == errno.ENOSPC and not (tmp_path / "b").exists()
    monkeypatch.delattr(os, "posix_fallocate")
    allocate(tmp_path / "c", 5000)
    assert (tmp_path / "c").stat().st_size == 5000


def test_a_link_to_nowhere(tmp_path):
    (tmp_path / "a.json").symlink_to(tmp_path / "gone" / "b.json")
    with pytest.raises(FileNotFoundError, match="a.json' is a link to '.*gone/b.json', whose folder does not exist"):
        files.write_json(tmp_path / "a.json", {})
