# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Runs: a folder that a long piece of work fills, that says what it was made from, and goes on after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from peft_ext.file_formats import JsonFormat, mapping_of, number, record, text, truth
from peft_ext.files import check_folder_writable, held, sweep, write_json, written_whole
from peft_ext.trainer_checkpoints import drop_checkpoints, last_checkpoint


__all__ = [
    "Difference",
    "RunFolder",
    "StagedRun",
    "differences",
    "digest",
    "drop_checkpoints",
    "last_checkpoint",
    "lock",
    "open_file",
    "other_folder",
    "plain",
    "read_settings",
    "write_settings",
]
PathLike = Union[str, os.PathLike]
_FORMAT = 1


MANIFEST = JsonFormat(
    "manifest/<stage>.json",
    {
        "stage": text().or_missing(),
        "config": record({}).means("all that the stage's output depends on, besides its inputs"),
        "inputs": mapping_of(text()).means("their sha256"),
        "outputs": mapping_of(text()).means("their sha256, once it is done"),
        "counts": record({}),
        "seconds": number(0).or_missing(),
        "done": truth(),
    },
    format=_FORMAT,
    way_out="Put the file back, or use a new run directory.",
)


class Difference(NamedTuple):
    """A setting that two runs don't share; its values as JSON, `"not set"` for a missing one."""

    key: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.key}: was {self.old}, is {self.new}"


def differences(old: Any, new: Any, at: str = "") -> list[Difference]:
    """Where two settings differ, by dotted keys."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [Difference(at, json.dumps(old, default=str), json.dumps(new, default=str))]
    result = []
    for key in dict.fromkeys([*old, *new]):
        below = f"{at}.{key}" if at else str(key)
        if key in old and key in new:
            result += differences(old[key], new[key], below)
        else:
            shown = [json.dumps(side[key]) if key in side else "not set" for side in (old, new)]
            result.append(Difference(below, *shown))
    return result


def plain(value: Any) -> Any:
    """Settings as they come back from JSON; a dataclass as the mapping of its fields, what JSON doesn't know as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value, default=str))


def digest(path: Path) -> str:
    """sha256 of a file, or of a folder's files and their names.

    Raises:
        FileNotFoundError: If there is neither.
    """
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} isn't there; run the stage that writes it first.")
    hash_ = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            hash_.update(f"{file.relative_to(path)}\0".encode() if path.is_dir() else b"")
            with open(file, "rb") as content:
                while block := content.read(1 << 20):
                    hash_.update(block)
    return hash_.hexdigest()


def read_settings(path: Path) -> Optional[dict[str, Any]]:
    """The settings in a JSON or YAML file; None if it isn't there.

    Raises:
        ValueError: If it is damaged.
    """
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        value = _yaml().safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except Exception as error:  # YAML's own class is only there where PyYAML is
        raise ValueError(f"{str(path)!r} is damaged ({error}); delete it, or choose another folder.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} holds no settings; delete it, or choose another folder.")
    return value


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings as YAML or JSON, by the file's ending, whole or not at all."""
    if path.suffix != ".yaml":
        write_json(path, settings)
        return
    with written_whole(path) as partial:
        partial.write_text(_yaml().safe_dump(dict(settings)), encoding="utf-8")


def lock(path: PathLike) -> Any:
    """A lock that the system opens when its process ends, however it ends: a `filelock.FileLock`.

    Raises:
        ImportError: If filelock is missing; says what to install.
    """
    try:
        from filelock import FileLock
    except ImportError as error:
        raise ImportError("work that several processes share needs: pip install filelock") from error
    return FileLock(path)


