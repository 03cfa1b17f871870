# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Which of Trainer's checkpoints a training goes on from: the newest that is complete, whatever a kill left beside it.

transformers takes the newest folder, complete or not, and writes a checkpoint's files one by one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union

from peft_ext.files import held


logger = logging.getLogger(__name__)
PathLike = Union[str, os.PathLike]
_NAME = re.compile(r"checkpoint-(\d+)")
_BROKEN = "broken-"  # before the name of one that is set aside
_STATE = "trainer_state.json"  # the Trainer writes it last
_JSON = ("config.json", "adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no", "none", "")


def last_checkpoint(folder: PathLike) -> Optional[str]:
    """The newest of Trainer's checkpoints in a folder that is complete; None if there is none.

    Newer ones that a kill left incomplete are named in a warning and set aside, as `broken-checkpoint-<step>`, unless
    another process holds the folder and may be writing them.
    """
    folder = Path(folder)
    for checkpoint in _newest_first(folder):
        missing = incomplete(checkpoint)
        if missing is None:
            return str(checkpoint)
        _set_aside(checkpoint, missing)
    return None


def incomplete(checkpoint: PathLike) -> Optional[str]:
    """What a checkpoint lacks of what its Trainer needs to go on; None: nothing.

    Weights, with all shards and as long as their headers say; the state; and, unless only the model was saved,
    optimizer, schedule and random numbers.
    """
    checkpoint = Path(checkpoint)
    try:
        return _of_state(checkpoint) or _of_weights(checkpoint) or _of_optimizer(checkpoint)
    except FileNotFoundError as error:  # another process removes it
        return f"{error.filename} is gone"


@contextmanager
def going_on(trainer: Any, resume_from_checkpoint: Union[None, bool, PathLike] = True) -> Iterator[Optional[str]]:
    """Hold a trainer's output folder within the block, against other processes; gives the checkpoint to go on from.

    Args:
        trainer: transformers' Trainer, or a trainer of TRL.
        resume_from_checkpoint: True: the newest complete one, if there is one; a path: that one; None or False: none. The
            trainer's argument of the same name, if it has been set, counts instead, and takes `"True"`, too.

    Raises:
        ValueError: If the checkpoint of that path is incomplete; says what it lacks.
        BlockingIOError: If another process trains in the folder.
    """
    folder = Path(str(trainer.args.output_dir))
    given = getattr(trainer.args, "resume_from_checkpoint", None)
    with _held(folder, trainer):
        checkpoint = resolve(resume_from_checkpoint if given is None else given, folder)
        with _no_step_too_many(trainer, checkpoint):
            yield checkpoint


def resolve(resume_from_checkpoint: Union[None, bool, PathLike], folder: PathLike) -> Optional[str]:
    """The checkpoint that `resume_from_checkpoint`, as [`going_on`] takes it, means in an output folder.

    Raises:
        ValueError: If the checkpoint of a path is incomplete; says what it lacks.
    """
    value = resume_from_checkpoint
    if value is None or value is False or str(value).lower() in _FALSE:
        return None
    if value is True or str(value).lower() in _TRUE:
        return last_checkpoint(folder)
    if not Path(value).is_dir():
        raise ValueError(f"resume_from_checkpoint={str(value)!r}: there is no such folder.")
    missing = incomplete(value)
    if missing is not None:
        newest = next((each for each in _newest_first(Path(folder)) if incomplete(each) is None), None)
        instead = "the run has no complete one" if newest is None else f"{str(newest)!r} is complete"
        raise ValueError(f"resume_from_checkpoint={str(value)!r} is incomplete: {missing}; {instead}.")
    return str(value)


def train(trainer: Any) -> Any:
    """Train from the newest complete checkpoint in the trainer's output folder, see [`going_on`]."""
    with going_on(trainer) as checkpoint:
        return trainer.train(resume_from_checkpoint=checkpoint)


def drop_checkpoints(folder: PathLike) -> None:
    """Remove Trainer's checkpoints, and those set aside, once what they led to is written."""
    for path in Path(folder).glob("*checkpoint-*"):
        if _NAME.fullmatch(path.name.removeprefix(_BROKEN).partition(".")[0]):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _held(folder: Path, trainer: Any) -> Iterator[None]:
    if not trainer.is_world_process_zero():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder, "output_dir"):
        yield


