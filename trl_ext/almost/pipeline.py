# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""All stages in order, in one run directory; each is left out where its manifest shows that it is done."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from filelock import Timeout

from peft_ext.files import check_folder_writable, sweep
from peft_ext.runs import StagedRun, lock, read_settings, write_settings
from trl_ext.almost.config import RENAMED, WHERE
from trl_ext.almost.data import comparisons, queries, responses, self_play
from trl_ext.almost.recipe import (
    COMPARISONS,
    EVALUATION,
    INLINE,
    QUERIES,
    RESPONSES,
    REWARD,
    REWARD_2,
    RLSF,
    RLSF_QUERIES,
    SCRIPTS,
    SELF_PLAY,
    SFT,
    AlmostConfig,
    check_evaluation_data,
    check_own_format,
    check_recipe,
)


logger = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1


class Files(NamedTuple):
    """What a stage reads and writes, in the run directory."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


FILES = {
    QUERIES: Files((), ("queries.jsonl",)),
    RLSF_QUERIES: Files(("queries.jsonl",), ("rlsf_queries.jsonl",)),
    RESPONSES: Files(("queries.jsonl",), ("responses.jsonl",)),
    COMPARISONS: Files(("responses.jsonl",), (comparisons.TRAINING, comparisons.HELDOUT)),
    REWARD: Files((comparisons.TRAINING, comparisons.HELDOUT), ("reward_model",)),
    REWARD_2: Files((comparisons.TRAINING, comparisons.HELDOUT), ("reward_model_2",)),
    SELF_PLAY: Files(("queries.jsonl", "reward_model"), ("demonstrations.jsonl",)),
    SFT: Files(("demonstrations.jsonl",), ("sft",)),
    RLSF: Files(("rlsf_queries.jsonl", "sft", "reward_model"), ("rlsf",)),
    EVALUATION: Files(("reward_model",), ("evaluation",)),
}
# Settings that say where things are, not what is made.
_WHERE = (
    "output_dir",
    "dataset_name",
    "eval_dataset_name",
    "reward_model",
    "run_dir",
    "data_dir",
    "report_to",
    *WHERE,
)


class Pipeline:
    """A run of a recipe.

    Args:
        config: The recipe.

    Raises:
        ValueError: If a block of the recipe is wrong, or the run directory holds a run of another config; names what
            differs, and another directory.
        OSError: If the run directory can't be written.
    """

    def __init__(self, config: AlmostConfig) -> None:
        check_recipe(config)
        self.config = config
        folder = Path(config.run_dir).expanduser()
        check_folder_writable(folder, "run_dir")
        self.run_files = StagedRun(folder, RENAMED)
        for stage in config.stages:
            self.run_files.check(stage, self.settings(stage))

    def settings(self, stage: str) -> dict[str, Any]:
        """What a stage's output depends on, besides its inputs."""
        values = {name: value for name, value in self.config.block(stage).items() if name not in _WHERE}
        if self._is_output(values.get("model_name_or_path")):
            del values["model_name_or_path"]  # an input
        return values

    def _is_output(self, model: Any) -> bool:
        """Whether a model is what a stage of this run writes."""
        path, run = Path(str(model)).expanduser().resolve(), self.run_files.folder.resolve()
        outputs = [run / name for files in FILES.values() for name in files.outputs]
        return model is not None and any(path == output or output in path.parents for output in outputs)

    def is_done(self, stage: str) -> bool:
        """Whether a stage has finished, as far as its manifest says."""
        manifest = self.run_files.manifest(stage)
        return bool(manifest and manifest["done"])

    def run(self) -> dict[str, dict[str, Any]]:
        """Run what isn't done.

        Returns:
            The counts of each stage.

        Raises:
            ChildProcessError: If a training script fails.
            ValueError, OSError: As the stages.
        """
        if EVALUATION in self.config.stages and not self.is_done(EVALUATION):
            check_evaluation_data(self.config)
        if SELF_PLAY in self.config.stages and not self.is_done(SELF_PLAY):
            check_own_format(self.config)
        self.run_files.folder.mkdir(parents=True, exist_ok=True)
        alone = lock(self.run_files.path(".lock"))
        try:
            alone.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"run_dir={self.config.run_dir!r}: another process works on this run; wait for it, or end it."
            ) from None
        try:
            sweep(self.run_files.folder)
            for stage in self.config.stages:
                self._run_stage(stage)
        finally:
            alone.release()
        return {stage: (self.run_files.manifest(stage) or {})["counts"] for stage in self.config.stages}

    def _run_stage(self, stage: str) -> None:
        files = self._files(stage)
        if not self.run_files.begin(stage, self.settings(stage), files.inputs):
            logger.info("%s: done already", stage)
            return
        logger.info("%s", stage)
        start = time.monotonic()
        counts = self._run_script(stage) if stage in SCRIPTS else self._write_data(stage)
        gc.collect()
        self.run_files.finish(stage, files.outputs, counts, time.monotonic() - start)

    def _files(self, stage: str) -> Files:
        files = FILES[stage]
        if stage == SELF_PLAY and self.config.data_config(SELF_PLAY).samples == 1:
            return Files(files.inputs[:1], files.outputs)
        if stage == EVALUATION:
            models = tuple(name for name in (REWARD_2, SFT, RLSF) if name in self.config.stages)
            return Files((*files.inputs, *models), files.outputs)
        return files

    def _write_data(self, stage: str) -> dict[str, Any]:
        config, path = self.config.data_config(stage), self.run_files.path
        if stage in (QUERIES, RLSF_QUERIES):
            avoid = [path("queries.jsonl")] if stage == RLSF_QUERIES else []
            return queries.run(config, path(f"{stage}.jsonl"), avoid)
        if stage == RESPONSES:
            return responses.run(config, path("queries.jsonl"), path("responses.jsonl"))
        if stage == COMPARISONS:
            generators = self.config.data_config(RESPONSES).generators
            return comparisons.run(config, generators, path("responses.jsonl"), path("."))
        return self_play.run(config, path("queries.jsonl"), path("demonstrations.jsonl"), path("reward_model"))

    def _run_script(self, stage: str) -> dict[str, Any]:
        """Run a training script with its block as its YAML, in a process of its own unless it is to run inline."""
        path = self.run_files.path("configs") / f"{stage}.yaml"
        path.parent.mkdir(exist_ok=True)
        write_settings(path, self.config.block(stage))
        script = SCRIPTS[stage]
        if self.config.launcher == INLINE:
            with contextlib.redirect_stdout(sys.stderr):
                script.run(*script.parse(["--config", str(path)]))
            return self._script_counts(stage)
        start = shlex.split(self.config.launcher) or [sys.executable]
        command = [*start, "-m", f"trl_ext.scripts.{script.PROGRAM}", "--config", str(path)]
        # what a script prints is progress here, so it goes to stderr
        dies = _end_with_parent if sys.platform == "linux" else None
        ended = subprocess.run(command, check=False, stdout=2, preexec_fn=dies)
        if ended.returncode:
            raise ChildProcessError(
                f"stage {stage!r} ended with status {ended.returncode}; what it said stands above. To run it alone: "
                f"{shlex.join(command)}. When it is mended, start the pipeline again; it goes on from here."
            )
        return self._script_counts(stage)

    def _script_counts(self, stage: str) -> dict[str, Any]:
        name = "evaluation.json" if stage == EVALUATION else "training.json"
        result = read_settings(self.run_files.path(FILES[stage].outputs[0]) / name) or {}
        return {key: value for key, value in result.items() if key != "history"}


def _end_with_parent() -> None:
    """A training whose pipeline was killed must not write beside the one that goes on."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)
