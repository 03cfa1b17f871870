# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A recipe: one YAML with a block for each stage, checked as a whole before anything runs."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, get_type_hints

import yaml

from peft_ext import devices
from peft_ext.files import scratch
from peft_ext.models import DEFAULT_MODEL
from trl_ext.almost.config import RENAMED, ComparisonsConfig, QueriesConfig, ResponsesConfig, SelfPlayConfig
from trl_ext.almost.evaluation import run as evaluation
from trl_ext.almost.prompts.roles import OWN, uses_chat
from trl_ext.almost.training import reward, rlsf, sft
from trl_ext.almost.writing.generators import parse_generators
from trl_ext.almost.writing.loading import speaker_tokenizer


QUERIES, RLSF_QUERIES, RESPONSES, COMPARISONS = "queries", "rlsf_queries", "responses", "comparisons"
REWARD, REWARD_2, SELF_PLAY, SFT, RLSF, EVALUATION = (
    "reward_model",
    "reward_model_2",
    "self_play",
    "sft",
    "rlsf",
    "evaluation",
)
# The launcher that starts no process.
INLINE = "inline"
# In the order in which they run.
STAGES = (QUERIES, RLSF_QUERIES, RESPONSES, COMPARISONS, REWARD, REWARD_2, SELF_PLAY, SFT, RLSF, EVALUATION)
OPTIONAL = (RLSF_QUERIES, REWARD_2, SFT, RLSF, EVALUATION)
# The stages that run as a script of their own: each module's `parse` and `run` are that script.
SCRIPTS: dict[str, Any] = {
    REWARD: reward,
    REWARD_2: reward,
    SFT: sft,
    RLSF: rlsf,
    EVALUATION: evaluation,
}
DATA_CONFIGS: dict[str, type] = {
    QUERIES: QueriesConfig,
    RLSF_QUERIES: QueriesConfig,
    RESPONSES: ResponsesConfig,
    COMPARISONS: ComparisonsConfig,
    SELF_PLAY: SelfPlayConfig,
}
# A block that is like another but for what it says itself.
_LIKE = {RLSF_QUERIES: QUERIES, REWARD_2: REWARD}


def _block(stage: str) -> Any:
    return field(default_factory=dict, metadata={"help": f"Settings of the stage {stage}; a mapping, in YAML."})


