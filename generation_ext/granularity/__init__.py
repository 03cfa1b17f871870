# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Attention that infers each token's granularity (Gu et al. 2022): on pretrained models, in one's own, and as C-DNPG.

`AutoModelForSeq2SeqLM` knows saved C-DNPG models once `CDNPGForConditionalGeneration` has been imported.
"""

from typing import TYPE_CHECKING

from generation_ext.lazy import found_in


if TYPE_CHECKING:
    from generation_ext.granularity.attention import GranularityAttention, GranularityConfig, GranularityHead, recorded
    from generation_ext.granularity.conversion import (
        convert_to_granularity_attention,
        granularity_parameters,
        load_granularities,
    )
    from generation_ext.granularity.metrics import paraphrase_metrics
    from generation_ext.granularity.modeling import CDNPGConfig, CDNPGForConditionalGeneration
    from generation_ext.granularity.pictures import as_text, sentence_granularities
    from generation_ext.granularity.tokenizer import train_tokenizer
    from generation_ext.granularity.training import paraphrase, paraphrase_trainer


__all__ = [
    "CDNPGConfig",
    "CDNPGForConditionalGeneration",
    "GranularityAttention",
    "GranularityConfig",
    "GranularityHead",
    "as_text",
    "convert_to_granularity_attention",
    "granularity_parameters",
    "load_granularities",
    "paraphrase",
    "paraphrase_metrics",
    "paraphrase_trainer",
    "recorded",
    "sentence_granularities",
    "train_tokenizer",
]

__getattr__ = found_in(
    __name__, ".attention", ".conversion", ".modeling", ".metrics", ".pictures", ".tokenizer", ".training"
)
