# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""CriticControl (Kim et al., Findings of ACL 2023): a critic on a frozen language model steers what it writes."""

from typing import TYPE_CHECKING

from generation_ext.lazy import found_in


if TYPE_CHECKING:
    from generation_ext.critic.generate import critic_generate
    from generation_ext.critic.model_config import CriticModelConfig
    from generation_ext.critic.processor import CriticLogitsProcessor
    from generation_ext.critic.rewards import from_classifier, from_pipeline, from_texts
    from generation_ext.critic.training import CriticConfig, CriticTrainer
    from generation_ext.critic.value import Critic
    from peft_ext.language_model import backbone, base_fingerprint


__all__ = [
    "Critic",
    "CriticConfig",
    "CriticLogitsProcessor",
    "CriticModelConfig",
    "CriticTrainer",
    "backbone",
    "base_fingerprint",
    "critic_generate",
    "from_classifier",
    "from_pipeline",
    "from_texts",
]

# training imports transformers' Trainer, seconds that those who only generate shouldn't wait for
__getattr__ = found_in(
    __name__, "peft_ext.language_model", ".value", ".processor", ".generate", ".rewards", ".training"
)