@dataclass
class AlmostConfig:
    """A run of the whole recipe. Its blocks are settings of the stages' own scripts."""

    run_dir: str = field(metadata={"help": "The folder of the run; an interrupted run there goes on."})
    model_name_or_path: Optional[str] = field(
        default=None, metadata={"help": "Of all stages whose block names no other; default: SmolLM2-135M-Instruct."}
    )
    seed: int = field(default=0, metadata={"help": "Of all stages whose block names no other."})
    backend: str = field(default="transformers", metadata={"help": "Who generates: transformers or vllm."})
    batch_size: int = field(default=32, metadata={"help": "Texts that are written side by side."})
    dtype: str = field(default="auto", metadata={"help": "Float type of the models that write."})
    chat_format: str = field(default="auto", metadata={"help": "chat, plain or auto."})
    device: Optional[str] = field(default=None, metadata={"help": devices.HELP})
    launcher: str = field(
        default="",
        metadata={
            "help": "What starts the training scripts, such as 'accelerate launch'; 'inline': this process; default: python."
        },
    )
    skip: list[str] = field(default_factory=list, metadata={"help": f"Stages to leave out, of {', '.join(OPTIONAL)}."})
    until: Optional[str] = field(default=None, metadata={"help": "Stop after this stage."})
    queries: dict[str, Any] = _block(QUERIES)
    rlsf_queries: dict[str, Any] = _block(RLSF_QUERIES)
    responses: dict[str, Any] = _block(RESPONSES)
    comparisons: dict[str, Any] = _block(COMPARISONS)
    reward_model: dict[str, Any] = _block(REWARD)
    reward_model_2: dict[str, Any] = _block(REWARD_2)
    self_play: dict[str, Any] = _block(SELF_PLAY)
    sft: dict[str, Any] = _block(SFT)
    rlsf: dict[str, Any] = _block(RLSF)
    evaluation: dict[str, Any] = _block(EVALUATION)

    def __post_init__(self) -> None:
        for name in self.skip:
            if name not in OPTIONAL:
                raise ValueError(f"skip={name!r} is no stage that can be left out; these can: {OPTIONAL}.")
        if RLSF_QUERIES in self.skip and RLSF not in self.skip:
            self.skip = [*self.skip, RLSF]
        if SFT in self.skip and RLSF not in self.skip:
            raise ValueError("skip='sft' leaves 'rlsf' without a model to start from; skip both.")
        if self.until is not None and self.until not in STAGES:
            raise ValueError(f"until={self.until!r} is no stage; choose one of {STAGES}.")
        for stage in STAGES:
            value = getattr(self, stage) or {}
            if not isinstance(value, Mapping):
                raise ValueError(f"{stage}={value!r} must be a mapping of settings, as in the recipes.")
            setattr(self, stage, {RENAMED.get(name, name): setting for name, setting in value.items()})

    @property
    def stages(self) -> list[str]:
        """What runs, in order."""
        names = [stage for stage in STAGES if stage not in self.skip]
        return names if self.until is None else [s for s in names if STAGES.index(s) <= STAGES.index(self.until)]

    def block(self, stage: str) -> dict[str, Any]:
        """A stage's settings, with what the recipe says for all stages filled in."""
        like = _LIKE.get(stage)
        values: dict[str, Any] = {**(getattr(self, like) if like else {}), **getattr(self, stage)}
        values.setdefault("seed", self.seed + (1 if like else 0))
        if self.device is not None:
            values.setdefault("device", self.device)
        if stage in DATA_CONFIGS:
            settings = {each.name for each in dataclasses.fields(DATA_CONFIGS[stage])}
            for name in ("model_name_or_path", "backend", "batch_size", "dtype", "chat_format"):
                if name in settings:
                    values.setdefault(name, getattr(self, name))
            return values
        return {**_wiring(self, stage, Path(self.run_dir)), **values}

    def data_config(self, stage: str) -> Any:
        """The settings of a stage that writes texts, as its dataclass.

        Raises:
            ValueError: If a key is unknown or a value out of its range; names the stage.
        """
        kind, values = DATA_CONFIGS[stage], self.block(stage)
        _check_names(values, kind, stage)
        types = get_type_hints(kind)
        try:
            # YAML reads 1e-5 as a text
            return kind(**{n: float(v) if types[n] is float and isinstance(v, str) else v for n, v in values.items()})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{stage}: {error}") from error


def load_recipe(path: str, overrides: Sequence[str] = (), **values: Any) -> AlmostConfig:
    """A recipe from its YAML.

    Args:
        path: The file.
        overrides: `"queries.count=100"`: values, in YAML's syntax, in place of the file's.
        **values: Top-level keys in place of the file's, such as `run_dir`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no mapping, or has an unknown key.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"config={path!r}: there is no such file.")
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"config={path!r} must hold a mapping.")
    content.update({name: value for name, value in values.items() if value is not None})
    _check_names(content, AlmostConfig, f"config={path!r}")
    return override(AlmostConfig(**content), overrides)


def override(config: AlmostConfig, overrides: Sequence[str]) -> AlmostConfig:
    """The recipe with other values.

    Raises:
        ValueError: If one is no `key=value` or `stage.key=value` of this recipe.
    """
    values = {each.name: getattr(config, each.name) for each in dataclasses.fields(AlmostConfig)}
    for text in overrides:
        key, sign, value = text.partition("=")
        stage, dot, name = key.partition(".")
        if not sign or stage not in values or (stage in STAGES) != bool(dot):
            raise ValueError(f"set={text!r} must look like queries.count=100 or batch_size=16; stages are {STAGES}.")
        parsed = yaml.safe_load(value)
        values[stage] = {**values[stage], RENAMED.get(name, name): parsed} if dot else parsed
    return AlmostConfig(**values)


def check_recipe(config: AlmostConfig) -> None:
    """Parse every block as its stage will.

    Raises:
        ValueError: Names the stage and what is wrong.
    """
    for stage in config.stages:
        if stage in DATA_CONFIGS:
            parsed = config.data_config(stage)
            if stage == RESPONSES:
                parse_generators(parsed.generators)
        elif stage == EVALUATION:
            _evaluation_arguments(config)
        else:
            with scratch("almost-recipe") as folder:
                path = folder / f"{stage}.yaml"
                path.write_text(yaml.safe_dump(config.block(stage)), encoding="utf-8")
                _check_script(stage, path)


def _check_script(stage: str, path: Path) -> None:
    """Parse a script's YAML as it will; errors name the stage."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            SCRIPTS[stage].parse(["--config", str(path)])
    except SystemExit as error:  # argparse
        raise ValueError(f"{stage}: {said.getvalue().strip().splitlines()[-1]}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{stage}: {error}") from error


