# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""All stages in order, in one run directory; each is left out where its manifest shows that it is done."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from filelock import FileLock, Timeout

from peft_ext.files import check_folder_writable, sweep, written_whole
from trl_ext.almost.data.comparisons import (
    COMPARISONS as COMPARISONS_FILE,
)
from trl_ext.almost.data.comparisons import (
    HELDOUT,
    build_comparisons,
    write_comparisons,
    write_responses,
)
from trl_ext.almost.data.queries import mine_queries
from trl_ext.almost.data.self_play import self_play
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
    check_recipe,
)
from trl_ext.almost.rewards import RewardModel
from trl_ext.almost.store import Run, read_rows
from trl_ext.almost.writing.backends import Backend
from trl_ext.almost.writing.loading import load_backend


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
    COMPARISONS: Files(("responses.jsonl",), (COMPARISONS_FILE, HELDOUT)),
    REWARD: Files((COMPARISONS_FILE, HELDOUT), ("reward_model",)),
    REWARD_2: Files((COMPARISONS_FILE, HELDOUT), ("reward_model_2",)),
    SELF_PLAY: Files(("queries.jsonl", "reward_model"), ("demonstrations.jsonl",)),
    SFT: Files(("demonstrations.jsonl",), ("sft",)),
    RLSF: Files(("rlsf_queries.jsonl", "sft", "reward_model"), ("rlsf",)),
    EVALUATION: Files(("reward_model",), ("evaluation",)),
}
# Settings that say where things are, not what is made.
_WHERE = ("output_dir", "dataset_name", "eval_dataset_name", "reward_model", "run_dir", "data_dir", "report_to")


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
        self.run_files = Run(folder)
        for stage in config.stages:
            self.run_files.check(stage, self.settings(stage))

    def settings(self, stage: str) -> dict[str, Any]:
        """What a stage's output depends on, besides its inputs."""
        values = {name: value for name, value in self.config.block(stage).items() if name not in _WHERE}
        if str(values.get("model_name_or_path", "")).startswith(str(Path(self.config.run_dir))):
            del values["model_name_or_path"]  # an input
        return values

    def is_done(self, stage: str) -> bool:
        """Whether a stage has finished, as far as its manifest says."""
        known = self.run_files.manifest(stage)
        return bool(known and known["done"])

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
        self.run_files.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.run_files.path(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"run_dir={self.config.run_dir!r}: another process works on this run; wait for it, or end it."
            ) from None
        try:
            sweep(self.run_files.folder)
            for stage in self.config.stages:
                self._run_stage(stage)
        finally:
            lock.release()
        return {stage: (self.run_files.manifest(stage) or {})["counts"] for stage in self.config.stages}

    def _run_stage(self, stage: str) -> None:
        files = self._files(stage)
        if not self.run_files.begin(stage, self.settings(stage), files.inputs):
            logger.info("%s: done already", stage)
            return
        logger.info("%s", stage)
        start = time.monotonic()
        counts = self._script(stage) if stage in SCRIPTS else _DATA_STAGES[stage](self)
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

    def _script(self, stage: str) -> dict[str, Any]:
        """Run a training script with its block as its YAML, in a process of its own unless it is to run inline."""
        path = self.run_files.path("configs") / f"{stage}.yaml"
        path.parent.mkdir(exist_ok=True)
        with written_whole(path) as partial:
            partial.write_text(yaml.safe_dump(self.config.block(stage), sort_keys=False), encoding="utf-8")
        if self.config.launcher == INLINE:
            with contextlib.redirect_stdout(sys.stderr):
                importlib.import_module(f"trl_ext.scripts.{SCRIPTS[stage]}").main(["--config", str(path)])
            return self._script_counts(stage)
        start = shlex.split(self.config.launcher) or [sys.executable]
        command = [*start, "-m", f"trl_ext.scripts.{SCRIPTS[stage]}", "--config", str(path)]
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
        path = self.run_files.path(FILES[stage].outputs[0]) / name
        if not path.is_file():
            return {}
        result = json.loads(path.read_text(encoding="utf-8"))
        return {key: value for key, value in result.items() if key != "history"}

    def backend(self, stage: str) -> Backend:
        """Who writes in a stage."""
        config = self.config.data_config(stage)
        return load_backend(
            config.model_name_or_path, backend=config.backend, batch_size=config.batch_size, dtype=config.dtype
        )

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a file of the run."""
        return read_rows(self.run_files.path(name))


def _queries(pipeline: Pipeline) -> dict[str, Any]:
    path = pipeline.run_files.path("queries.jsonl")
    return mine_queries(pipeline.backend(QUERIES), pipeline.config.data_config(QUERIES), path)


def _rlsf_queries(pipeline: Pipeline) -> dict[str, Any]:
    avoid = [row["query"] for row in pipeline.rows("queries.jsonl")]
    path = pipeline.run_files.path("rlsf_queries.jsonl")
    return mine_queries(pipeline.backend(RLSF_QUERIES), pipeline.config.data_config(RLSF_QUERIES), path, avoid)


def _responses(pipeline: Pipeline) -> dict[str, Any]:
    config = pipeline.config.data_config(RESPONSES)

    def load(rung: Any) -> Backend:
        return load_backend(
            rung.model or config.model_name_or_path,
            rung.bits,
            rung.group_size,
            config.backend,
            config.batch_size,
            config.dtype,
        )

    return write_responses(load, config, pipeline.rows("queries.jsonl"), pipeline.run_files.path("responses.jsonl"))


def _comparisons(pipeline: Pipeline) -> dict[str, Any]:
    config = pipeline.config.data_config(COMPARISONS)
    reward = None
    if config.as_is_reward_model:
        reward = RewardModel.from_pretrained(config.as_is_reward_model, batch_size=config.reward_batch_size).score
    ladder = pipeline.config.data_config(RESPONSES).ladder
    rows, counts = build_comparisons(pipeline.rows("responses.jsonl"), ladder, config, reward)
    return {**counts, **write_comparisons(rows, pipeline.run_files.folder, config)}


def _self_play(pipeline: Pipeline) -> dict[str, Any]:
    config = pipeline.config.data_config(SELF_PLAY)
    backend, reward = pipeline.backend(SELF_PLAY), None
    if config.samples > 1:
        reward = RewardModel.from_pretrained(
            str(pipeline.run_files.path("reward_model")),
            dtype=config.reward_dtype,
            policy_tokenizer=backend.tokenizer,
            batch_size=config.reward_batch_size,
        ).score
    path = pipeline.run_files.path("demonstrations.jsonl")
    return self_play(backend, config, pipeline.rows("queries.jsonl"), path, reward)


_DATA_STAGES: dict[str, Callable[[Pipeline], dict[str, Any]]] = {
    QUERIES: _queries,
    RLSF_QUERIES: _rlsf_queries,
    RESPONSES: _responses,
    COMPARISONS: _comparisons,
    SELF_PLAY: _self_play,
}


def _end_with_parent() -> None:
    """A training whose pipeline was killed must not write beside the one that goes on."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)
