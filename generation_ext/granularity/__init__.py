# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Attention that infers each token's granularity (Gu et al. 2022): on pretrained models, in one's own, and as C-DNPG."""

from generation_ext.granularity.attention import GranularityAttention, GranularityConfig, GranularityHead, recorded
from generation_ext.granularity.conversion import (
    convert_to_granularity_attention,
    granularity_parameters,
    load_granularities,
)
from generation_ext.granularity.modeling import CDNPGConfig, CDNPGForConditionalGeneration


__all__ = [
    "CDNPGConfig",
    "CDNPGForConditionalGeneration",
    "GranularityAttention",
    "GranularityConfig",
    "GranularityHead",
    "convert_to_granularity_attention",
    "granularity_parameters",
    "load_granularities",
    "recorded",
]
