# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""ALMoST (Kim et al. 2023): alignment with synthetic feedback, from a language model and a handful of demonstrations."""

from __future__ import annotations

import importlib
from typing import Any


# Where each public name lives; imported when it is asked for, as TRL does.
_HOMES = {
    "AlmostConfig": "recipe",
    "Backend": "writing.backends",
    "ComparisonsConfig": "config",
    "Generator": "writing.generators",
    "Pipeline": "pipeline",
    "QueriesConfig": "config",
    "Request": "writing.backends",
    "ResponsesConfig": "config",
    "RewardModel": "rewards",
    "Sampling": "writing.backends",
    "SelfPlayConfig": "config",
    "TransformersBackend": "writing.backends",
    "VLLMBackend": "writing.backends",
    "build_comparisons": "data.comparisons",
    "heuristic_filter": "data.comparisons",
    "load_backend": "writing.loading",
    "load_recipe": "recipe",
    "mine_queries": "data.queries",
    "parse_generators": "writing.generators",
    "reward_statistics": "data.self_play",
    "self_play": "data.self_play",
    "write_comparisons": "data.comparisons",
    "write_responses": "data.responses",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
