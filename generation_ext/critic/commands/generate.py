# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`generate`: text that one critic or several steer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch

from generation_ext.critic.commands.arguments import CriticArguments, critic_folders, load_critics
from generation_ext.critic.generate import critic_generate
from generation_ext.critic.rollouts import RolloutSampler
from generation_ext.critic.value import Critic
from peft_ext.command_line import TextArguments, parse, show


@dataclass
class GenerateArguments(CriticArguments, TextArguments):
    """Arguments of `generate`; temperature and top_p come after the critic."""

    strength: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "Exponent of the value ratio; one, or one for each critic."}
    )
    control_code: Optional[str] = field(
        default=None, metadata={"help": "Attribute, for a critic with control codes; may be one it never saw."}
    )
    max_new_tokens: int = field(default=32, metadata={"help": "Tokens to generate at most."})
    num_beams: int = field(default=1, metadata={"help": "Beams of beam search."})


@torch.no_grad()
def main(argv: Sequence[str]) -> None:
    """Generate for every prompt, and print prompt and continuation."""
    (args,) = parse(argv, GenerateArguments, positional="critic")
    prompts = args.prompts()
    folders = critic_folders(args.critic)
    model, tokenizer = args.load()
    critics = load_critics(folders, model)
    texts = [_with_code(critics, prompt, args.control_code) for prompt in prompts]
    inputs, _ = RolloutSampler(model, tokenizer).tokenize(texts)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    tokens = _generate(args, model, tokenizer, critics, inputs)
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    answers = tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
    whole = [text if model.config.is_encoder_decoder else prompt + text for prompt, text in zip(prompts, answers)]
    show(
        [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, whole)],
        "\n".join(f"--- {prompt}\n{text}\n" for prompt, text in zip(prompts, whole)),
    )


def _generate(args: GenerateArguments, model: Any, tokenizer: Any, critics: list[Critic], inputs: Any) -> torch.Tensor:
    """Through the loop that reuses the candidates' forward pass, where it can be."""
    strength = args.strength[0] if len(args.strength) == 1 else args.strength
    with args.processor(model, critics, strength, attention_mask=inputs["attention_mask"]) as processor:
        reuses = args.mode == "exact" and args.num_beams == 1
        return model.generate(
            **inputs,
            logits_processor=[processor],
            num_beams=args.num_beams,
            pad_token_id=tokenizer.pad_token_id,
            **args.options(),
            **({"custom_generate": critic_generate} if reuses else {}),
        )


def _with_code(critics: list[Critic], prompt: str, code: Optional[str]) -> str:
    coded = [critic for critic in critics if critic.config.control_codes]
    if code is None and not coded:
        return prompt
    if code is None:
        raise ValueError(f"control_code is missing; this critic was trained for {coded[0].config.control_codes}.")
    return (coded or critics)[0].control_prompt(prompt, code)
