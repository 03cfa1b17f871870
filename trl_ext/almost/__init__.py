# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""ALMoST (Kim et al. 2023): alignment with synthetic feedback, from a language model and a handful of demonstrations."""

from typing import TYPE_CHECKING

from generation_ext.lazy import found_in


if TYPE_CHECKING:
    from trl_ext.almost.config import ComparisonsConfig, QueriesConfig, ResponsesConfig, SelfPlayConfig
    from trl_ext.almost.data.comparisons import build_comparisons, heuristic_filter, write_comparisons
    from trl_ext.almost.data.queries import mine_queries
    from trl_ext.almost.data.responses import write_responses
    from trl_ext.almost.data.self_play import reward_statistics, self_play
    from trl_ext.almost.pipeline import Pipeline
    from trl_ext.almost.prompts.chat import request_text
    from trl_ext.almost.recipe import AlmostConfig, load_recipe
    from trl_ext.almost.repetition import RepetitionPenalty, repeated_share
    from trl_ext.almost.rewards import RewardModel
    from trl_ext.almost.writing.backends import Backend, Request, Sampling, TransformersBackend, VLLMBackend
    from trl_ext.almost.writing.generators import Generator, parse_generators
    from trl_ext.almost.writing.loading import load_backend


__all__ = [
    "AlmostConfig",
    "Backend",
    "ComparisonsConfig",
    "Generator",
    "Pipeline",
    "QueriesConfig",
    "RepetitionPenalty",
    "Request",
    "ResponsesConfig",
    "RewardModel",
    "Sampling",
    "SelfPlayConfig",
    "TransformersBackend",
    "VLLMBackend",
    "build_comparisons",
    "heuristic_filter",
    "load_backend",
    "load_recipe",
    "mine_queries",
    "parse_generators",
    "repeated_share",
    "request_text",
    "reward_statistics",
    "self_play",
    "write_comparisons",
    "write_responses",
]

__getattr__ = found_in(
    __name__,
    ".config",
    ".prompts.chat",
    ".writing.generators",
    ".writing.backends",
    ".writing.loading",
    ".data.queries",
    ".data.responses",
    ".data.comparisons",
    ".data.self_play",
    ".repetition",
    ".rewards",
    ".recipe",
    ".pipeline",
)
