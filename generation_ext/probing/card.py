# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The model card of a PALP classifier."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_ext.model_card import SOURCE, BaseModel, Card, base_model, measured_of


PAPER = "https://huggingface.co/papers/2212.10873"
_MOST = 8


def palp_card(classifier: Any, token: Any = None, online: bool = False) -> Card:
    """What a fitted classifier is, on which language model, and lines that classify with it.

    Args:
        classifier: A fitted `PALPClassifier`.
        token, online: See `peft_ext.model_card.base_model`.
    """
    model = classifier.model
    base = base_model(model, None, token, online) if isinstance(model, nn.Module) else BaseModel()
    classes = [str(name) for name in classifier.classes_.tolist()]
    shown = ", ".join(f"`{name}`" for name in classes[:_MOST]) + (
        f" and {len(classes) - _MOST} more" if len(classes) > _MOST else ""
    )
    facts: dict[str, Any] = {
        "method": f"[PALP]({PAPER})",
        "classes": shown,
        "template": f"`{classifier.template!r}`",
        "demonstrations": f"{classifier.demonstrations}, {len(classifier.demonstrations_)} texts",
        "reads": _read(classifier),
        "head": classifier.head_.name + ("" if classifier.C_ is None else f", C {classifier.C_:g}"),
    }
    loads = base.name is not None
    return Card(
        title=f"A classifier on {base.title}",
        text=f"A light classifier on hidden states of {base} behind a prompt. The language model stays as it is and isn't "
        "in here.",
        base=base,
        base_is="classifier.model.config._name_or_path" if loads else None,
        tags=("palp", "linear-probing"),
        pipeline_tag="text-classification",
        facts=facts,
        measured=measured_of(classifier),
        snippet=_snippet(classifier.task_.fields) if loads else None,
        notes=("Demonstrations and templates are in the files: they hold texts of the training data.",)
        if classifier.demonstrations_
        else (),
    )


def _read(classifier: Any) -> str:
    if len(classifier.blocks_) > 1:
        return classifier.chosen
    if classifier.layer_ is None:
        return "what its extractor gives"
    how = "chosen by cross-validation" if classifier.layer_scores_ else "as it was asked for"
    return f"layer {classifier.layer_} ({classifier.pooling_}), {how}"


def _snippet(fields: tuple[str, ...]) -> str:
    example = (
        '"a fine film"' if len(fields) == 1 else "{" + ", ".join(f'"{name}": "a fine film"' for name in fields) + "}"
    )
    return f"""
from generation_ext import PALPClassifier

classifier = PALPClassifier.from_pretrained("{SOURCE}")  # and the language model, by its name
print(classifier.predict([{example}]))
"""
