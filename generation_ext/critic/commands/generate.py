# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`generate`: text that one critic or several steer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch

from generation_ext.critic.commands.arguments import CriticArguments, critic_folders, load_critics, parse
from generation_ext.critic.generate import critic_generate
from generation_ext.critic.value import Critic


@dataclass
class GenerateArguments(CriticArguments):
    """Arguments of `generate`."""

    strength: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "Exponent of the value ratio; one, or one for each critic."}
    )
    prompt: list[str] = field(
        default_factory=list, metadata={"help": "One or more prompts; without it, lines of the standard input."}
    )
    control_code: Optional[str] = field(
        default=None, metadata={"help": "Attribute, for a critic with control codes; may be one it never saw."}
    )
    max_new_tokens: int = field(default=32, metadata={"help": "Tokens to generate at most."})
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of taking the most likely token."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling, after the critic."})
    top_p: float = field(default=1.0, metadata={"help": "Probability mass to sample from, after the critic."})
    num_beams: int = field(default=1, metadata={"help": "Beams of beam search."})
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Penalty of tokens that stand in the text already."}
    )
    seed: Optional[int] = field(default=None, metadata={"help": "Seed of sampling."})


@torch.no_grad()
def main(argv: Sequence[str]) -> None:
    """Generate for every prompt, and print prompt and continuation."""
    (args,) = parse(argv, GenerateArguments, positional="critic")
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={args.max_new_tokens} must be at least 1.")
    prompts = args.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts or not all(prompts):
        raise ValueError("no prompt, or an empty one: pass --prompt TEXT, or lines on the standard input.")
    folders = critic_folders(args.critic)
    model, tokenizer = args.load()
    critics = load_critics(folders, model)
    texts = [_with_code(critics, prompt, args.control_code) for prompt in prompts]
    side = "right" if model.config.is_encoder_decoder else "left"
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side).to(model.device)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    tokens = _generate(args, model, tokenizer, critics, inputs)
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    for prompt, text in zip(prompts, tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)):
        print(f"--- {prompt}\n{text if model.config.is_encoder_decoder else prompt + text}\n")


def _generate(args: GenerateArguments, model: Any, tokenizer: Any, critics: list[Critic], inputs: Any) -> torch.Tensor:
    """Through the loop that reuses the candidates' forward pass, where it can be."""
    strength = args.strength[0] if len(args.strength) == 1 else args.strength
    with args.processor(model, critics, strength, attention_mask=inputs["attention_mask"]) as processor:
        reuses = args.mode == "exact" and args.num_beams == 1
        return model.generate(
            **inputs,
            logits_processor=[processor],
            max_new_tokens=args.max_new_tokens,
            do_sample=args.do_sample,
            num_beams=args.num_beams,
            repetition_penalty=args.repetition_penalty,
            pad_token_id=tokenizer.pad_token_id,
            **({"temperature": args.temperature, "top_p": args.top_p} if args.do_sample else {}),
            **({"custom_generate": critic_generate} if reuses else {}),
        )


def _with_code(critics: list[Critic], prompt: str, code: Optional[str]) -> str:
    coded = [critic for critic in critics if critic.config.control_codes]
    if code is None and not coded:
        return prompt
    if code is None:
        raise ValueError(f"control_code is missing; this critic was trained for {coded[0].config.control_codes}.")
    return (coded or critics)[0].control_prompt(prompt, code)
