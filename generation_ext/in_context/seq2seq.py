# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Labels in encoder-decoder models: a text goes through the encoder once, the labels through the decoder beside it.

The encoder sees a text in both directions, so that demonstrations can't be encoded apart from the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.modeling_outputs import BaseModelOutput

from generation_ext.shared_prefix.cache import encode_whole, narrowed_head
from generation_ext.shared_prefix.encoding import LabelTokens
from generation_ext.shared_prefix.token_tree import TokenTree, unfold
from peft_ext.language_model import LanguageModel, start_tokens


def read_label_logits(model: LanguageModel, texts: Sequence[Sequence[int]], labels: LabelTokens) -> torch.Tensor:
    """Logits of all states of the labels.

    Args:
        model: An encoder-decoder model.
        texts: Token ids of whole texts.
        labels: What goes through the decoder.

    Returns:
        `[texts * labels.states, vocabulary]`.
    """
    output, mask = encode_whole(model, unfold([TokenTree.chain(text) for text in texts]))
    tree = TokenTree()
    labels.grow(tree, tree.append(start_tokens(model.base)))
    rows = unfold([tree])
    count, branches = len(texts), len(rows.tokens)
    places = rows.places.repeat(count, 1)
    places[:, 0] += torch.arange(count).repeat_interleave(len(rows.places)) * branches
    with narrowed_head(model, places):
        decoded = model.base(
            encoder_outputs=BaseModelOutput(last_hidden_state=output[0].repeat_interleave(branches, dim=0)),
            attention_mask=mask.repeat_interleave(branches, dim=0),
            decoder_input_ids=rows.tokens.repeat(count, 1).to(model.device),
            use_cache=False,
        )
    return decoded.logits[0]
