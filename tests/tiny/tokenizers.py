# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers of a hundred words, of bytes, and of characters with bytes to fall back on."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


VOCAB = 100


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words `w3` ... `w99` to ids 3 ... 99; splits at white space."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, VOCAB)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Single bytes, a few merges and an end token; 258 ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet, special_tokens=["<eos>"])
    tokenizer.train_from_iterator(["a b"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


# SmolLM2's, which has no generation markers and is none of those that TRL knows.
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] "
    "+ '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes with SmolLM2's chat template and its special tokens; 260 ids."""
    fast = byte_tokenizer()
    fast.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"})
    fast.add_tokens(["<|im_start|>"], special_tokens=True)
    fast.chat_template = SMOLLM2_TEMPLATE
    return fast


@functools.cache
def tokenizer(start: bool = False, end: bool = False) -> PreTrainedTokenizerBase:
    """Bytes; with a start or an end token around each text if asked for. It has no padding token."""
    fast = byte_tokenizer()
    token = fast.eos_token
    if start or end:
        single = " ".join([f"{token}"] * start + ["$A"] + [f"{token}"] * end)
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, fast.eos_token_id)]
        )
    return fast


def tokenizer_for(name: str) -> PreTrainedTokenizerBase:
    """Bytes in the manner of the model's family."""
    return tokenizer(start=name in ("llama", "mistral", "gemma2", "opt", "bert"), end=name in ("t5", "bert"))


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 2's kind: BPE over characters, unknown ones as bytes."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)])
    tokenizer.train_from_iterator(["the cat sat on the mat", "that hat is the best of them", "a bath"] * 3, trainer)
    state = tokenizer.to_str()
    tokenizer = Tokenizer.from_str(state)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
