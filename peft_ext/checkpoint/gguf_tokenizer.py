# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A fast tokenizer as GGUF's metadata: vocabulary, merges or scores, special tokens, chat template.

Source: llama.cpp's `conversion/base.py` (`get_vocab_base`, `get_vocab_base_pre`) and `gguf.SpecialVocab`.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any, Optional

from tokenizers import Regex, pre_tokenizers
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from peft_ext.files import scratch


# llama.cpp tells pre-tokenizers apart by what becomes of this text.
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
# SHA-256 of its ids in the vocabularies of the supported architectures that llama.cpp knows. These come first: what
# transformers reads from a GGUF may have another pre-tokenizer than the vocabulary was made with.
FINGERPRINTS = {
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
}
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "▁"  # SentencePiece's


def add_tokenizer(
    writer: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    vocab_size: int,
    pre_tokenizer: Optional[str] = None,
) -> None:
    """Add a tokenizer to a GGUF's metadata.

    Args:
        writer: A `gguf.GGUFWriter`.
        config: The model's, for special tokens that the tokenizer doesn't name.
        vocab_size: Rows of the model's embedding; ids without a token are filled up.
        pre_tokenizer: llama.cpp's name of what cuts text before merging, where it can't be told from the tokenizer.

    Raises:
        ValueError: If llama.cpp has no counterpart of the tokenizer.
    """
    import gguf

    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer={type(tokenizer).__name__} is a slow one; pass a fast tokenizer (AutoTokenizer's)."
        )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ValueError(f"tokenizer: llama.cpp's tokenizers of these models are BPE, this one is {model['type']}.")
    sentencepiece = bool(model.get("byte_fallback"))
    name = "default" if sentencepiece else pre_tokenizer or recognize(tokenizer)
    tokens, types = _vocabulary(tokenizer, vocab_size, model.get("unk_token") if sentencepiece else None)
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if sentencepiece:
        writer.add_token_scores(_scores(tokens, model["merges"]))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith(_SPACE))
    with scratch("gguf-tokenizer") as folder:
        tokenizer.save_pretrained(folder)
        config.to_json_file(str(Path(folder, "config.json")))
        special = gguf.SpecialVocab(folder, load_merges=not sentencepiece, n_vocab=vocab_size)
    # what the tokenizer does, whatever its files say
    encoded = tokenizer("a", return_special_tokens_mask=True)
    special.add_special_token = {
        kind: bool(encoded["special_tokens_mask"][end])
        and encoded["input_ids"][end] == special.special_token_ids[kind]
        for kind, end in (("bos", 0), ("eos", -1))
        if kind in special.special_token_ids
    }
    special.add_to_gguf(writer)


def recognize(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name of a byte-level tokenizer's pre-tokenizer.

    A vocabulary that llama.cpp knows is recognised by its ids of a text, as llama.cpp's converter does it; any other by
    the pieces that its pre-tokenizer cuts the text into.

    Raises:
        ValueError: If it is neither.
    """
    ids = tokenizer.encode(CHECK_TEXT)
    fingerprint = hashlib.sha256(str(ids).encode()).hexdigest()
    if fingerprint in FINGERPRINTS:
        return FINGERPRINTS[fingerprint]
    backend = tokenizer.backend_tokenizer
    ignores_merges = bool(getattr(backend.model, "ignore_merges", False))
    known = _known_pre_tokenizers()
    if backend.pre_tokenizer is not None:
        pieces = _pieces(backend.pre_tokenizer)
        for name, (pre_tokenizer, ignoring) in known.items():
            if ignoring == ignores_merges and _pieces(pre_tokenizer) == pieces:
                return name
    raise ValueError(
        f"the tokenizer's pre-tokenizer is none of {tuple(known)}; if llama.cpp has it under another name "
        "(get_vocab_base_pre in its converter), pass that as pre_tokenizer=."
    )


def _known_pre_tokenizers() -> dict[str, tuple[Any, bool]]:
    """llama.cpp's name: what cuts the text, and whether words that are tokens are taken whole (`ignore_merges`)."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def split(pattern: str) -> Any:
        tail = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), tail])

    return {
        "gpt-2": (byte_level, False),
        "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]), False),
        "qwen2": (split(_SPLIT % ""), False),
        "llama-bpe": (split(_SPLIT % "{1,3}"), True),
        "smaug-bpe": (split(_SPLIT % "{1,3}"), False),  # Llama 3's without `ignore_merges`
    }


def _pieces(pre_tokenizer: Any) -> list[str]:
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(CHECK_TEXT)]


def _vocabulary(
    tokenizer: PreTrainedTokenizerBase, size: int, unk_token: Optional[str]
) -> tuple[list[str], list[int]]:
    """Text and type of every id below `size`. unk_token: SentencePiece's; None for a byte-level vocabulary."""
    from gguf import TokenType

    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    beyond = [index for index in by_id if index >= size]
    if beyond:
        warnings.warn(
            f"{len(beyond)} tokens have ids of {size} and more, for which the model has no embedding; they are left "
            f"out of the GGUF (first: {by_id[min(beyond)]!r}).",
            stacklevel=4,
        )
    tokens: list[str] = []
    types: list[int] = []
    for index in range(size):
        token = by_id.get(index)
        if token is None:
            token, kind = f"[PAD{index}]", TokenType.UNUSED
        elif unk_token is not None and token == unk_token:
            kind = TokenType.UNKNOWN
        elif unk_token is not None and re.fullmatch("<0x[0-9A-F]{2}>", token):
            kind = TokenType.BYTE
        elif index not in added:
            kind = TokenType.NORMAL
        elif added[index].special:
            kind = TokenType.CONTROL
        else:
            token, kind = token.replace(_SPACE, " "), TokenType.USER_DEFINED
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece's scores: llama.cpp merges the pair whose joint token has the highest one, so the first merge's."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]
