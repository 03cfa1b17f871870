# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Tiny models with random weights, built from configs: no download, the same on every machine, milliseconds per step.

Only the MLP has dropout, so that the others compute the same in training and evaluation.

`tiny(name)` gives a fresh float32 model in eval mode (tuners change a model in place), `inputs(name)` a batch for it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
import transformers
from torch import nn

from tests.tiny.tokenizers import VOCAB


HIDDEN = 32
LAYERS = 2
HEADS = 4
WINDOW = 4  # what sliding attention sees
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    **_SPECIAL,
}


class MLP(nn.Module):
    """Three linear layers and dropout, like a user's own model: no config, no `generate`."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 32, bias=bias)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.lin1 = nn.Linear(32, 16, bias=bias)
        self.head = nn.Linear(16, 2, bias=bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(self.relu(self.lin0(features)))
        return self.head(self.relu(self.lin1(hidden)))


class ConvNet(nn.Module):
    """Two convolutions (which stay as they are), an embedding that is not used in `forward`, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3)
        self.conv1 = nn.Conv2d(8, 8, 3)
        self.embed = nn.Embedding(4, 8)
        self.lin0 = nn.Linear(32, 32)
        self.head = nn.Linear(32, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = torch.relu(self.conv1(torch.relu(self.conv0(images))))
        return self.head(torch.relu(self.lin0(maps.flatten(1))))


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(num_hidden_layers=LAYERS, tie_word_embeddings=False, **_SHAPE)
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def _opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        init_std=0.2,
        dropout=0.0,
    )
    return transformers.OPTForCausalLM(config)


def _gpt_neox() -> nn.Module:
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return transformers.GPTNeoXForCausalLM(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=2 * HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        decoder_start_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        initializer_factor=1.0,
        dropout_rate=0.0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        pad_token_id=0,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    return transformers.BertForSequenceClassification(config)


def _mistral() -> nn.Module:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(num_hidden_layers=LAYERS, sliding_window=WINDOW, **_SHAPE)
    )


def _gemma3() -> nn.Module:
    """Sliding and full attention, one mask for each."""
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=3,
        head_dim=HIDDEN // HEADS,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **_SHAPE,
    )
    return transformers.Gemma3ForCausalLM(config)


def _lfm2() -> nn.Module:
    """Convolutions and attention: the cache has a state that isn't keys and values."""
    config = transformers.Lfm2Config(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], **_SHAPE)
    return transformers.Lfm2ForCausalLM(config)


def _bloom() -> nn.Module:
    """ALiBi: positions come from the mask."""
    config = transformers.BloomConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, initializer_range=0.2, **_SPECIAL
    )
    return transformers.BloomForCausalLM(config)


def _gpt_neo() -> nn.Module:
    """Local attention with a mask of the model's own."""
    config = transformers.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_layers=2,
        num_heads=HEADS,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        max_position_embeddings=64,
        initializer_range=0.2,
        **_SPECIAL,
    )
    return transformers.GPTNeoForCausalLM(config)


def _bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=2 * HIDDEN,
        decoder_ffn_dim=2 * HIDDEN,
        max_position_embeddings=64,
        init_std=0.2,
        dropout=0.0,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **_SPECIAL,
    )
    return transformers.BartForConditionalGeneration(config)


def _token_batch() -> dict[str, torch.Tensor]:
    """Three rows of six tokens; the first row is left-padded, as for generation."""
    input_ids = torch.tensor([[0, 0, 5, 17, 40, 8], [9, 3, 77, 4, 61, 12], [33, 90, 21, 6, 50, 7]])
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}


def _seq2seq_batch() -> dict[str, torch.Tensor]:
    return {**_token_batch(), "decoder_input_ids": torch.tensor([[0, 4, 11], [0, 52, 9], [0, 31, 7]])}


def _features() -> dict[str, torch.Tensor]:
    return {"features": torch.randn(3, 10, generator=torch.Generator().manual_seed(3))}


def _images() -> dict[str, torch.Tensor]:
    return {"images": torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(4))}


class TinyModel(NamedTuple):
    """How to build a tiny model, a batch for it, and for a model that tuners are tested on how many linear layers
    "all-linear" finds (output head left out)."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    linear_layers: Optional[int] = None
    generates: bool = True
    blocks: bool = True


TINY_MODELS = {
    "llama": TinyModel(_llama, _token_batch, linear_layers=7 * LAYERS),
    "gpt2": TinyModel(_gpt2, _token_batch, linear_layers=4 * LAYERS),
    "opt": TinyModel(_opt, _token_batch, linear_layers=6 * LAYERS),
    "gpt_neox": TinyModel(_gpt_neox, _token_batch, linear_layers=4 * LAYERS),
    "t5": TinyModel(_t5, _seq2seq_batch, linear_layers=(6 + 10) * LAYERS),
    "bert": TinyModel(_bert, _token_batch, linear_layers=6 * LAYERS + 1, generates=False),
    "mlp": TinyModel(MLP, _features, linear_layers=3, generates=False, blocks=False),
    "conv": TinyModel(ConvNet, _images, linear_layers=2, generates=False, blocks=False),
    "mistral": TinyModel(_mistral, _token_batch),
    "gemma3": TinyModel(_gemma3, _token_batch),
    "lfm2": TinyModel(_lfm2, _token_batch),
    "bloom": TinyModel(_bloom, _token_batch),
    "gpt_neo": TinyModel(_gpt_neo, _token_batch),
    "bart": TinyModel(_bart, _seq2seq_batch),
}


@functools.cache
def _template(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TINY_MODELS[name].build().eval()


def tiny(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh model: the same weights at every call, free to be changed."""
    return copy.deepcopy(_template(name)).to(dtype)


def inputs(name: str) -> dict[str, torch.Tensor]:
    """A batch of three rows for `tiny(name)`."""
    return TINY_MODELS[name].inputs()


def logits_of(model: nn.Module, batch: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    """The model's first output (logits), whatever kind of model it is."""
    output = model(**batch, **kwargs)
    return output if isinstance(output, torch.Tensor) else output[0]
