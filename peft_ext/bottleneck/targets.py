# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The layers that end each sub-layer of a block, by model family: where bottleneck adapters go by default."""

from __future__ import annotations

from typing import Union


Targets = dict[str, Union[list[str], str]]  # by placement


def _targets(
    attention: list[str], feed_forward: Union[list[str], str], both: Union[list[str], None] = None
) -> Targets:
    """`both`: names for all of them where those of the feed-forward layers are a regular expression."""
    together = both if isinstance(feed_forward, str) else [*attention, *feed_forward]
    return {"houlsby": together or attention, "pfeiffer": feed_forward}


_LLAMA = _targets(["self_attn.o_proj"], ["mlp.down_proj"])
_GPT_NEOX = _targets(["attention.dense"], ["mlp.dense_4h_to_h"])
_T5 = _targets(["SelfAttention.o", "EncDecAttention.o"], ["DenseReluDense.wo"])
_BART = _targets(["self_attn.out_proj", "encoder_attn.out_proj"], ["fc2"])
# "output.dense" ends attention layers, too
_BERT = _targets(["output.dense"], r"(?:.*\.)?layer\.\d+\.output\.dense", both=["output.dense"])

TARGET_MODULES: dict[str, Targets] = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "smollm3", "olmo2"], _LLAMA),
    "gpt2": _targets(["attn.c_proj", "crossattention.c_proj"], ["mlp.c_proj"]),
    "gpt_neo": _targets(["attention.out_proj"], ["mlp.c_proj"]),
    "gptj": _targets(["attn.out_proj"], ["mlp.fc_out"]),
    "gpt_neox": _GPT_NEOX,
    "opt": _targets(["self_attn.out_proj"], ["fc2"]),
    "bloom": _targets(["self_attention.dense"], ["mlp.dense_4h_to_h"]),
    "falcon": _targets(["self_attention.dense"], ["mlp.dense_4h_to_h"]),
    "phi": _targets(["self_attn.dense"], ["mlp.fc2"]),
    **dict.fromkeys(["t5", "mt5"], _T5),
    **dict.fromkeys(["bart", "mbart"], _BART),
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "electra", "camembert", "deberta", "deberta-v2"], _BERT),
    "distilbert": _targets(["attention.out_lin"], ["ffn.lin2"]),
    "mpnet": _targets(["attention.attn.o"], ["output.dense"]),
    "modernbert": _targets(["attn.Wo"], ["mlp.Wo"]),
}
