# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""C-DNPG (Gu et al. 2022): an encoder-decoder with GA-Attention everywhere, out of transformers' BART."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration
from transformers.modeling_outputs import Seq2SeqLMOutput

from generation_ext.granularity.attention import (
    GranularityConfig,
    GranularityHead,
    add_granularity,
    check_implementation,
    recorded,
)
from generation_ext.granularity.masks import EARLIER_FLOOR
from peft_ext.file_formats import check_fields, number
from peft_ext.model_card import SOURCE, Card, measured_of
from peft_ext.sealing import OwnFiles
from peft_ext.token_mean import items_in, mean_over_all


_SNIPPET = f"""
from transformers import AutoTokenizer

from generation_ext import CDNPGForConditionalGeneration, paraphrase

model = CDNPGForConditionalGeneration.from_pretrained("{SOURCE}").eval()
tokenizer = AutoTokenizer.from_pretrained("{SOURCE}")  # saved or pushed beside the model
print(paraphrase(model, tokenizer, ["how do i learn to swim"]))
"""


@strict
class CDNPGConfig(BartConfig):
    """C-DNPG's sizes (the paper's by default) and how its attention uses granularities.

    Args:
        granularity_mode: `"R"`, `"S"`, `"R*S"`, `"R+S"`, or None: a plain Transformer of the same size.
        granularity_placement: `"before"` the softmax or `"after"` it, see [`GranularityConfig`].
        granularity_cross_attention: Whether cross-attention gets resonance too.
        initial_granularity: z of all tokens before training.
        mask_floor: The weight that keys out of scope keep, see [`GranularityConfig`]: 0. A saved config that doesn't say is of a
            model that was trained with 1e-6, and keeps that.
        max_position_embeddings: Most tokens of a text, which is also N of eq. 8.
        kwargs: Those of `BartConfig`.
    """

    model_type = "cdnpg"

    vocab_size: int = 30522
    max_position_embeddings: int = 20
    d_model: int | None = 450
    encoder_layers: int | None = 3
    decoder_layers: int | None = 3
    encoder_attention_heads: int | None = 9
    decoder_attention_heads: int | None = 9
    encoder_ffn_dim: int | None = 1024
    decoder_ffn_dim: int | None = 1024
    attention_dropout: float | int | None = 0.1
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 1
    forced_eos_token_id: int | list[int] | None = None
    granularity_mode: str | None = "R*S"
    granularity_placement: str = "before"
    granularity_cross_attention: bool = True
    initial_granularity: float = 0.5
    mask_floor: float = 0.0

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As any config of transformers; what was saved before `mask_floor` keeps the floor that it was trained with."""
        if "transformers_version" in config_dict and "mask_floor" not in config_dict:
            config_dict = {**config_dict, "mask_floor": EARLIER_FLOOR}
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: what isn't the default, and `mask_floor`, whose absence means an earlier model."""
        return {**super().to_diff_dict(), "mask_floor": self.mask_floor}

    def granularity(self) -> Optional[GranularityConfig]:
        """For the attention; None for the plain Transformer.

        Raises:
            ValueError: If a value is unknown or out of its range.
        """
        if self.granularity_mode is None:
            return None
        initial = {"initial_granularity": self.initial_granularity}
        check_fields(initial, {"initial_granularity": number(0, 1)}, "a C-DNPG model's config", "Mend it.")
        return GranularityConfig(
            mode=self.granularity_mode,
            placement=self.granularity_placement,
            max_length=self.max_position_embeddings,
            initial=self.initial_granularity,
            cross_attention=self.granularity_cross_attention,
            mask_floor=self.mask_floor,
        )


@dataclass
class CDNPGOutput(Seq2SeqLMOutput):
    """What the model gives.

    Attributes:
        encoder_granularities: z of the source's tokens for each layer, `[batch, source]`; with `output_granularities`.
        decoder_granularities: z of the target's tokens for each layer's self-attention, `[batch, target]`.
        cross_granularities: z of the target's tokens for each layer's cross-attention, `[batch, target]`.
    """

    encoder_granularities: Optional[tuple[torch.Tensor, ...]] = None
    decoder_granularities: Optional[tuple[torch.Tensor, ...]] = None
    cross_granularities: Optional[tuple[torch.Tensor, ...]] = None