class RunFolder:
    """The folder of one run: the settings that it was started with, and a result once it is complete.

    Args:
        folder: What the user passed.
        settings_file: Its name; `.yaml` or `.json`.
        result_file: The name of what makes the run complete.
        argument: The argument that named the folder, for messages.
    """

    def __init__(
        self,
        folder: Optional[PathLike],
        settings_file: str = "config.yaml",
        result_file: str = "metrics.json",
        argument: str = "output_dir",
    ) -> None:
        if not folder:
            raise ValueError(f"{argument} is missing: pass --{argument}, the folder to write the run to.")
        self.folder, self.argument = Path(folder).expanduser().resolve(), argument
        self._settings, self._result = self.folder / settings_file, self.folder / result_file
        self._held = contextlib.ExitStack()

    def path(self, name: str) -> Path:
        """Where a file or folder of the run lies."""
        return self.folder / name

    @property
    def settings(self) -> Optional[dict[str, Any]]:
        """What the run was started with; None if it hasn't been."""
        return read_settings(self._settings)

    @property
    def result(self) -> Optional[dict[str, Any]]:
        """What a complete run has measured; None if it isn't complete."""
        return read_settings(self._result)

    def check(self, settings: Mapping[str, Any], begun: bool = True) -> Optional[dict[str, Any]]:
        """Check the folder before any long work: new, empty, or of a run with the same settings; writes nothing. Of a complete
        run, Trainer's checkpoints that a kill has left are removed.

        Args:
            settings: All that the run's result depends on.
            begun: Whether anything was made under the settings that are there; if not, others may take their place.

        Returns:
            The result of a complete run; None: the work is to be done, or goes on.

        Raises:
            FileExistsError: If the folder holds something else, or a run with other settings; names what differs.
            OSError: If it can't be written, or another process works on it.
        """
        here = f"{self.argument}={str(self.folder)!r}"
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"{here} is a file; pass a folder.")
        stored = self.settings
        if stored is None and self.folder.is_dir() and any(self.folder.glob("[!.]*")):  # a kill leaves hidden files
            raise FileExistsError(f"{here} is not empty and holds no run of ours; pass another folder.")
        changes = differences(stored, plain(settings)) if stored is not None and begun else []
        if changes:
            raise FileExistsError(
                f"{here} holds a run with other settings ({'; '.join(map(str, changes))}). Pass the same ones to "
                f"continue it, or another folder, such as {other_folder(self.folder)}."
            )
        check_folder_writable(self.folder, self.argument)
        sweep(self.folder)
        result = self.result
        if result is not None:
            drop_checkpoints(self.folder)  # as the run would have, had it not been killed right behind its result
        if result is None and self.folder.is_dir():
            with self._alone():
                pass
        return result

    def start(self, settings: Mapping[str, Any], begun: bool = True) -> None:
        """Make the folder and write the settings, unless they are there and the run has begun; from here to [`finish`], other
        processes are kept out (those of one launcher excepted).

        Raises:
            BlockingIOError: If another process works on the run.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(self._alone())
        if not (begun and self._settings.is_file()):
            write_settings(self._settings, plain(settings))

    def open(self, settings: Mapping[str, Any], begun: bool = True) -> Optional[dict[str, Any]]:
        """[`check`] and [`start`]."""
        result = self.check(settings, begun)
        self.start(settings, begun)
        return result

    def _alone(self) -> contextlib.AbstractContextManager[Any]:
        """Keeps other processes out; of a launcher's, the first does."""
        first = os.environ.get("RANK", "0") == "0"
        return held(self.folder, self.argument) if first else contextlib.nullcontext()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result, which makes the run complete."""
        write_json(self._result, result)
        self._held.close()


class StagedRun:
    """A run of several stages: its files, and what each stage was made from.

    `manifest/<stage>.json` holds a stage's config, the hashes of its inputs and outputs, and its counts.

    Args:
        folder: Made when a stage begins.
        renamed: Settings that earlier versions called otherwise: old name -> new.
    """

    def __init__(self, folder: PathLike, renamed: Optional[Mapping[str, str]] = None) -> None:
        self.folder, self.renamed = Path(folder), renamed or {}
        self._digests: dict[str, tuple[Any, str]] = {}

    def path(self, name: str) -> Path:
        """Where a file or folder of the run lies."""
        return self.folder / name

    def manifest(self, stage: str) -> Optional[dict[str, Any]]:
        """What is known of a stage; None if it has never begun."""
        path = self._manifest(stage)
        value = read_settings(path)
        if value is not None:
            MANIFEST.check(value, path)
        return value

    def check(self, stage: str, config: Mapping[str, Any]) -> None:
        """Check that a stage, if it has begun, had this config.

        Raises:
            ValueError: Names every key that differs, with both values, and a new directory.
        """
        stored = self.manifest(stage)
        changes = [] if stored is None else differences(_renamed(stored["config"], self.renamed), plain(config))
        if changes:
            lines = "\n".join(f"  {stage}.{change}" for change in changes)
            raise ValueError(
                f"the run in {str(self.folder)!r} was made with another config:\n{lines}\nA run keeps one config, since "
                "its rows would be a mixture otherwise. Go back to the old values, or start a new run: "
                f"run_dir={str(other_folder(self.folder))!r}"
            )

    def begin(self, stage: str, config: Mapping[str, Any], inputs: Iterable[str] = ()) -> bool:
        """Whether a stage has to run; writes down what it runs from.

        Args:
            stage: Its name.
            config: All that its output depends on, besides its inputs.
            inputs: Names of files and folders in the run directory.

        Returns:
            False if it has finished from the same inputs.

        Raises:
            ValueError: If it began with another config, or from inputs that have changed since, or what it wrote has.
        """
        self.check(stage, config)
        stored, hashes = self.manifest(stage), {name: self._digest(name) for name in inputs}
        if stored is not None:
            changed = [name for name, value in hashes.items() if stored["inputs"].get(name) != value]
            if changed:
                raise ValueError(
                    f"stage {stage!r} in {str(self.folder)!r} began from other inputs: {', '.join(changed)} changed since. "
                    f"Put them back, or start a new run: run_dir={str(other_folder(self.folder))!r}"
                )
            if stored["done"] and all(self.path(name).exists() for name in stored["outputs"]):
                self._check_outputs(stage, stored["outputs"])
                return False
        begun = {"config": plain(config), "inputs": hashes, "outputs": {}, "counts": {}, "done": False}
        self._write(stage, {**begun, "seconds": self._spent(stage, stored)})
        return True

    def finish(
        self, stage: str, outputs: Iterable[str], counts: Optional[Mapping[str, Any]] = None, seconds: float = 0.0
    ) -> None:
        """Write down that a stage is done.

        Args:
            stage: One that has begun.
            outputs: Names of what it wrote.
            counts: What to tell of it.
            seconds: How long its last, uninterrupted part took; what came before it is added.
        """
        begun = self.manifest(stage)
        if begun is None:
            raise ValueError(f"stage={stage!r} has not begun.")
        hashes = {name: self._digest(name) for name in outputs}
        seconds += begun.get("seconds", 0.0)
        self._write(
            stage, {**begun, "outputs": hashes, "counts": plain(counts or {}), "seconds": seconds, "done": True}
        )

    def _check_outputs(self, stage: str, outputs: Mapping[str, str]) -> None:
        changed = [name for name, value in outputs.items() if self._digest(name) != value]
        if changed:
            raise ValueError(
                f"stage {stage!r} in {str(self.folder)!r} is done, but what it wrote has changed since: {', '.join(changed)}. "
                f"Put it back; or delete it, and the stage makes it again; or start a new run: "
                f"run_dir={str(other_folder(self.folder))!r}"
            )

    def _digest(self, name: str) -> str:
        """[`digest`] of what lies in the run; read again only if sizes or times of its files have changed."""
        path = self.path(name)
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        state = [(str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino) for file in files if (stat := _stat(file))]
        known = self._digests.get(name)
        if known is None or known[0] != state:
            known = self._digests[name] = state, digest(path)
        return known[1]

    def _spent(self, stage: str, stored: Optional[dict[str, Any]]) -> float:
        """How long a stage ran before it was interrupted: until the newest file of the run, as stages run one by one."""
        if stored is None or stored["done"]:
            return 0.0
        newest = max(path.stat().st_mtime for path in self.folder.rglob("*") if path.is_file())
        return stored.get("seconds", 0.0) + newest - self._manifest(stage).stat().st_mtime

    def _manifest(self, stage: str) -> Path:
        return self.folder / "manifest" / f"{stage}.json"

    def _write(self, stage: str, value: dict[str, Any]) -> None:
        self._manifest(stage).parent.mkdir(parents=True, exist_ok=True)
        write_json(self._manifest(stage), {"format": _FORMAT, "stage": stage, **value})


def open_file(path: Optional[PathLike], settings: Any, renamed: Optional[Mapping[str, str]] = None) -> Path:
    """The one file that a piece of work writes, once its settings are beside it (`<name>.config.json`).

    Args:
        path: What the user passed.
        settings: A dataclass or a mapping.
        renamed: Settings that earlier versions called otherwise: old name -> new.

    Raises:
        ValueError: If there is no path, or the file was begun with other settings; names what differs.
    """
    if not path:
        raise ValueError("output_file is missing: pass --output_file, the .jsonl file to write.")
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(".config.json")
    stored = read_settings(beside)
    changes = [] if stored is None else differences(_renamed(stored, renamed or {}), plain(settings))
    if changes:
        listed = "; ".join(map(str, changes))
        raise ValueError(f"{str(target)!r} was begun with another config ({listed}); use another file.")
    if stored is None:
        write_settings(beside, plain(settings))
    return target


def _stat(path: Path) -> Optional[os.stat_result]:
    return path.stat() if path.exists() else None


def _renamed(settings: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in settings.items()}


def other_folder(folder: Path) -> Path:
    """A name for another run, beside one that is there."""
    number = 2
    while (other := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return other


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("the command line needs: pip install 'peft-ext[cli]'") from error
    return yaml