def check_evaluation_data(config: AlmostConfig) -> None:
    """Look for the evaluation's data, which is wanted after hours of other stages.

    Raises:
        ValueError, FileNotFoundError: If it isn't there; names the setting, and how to leave the stage out.
    """
    arguments = _evaluation_arguments(config)
    try:
        for task in arguments.tasks:
            evaluation.data_path(arguments, task)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(
            f"evaluation: {error} In a recipe: --set evaluation.data_dir=FOLDER, or --skip {EVALUATION} to leave it out."
        ) from error


def check_own_format(config: AlmostConfig) -> None:
    """Look for the chat template that self-play asks its model by, which is wanted after hours of other stages.

    Raises:
        ValueError: If it is asked for, and the model has none.
    """
    settings = config.data_config(SELF_PLAY)
    if settings.prompt == OWN and not uses_chat(speaker_tokenizer(settings.model_name_or_path), settings.chat_format):
        raise ValueError(
            f"self_play: prompt={OWN!r} needs a chat template, and the model has none; use another prompt, such as 'faithful'."
        )


def _evaluation_arguments(config: AlmostConfig) -> evaluation.EvaluationArguments:
    """The evaluation looks into the run, which isn't there yet; so it is parsed without."""
    values = config.block(EVALUATION)
    _check_names(values, evaluation.EvaluationArguments, EVALUATION)
    return evaluation.EvaluationArguments(
        **{**values, "run_dir": None, "output_dir": values.get("output_dir") or "evaluation"}
    )


def _check_names(values: Mapping[str, Any], kind: type, where: str) -> None:
    names = [each.name for each in dataclasses.fields(kind)]
    unknown = [name for name in values if name not in names]
    if unknown:
        raise ValueError(f"{where}: {unknown[0]!r} is no setting here; there are {names}.")


def _wiring(config: AlmostConfig, stage: str, run: Path) -> dict[str, Any]:
    """Where a training stage's inputs and outputs lie."""
    model = config.model_name_or_path or DEFAULT_MODEL
    if stage == EVALUATION:
        return {"run_dir": str(run), "start": model}
    common = {"output_dir": str(run / stage), "model_name_or_path": model}
    if stage in (REWARD, REWARD_2):
        heldout = config.comparisons.get("heldout_share", ComparisonsConfig.heldout_share)
        data = {"dataset_name": str(run / "comparisons.jsonl"), "half": 0}
        if REWARD_2 not in config.skip:
            data["half"] = 1 if stage == REWARD else 2
        return {**common, **data, **({"eval_dataset_name": str(run / "comparisons.heldout.jsonl")} if heldout else {})}
    if stage == SFT:
        return {**common, "dataset_name": str(run / "demonstrations.jsonl")}
    return {
        **common,
        "model_name_or_path": str(run / SFT),
        "dataset_name": str(run / "rlsf_queries.jsonl"),
        "reward_model": str(run / REWARD),
    }
