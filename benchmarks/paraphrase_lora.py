# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""SmolLM2 as a paraphraser: under LoRA alone, and under LoRA with GA-Attention added by conversion."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from benchmarks.core.run import Run
from benchmarks.in_context import smoke_model
from generation_ext.granularity import GranularityConfig, convert_to_granularity_attention
from peft_ext.models import load, load_tokenizer


LORA, GA_LORA = "SmolLM2 + LoRA", "SmolLM2 + GA + LoRA"
LORAS = (LORA, GA_LORA)
PROMPT = "{source}\nIn other words:"
MOST_TOKENS = 80  # of a prompt and its paraphrase
MOST_NEW_TOKENS = 28


def lora_paraphrases(
    mode: str,
    train: Sequence[dict[str, str]],
    test: Sequence[dict[str, str]],
    run: Run,
    seed: int,
) -> tuple[list[str], dict[str, Any]]:
    """Train, and paraphrase greedily.

    Args:
        mode: One of `LORAS`.
        train, test: Pairs; only the first ones are seen that the steps have room for.
        run: Says how much.
        seed: Of adapters and order.

    Returns:
        Paraphrases of the test pairs' sources; CPU seconds of training, loss of the last tenth of the steps, number of
        trained parameters.
    """
    set_seed(seed)
    base: Any
    if run.smoke:
        base, tokenizer = smoke_model()
    else:
        base, tokenizer = load(run.model, dtype=getattr(torch, run.dtype)), load_tokenizer(run.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    heads = []
    if mode == GA_LORA:
        config = GranularityConfig(run.granularity, max_length=2 * MOST_TOKENS, link="rectified", initial=0.0)
        base, heads = convert_to_granularity_attention(base, config), ["granularity"]
    lora = LoraConfig(
        r=run.rank,
        lora_alpha=2 * run.rank,
        target_modules=r".*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=heads,
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(base, lora)
    training = _train(model, tokenizer, train, run, seed)
    return _generate(model.eval(), tokenizer, [pair["source"] for pair in test]), training


def _train(model: Any, tokenizer: Any, pairs: Sequence[dict[str, str]], run: Run, seed: int) -> dict[str, Any]:
    def batch(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

        ids, labels = padded("input_ids", tokenizer.pad_token_id), padded("labels", -100)
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    rows = [_encoded(tokenizer, pair) for pair in pairs[: run.steps * run.batch]]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=run.steps,
            per_device_train_batch_size=run.batch,
            learning_rate=run.learning_rate,
            warmup_steps=run.steps // 10,
            save_strategy="no",
            logging_steps=max(1, run.steps // 10),
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=batch)  # type: ignore[arg-type]
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
    loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"seconds": seconds, "loss": float(loss), "parameters": trained}


def _encoded(tokenizer: Any, pair: dict[str, str]) -> dict[str, list[int]]:
    """Prompt and paraphrase; the loss is the paraphrase's."""
    prompt = tokenizer(PROMPT.format(source=pair["source"]), add_special_tokens=False)["input_ids"]
    answer = tokenizer(" " + pair["target"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids, labels = prompt + answer, [-100] * len(prompt) + answer
    return {"input_ids": ids[:MOST_TOKENS], "labels": labels[:MOST_TOKENS]}


@torch.inference_mode()
def _generate(model: Any, tokenizer: Any, sources: Sequence[str], size: int = 32) -> list[str]:
    tokenizer.padding_side = "left"
    found: list[str] = []
    for start in range(0, len(sources), size):
        prompts = [PROMPT.format(source=source) for source in sources[start : start + size]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        ids = model.generate(
            **inputs, max_new_tokens=MOST_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        new = ids[:, inputs["input_ids"].shape[1] :]
        found += [text.strip().split("\n")[0] for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return found
