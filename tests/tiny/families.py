# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Tiny models of many families, with random weights, built from configs alone: what the table in `docs/families.md` is about.

`build(name)` gives a fresh float32 model in eval mode, `batch(name)` a batch for it. The layers' inputs are multiples of 16, so
that groups of 16 fit; head counts, experts and convolutions are as small as each family allows.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from tests.tiny.tokenizers import VOCAB


HIDDEN, LAYERS, HEADS, WINDOW = 32, 2, 4, 4
# What most configs call these things; those that have other names for them state them in their row.
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_GROUPED = {"num_key_value_heads": HEADS // 2}
_HEAD = {"head_dim": HIDDEN // HEADS}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT2_SIZES = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 64,
    "initializer_range": 0.2,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
_BART_SIZES = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 2 * HIDDEN,
    "decoder_ffn_dim": 2 * HIDDEN,
    "max_position_embeddings": 64,
    "init_std": 0.2,
    "dropout": 0.0,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5_SIZES = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": HIDDEN // HEADS,
    "d_ff": 2 * HIDDEN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_MASKED_SIZES = {**_SIZES, **_NO_DROPOUT, "num_labels": 3}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}
_VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.2,
}
_IMAGE = VOCAB - 1  # the token that stands for a patch


class Family(NamedTuple):
    """A family of models: its config class, its fields, the auto class of its models and what they read."""

    config: str
    fields: dict[str, Any]
    auto_class: str
    inputs: str  # a key of _INPUTS below


def _causal(config: str, **fields: Any) -> Family:
    return Family(config, {**_SIZES, **fields}, "AutoModelForCausalLM", "tokens")


def _exact(config: str, auto_class: str, inputs: str, **fields: Any) -> Family:
    return Family(config, fields, auto_class, inputs)


_seq2seq = functools.partial(_exact, auto_class="AutoModelForSeq2SeqLM", inputs="seq2seq")
_decoder = functools.partial(_exact, auto_class="AutoModelForCausalLM", inputs="tokens")
_classifier = functools.partial(_exact, auto_class="AutoModelForSequenceClassification", inputs="labelled")
_seeing = functools.partial(_exact, auto_class="AutoModelForImageTextToText", inputs="images")

_LLAMA = {**_SIZES, **_GROUPED, **_SPECIAL}

