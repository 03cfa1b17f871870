# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Tiny models that see or hear beside reading, built from configs, and a batch of texts with images or sounds for each.

`multimodal(name)` gives a fresh float32 model in eval mode, `batch(name)` what its processor would make of two texts,
`MULTIMODAL[name].auto_class` the class that loads it. Images and sounds are noise.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn


VOCAB, IMAGE, VIDEO, START, END, AUDIO = 128, 120, 121, 122, 123, 124
TEXTS, TOKENS = 2, 14
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.2,
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "initializer_range": 0.2,
}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def _gemma3() -> nn.Module:
    config = transformers.Gemma3Config(
        text_config={**_TEXT, "sliding_window": 8, "query_pre_attn_scalar": 8},
        vision_config=_VISION,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _qwen2_vl() -> nn.Module:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config={**_TEXT, **_MROPE}, vision_config=vision, **_QWEN_TOKENS)
    return transformers.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl() -> nn.Module:
    vision = {**_QWEN_VISION, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config={**_TEXT, **_MROPE}, vision_config=vision, **_QWEN_TOKENS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> nn.Module:
    vision = {
        **_QWEN_VISION,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = transformers.Qwen3VLConfig(text_config={**_TEXT, **_MROPE}, vision_config=vision, **_QWEN_TOKENS)
    return transformers.Qwen3VLForConditionalGeneration(config)


def _qwen3_vl_moe() -> nn.Module:
    """Two blocks of two experts in the language model."""
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    vision = {
        **_QWEN_VISION,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = transformers.Qwen3VLMoeConfig(
        text_config={**_TEXT, **_MROPE, **experts}, vision_config=vision, **_QWEN_TOKENS
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def _llava() -> nn.Module:
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config={"model_type": "clip_vision_model", **_VISION},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _llava_next() -> nn.Module:
    config = transformers.LlavaNextConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config={"model_type": "clip_vision_model", **_VISION},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[28, 28], [28, 56]],
    )
    return transformers.LlavaNextForConditionalGeneration(config)


def _paligemma() -> nn.Module:
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", **_TEXT},
        vision_config={"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _mistral3() -> nn.Module:
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **_TEXT},
        vision_config={"model_type": "pixtral", **_VISION, "image_size": 56, "head_dim": 8},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def _idefics3(family: str = "Idefics3") -> nn.Module:
    config = getattr(transformers, f"{family}Config")(
        text_config={"model_type": "llama", **_TEXT},
        vision_config={**_VISION, "image_size": 56},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return getattr(transformers, f"{family}ForConditionalGeneration")(config)


def _smolvlm() -> nn.Module:
    return _idefics3("SmolVLM")


def _qwen2_audio() -> nn.Module:
    audio = {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 8,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "d_model": 16,
        "max_source_positions": 8,
        "initializer_range": 0.2,
    }
    config = transformers.Qwen2AudioConfig(
        text_config={"model_type": "qwen2", **_TEXT}, audio_config=audio, audio_token_index=AUDIO
    )
    return transformers.Qwen2AudioForConditionalGeneration(config)


def _voxtral() -> nn.Module:
    audio = {
        "model_type": "voxtral_encoder",
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_mel_bins": 8,
        "max_source_positions": 8,
        "initializer_range": 0.2,
    }
    config = transformers.VoxtralConfig(
        text_config={"model_type": "llama", **_TEXT}, audio_config=audio, audio_token_id=AUDIO
    )
    return transformers.VoxtralForConditionalGeneration(config)


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=64,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    return transformers.WhisperForConditionalGeneration(config)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def texts(inserted: int = 0, token: int = IMAGE, seed: int = 0, count: int = TEXTS) -> torch.Tensor:
    """Token ids `[count, TOKENS]`; after the first, `inserted` of them stand for an image or a sound."""
    ids = torch.randint(3, 100, (count, TOKENS), generator=torch.Generator().manual_seed(seed))
    ids[:, 1 : 1 + inserted] = token
    return ids


def _with_images(tokens: int, shape: tuple[int, ...], **extra: Any) -> Callable[[int], dict[str, torch.Tensor]]:
    """One image for each text, of `tokens` tokens and `shape` numbers."""

    def batch(seed: int = 0) -> dict[str, torch.Tensor]:
        sized = {key: torch.tensor([value] * TEXTS) for key, value in extra.items()}
        return {"input_ids": texts(tokens, seed=seed), "pixel_values": noise(TEXTS, *shape, seed=seed), **sized}

    return batch


def _typed(make: Callable[[int], dict[str, torch.Tensor]]) -> Callable[[int], dict[str, torch.Tensor]]:
    def batch(seed: int = 0) -> dict[str, torch.Tensor]:
        found = make(seed)
        return {**found, "token_type_ids": (found["input_ids"] == IMAGE).long()}

    return batch


def _patches(seed: int = 0) -> dict[str, torch.Tensor]:
    """Qwen's: patches of all images one after the other; two images in the first text, one, another size, in the second."""
    ids = texts(seed=seed)
    ids[0, 1], ids[0, 2:6], ids[0, 7], ids[0, 8:10] = START, IMAGE, START, IMAGE
    ids[1, 1], ids[1, 2:8] = START, IMAGE
    grids = torch.tensor([[1, 4, 4], [1, 2, 4], [1, 4, 6]])
    pixels = noise(int(grids.prod(1).sum()), 3 * 2 * 4 * 4, seed=seed)
    kinds = (ids == IMAGE).int()
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": kinds}


def _qwen_sounds(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = texts(4, AUDIO, seed)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": noise(TEXTS, 8, 16, seed=seed),
        "feature_attention_mask": torch.ones(TEXTS, 16, dtype=torch.long),
    }


def _voxtral_sounds(seed: int = 0) -> dict[str, torch.Tensor]:
    return {"input_ids": texts(2, AUDIO, seed), "input_features": noise(TEXTS, 8, 16, seed=seed)}


def _speech(seed: int = 0) -> dict[str, torch.Tensor]:
    return {"input_features": noise(TEXTS, 8, 16, seed=seed), "decoder_input_ids": texts(seed=seed)}


class Multimodal(NamedTuple):
    """How to build a model and a batch of a seed for it; its parts beside the language model with their linear layers, and
    the language model's own."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, torch.Tensor]]
    left: dict[str, int]
    packed: int = 14
    auto_class: str = "AutoModelForImageTextToText"


MULTIMODAL = {
    "gemma3": Multimodal(_gemma3, _typed(_with_images(4, (3, 28, 28))), {"vision tower": 15}),
    "qwen2_vl": Multimodal(_qwen2_vl, _patches, {"vision tower": 10}),
    "qwen2_5_vl": Multimodal(_qwen2_5_vl, _patches, {"vision tower": 12}),
    "qwen3_vl": Multimodal(_qwen3_vl, _patches, {"vision tower": 12}),
    "qwen3_vl_moe": Multimodal(_qwen3_vl_moe, _patches, {"vision tower": 12, "router": 2}, packed=4 * 2 + 3 * 2 * 2),
    "llava": Multimodal(_llava, _with_images(4, (3, 28, 28)), {"vision tower": 12, "projector": 2}),
    "llava_next": Multimodal(
        _llava_next, _with_images(10, (2, 3, 28, 28), image_sizes=[28, 28]), {"vision tower": 12, "projector": 2}
    ),
    "paligemma": Multimodal(_paligemma, _with_images(4, (3, 28, 28)), {"vision tower": 12, "projector": 1}),
    "mistral3": Multimodal(
        _mistral3, _with_images(4, (3, 56, 56), image_sizes=[56, 56]), {"vision tower": 14, "projector": 3}
    ),
    "idefics3": Multimodal(_idefics3, _with_images(4, (1, 3, 56, 56)), {"vision tower": 12, "projector": 1}),
    "smolvlm": Multimodal(_smolvlm, _with_images(4, (1, 3, 56, 56)), {"vision tower": 12, "projector": 1}),
    "qwen2_audio": Multimodal(
        _qwen2_audio, _qwen_sounds, {"audio tower": 12, "projector": 1}, auto_class="AutoModelForMultimodalLM"
    ),
    "voxtral": Multimodal(
        _voxtral, _voxtral_sounds, {"audio tower": 12, "projector": 2}, auto_class="AutoModelForMultimodalLM"
    ),
    "whisper": Multimodal(_whisper, _speech, {}, 32, "AutoModelForSpeechSeq2Seq"),
}


@functools.cache
def _template(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MULTIMODAL[name].build().eval()


def multimodal(name: str) -> Any:
    """A fresh model: the same weights at every call, free to be changed."""
    return copy.deepcopy(_template(name))


def batch(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the processor of `multimodal(name)` makes of two texts."""
    return MULTIMODAL[name].batch(seed)
