# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A critic's model card."""

from __future__ import annotations

from typing import Any

from peft_ext.model_card import SOURCE, Card, measured_of, named_base


PAPER = "https://huggingface.co/papers/2212.10938"
_PROMPT = "The film was"


def critic_card(critic: Any, token: Any = None, online: bool = False) -> Card:
    """What a critic is, for which language model, and lines that steer with it.

    Args:
        critic: A `Critic`.
        token, online: See `peft_ext.model_card.base_model`.
    """
    config = critic.config
    base = named_base(config.base_model_name_or_path, config.base_model_fingerprint, token, online)
    facts: dict[str, Any] = {
        "method": f"[CriticControl]({PAPER})",
        "head": f"{config.head}, on {_reads(config)}",
        "numbers": f"{sum(parameter.numel() for parameter in critic.parameters()):,}",
    }
    if config.lora_rank:
        facts["the critic's own LoRA"] = f"rank {config.lora_rank}, on {len(config.lora_layers)} layers"
    if config.action_values:
        facts["action values"] = "yes: `mode` other than exact is possible"
    if config.control_codes:
        facts["control codes"] = ", ".join(f"`{code}`" for code in config.control_codes)
    return Card(
        title=f"A critic for {base.title}",
        text=f"A value head for {base}: it reads, off the model's hidden states, the probability that the finished text "
        "will have an attribute, and so steers generation. The language model stays as it is and isn't in here.",
        base=base,
        base_is="critic.config.base_model_name_or_path",
        tags=("critic-control", "controlled-text-generation"),
        pipeline_tag="text-generation",
        facts=facts,
        measured=measured_of(critic),
        snippet=None if base.name is None else _snippet(base.name, config.control_codes),
    )


def _reads(config: Any) -> str:
    layers = " and ".join(map(str, config.layers or [])) or None
    states = f"the states of layer {layers}" if layers else f"the last hidden states of {config.hidden_size}"
    return states + (" and their mean over the text" if config.running_mean else "")


def _snippet(base: str, codes: list[str]) -> str:
    prompt = f'critic.control_prompt("{_PROMPT}", "{codes[0]}")' if codes else f'"{_PROMPT}"'
    return f"""
import peft_ext
from generation_ext import Critic, CriticLogitsProcessor

model = peft_ext.load("{base}", kind="auto")
tokenizer = peft_ext.load_tokenizer("{base}")
critic = Critic.from_pretrained("{SOURCE}").eval().attach(model)
inputs = tokenizer({prompt}, return_tensors="pt")
with CriticLogitsProcessor(model, critic, strength=4.0) as processor:
    output = model.generate(**inputs, max_new_tokens=20, logits_processor=[processor])
print(tokenizer.decode(output[0]))
"""