class CDNPGForConditionalGeneration(OwnFiles, BartForConditionalGeneration):
    """The paraphrase model; used as any encoder-decoder of transformers.

    Example:

    ```py
    >>> model = CDNPGForConditionalGeneration(CDNPGConfig(vocab_size=len(tokenizer)))
    >>> model.generate(**tokenizer("how do i learn to swim", return_tensors="pt"), num_beams=8)
    ```
    """

    config_class = CDNPGConfig
    config: CDNPGConfig
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: CDNPGConfig) -> None:
        granularity = config.granularity()  # refuses before anything is made
        super().__init__(config)
        if granularity is None:
            return
        size: Any = config.d_model
        for layer in self.model.encoder.layers:
            add_granularity(layer.self_attn, size, granularity, is_causal=False)
        for layer in self.model.decoder.layers:
            add_granularity(layer.self_attn, size, granularity, is_causal=True)
            if granularity.cross_attention:
                add_granularity(layer.encoder_attn, size, granularity, is_causal=False)
        self.config._attn_implementation = check_implementation(self.config._attn_implementation)

    def model_card(self, token: Any = None, online: bool = False) -> Card:
        """What `save_pretrained` and `push_to_hub` write into README.md; see `peft_ext.model_card`."""
        config = self.config
        return Card(
            title="A paraphrase model (C-DNPG)",
            text="An encoder-decoder that infers the granularity of each token and paraphrases word by word or phrase by "
            "phrase; its architecture is peft-ext's, on transformers' BART.",
            base=None,
            tags=("paraphrase", "c-dnpg", "text2text-generation"),
            facts={
                "method": "[C-DNPG](https://huggingface.co/papers/2209.01765)",
                "granularity": f"`{config.granularity_mode}`, {config.granularity_placement} the softmax",
                "size": f"{config.encoder_layers} and {config.decoder_layers} layers of {config.d_model}, "
                f"{self.num_parameters():,} numbers, texts of {config.max_position_embeddings} tokens",
            },
            measured=measured_of(self),
            snippet=_SNIPPET,
        )

    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        decoder_input_ids: Optional[torch.Tensor] = None,
        decoder_attention_mask: Optional[torch.Tensor] = None,
        labels: Optional[torch.Tensor] = None,
        output_granularities: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        num_items_in_batch: Optional[torch.Tensor] = None,
        **kwargs: Any,
    ) -> Any:
        """As `BartForConditionalGeneration`.

        Args:
            num_items_in_batch: How many labels the mean of the loss is over, where they are of several batches; Trainer says.
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, labels, return_dict, kwargs: BART's.
            output_granularities: Whether to give the tokens' z, see [`CDNPGOutput`].
        """
        # Trainer and generate read the names off this signature
        kwargs.update(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            labels=labels,
        )
        if not output_granularities or self.config.granularity_mode is None:
            output = super().forward(return_dict=True, **kwargs)
            _count_labels(output, labels, num_items_in_batch)
            as_dict = self.config.return_dict if return_dict is None else return_dict
            return output if as_dict else output.to_tuple()
        with recorded(self) as granularities:
            output = super().forward(return_dict=True, **kwargs)
        _count_labels(output, labels, num_items_in_batch)
        encoder = tuple(z for name, z in granularities.items() if ".encoder." in name)
        decoder = tuple(z for name, z in granularities.items() if ".decoder." in name and name.endswith("self_attn"))
        cross = tuple(z for name, z in granularities.items() if name.endswith("encoder_attn"))
        result = CDNPGOutput(
            **output, encoder_granularities=encoder, decoder_granularities=decoder, cross_granularities=cross
        )
        return result if return_dict is not False else result.to_tuple()

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, GranularityHead):
            module.reset_parameters()


def _count_labels(output: Any, labels: Optional[torch.Tensor], num_items_in_batch: Optional[torch.Tensor]) -> None:
    """Make of a mean over a batch's labels the batch's part of a mean over more of them."""
    if labels is not None and num_items_in_batch is not None:
        count = items_in(labels)
        output.loss = mean_over_all(output.loss * count, count, num_items_in_batch)


AutoConfig.register(CDNPGConfig.model_type, CDNPGConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(CDNPGConfig, CDNPGForConditionalGeneration, exist_ok=True)
