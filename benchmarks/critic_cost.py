# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What steering costs: time per token of every mode of CriticControl over plain `generate`, and over re-encoding each
candidate's text as the paper's released code does.

Greedy, one process, contenders in turn, medians of rounds.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import torch
from peft import PeftModel
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.core.claims import Claim, Headline, markdown_table, unless
from benchmarks.core.run import Run, log
from benchmarks.core.task import Runs, Task, claims_of_each, tables_of_each
from benchmarks.tuning import tiny_llama
from generation_ext.critic import Critic, CriticLogitsProcessor, critic_generate
from peft_ext.files import scratch
from peft_ext.models import load


PLAIN, EXACT, CUSTOM, ACTION, LORA, REENCODING = (
    "generate",
    "CriticLogitsProcessor, exact",
    "critic_generate",
    "CriticLogitsProcessor, action-value",
    "Critic.to_lora, in PEFT",
    "re-encoding every candidate",
)
# Time per token over plain generate, at most: by batch.
LIMITS = {EXACT: {1: 2.2, 8: 3.0}, CUSTOM: {1: 1.35, 8: 2.0}, ACTION: {1: 1.1, 8: 1.1}, LORA: {1: 1.02, 8: 1.02}}
BATCHES = (1, 8)
TOP_K = 10
RANK = 16  # of the LoRA


class Reencoding(LogitsProcessor):
    """The released code's way: the text so far, and the text with each candidate, encoded from the start."""

    def __init__(self, model: Any, critic: Critic) -> None:
        self.model, self.critic = model, critic

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        before = self.critic.log_value(self.critic.read(self.model, input_ids)[:, -1])
        candidates = scores.topk(TOP_K).indices
        scores = scores.clone()
        for column in range(TOP_K):
            token = candidates[:, column : column + 1]
            text = torch.cat([input_ids, token], dim=1)
            after = self.critic.log_value(self.critic.read(self.model, text)[:, -1])
            change = (after - before).unsqueeze(1)
            scores.scatter_(1, token, scores.gather(1, token) + change.to(scores.dtype))
        return scores


def measure(run: Run) -> None:
    """A row for each size of batch."""
    for batch in run.batches:
        if run.find({"batch": batch}) is None:
            log(f"batch of {batch}")
            torch.manual_seed(run.seed)
            run.add({"batch": batch}, seconds_per_token(run, batch))


def seconds_per_token(run: Run, batch: int) -> dict[str, list[float]]:
    """Of every round, by contender."""
    model = tiny_llama() if run.smoke else load(run.model, dtype=torch.bfloat16)
    critic = _critic(model)
    ids = torch.randint(3, model.config.vocab_size, (batch, run.prompt_tokens))
    long = torch.randint(3, model.config.vocab_size, (batch, run.long_tokens - run.new_tokens // 8))
    few = max(run.new_tokens // 8, 2)
    exact = partial(CriticLogitsProcessor, model, critic, top_k=TOP_K)
    runs = {
        PLAIN: _run(model, ids, run.new_tokens),
        EXACT: _run(model, ids, run.new_tokens, exact),
        ACTION: _run(model, ids, run.new_tokens, partial(exact, mode="action-value")),
        LORA: _run(_as_lora(model), ids, run.new_tokens),
    }
    runs[CUSTOM] = _run(model, ids, run.new_tokens, custom_generate=critic_generate, critic=critic, critic_top_k=TOP_K)
    runs[f"{EXACT}, {run.long_tokens} tokens"] = _run(model, long, few, exact)
    runs[f"{REENCODING}, {run.long_tokens} tokens"] = _run(model, long, few, partial(Reencoding, model, critic))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(run.rounds + 1):
        for name, contender in runs.items():
            seconds = contender()
            if number:  # the first round warms up
                found[name].append(seconds)
    return found


def _as_lora(model: Any) -> Any:
    """A twin of the model, as PEFT loads it with a critic's LoRA; its own generate, since PEFT's adds a constant to each call."""
    critic = _critic(model, action_form="linear", action_rank=RANK)
    with scratch("critic-lora") as folder:
        steered = PeftModel.from_pretrained(copy.deepcopy(model), str(critic.to_lora(model, folder))).eval()
    return steered.get_base_model()


def _critic(model: Any, **kwargs: Any) -> Critic:
    """Random weights, so that texts are steered; what it costs doesn't depend on them."""
    critic = Critic.for_model(model, action_values=True, **kwargs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return critic.eval()


def _run(
    model: Any,
    ids: torch.Tensor,
    new_tokens: int,
    make_processor: Optional[Callable[[], Any]] = None,
    **kwargs: Any,
) -> Callable[[], float]:
    def run() -> float:
        # no contender leaves its hooks to the others
        processor = make_processor() if make_processor is not None else None
        started = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([] if processor is None else [processor]),
            **kwargs,
        )
        seconds = (time.perf_counter() - started) / new_tokens
        if isinstance(processor, CriticLogitsProcessor):
            processor.close()
        return seconds

    return run


def over(found: dict[str, list[float]], one: str, other: str) -> float:
    """Median over the rounds of the ratio of two contenders in the same round."""
    return statistics.median(a / b for a, b in zip(found[one], found[other]))


def tables(run: Run) -> dict[str, str]:
    """Milliseconds per token and, in brackets, over plain `generate`, by batch."""
    found = {batch: result for batch in run.batches if (result := run.find({"batch": batch})) is not None}
    names = next(iter(found.values()), {})

    def cell(result: dict[str, list[float]], name: str) -> str:
        milliseconds = f"{1e3 * statistics.median(result[name]):,.1f}"
        # texts of another length are compared with each other
        return (
            milliseconds if name == PLAIN or "tokens" in name else f"{milliseconds} ({over(result, name, PLAIN):.2f})"
        )

    rows = [[name, *(cell(result, name) for result in found.values())] for name in names]
    return {"ms a token (over generate)": markdown_table(["", *(f"batch of {batch}" for batch in found)], rows)}


def claims(run: Run) -> list[Claim]:
    """What a token may cost."""
    lines = []
    exact, slow = (f"{name}, {run.long_tokens} tokens" for name in (EXACT, REENCODING))
    for batch in BATCHES:
        found = run.find({"batch": batch})
        for name, limits in LIMITS.items():
            # runs of earlier versions lack some
            ratio = over(found, name, PLAIN) if found and name in found else None
            if batch in limits and (ratio is not None or not found):
                lines.append(Claim(f"{name} over generate, batch of {batch}", ratio, limits[batch]))
        lines.append(
            Claim(f"re-encoding over exact, batch of {batch}", found and over(found, slow, exact), 10, at_least=True)
        )
    return lines


def headlines(runs: Runs) -> list[Headline]:
    """A token by itself."""
    found = [result for run in runs if (result := run.find({"batch": 1})) is not None]
    if not found:
        return []
    ratios = {name: over(found[0], name, PLAIN) for name in (CUSTOM, EXACT, ACTION)}
    shown = f"`critic_generate` {ratios[CUSTOM]:.2f}, logits processor {ratios[EXACT]:.2f}, action values {ratios[ACTION]:.2f}"
    wanted = ", ".join(unless(ratio <= LIMITS[name][1], f"{LIMITS[name][1]}") for name, ratio in ratios.items())
    page = "../benchmarks/critic_control.md#what-steering-costs"
    return [Headline("Steering", "A steered token over a plain one", shown, wanted, page)]


TASK = Task(measure, tables_of_each(tables), claims_of_each(claims), headlines)
