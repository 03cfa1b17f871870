# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The model card of an out-of-distribution pipeline."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from peft_ext.language_model import unwrapped
from peft_ext.model_card import SOURCE, Card, base_model, measured_of


_MOST = 8


def ood_card(pipeline: Any, token: Any = None, online: bool = False) -> Card:
    """What a pipeline knows, what its detector is, and lines that use it.

    Args:
        pipeline: An `OODPipeline`.
        token, online: See `peft_ext.model_card.base_model`.
    """
    model, labels = pipeline.model, [str(name) for name in pipeline.label_names]
    adapted = isinstance(model, PeftModel)
    config = model.peft_config[model.active_adapter] if adapted else None
    base = base_model(model, getattr(config, "base_model_name_or_path", None), token, online)
    shown = ", ".join(f"`{name}`" for name in labels[:_MOST]) + (
        f" and {len(labels) - _MOST} more" if len(labels) > _MOST else ""
    )
    method = "the whole model" if config is None else str(getattr(config.peft_type, "value", config.peft_type))
    facts: dict[str, Any] = {
        "classes": f"{len(labels)}: {shown}",
        "classifier": f"{type(unwrapped(model)).__name__}, trained: {method}",
        "detector": type(pipeline.detector).__name__,
        "threshold": f"{pipeline.threshold:.6g}: scores from there on are in-distribution"
        + ("" if pipeline.offsets is None else "; each class has its own, by `offsets`"),
    }
    kept = "In here are the adapter, its head, the tokenizer and the detector; the base is loaded by its name."
    return Card(
        title="A classifier that knows what it doesn't know",
        text=f"A text classifier on {base} with an out-of-distribution detector behind it: it gives each text a class and "
        f"says whether the text is of a kind that it was trained on. {kept if adapted else 'Everything is in here.'}",
        base=base,
        base_is=f"pipeline.model.peft_config[{model.active_adapter!r}].base_model_name_or_path" if adapted else None,
        relation="adapter" if adapted else "finetune",
        tags=("out-of-distribution-detection", "intent-classification", type(pipeline.detector).__name__.lower()),
        pipeline_tag="text-classification",
        facts=facts,
        measured=measured_of(pipeline),
        snippet=None if adapted and base.name is None else _SNIPPET,
    )


_SNIPPET = f"""
from peft_ext.ood import OODPipeline

pipeline = OODPipeline.from_pretrained("{SOURCE}")
print(pipeline("please book a table for two"))
"""
