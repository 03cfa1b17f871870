# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What a critic's training keeps beside Trainer's checkpoints, so that it goes on after a kill.

rollouts/penalty.json                   the penalty of the head's weights that was chosen
rollouts/settings.json                  what roll-outs and targets depend on
rollouts/iteration-0003-000.jsonl       the roll-outs of an iteration and a process
rollouts/iteration-0003-000.safetensors the critic's values of their states as the iteration began
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch

from generation_ext.critic.rollout_files import RolloutWriter, read_rollouts
from generation_ext.critic.rollouts import Rollout
from peft_ext.file_formats import Tensor, check_fields, check_tensors, number
from peft_ext.files import read_json, sweep, write_json
from peft_ext.runs import differences, plain, read_settings
from peft_ext.tensor_files import read_tensors, write_tensors


class RunFiles:
    """The files of one process.

    Args:
        folder: The run's output folder.
        process: The process's number.
        writes: False: write nothing.
    """

    def __init__(self, folder: Path, process: int, writes: bool = True) -> None:
        self.folder = folder / "rollouts"
        self.process = process
        self.writes = writes

    @property
    def started(self) -> bool:
        """Whether a run has been started here."""
        return self._settings.is_file()

    def start(self, settings: dict[str, Any]) -> None:
        """Remove an older run's files, and write the settings; called by one process."""
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        for pattern in ("iteration-*.jsonl", "iteration-*.safetensors", "penalty.json"):
            for old in self.folder.glob(pattern):
                old.unlink()
        write_json(self._settings, settings)

    def check(self, settings: dict[str, Any]) -> None:
        """Check that the run that is here, if there is one, had these settings.

        Raises:
            ValueError: Names the settings that differ.
        """
        stored = read_settings(self._settings)
        # a setting that a run of an earlier version didn't write down is taken to be the same
        changes = [] if stored is None else differences({**plain(settings), **stored}, plain(settings))
        if changes:
            raise ValueError(
                f"the run in {str(self.folder.parent)!r} had other settings ({'; '.join(map(str, changes))}); resume it "
                "with its own, or start a new one in another output_dir."
            )

    def rollouts(self, iteration: int, count: int, batch_size: int) -> list[Rollout]:
        """The roll-outs of an iteration that are here; of an unfinished one, those of its whole batches."""
        path = self._path(iteration, "jsonl")
        if not path.is_file():
            return []
        rollouts = read_rollouts(path)[:count]
        return rollouts if len(rollouts) == count else rollouts[: len(rollouts) // batch_size * batch_size]

    def writer(self, iteration: int, keep: int) -> Callable[[list[Rollout]], None]:
        """A function that appends roll-outs to an iteration's file, after the first `keep` ones."""
        if not self.writes:
            return lambda rollouts: None
        return RolloutWriter(self._path(iteration, "jsonl"), keep=keep).write

    def keep_values(self, iteration: int, values: torch.Tensor) -> None:
        """Write the values `[roll-outs, states]` that an iteration begins with; its targets depend on them."""
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path(iteration, "safetensors"), {"values": values})

    def kept_values(self, iteration: int, shape: torch.Size) -> Optional[torch.Tensor]:
        """The values that an iteration began with, or None.

        Raises:
            ValueError: If the file is damaged or belongs to other roll-outs.
        """
        path = self._path(iteration, "safetensors")
        if not path.is_file():
            return None
        tensors = read_tensors(path)
        described = {"values": Tensor(("F32",), tuple(shape))}
        check_tensors(
            tensors,
            described,
            repr(str(path)),
            way_out="It doesn't belong to the roll-outs beside it; start a new run.",
        )
        return tensors["values"]

    def keep_l2(self, l2: float) -> None:
        """Write the penalty that a run has chosen."""
        if self.writes and self.process == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "penalty.json", {"l2": l2})

    def kept_l2(self) -> Optional[float]:
        """The penalty that a run has chosen, or None."""
        path = self.folder / "penalty.json"
        if not path.is_file():
            return None
        row = read_json(path)
        check_fields(row, {"l2": number(0)}, repr(str(path)), "Start a new run.")
        return float(row["l2"])

    @property
    def _settings(self) -> Path:
        return self.folder / "settings.json"

    def _path(self, iteration: int, ending: str) -> Path:
        return self.folder / f"iteration-{iteration:04d}-{self.process:03d}.{ending}"
