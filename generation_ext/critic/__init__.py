# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""CriticControl (Kim et al., Findings of ACL 2023): a critic on a frozen language model steers what it writes."""

from typing import TYPE_CHECKING, Any

from generation_ext.critic.generate import critic_generate
from generation_ext.critic.processor import CriticLogitsProcessor
from generation_ext.critic.value import Critic, CriticModelConfig
from peft_ext.language_model import backbone, base_fingerprint


if TYPE_CHECKING:
    from generation_ext.critic.training import CriticConfig, CriticTrainer


__all__ = [
    "Critic",
    "CriticConfig",
    "CriticLogitsProcessor",
    "CriticModelConfig",
    "CriticTrainer",
    "backbone",
    "base_fingerprint",
    "critic_generate",
]


def __getattr__(name: str) -> Any:
    # Trainer takes seconds to import, which those who only generate shouldn't wait for
    if name in ("CriticConfig", "CriticTrainer"):
        from generation_ext.critic import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
