# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Perplexity on blocks of tokens."""

from __future__ import annotations

import pytest
import torch

from peft_ext.language_model import check_tokens
from peft_ext.perplexity import perplexity
from tests.tiny.models import tiny
from tests.tiny.tokenizers import tiny_tokenizer


def test_perplexity_is_that_of_the_mean_loss():
    model = tiny("llama").train()
    blocks = torch.randint(3, 90, (5, 12))
    with torch.no_grad():
        model.eval()
        logits = model(blocks).logits[:, :-1]
        model.train()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).exp().item()
    for batch_size in (1, 2, 8):
        assert perplexity(model, blocks, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)
    assert model.training


@pytest.mark.parametrize("shape", [(0, 8), (4, 1), (8,)])
def test_perplexity_refuses_blocks_that_predict_nothing(shape):
    with pytest.raises(ValueError, match="blocks must be"):
        perplexity(tiny("llama"), torch.zeros(shape, dtype=torch.long))


def test_a_token_that_the_model_lacks_is_named():
    """(An IndexError of torch's, which names neither.)"""
    with pytest.raises(
        ValueError, match="block 1 has the token 5000, which the model lacks: it has embeddings of 100"
    ):
        perplexity(tiny("llama"), torch.tensor([[3, 4, 5], [3, 5000, 5]]))
    words = tiny_tokenizer()
    words.add_tokens(["new"])
    with pytest.raises(ValueError, match=r"text 0 has the token 'new' \(100\), which the model lacks"):
        check_tokens(tiny("llama"), [words("w5 new")["input_ids"]], words)


@pytest.mark.parametrize("blocks", [torch.full((2, 8), 5), torch.full((2, 8), -7)], ids=["good", "no such token"])
def test_every_module_gets_its_own_mode_back(blocks):
    """A frozen part stays in eval, also where the pass fails."""
    model = tiny("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    try:
        perplexity(model, blocks)
    except IndexError:
        assert blocks.max() < 0
    assert [module.training for module in model.modules()] == before
