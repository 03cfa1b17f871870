# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What a recipe is going to do: counts and tokens of each stage, before any model is loaded."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from peft_ext.models import DEFAULT_MODEL, load_tokenizer
from trl_ext.almost.pipeline import Pipeline
from trl_ext.almost.prompts.roles import assistant_prompt, chosen_prompt, load_style, mining_prompt, seed_queries
from trl_ext.almost.recipe import (
    COMPARISONS,
    QUERIES,
    RESPONSES,
    REWARD,
    REWARD_2,
    RLSF,
    RLSF_QUERIES,
    SELF_PLAY,
    SFT,
)
from trl_ext.almost.writing.backends import tokens_of
from trl_ext.almost.writing.generators import parse_generators


# Share of the texts that become queries; what SmolLM2 reaches, about.
ACCEPTED = 0.5
# A text's length as a share of the most that it may have.
FILLED = 0.5


class Line(NamedTuple):
    """A stage's estimate.

    Attributes:
        stage: Its name.
        status: `"done"`, `"begun"` or `"to do"`.
        rows: How many rows, pairs, conversations or episodes it makes or reads, at most.
        read, written: Tokens that run through a model as prompts (or in training), and that are written.
        note: What it is made of.
    """

    stage: str
    status: str
    rows: int
    read: int
    written: int
    note: str


def plan(pipeline: Pipeline) -> list[Line]:
    """The stages of a run with their estimates."""
    estimate = _Estimate(pipeline)
    lines = []
    for stage in pipeline.config.stages:
        manifest = pipeline.run_files.manifest(stage)
        status = "to do" if manifest is None else "done" if manifest["done"] else "begun"
        lines.append(Line(stage, status, *estimate.of(stage)))
    return lines


def show(lines: list[Line]) -> str:
    """As a Markdown table."""
    head = ["| Stage | Status | Rows | Tokens read | Tokens written | |", "|---|---|---:|---:|---:|---|"]
    body = [
        f"| {line.stage} | {line.status} | {line.rows:,} | {line.read:,} | {line.written:,} | {line.note} |"
        for line in lines
    ]
    read, written = sum(line.read for line in lines), sum(line.written for line in lines)
    foot = [
        f"| **sum** | | | {read:,} | {written:,} | |",
        "",
        f"Estimated: {ACCEPTED:.0%} of the mined texts are accepted, texts fill {FILLED:.0%} of their most tokens, no filter "
        "drops a pair. A demonstration that many requests begin with is counted once.",
    ]
    return "\n".join([*head, *body, *foot])


class _Estimate:
    def __init__(self, pipeline: Pipeline) -> None:
        self.config = pipeline.config
        self.tokenizer = _tokenizer(self.config.model_name_or_path)
        mined = self.config.data_config(QUERIES)
        seeds = seed_queries(mined.seeds)
        self.query = max(1, sum(len(tokens_of(self.tokenizer, seed)) for seed in seeds[:50]) // len(seeds[:50]))
        self.mining = len(tokens_of(self.tokenizer, mining_prompt(seeds[: mined.shots])))

    def of(self, stage: str) -> tuple[int, int, int, str]:
        """Rows, tokens read, tokens written, note."""
        if stage in (QUERIES, RLSF_QUERIES):
            config = self.config.data_config(stage)
            texts = round(config.count / ACCEPTED)
            return (
                config.count,
                texts // config.samples * self.mining,
                texts * self.query,
                f"{texts:,} texts, {config.shots} shots each",
            )
        if stage == RESPONSES:
            return self._responses()
        if stage == COMPARISONS:
            return self._pairs(), 0, 0, "at most one pair less than ranks for each query"
        if stage in (REWARD, REWARD_2):
            return self._reward(stage)
        if stage == SELF_PLAY:
            return self._self_play()
        if stage == SFT:
            epochs = float(self.config.block(SFT).get("num_train_epochs", 3))
            rows, tokens = self._demonstrations()
            return rows, round(epochs * rows * tokens), 0, f"{epochs:g} epochs"
        return self._rlsf() if stage == RLSF else (0, 0, 0, "see its block; read: --limit")

    def _responses(self) -> tuple[int, int, int, str]:
        config, queries = self.config.data_config(RESPONSES), self._queries()
        generators = parse_generators(config.generators)
        prefix = sum(self._shots(generator.prompt, generator.shots) for generator in generators)
        new = sum(generator.max_new_tokens or config.max_new_tokens for generator in generators)
        rows = queries * len(generators)
        return rows, prefix + rows * self.query, round(FILLED * queries * new), f"{len(generators)} generators"

    def _reward(self, stage: str) -> tuple[int, int, int, str]:
        block = self.config.block(stage)
        rows = round(self._pairs() * (1 - self.config.data_config(COMPARISONS).heldout_share))
        rows = rows // 2 if block.get("half") else rows
        epochs = float(block.get("num_train_epochs", 1))
        new = FILLED * self.config.data_config(RESPONSES).max_new_tokens
        return rows, round(epochs * rows * 2 * (self.query + new)), 0, f"{epochs:g} epochs"

    def _self_play(self) -> tuple[int, int, int, str]:
        config = self.config.data_config(SELF_PLAY)
        rows, tokens = self._demonstrations()
        answers = rows * config.max_turns
        written = FILLED * (
            answers * config.samples * config.max_new_tokens
            + rows * (config.max_turns - 1) * config.user_max_new_tokens
        )
        prompt, shots = chosen_prompt(self.tokenizer, config.prompt, config.shots, self.config.chat_format)
        read = self._shots(prompt, shots) + rows * tokens
        return (
            rows,
            round(read),
            round(written),
            f"best of {config.samples}, {config.max_turns} turns, prompt {prompt}",
        )

    def _rlsf(self) -> tuple[int, int, int, str]:
        block = self.config.block(RLSF)
        count, answers = self.config.data_config(RLSF_QUERIES).count, int(block.get("num_generations", 4))
        episodes = round(float(block.get("num_train_epochs", 3)) * count * answers)
        if int(block.get("max_steps", -1)) > 0:
            steps = int(block["max_steps"]) * int(block.get("gradient_accumulation_steps", 1))
            episodes = min(episodes, steps * int(block.get("per_device_train_batch_size", 8)))
        new = FILLED * int(block.get("max_completion_length", 256))
        return episodes, round(episodes * (self.query + new)), round(episodes * new), f"{answers} answers a query"

    def _demonstrations(self) -> tuple[int, float]:
        config = self.config.data_config(SELF_PLAY)
        rows = min(self._queries(), config.count or self._queries())
        return rows, config.max_turns * (self.query + FILLED * config.max_new_tokens)

    def _queries(self) -> int:
        return int(self.config.data_config(QUERIES).count)

    def _pairs(self) -> int:
        ranks = {each.rank for each in parse_generators(self.config.data_config(RESPONSES).generators)}
        return self._queries() * (len(ranks) - 1)

    def _shots(self, prompt: str, shots: int) -> int:
        text = assistant_prompt(self.tokenizer, "", load_style(prompt), shots, self.config.chat_format)
        return len(tokens_of(self.tokenizer, text))


def _tokenizer(model: Any) -> PreTrainedTokenizerBase:
    """The model's, or where it isn't here yet, the default model's: an estimate needs no download."""
    try:
        return load_tokenizer(model)
    except (OSError, ValueError):
        return load_tokenizer(DEFAULT_MODEL)
