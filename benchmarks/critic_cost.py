# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What steering costs: time per token of every mode of CriticControl over plain `generate`, and over re-encoding each
candidate's text as the paper's released code does.

Greedy, one process, contenders in turn, medians of rounds.

    python -m benchmarks.critic_cost
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Optional

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.common import Results, argument_parser, describe, log, markdown_table, verdict
from benchmarks.tuning import tiny_llama
from generation_ext.critic import Critic, CriticLogitsProcessor, critic_generate
from generation_ext.critic.value import backbone
from peft_ext.models import DEFAULT_MODEL, load


PLAIN, EXACT, CUSTOM, ACTION, REENCODING = (
    "generate",
    "CriticLogitsProcessor, exact",
    "critic_generate",
    "CriticLogitsProcessor, action-value",
    "re-encoding every candidate",
)
# Time per token over plain generate, at most: by batch.
LIMITS = {EXACT: {1: 2.2, 8: 3.0}, CUSTOM: {1: 1.35, 8: 2.0}, ACTION: {1: 1.1, 8: 1.1}}
TOP_K = 10


class Reencoding(LogitsProcessor):
    """The released code's way: the text so far, and the text with each candidate, encoded from the start."""

    def __init__(self, model: Any, critic: Critic) -> None:
        self.model, self.critic = model, critic

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        body = backbone(self.model)
        before = self.critic.log_value(body(input_ids=input_ids, use_cache=False).last_hidden_state[:, -1])
        candidates = scores.topk(TOP_K).indices
        scores = scores.clone()
        for column in range(TOP_K):
            token = candidates[:, column : column + 1]
            text = torch.cat([input_ids, token], dim=1)
            after = self.critic.log_value(body(input_ids=text, use_cache=False).last_hidden_state[:, -1])
            change = (after - before).unsqueeze(1)
            scores.scatter_(1, token, scores.gather(1, token) + change.to(scores.dtype))
        return scores


def measure(args: argparse.Namespace, batch: int) -> dict[str, list[float]]:
    """Seconds per token of every round, by contender."""
    model = tiny_llama() if args.smoke else load(args.model, dtype=torch.bfloat16)
    critic = _critic(model)
    ids = torch.randint(3, model.config.vocab_size, (batch, args.prompt_tokens))
    long = torch.randint(3, model.config.vocab_size, (batch, args.long_tokens - args.new_tokens // 8))
    few = max(args.new_tokens // 8, 2)
    exact = partial(CriticLogitsProcessor, model, critic, top_k=TOP_K)
    runs = {
        PLAIN: _run(model, ids, args.new_tokens),
        EXACT: _run(model, ids, args.new_tokens, exact),
        ACTION: _run(model, ids, args.new_tokens, partial(exact, mode="action-value")),
    }
    runs[CUSTOM] = _run(
        model, ids, args.new_tokens, custom_generate=critic_generate, critic=critic, critic_top_k=TOP_K
    )
    runs[f"{EXACT}, {args.long_tokens} tokens"] = _run(model, long, few, exact)
    runs[f"{REENCODING}, {args.long_tokens} tokens"] = _run(model, long, few, partial(Reencoding, model, critic))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            seconds = run()
            if number:  # the first round warms up
                found[name].append(seconds)
    return found


def _critic(model: Any) -> Critic:
    """Random weights, so that texts are steered; what it costs doesn't depend on them."""
    critic = Critic.for_model(model, action_values=True)
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


def print_tables(results: Results, args: argparse.Namespace) -> None:
    """Milliseconds per token, and the ratios."""
    lines = []
    for batch in args.batches:
        found = results.find(_settings(args, batch))
        if found is None:
            continue
        rows = [
            [name, f"{1e3 * statistics.median(seconds):.1f}", f"{over(found, name, PLAIN):.2f}"]
            for name, seconds in found.items()
        ]
        print(f"\nBatch of {batch}\n\n" + markdown_table(["", "ms a token", "over generate"], rows))
        for name, limits in LIMITS.items():
            if batch in limits:
                ratio = over(found, name, PLAIN)
                lines.append(verdict(f"batch of {batch}: {name} over generate", ratio, limits[batch]))
        exact, slow = (f"{name}, {args.long_tokens} tokens" for name in (EXACT, REENCODING))
        lines.append(verdict(f"batch of {batch}: re-encoding over exact", over(found, slow, exact), 10, at_least=True))
    print("\n" + "\n".join(lines))
    if results.rows:
        print("\n" + describe(results.rows[-1]["environment"]))


def _settings(args: argparse.Namespace, batch: int) -> dict[str, Any]:
    names = ("prompt_tokens", "new_tokens", "long_tokens", "rounds")
    return {
        "model": "tiny random Llama" if args.smoke else args.model,
        "batch": batch,
        "top_k": TOP_K,
        "threads": torch.get_num_threads(),
        **{name: getattr(args, name) for name in names},
    }


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure what isn't stored yet; print tables and verdicts."""
    parser = argument_parser(__doc__, "critic_cost.json", table=False)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument(
        "--long_tokens", type=int, default=128, help="length of the text when every candidate is encoded"
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    if args.smoke:
        args.batches, args.new_tokens, args.long_tokens, args.rounds = [2], 8, 16, 2
    torch.manual_seed(args.seed)
    results = Results(args.output, args.seed)
    for batch in args.batches:
        if results.find(_settings(args, batch)) is None:
            log(f"batch of {batch}")
            results.add(_settings(args, batch), measure(args, batch))
    print_tables(results, args)


if __name__ == "__main__":
    main()
