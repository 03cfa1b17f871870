# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that are written whole or not at all, whatever ends the process that writes them.

What is written lies beside its target, in a hidden folder that its process holds, until it is complete and on disk
(`fsync`: a power cut must not leave a new name without its content). Then it takes the target's place in one step, and
what was there is removed after. What a killed process left is swept by whoever writes the same target next.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional


# Whether digests are compared when something is loaded.
VERIFY_VARIABLE = "PEFT_EXT_VERIFY_DIGESTS"
# In the name of what is being written.
_PARTIAL = "-partial-"
# Where an older version waits that couldn't change places with the new one in one step.
_BEFORE = "before"
# What renaming a folder ends with where it can't be done: a mount point, another file system, a parent that is read-only.
_IN_PLACE = frozenset((errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS))
_AT_FDCWD, _EXCHANGE = -100, 2  # of Linux's renameat2, and of macOS' renamex_np


@contextmanager
def written_whole(
    target: Path, keep: bool = False, stale: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place if the block succeeds; for a file or a folder.

    At every moment, `target` is the old version or the new one. Where folders can't change places (a mount point, the
    working directory, a file system without such a step), files are moved one by one instead.

    Args:
        target: The file or folder. A link stays one: what it points to is replaced.
        keep: Of a folder that is replaced, keep the entries that the new one lacks, since they are someone else's.
        stale: Of such an entry, by its path in the folder: whether it belongs to the old version and goes with it.
    """
    link, target = target, Path(os.path.realpath(target))
    if link.is_symlink() and not target.parent.is_dir():
        raise FileNotFoundError(
            f"{str(link)!r} is a link to {str(target)!r}, whose folder does not exist; remove the link."
        )
    _sweep(target.parent, f".{target.name}{_PARTIAL}*")
    inside = _has_to_stay(target)
    with _partial(target, target if inside else target.parent) as partial:
        new = partial / target.name
        yield new
        if keep and new.is_dir() and target.is_dir() and not inside:
            _carry_over(target, new, stale)
        _sync(new)
        if inside:
            _move_into(new, target, keep, stale)
        else:
            try:
                _take_place(new, target, partial)
            except OSError as error:
                if error.errno not in _IN_PLACE or not (target.is_dir() and new.is_dir()):
                    raise
                _move_into(new, target, keep, stale)
        _sync_folder(target.parent)


@contextmanager
def scratch(name: str, folder: Optional[Path] = None) -> Iterator[Path]:
    """An empty folder to work in, which is removed after; what killed processes left of such ones goes first.

    Args:
        name: What it is for.
        folder: Where to make it; None: where the system has temporary files.
    """
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    _sweep(folder, f".{name}{_PARTIAL}*")
    with _partial(Path(name), folder) as partial:
        yield partial


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder and below; what a living one writes stays."""
    if folder.is_dir():
        _sweep(folder, f".*{_PARTIAL}*", below=True)


@contextmanager
def held(folder: Path, what: str = "folder") -> Iterator[bool]:
    """Hold a folder, or a file, within the block, against other processes that do the same; again within a process is fine.

    The system lets go of it when the process ends, however it ends.

    Args:
        folder: The folder, which is there.
        what: What it is called in the message.

    Returns:
        Whether it could be held at all; not on file systems and systems without such locks.

    Raises:
        BlockingIOError: If another process holds it.
    """
    path = os.path.realpath(folder)
    with _HOLDS_LOCK:
        hold = _HOLDS.get(path)
        if hold is None:
            descriptor = _open(path)
            state = None if descriptor is None else _locked(descriptor)
            if not state and descriptor is not None:
                os.close(descriptor)
            if state is False:
                raise BlockingIOError(f"{what}={str(folder)!r}: another process works in it; wait for it, or end it.")
            hold = _HOLDS[path] = [0, descriptor if state else None]
        hold[0] += 1
    try:
        yield hold[1] is not None
    finally:
        with _HOLDS_LOCK:
            hold[0] -= 1
            if not hold[0]:
                del _HOLDS[path]
                if hold[1] is not None:
                    os.close(hold[1])


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    hash_ = hashlib.sha256()
    with open(path, "rb") as content:
        while block := content.read(1 << 20):
            hash_.update(block)
    return hash_.hexdigest()