FAMILIES: dict[str, Family] = {
    # decoders like Llama
    **{
        name: _causal(config, **_GROUPED, **fields)
        for name, config, fields in [
            ("llama", "LlamaConfig", {}),
            ("mistral", "MistralConfig", {"sliding_window": WINDOW}),
            ("ministral", "MinistralConfig", {"sliding_window": WINDOW, **_HEAD}),
            ("qwen2", "Qwen2Config", {"tie_word_embeddings": True}),
            ("qwen3", "Qwen3Config", {**_HEAD, "tie_word_embeddings": True}),
            ("gemma", "GemmaConfig", _HEAD),
            ("gemma2", "Gemma2Config", {**_HEAD, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}),
            ("gemma3", "Gemma3TextConfig", {**_HEAD, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}),
            ("phi", "PhiConfig", {"partial_rotary_factor": 0.5}),
            ("phi3", "Phi3Config", {}),
            ("olmo", "OlmoConfig", {}),
            ("olmo2", "Olmo2Config", {}),
            ("olmo3", "Olmo3Config", {"sliding_window": WINDOW}),
            ("stablelm", "StableLmConfig", {"partial_rotary_factor": 0.5}),
            ("starcoder2", "Starcoder2Config", {"residual_dropout": 0.0, "embedding_dropout": 0.0}),
            ("cohere", "CohereConfig", {}),
            ("cohere2", "Cohere2Config", {"sliding_window": WINDOW}),
            ("granite", "GraniteConfig", {}),
            ("glm", "GlmConfig", _HEAD),
            ("glm4", "Glm4Config", _HEAD),
            ("smollm3", "SmolLM3Config", {}),
            ("nemotron", "NemotronConfig", {}),
            ("helium", "HeliumConfig", _HEAD),
            ("exaone4", "Exaone4Config", {"sliding_window": WINDOW}),
            ("ernie4_5", "Ernie4_5Config", _HEAD),
            ("hunyuan_v1_dense", "HunYuanDenseV1Config", _HEAD),
            ("seed_oss", "SeedOssConfig", _HEAD),
            ("arcee", "ArceeConfig", {}),
            ("apertus", "ApertusConfig", {}),
            ("bitnet", "BitNetConfig", {}),
            ("doge", "DogeConfig", {}),
            ("lfm2", "Lfm2Config", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}),
        ]
    },
    "persimmon": _causal("PersimmonConfig"),
    # earlier decoders
    "gpt2": _decoder("GPT2Config", **_GPT2_SIZES),
    "gpt_bigcode": _decoder("GPTBigCodeConfig", **_GPT2_SIZES),
    "gptj": _decoder("GPTJConfig", **_GPT2_SIZES, rotary_dim=8, tie_word_embeddings=False),
    "codegen": _decoder("CodeGenConfig", **_GPT2_SIZES, rotary_dim=8, n_ctx=64),
    "gpt_neo": _decoder(
        "GPTNeoConfig",
        **{**_SIZES, "num_layers": LAYERS, "num_heads": HEADS, "window_size": WINDOW},
        attention_types=[[["global", "local"], 1]],
    ),
    "gpt_neox": _causal("GPTNeoXConfig"),
    "opt": _causal("OPTConfig", ffn_dim=2 * HIDDEN, word_embed_proj_dim=HIDDEN, dropout=0.0, init_std=0.2),
    "bloom": _decoder(
        "BloomConfig", vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, initializer_range=0.2
    ),
    "mpt": _decoder(
        "MptConfig",
        vocab_size=VOCAB,
        d_model=HIDDEN,
        n_layers=LAYERS,
        n_heads=HEADS,
        max_seq_len=64,
        initializer_range=0.2,
    ),
    "falcon": _causal("FalconConfig"),
    "falcon_new": _causal("FalconConfig", new_decoder_architecture=True, num_kv_heads=2),
    "xglm": _decoder(
        "XGLMConfig",
        vocab_size=VOCAB,
        d_model=HIDDEN,
        ffn_dim=2 * HIDDEN,
        num_layers=LAYERS,
        attention_heads=HEADS,
        max_position_embeddings=64,
        init_std=0.2,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    "biogpt": _causal("BioGptConfig", **_NO_DROPOUT),
    "ctrl": _decoder(
        "CTRLConfig",
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=HIDDEN,
        dff=2 * HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        initializer_range=0.2,
    ),
    # recurrent ones and mixtures of the two
    "mamba": _causal("MambaConfig", state_size=8, time_step_rank=16),
    "falcon_mamba": _causal("FalconMambaConfig", state_size=8, time_step_rank=16),
    "mamba2": _causal("Mamba2Config", state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    "recurrent_gemma": _causal("RecurrentGemmaConfig", lru_width=HIDDEN, attention_window_size=8, num_hidden_layers=3),
    "jamba": _causal(
        "JambaConfig",
        **_GROUPED,
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=4,
        expert_layer_offset=3,
        use_mamba_kernels=False,
        mamba_d_state=8,
        mamba_dt_rank=16,
    ),
    "zamba": _causal(
        "ZambaConfig",
        num_hidden_layers=5,
        attention_hidden_size=2 * HIDDEN,
        attention_head_dim=16,
        n_mamba_heads=2,
        mamba_d_state=8,
        mamba_dt_rank=16,
        use_mamba_kernels=False,
        layers_block_type=["mamba", "hybrid", "mamba", "mamba", "hybrid"],
        num_key_value_heads=HEADS,
    ),
    "zamba2": _causal(
        "Zamba2Config",
        num_hidden_layers=4,
        mamba_d_state=8,
        mamba_headdim=16,
        n_mamba_heads=4,
        mamba_ngroups=1,
        chunk_size=8,
        adapter_rank=16,
        use_mem_rope=False,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        hybrid_layer_ids=[1, 3],
        num_mem_blocks=1,
        use_mamba_kernels=False,
    ),
    "bamba": _causal(
        "BambaConfig",
        **_GROUPED,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=8,
    ),
    "falcon_h1": _causal(
        "FalconH1Config",
        **_GROUPED,
        **_HEAD,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_ssm=64,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=8,
    ),
    "rwkv": _causal("RwkvConfig", context_length=64, attention_hidden_size=HIDDEN, rescale_every=0),
    "qwen3_next": _causal(
        "Qwen3NextConfig",
        **_GROUPED,
        **_HEAD,
        **_EXPERTS,
        num_experts=4,
        shared_expert_intermediate_size=HIDDEN,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    ),
    # mixtures of experts
    "mixtral": _causal("MixtralConfig", **_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _causal(
        "Qwen2MoeConfig", **_GROUPED, **_EXPERTS, num_experts=4, shared_expert_intermediate_size=HIDDEN
    ),
    "qwen3_moe": _causal("Qwen3MoeConfig", **_GROUPED, **_HEAD, **_EXPERTS, num_experts=4),
    "gpt_oss": _causal(
        "GptOssConfig", **_GROUPED, **_HEAD, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW
    ),
    "olmoe": _causal("OlmoeConfig", **_GROUPED, num_experts=4, num_experts_per_tok=2),
    "phimoe": _causal("PhimoeConfig", **_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "granitemoe": _causal("GraniteMoeConfig", **_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": _causal(
        "DeepseekV3Config",
        **_EXPERTS,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        num_key_value_heads=HEADS,
    ),
    "llama4": _causal(
        "Llama4TextConfig",
        **_GROUPED,
        **_HEAD,
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=2 * HIDDEN,
        attention_chunk_size=32,
    ),
    # encoder-decoders
    **{
        name: _seq2seq(config, **_T5_SIZES)
        for name, config in [("t5", "T5Config"), ("mt5", "MT5Config"), ("umt5", "UMT5Config")]
    },
    **{
        name: _seq2seq(config, **_BART_SIZES)
        for name, config in [
            ("bart", "BartConfig"),
            ("mbart", "MBartConfig"),
            ("pegasus", "PegasusConfig"),
            ("marian", "MarianConfig"),
            ("m2m_100", "M2M100Config"),
            ("blenderbot", "BlenderbotConfig"),
        ]
    },
    "led": _exact(
        "LEDConfig",
        "AutoModelForSeq2SeqLM",
        "seq2seq_global",
        **_BART_SIZES,
        attention_window=[4, 4],
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    "whisper": _exact(
        "WhisperConfig",
        "AutoModelForSpeechSeq2Seq",
        "audio",
        **_BART_SIZES,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=64,
    ),
    # encoders
    **{
        name: _classifier(config, **_MASKED_SIZES)
        for name, config in [
            ("bert", "BertConfig"),
            ("roberta", "RobertaConfig"),
            ("deberta", "DebertaConfig"),
            ("deberta_v2", "DebertaV2Config"),
            ("xlm_roberta", "XLMRobertaConfig"),
            ("camembert", "CamembertConfig"),
            ("mpnet", "MPNetConfig"),
        ]
    },
    "electra": _classifier("ElectraConfig", **_MASKED_SIZES, embedding_size=HIDDEN),
    "albert": _classifier("AlbertConfig", **_MASKED_SIZES, embedding_size=HIDDEN, classifier_dropout_prob=0.0),
    "distilbert": _classifier(
        "DistilBertConfig",
        vocab_size=VOCAB,
        dim=HIDDEN,
        hidden_dim=2 * HIDDEN,
        n_layers=LAYERS,
        n_heads=HEADS,
        max_position_embeddings=64,
        num_labels=3,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        initializer_range=0.2,
    ),
    "modernbert": _classifier("ModernBertConfig", **_MASKED_SIZES, local_attention=4, cls_token_id=1, sep_token_id=2),
    # models that see
    "gemma3_vl": _seeing(
        "Gemma3Config",
        text_config={**_LLAMA, **_HEAD, "sliding_window": WINDOW},
        vision_config={"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=_IMAGE,
    ),
    "qwen2_vl": _seeing(
        "Qwen2VLConfig",
        text_config={
            **_LLAMA,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={
            "depth": LAYERS,
            "embed_dim": HIDDEN,
            "hidden_size": HIDDEN,
            "num_heads": HEADS,
            "mlp_ratio": 2,
            "patch_size": 4,
            "initializer_range": 0.2,
        },
        image_token_id=_IMAGE,
        vision_start_token_id=VOCAB - 2,
        vision_end_token_id=VOCAB - 3,
        video_token_id=VOCAB - 4,
    ),
    "qwen2_5_vl": _seeing(
        "Qwen2_5_VLConfig",
        text_config={
            **_LLAMA,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={
            "depth": LAYERS,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "out_hidden_size": HIDDEN,
            "num_heads": HEADS,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.2,
        },
        image_token_id=_IMAGE,
        vision_start_token_id=VOCAB - 2,
        vision_end_token_id=VOCAB - 3,
        video_token_id=VOCAB - 4,
    ),
    "llava": _seeing(
        "LlavaConfig",
        text_config={"model_type": "llama", **_LLAMA},
        vision_config={"model_type": "clip_vision_model", **_VISION},
        image_token_index=_IMAGE,
        vision_feature_layer=-1,
    ),
    "paligemma": _seeing(
        "PaliGemmaConfig",
        text_config={"model_type": "gemma", **_LLAMA, **_HEAD},
        vision_config={"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
        image_token_index=_IMAGE,
        projection_dim=HIDDEN,
    ),
    "mistral3": _seeing(
        "Mistral3Config",
        text_config={"model_type": "mistral", **_LLAMA},
        vision_config={"model_type": "pixtral", **_VISION, "head_dim": 8},
        image_token_index=_IMAGE,
        spatial_merge_size=1,
        vision_feature_layer=-1,
    ),
    "idefics3": _seeing(
        "Idefics3Config",
        text_config={"model_type": "llama", **_LLAMA},
        vision_config={**_VISION},
        image_token_id=_IMAGE,
        scale_factor=2,
    ),
}


def _token_batch() -> dict[str, torch.Tensor]:
    """Three rows of eight tokens, nothing padded: every family reads that the same way."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, VOCAB - 5, (3, 8), generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _tokens(model: Any) -> dict[str, torch.Tensor]:
    found = _token_batch()
    return {**found, "labels": found["input_ids"]}


def _seq2seq_batch(model: Any) -> dict[str, torch.Tensor]:
    return {**_token_batch(), "labels": torch.tensor([[4, 11, 2], [52, 9, 2], [31, 7, 2]])}


def _seq2seq_global(model: Any) -> dict[str, torch.Tensor]:
    """With tokens that see all others (LED has layers for these alone)."""
    found = _seq2seq_batch(model)
    return {**found, "global_attention_mask": torch.eye(8, dtype=torch.long)[:3]}


def _labelled(model: Any) -> dict[str, torch.Tensor]:
    return {**_token_batch(), "labels": torch.tensor([0, 2, 1])}


def _audio(model: Any) -> dict[str, torch.Tensor]:
    features = torch.randn(
        3, model.config.num_mel_bins, 2 * model.config.max_source_positions, generator=torch.Generator().manual_seed(2)
    )
    return {"input_features": features, "labels": torch.tensor([[4, 11, 2], [52, 9, 2], [31, 7, 2]])}


def _images(model: Any) -> dict[str, torch.Tensor]:
    """Text alone: what the vision tower makes of images is tested where its batches are."""
    return _tokens(model)


_INPUTS: dict[str, Callable[[Any], dict[str, torch.Tensor]]] = {
    "tokens": _tokens,
    "seq2seq": _seq2seq_batch,
    "seq2seq_global": _seq2seq_global,
    "labelled": _labelled,
    "audio": _audio,
    "images": _images,
}


@functools.cache
def _template(name: str) -> nn.Module:
    family = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fields = dict(family.fields)
        if "text_config" not in fields:
            fields = {**_SPECIAL, **fields}
        config = getattr(transformers, family.config)(**fields)
        return getattr(transformers, family.auto_class).from_config(config).float().eval()


def build(name: str) -> Any:
    """A fresh model of a family: the same weights at every call, free to be changed."""
    return copy.deepcopy(_template(name))


def batch(name: str, labels: bool = False) -> dict[str, torch.Tensor]:
    """A batch of three samples for it; with `labels` it gives a loss."""
    found = _INPUTS[FAMILIES[name].inputs](_template(name))
    if labels:
        return found
    given = found.pop("labels")
    if FAMILIES[name].inputs in ("seq2seq", "seq2seq_global", "audio"):
        found["decoder_input_ids"] = given
    return found
