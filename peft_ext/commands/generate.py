# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext generate`: text from any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from peft_ext.chat_format import chat_prompt
from peft_ext.command_line import TextArguments, parse, show
from peft_ext.commands.run_folder import AnyModelArguments


@dataclass
class GenerateArguments(AnyModelArguments, TextArguments):
    """Arguments of `peft-ext generate`."""

    chat: bool = field(default=False, metadata={"help": "Wrap each prompt in the tokenizer's chat template."})


@torch.no_grad()
def main(argv: Sequence[str]) -> None:
    """Generate for every prompt, and print prompt and continuation."""
    (args,) = parse(argv, GenerateArguments, positional="model")
    prompts = args.prompts()
    model, tokenizer = args.load()
    tokenizer.padding_side = "left"
    if args.seed is not None:
        torch.manual_seed(args.seed)
    texts = [chat_prompt(tokenizer, prompt) for prompt in prompts] if args.chat else prompts
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not args.chat)
    tokens = model.generate(**inputs.to(model.device), pad_token_id=tokenizer.pad_token_id, **args.options())
    new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    whole = [text.strip() if args.chat else prompt + text for prompt, text in zip(prompts, answers)]
    show(
        [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, whole)],
        "\n".join(f"--- {prompt}\n{text}\n" for prompt, text in zip(prompts, whole)),
    )
