# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A WordPiece or BPE tokenizer of one's own texts, in BERT's manner: lower case, [CLS] text [SEP]."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


KINDS = ("wordpiece", "bpe")
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")  # ids 0, 1, 2, 3, 4


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 8000, kind: str = "wordpiece", max_length: int = 20
) -> PreTrainedTokenizerFast:
    """Train a tokenizer.

    Args:
        texts: What it is trained on.
        vocab_size: Most tokens, the special ones included.
        kind: `"wordpiece"` or `"bpe"`.
        max_length: Most tokens of a text, `model_max_length` of the result.

    Raises:
        ValueError: If an argument is out of its range, or the texts have no word.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {KINDS}.")
    if vocab_size <= len(SPECIAL):
        raise ValueError(f"vocab_size={vocab_size} must be above {len(SPECIAL)}, the number of special tokens.")
    wordpiece = kind == "wordpiece"
    model: Any = models.WordPiece(unk_token="[UNK]") if wordpiece else models.BPE(unk_token="[UNK]")
    tokenizer: Any = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece() if wordpiece else decoders.BPEDecoder(suffix="</w>")
    common: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": list(SPECIAL), "show_progress": False}
    trainer: Any = trainers.WordPieceTrainer(**common)
    if not wordpiece:
        trainer = trainers.BpeTrainer(**common, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() <= len(SPECIAL):
        raise ValueError("texts have no words to train a tokenizer on.")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    names = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token", "mask_token"), SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, bos_token="[CLS]", eos_token="[SEP]", **names
    )
