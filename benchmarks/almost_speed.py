# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Tokens a second of ALMoST's stages that write texts, against a plain `generate` loop without a shared prefix."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from peft import get_peft_model

from generation_ext.shared_prefix.sampling import Sampling
from trl_ext.almost.models import load_chat_tokenizer, load_policy
from trl_ext.almost.prompts.chat import request_text
from trl_ext.almost.prompts.roles import (
    ASSISTANT_STOPS,
    MINING_STOPS,
    assistant_prompt,
    chosen_prompt,
    load_style,
    mining_prompt,
    seed_queries,
)
from trl_ext.almost.recipe import QUERIES, RESPONSES, RLSF, SELF_PLAY, AlmostConfig
from trl_ext.almost.training.rlsf_generation import merged_copy
from trl_ext.almost.training.stage import AlmostModelConfig, adapter_config
from trl_ext.almost.writing.backends import Request, TransformersBackend, tokens_of
from trl_ext.almost.writing.generators import parse_generators
from trl_ext.almost.writing.loading import load_speaker


SPEED_STAGES = (QUERIES, RESPONSES, SELF_PLAY, RLSF)


def measure_speed(config: AlmostConfig, stage: str, count: int) -> dict[str, float]:
    """Tokens a second of both ways, on the same requests with the same limits, after a batch to warm up.

    Args:
        config: The recipe.
        stage: `"queries"`, `"responses"` (the best generator), `"self_play"` (first answers) or `"rlsf"` (as it trains).
        count: Requests.
    """
    if stage == RLSF:
        return _measure_rlsf(config, count)
    settings = config.data_config(stage)
    model, tokenizer = load_speaker(settings.model_name_or_path, dtype=settings.dtype)
    backend = TransformersBackend(model, tokenizer, settings.batch_size)
    requests, sampling = _work(config, stage, tokenizer, count)
    few = Sampling(**{**sampling.__dict__, "max_new_tokens": 2})
    backend.generate(requests[: settings.batch_size], few)
    _plain(model, tokenizer, requests[: settings.batch_size], few, settings.batch_size)
    backend = TransformersBackend(model, tokenizer, settings.batch_size)  # without the prefix of before
    start = time.perf_counter()
    backend.generate(requests, sampling)
    ours = backend.new_tokens / (time.perf_counter() - start)
    start = time.perf_counter()
    tokens = _plain(model, tokenizer, requests, sampling, settings.batch_size)
    return {"ours": ours, "plain": tokens / (time.perf_counter() - start)}


def _measure_rlsf(config: AlmostConfig, count: int) -> dict[str, float]:
    """Answers while a policy trains: by its merged copy, which is made anew, and through its adapter, as TRL does."""
    block = config.block(RLSF)
    tokenizer = load_chat_tokenizer(config.model_name_or_path)
    model_args = AlmostModelConfig(
        **{key: block[key] for key in ("use_peft", "lora_r", "lora_target_modules") if key in block}
    )
    policy, adapter = load_policy(config.model_name_or_path), adapter_config(model_args, "CAUSAL_LM")
    policy = policy if adapter is None else get_peft_model(policy, adapter)
    dtype = torch.bfloat16 if block.get("bf16") else None
    sampling = Sampling(top_p=1.0, max_new_tokens=block["max_completion_length"], samples=block["num_generations"])
    prompts = [
        tokens_of(tokenizer, request_text(tokenizer, query))
        for query in (seed_queries() * count)[: count // sampling.samples]
    ]
    asked = [prompt for prompt in prompts for _ in range(sampling.samples)]
    keys = [str(number) for number in range(len(asked))]
    start = time.perf_counter()
    backend = TransformersBackend(merged_copy(policy, dtype), tokenizer)
    backend.write_tokens(asked, keys, sampling)
    ours = backend.new_tokens / (time.perf_counter() - start)
    policy.eval()
    start = time.perf_counter()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        one = Sampling(**{**sampling.__dict__, "samples": 1})
        tokens = _plain_tokens(policy, tokenizer, asked, one, len(asked))
    return {"ours": ours, "plain": tokens / (time.perf_counter() - start)}


def _work(config: AlmostConfig, stage: str, tokenizer: Any, count: int) -> tuple[list[Request], Sampling]:
    settings, queries = config.data_config(stage), seed_queries()
    queries = [queries[number % len(queries)] for number in range(count)]
    if stage == QUERIES:
        prompts = [mining_prompt((queries[n:] + queries[:n])[: settings.shots]) for n in range(len(queries))]
        sampling = settings.sampling(stop=MINING_STOPS, samples=settings.samples)
    elif stage == RESPONSES:
        generator = parse_generators(settings.generators)[0]
        style, shots = load_style(generator.prompt), generator.shots
        prompts = [assistant_prompt(tokenizer, query, style, shots, settings.chat_format) for query in queries]
        sampling = settings.sampling(stop=ASSISTANT_STOPS)
    else:
        prompt, shots = chosen_prompt(tokenizer, settings.prompt, settings.shots, settings.chat_format)
        style = load_style(prompt)
        prompts = [assistant_prompt(tokenizer, query, style, shots, settings.chat_format) for query in queries]
        sampling = settings.sampling(stop=ASSISTANT_STOPS, samples=settings.samples)
    return [Request(str(n), prompt) for n, prompt in enumerate(prompts)], sampling


def _plain(model: Any, tokenizer: Any, requests: Sequence[Request], sampling: Sampling, batch_size: int) -> int:
    prompts = [tokens_of(tokenizer, request.prompt) for request in requests]
    return _plain_tokens(model, tokenizer, prompts, sampling, max(1, batch_size // sampling.samples))


@torch.no_grad()
def _plain_tokens(model: Any, tokenizer: Any, every: Sequence[Sequence[int]], sampling: Sampling, size: int) -> int:
    """Batches in the order that they come in, the whole prompt in every row; returns how many tokens were written."""
    torch.manual_seed(0)
    tokens, device = 0, next(model.parameters()).device
    ends = torch.tensor(sorted({*tokenizer.all_special_ids}), device=device)
    for start in range(0, len(every), size):
        prompts = [list(prompt) for prompt in every[start : start + size]]
        longest = max(map(len, prompts))
        pad = tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=sampling.max_new_tokens,
            num_return_sequences=sampling.samples,
            stop_strings=list(sampling.stop) or None,
            tokenizer=tokenizer,
            eos_token_id=ends.tolist(),
            pad_token_id=pad,
        )[:, longest:]
        over = torch.isin(written, ends).cumsum(dim=-1) > 0
        tokens += int((~over).sum())
    return tokens