def digests(folder: Path, names: Optional[Iterable[str]] = None) -> dict[str, str]:
    """sha256 of files that belong together, by their names with `/`; None: of all files of a folder and below."""
    if names is None:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: file_digest(folder / name) for name in names}


def verifies() -> bool:
    """Whether digests are compared; `PEFT_EXT_VERIFY_DIGESTS=0` turns it off.

    Raises:
        ValueError: If the variable has another value than 0 and 1.
    """
    value = os.environ.get(VERIFY_VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{VERIFY_VARIABLE}={value!r} is unknown; set 1 (the default) or 0.")
    return value == "1"


def check_digests(folder: Path, stored: Any, kept_in: str) -> None:
    """Refuse a folder whose files aren't those that were saved together.

    Args:
        folder: The folder.
        stored: What [`digests`] gave; None, of an earlier version: nothing is checked.
        kept_in: The name of the file that keeps it, under `files`.

    Raises:
        ValueError: If a file is missing or another one; names it.
    """
    if stored is None or not verifies():
        return
    if not isinstance(stored, Mapping):
        raise ValueError(f"{str(folder / kept_in)!r}: files is {stored!r}, not a mapping of names to digests.")
    for name, digest in stored.items():
        path = folder / name
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise ValueError(f"{str(folder / kept_in)!r}: files names {name!r}, which is outside the folder.")
        if not path.is_file():
            raise ValueError(f"{str(path)!r} is missing; {kept_in} was saved with it. Copy the whole folder again.")
        if file_digest(path) != digest:
            raise ValueError(
                f"{str(path)!r} isn't the file that was saved with {kept_in}: it is damaged, or of another save. Copy or save "
                f"the whole folder again; if you changed the file yourself, take its line out of 'files' in {kept_in}."
            )


def allocate(path: Path, size: int, keep: bool = False) -> None:
    """Make a file of zeros whose bytes the disk has room for, so that mapping it can't fail later (SIGBUS).

    Args:
        path: The file.
        size: Its bytes.
        keep: It is there, of this size; what it holds stays.

    Raises:
        OSError: If there is no room; names the file and the bytes.
    """
    with open(path, "r+b" if keep else "wb") as file:
        try:
            if size and not _allocated(file.fileno(), size) and not keep:
                _fill(file, size)
        except OSError as error:
            file.close()
            if not keep:
                path.unlink(missing_ok=True)
            raise OSError(
                error.errno, f"{os.strerror(error.errno or 0)}: {str(path)!r} needs {size:,} bytes"
            ) from None


def check_writable(target: Path, argument: str) -> None:
    """Refuse, before any long work, a file that can't be written.

    Raises:
        OSError: Names the argument and the file.
    """
    if target.is_dir():
        raise IsADirectoryError(f"{argument}={str(target)!r} is a folder; pass a file.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{argument}={str(target)!r}: the folder {str(target.parent)!r} does not exist.")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"{argument}={str(target)!r} can't be written: no permission.")


def check_folder_writable(folder: Path, argument: str) -> None:
    """Refuse, before any long work, a folder that can't be made.

    Raises:
        PermissionError: Names the argument and the folder.
    """
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with scratch("writable", parent):
            pass
    except OSError as error:
        raise PermissionError(f"{argument}={str(folder)!r} can't be written: {error}") from error


def write_json(target: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with written_whole(target) as path:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, way_out: str = "download or save it again") -> dict[str, Any]:
    """An object out of a JSON file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it isn't UTF-8, no JSON, nested too deeply or no object; names it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{str(path)!r} is nested too deeply to be a file of ours; {way_out}.") from None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON ({error}); {way_out}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} holds a {type(value).__name__} where an object is expected; {way_out}.")
    return value


# ---- what is held

_HOLDS: dict[str, list[Any]] = {}  # path -> [how often, descriptor]
_HOLDS_LOCK = threading.Lock()


def _open(path: str) -> Optional[int]:
    try:
        return os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return None


def _locked(descriptor: int) -> Optional[bool]:
    """Lock an open file or folder; False if another process has, None where nothing can."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None


@contextmanager
def _partial(target: Path, parent: Path) -> Iterator[Path]:
    """A hidden folder that this process holds."""
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}{_PARTIAL}", dir=parent))
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(held(partial))
            except (BlockingIOError, FileNotFoundError):
                continue  # swept before it could be held
            if not partial.is_dir():
                continue
            try:
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return


