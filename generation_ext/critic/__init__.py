# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""CriticControl (Kim et al., Findings of ACL 2023): a critic on a frozen language model steers what it writes."""

from generation_ext.critic.generate import critic_generate
from generation_ext.critic.processor import CriticLogitsProcessor
from generation_ext.critic.value import Critic, CriticModelConfig, backbone, base_fingerprint


__all__ = ["Critic", "CriticLogitsProcessor", "CriticModelConfig", "backbone", "base_fingerprint", "critic_generate"]
