# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext generate`: text from a tuned model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

import torch

from peft_ext.command_line import parse
from peft_ext.commands.run_folder import TunedModelArguments


@dataclass
class GenerateArguments(TunedModelArguments):
    """Arguments of `peft-ext generate`."""

    prompt: list[str] = field(
        default_factory=list, metadata={"help": "One or more prompts; without it, lines of the standard input."}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens to generate at most."})
    chat: bool = field(default=False, metadata={"help": "Wrap each prompt in the tokenizer's chat template."})
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of taking the most likely token."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Probability mass to sample from."})
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Penalty of tokens that stand in the text already."}
    )
    seed: Optional[int] = field(default=None, metadata={"help": "Seed of sampling."})


@torch.no_grad()
def main(argv: Sequence[str]) -> None:
    """Generate for every prompt, and print prompt and continuation."""
    (args,) = parse(argv, GenerateArguments, positional="run")
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={args.max_new_tokens} must be at least 1.")
    prompts = args.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts or not all(prompts):
        raise ValueError("no prompt, or an empty one: pass --prompt TEXT, or lines on the standard input.")
    model, tokenizer = args.load()
    tokenizer.padding_side = "left"
    if args.seed is not None:
        torch.manual_seed(args.seed)
    texts = [_as_chat(tokenizer, prompt) for prompt in prompts] if args.chat else prompts
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not args.chat)
    sampling = {"temperature": args.temperature, "top_p": args.top_p} if args.do_sample else {}
    tokens = model.generate(
        **inputs.to(model.device),
        max_new_tokens=args.max_new_tokens,
        do_sample=args.do_sample,
        repetition_penalty=args.repetition_penalty,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
    for prompt, text in zip(prompts, tokenizer.batch_decode(new_tokens, skip_special_tokens=True)):
        print(f"--- {prompt}\n{text.strip() if args.chat else prompt + text}\n")


def _as_chat(tokenizer, prompt: str) -> str:
    if tokenizer.chat_template is None:
        raise ValueError("chat=True, but this model's tokenizer has no chat template; leave --chat out.")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