def _sweep(folder: Path, pattern: str, below: bool = False) -> None:
    """Remove partial folders that no process holds, and put back an older version that one of them still has."""
    try:
        found = list(folder.rglob(pattern) if below else folder.glob(pattern))
    except OSError:
        return
    for path in found:
        if os.path.realpath(path) in _HOLDS:
            continue
        try:
            with held(path) as alone:
                if alone:
                    _put_back(path)
                    shutil.rmtree(path, ignore_errors=True)
        except OSError:  # another process writes it, or has swept it
            continue


def _put_back(partial: Path) -> None:
    """Where the steps of `_take_place` were interrupted."""
    for old in partial.glob(f"{_BEFORE}/*"):
        if not os.path.lexists(partial.parent / old.name):
            os.rename(old, partial.parent / old.name)


# ---- the step


def _take_place(new: Path, target: Path, partial: Path) -> None:
    if not os.path.lexists(target) or not (new.is_dir() or target.is_dir()):
        os.replace(new, target)
        return
    if new.is_dir() and target.is_dir():
        shutil.copymode(target, new)
    if not _exchanged(new, target):
        (partial / _BEFORE).mkdir()
        os.rename(target, partial / _BEFORE / target.name)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(partial / _BEFORE / target.name, target)
            raise


def _exchanged(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system or its file system can't."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(one), os.fsencode(other)
        if sys.platform == "darwin":
            failed = library.renamex_np(*names, _EXCHANGE)
        else:
            failed = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE)
    except (AttributeError, OSError, TypeError):  # no such function, no such library
        return False
    code = ctypes.get_errno()
    if failed and code in _IN_PLACE - {errno.EXDEV}:
        raise OSError(code, os.strerror(code), str(other))
    return not failed


def _has_to_stay(target: Path) -> bool:
    """Whether a folder can't be replaced by another one: the working directory or one above, a mount point, one whose parent
    is read-only."""
    if not target.is_dir():
        return False
    try:
        here = Path(os.path.realpath(os.getcwd()))
    except OSError:  # the working directory is gone
        here = Path()
    return target == here or target in here.parents or os.path.ismount(target) or not os.access(target.parent, os.W_OK)


def _move_into(new: Path, target: Path, keep: bool, stale: Callable[[str], bool], at: str = "") -> None:
    """Replace a folder's files one by one."""
    names = {path.name for path in new.iterdir()}
    for path in sorted(new.iterdir()):
        old = target / path.name
        if _is_folder(path) and _is_folder(old):
            _move_into(path, old, keep, stale, f"{at}{path.name}/")
            continue
        _remove(old, only_folder=True)
        os.replace(path, old)
    for old in list(target.iterdir()):
        if old.name not in names and _PARTIAL not in old.name and not (keep and not stale(at + old.name)):
            _remove(old)


def _carry_over(old: Path, new: Path, stale: Callable[[str], bool], at: str = "") -> None:
    """Give the new folder what only the old one has: as links to the same contents, or copies where there are none."""
    for path in old.iterdir():
        there = new / path.name
        if _PARTIAL in path.name or stale(at + path.name):
            continue
        if _is_folder(path):
            if not os.path.lexists(there):
                there.mkdir()
                shutil.copymode(path, there)
            if _is_folder(there):
                _carry_over(path, there, stale, f"{at}{path.name}/")
        elif os.path.lexists(there):
            continue
        elif path.is_symlink():
            os.symlink(os.readlink(path), there)
        else:
            _linked(path, there)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path, only_folder: bool = False) -> None:
    if _is_folder(path):
        shutil.rmtree(path)
    elif not only_folder:
        path.unlink()


def _linked(source: Any, target: Any) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# ---- on disk


def _sync(path: Path) -> None:
    """Wait until the system has a file, or a folder's files, on disk."""
    if not path.is_dir():
        _sync_file(path)
        return
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder) / name
            if not file.is_symlink():
                _sync_file(file)
        _sync_folder(Path(folder))


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    try:
        _sync_file(path)
    except OSError:  # Windows, and file systems that have no such thing
        pass


def _allocated(descriptor: int, size: int) -> bool:
    """Whether the system has set the bytes aside; False where it has no such call."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    return True


def _fill(file: Any, size: int) -> None:
    block = bytes(1 << 20)
    while size:
        size -= file.write(block[: min(size, len(block))])
    file.flush()
