# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Labels in encoder-decoder models: a text goes through the encoder once, the labels through the decoder beside it.

The encoder sees a text in both directions, so that demonstrations can't be encoded apart from the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.modeling_outputs import BaseModelOutput

from generation_ext.shared_prefix.cache import NarrowedHead
from generation_ext.shared_prefix.encoding import LabelTokens
from generation_ext.shared_prefix.token_tree import TokenTree, unfold
from peft_ext.language_model import LanguageModel


def read_label_logits(traits: LanguageModel, texts: Sequence[Sequence[int]], labels: LabelTokens) -> torch.Tensor:
    """Logits of all states of the labels.

    Args:
        traits: An encoder-decoder model.
        texts: Token ids of whole texts.
        labels: What goes through the decoder.

    Returns:
        `[texts * labels.states, vocabulary]`.
    """
    encoder_rows = unfold([TokenTree.chain(text) for text in texts])
    mask = (torch.arange(encoder_rows.tokens.shape[1]) < encoder_rows.lengths[:, None]).long().to(traits.device)
    encoded = traits.backbone(input_ids=encoder_rows.tokens.to(traits.device), attention_mask=mask)[0]
    tree = TokenTree()
    labels.grow(tree, tree.append([_start_token(traits)]))
    rows = unfold([tree])
    count, branches = len(texts), len(rows.tokens)
    places = rows.places.repeat(count, 1)
    places[:, 0] += torch.arange(count).repeat_interleave(len(rows.places)) * branches
    with NarrowedHead(traits, places):
        output = traits.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.repeat_interleave(branches, dim=0)),
            attention_mask=mask.repeat_interleave(branches, dim=0),
            decoder_input_ids=rows.tokens.repeat(count, 1).to(traits.device),
            use_cache=False,
        )
    return output.logits[0]


def _start_token(traits: LanguageModel) -> int:
    config, generation = traits.model.config, getattr(traits.model, "generation_config", None)
    for holder in (config, generation):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(holder, name, None)
            if token is not None:
                return token
    raise ValueError("model's config has no decoder_start_token_id; set it.")