@contextmanager
def _no_step_too_many(trainer: Any, checkpoint: Optional[str]) -> Iterator[None]:
    """From the checkpoint of the last step, transformers would make another: it looks after a step whether it was the last."""
    limit = trainer.args.max_steps
    if checkpoint is None or limit < 1 or _json(Path(checkpoint) / _STATE)["global_step"] < limit:
        yield
        return
    own = trainer.set_initial_training_values

    def without_epochs(*args: Any, **kwargs: Any) -> Any:
        return (0, *own(*args, **kwargs)[1:])

    trainer.set_initial_training_values = without_epochs
    try:
        yield
    finally:
        del trainer.set_initial_training_values


def _newest_first(folder: Path) -> list[Path]:
    named = [(match, path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for match, path in sorted(named, key=lambda each: -int(each[0][1])) if path.is_dir()]


def _set_aside(checkpoint: Path, missing: str) -> None:
    if os.environ.get("RANK", "0") != "0":  # one process of a launcher's does it
        return
    try:
        with held(checkpoint.parent):
            number, aside = 1, checkpoint.with_name(_BROKEN + checkpoint.name)
            while aside.exists():
                number += 1
                aside = checkpoint.with_name(f"{_BROKEN}{checkpoint.name}.{number}")
            checkpoint.rename(aside)
    except BlockingIOError:
        logger.warning(
            "%s is incomplete (%s); another process works there, so it stays as it is.", checkpoint, missing
        )
    except OSError as error:
        logger.warning("%s is incomplete (%s), and can't be set aside: %s.", checkpoint, missing, error)
    else:
        logger.warning(
            "%s is incomplete (%s), as a kill leaves it; it is set aside as %s.", checkpoint, missing, aside.name
        )


def _of_state(checkpoint: Path) -> Optional[str]:
    state = checkpoint / _STATE
    if not state.is_file():
        return f"{_STATE} is missing"
    for path in (state, *(checkpoint / name for name in _JSON)):
        if path.is_file() and not isinstance(_json(path), dict):
            return f"{path.name} is damaged"
    return None if isinstance(_json(state).get("global_step"), int) else f"{_STATE} has no global_step"


def _of_weights(checkpoint: Path) -> Optional[str]:
    found = False
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if path.suffix == ".safetensors":
            found = True
            if not _safetensors_whole(path):
                return f"{name} is cut off"
        elif path.suffix in (".bin", ".pt", ".pth") and path.is_file():
            found = found or path.name.startswith(("pytorch_model", "adapter_model"))
            if not _pickle_whole(path):
                return f"{name} is cut off"
        elif path.name == "adapter_model.safetensors.index.json" or path.name in _JSON[2:]:
            for shard in sorted(set((_json(path) or {}).get("weight_map", {}).values())):
                if not (path.parent / shard).is_file():
                    return f"{shard} is missing"
    sharded = any(
        path.is_dir() for path in (*checkpoint.glob("pytorch_model_fsdp*"), *checkpoint.glob("global_step*"))
    )
    if not found and not sharded:
        return "there are no weights"
    for weights in checkpoint.rglob("adapter_model.*"):
        if not weights.with_name("adapter_config.json").is_file():
            return f"{weights.with_name('adapter_config.json').relative_to(checkpoint).as_posix()} is missing"
    return None


def _of_optimizer(checkpoint: Path) -> Optional[str]:
    if any(checkpoint.glob("global_step*")):  # DeepSpeed keeps them there
        return None
    parts = {"optimizer": "*optimizer*", "scheduler.pt": "scheduler.pt", "rng_state.pth": "rng_state*.pth"}
    there = {name: sorted(checkpoint.glob(pattern)) for name, pattern in parts.items()}
    if not any(there.values()):
        return None  # save_only_model
    for name, files in there.items():
        if not files:
            return f"{name} is missing"
    numbers = [int(path.stem.rpartition("_")[2]) for path in there["rng_state.pth"] if path.stem != "rng_state"]
    return None if not numbers or len(numbers) == max(numbers) + 1 else "the rng_state of a process is missing"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def _safetensors_whole(path: Path) -> bool:
    """Whether a file is as long as its header says."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return False
    return size == 8 + length + max(ends, default=0)


def _pickle_whole(path: Path) -> bool:
    """Whether a file of torch.save has its end, where the table of its contents stands."""
    if not path.stat().st_size:
        return False
    with open(path, "rb") as file:
        if not file.read(4).startswith(b"PK"):
            return True  # of an old torch, which nothing tells
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False
