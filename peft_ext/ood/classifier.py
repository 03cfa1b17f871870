# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A text classifier as the study builds it: any model of transformers, its hidden states pooled, a linear head without
bias."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from peft_ext.language_model import is_causal_config, unwrapped
from peft_ext.models import load, load_config
from peft_ext.sealing import OwnFiles
from peft_ext.token_mean import items_in, mean_over_all


POOLINGS = ("last", "mean", "first")


class PooledClassifier(OwnFiles, PreTrainedModel):
    """`score(pool(backbone(tokens)))`: one architecture for causal models and encoders, as in the study.

    Args:
        config: The backbone's, with `pooling` (`"last"`: the last token that isn't padding; `"mean"`; `"first"`) and
            `num_labels`.
        backbone: The model without head; None: made from the config, with random weights.
    """

    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: PretrainedConfig, backbone: Optional[PreTrainedModel] = None) -> None:
        super().__init__(config)
        pooling = getattr(config, "pooling", None)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} is unknown; choose one of {POOLINGS}.")
        self.backbone = AutoModel.from_config(config) if backbone is None else backbone
        if isinstance(getattr(self.backbone, "pooler", None), nn.Module):
            self.backbone.pooler = None  # ours takes its place; it must be neither packed nor counted
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @classmethod
    def from_backbone(
        cls, model: Optional[str], num_labels: int, pooling: Optional[str] = None, layers: Optional[int] = None
    ) -> PooledClassifier:
        """A new head on a pretrained model.

        Args:
            model: What names it (see `peft_ext.models.load`), an encoder or a causal model.
            num_labels: Number of classes.
            pooling: None: `"last"` for causal models, `"mean"` for encoders.
            layers: Keep only so many of its first layers.

        Raises:
            FileNotFoundError, ImportError: If the model isn't there.
            ValueError: If it has fewer layers, or an unknown `pooling`.
        """
        causal = is_causal_config(load_config(model))
        # a causal model is loaded with its head, since GGUF and GPTQ name their tensors so
        backbone = unwrapped(load(model, kind="causal" if causal else "encoder", dtype=torch.float32)).base_model
        config = backbone.config
        if layers is not None:
            keep_layers(backbone, layers)
        config.pooling, config.num_labels = pooling or ("last" if causal else "mean"), num_labels
        return cls(config, backbone)

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> PooledClassifier:  # type: ignore[override]
        """Read a classifier that `save_pretrained` wrote."""
        kwargs.setdefault("config", AutoConfig.from_pretrained(folder))
        return super().from_pretrained(folder, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        past_key_values: Any = None,
        labels: Optional[torch.Tensor] = None,
        num_items_in_batch: Optional[torch.Tensor] = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits `[batch, labels]`, and with `labels` `[batch]` their cross-entropy, the mean over `num_items_in_batch` where
        Trainer says that there are more of them; `past_key_values` is a prefix."""
        kwargs = {name: value for name, value in kwargs.items() if name not in ("return_dict", "token_type_ids")}
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        output = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **kwargs
        )
        states = output.last_hidden_state
        logits = self.score(pool(states, attention_mask, self.config.pooling).to(self.score.weight.dtype))
        loss = None
        if labels is not None:
            total = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            loss = mean_over_all(total, items_in(labels), num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def pool(states: torch.Tensor, attention_mask: Optional[torch.Tensor], pooling: str) -> torch.Tensor:
    """Hidden states `[batch, tokens, size]` to `[batch, size]`; the mask may be longer, by a prefix in front."""
    if attention_mask is None:
        attention_mask = states.new_ones(states.shape[:2], dtype=torch.long)
    mask = attention_mask[:, -states.shape[1] :]
    if pooling == "first":
        index = mask.argmax(dim=1)
    elif pooling == "last":
        index = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
    else:
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
    return states[torch.arange(len(states), device=states.device), index]


def layer_list(model: nn.Module) -> Optional[nn.ModuleList]:
    """The layers that a model runs in turn; None if it has no list of them."""
    found = _named_layer_list(model)
    return None if found is None else found[1]


def _named_layer_list(model: nn.Module) -> Optional[tuple[str, nn.ModuleList]]:
    total = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            return name, module
    return None


def keep_layers(backbone: PreTrainedModel, layers: int) -> None:
    """Cut a model down to its first layers.

    Raises:
        ValueError: If it has fewer, or its layers can't be found.
    """
    total = backbone.config.num_hidden_layers
    found = _named_layer_list(backbone)
    if found is None:
        raise ValueError(f"layers={layers}: no list of {total} layers was found in a {type(backbone).__name__}.")
    if not 1 <= layers <= total:
        raise ValueError(f"layers={layers}: the model has {total} layers.")
    name, module = found
    parent = backbone.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], module[:layers])
    backbone.config.num_hidden_layers = layers
    kinds = getattr(backbone.config, "layer_types", None)
    if kinds:
        backbone.config.layer_types = kinds[:layers]
