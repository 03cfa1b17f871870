# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Many threads on one model at once, for as long as one likes: `python -m tests.faults.threads [--calls 400]`.

What CI runs of it, with threads that meet where it matters, is tests/test_threads.py. Every answer is compared with what the
same call gave alone, text by text.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from generation_ext.critic import CriticLogitsProcessor, critic_generate
from generation_ext.in_context import LabelScorer
from generation_ext.prompts import Task
from peft_ext import AdapterPool, PeqaConfig
from peft_ext.ood.features import extract
from tests.cases import move_adapter
from tests.generation_ext.critic.reference import random_critic
from tests.tiny import byte_models
from tests.tiny.models import inputs, tiny
from tests.tiny.tokenizers import tiny_tokenizer, tokenizer


OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def compare(name: str, jobs: list[Callable[[], Any]], calls: int) -> bool:
    """Each job in a thread of its own, again and again; prints how many answers are those of the job alone."""
    alone, right, wrong, errors = [job() for job in jobs], [], [], []
    start = threading.Barrier(len(jobs))

    def work(index: int) -> None:
        start.wait()
        for _ in range(calls // len(jobs)):
            try:
                (right if jobs[index]() == alone[index] else wrong).append(index)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}"[:120])

    began = time.perf_counter()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = len(right) + len(wrong) + len(errors)
    print(f"| {name} | {len(jobs)} | {len(right)} of {done} | {len(wrong)} | {len(errors)} |", flush=True)
    print(f"{time.perf_counter() - began:.0f} s{''.join(f', {one}' for one in sorted(set(errors)))}", file=sys.stderr)
    return len(right) == done


def _tuned(names: list[str]) -> Any:
    model = get_peft_model(tiny("llama"), PeqaConfig(bits=4), names[0]).eval()
    for index, name in enumerate(names):
        if index:
            model.add_adapter(name, PeqaConfig(bits=4))
        move_adapter(model, name, seed=index, strength=0.5)
    return model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=400)
    args = parser.parse_args(argv)
    names, batch, rows = [f"task{index}" for index in range(args.threads)], inputs("llama"), 3
    model = _tuned(names)
    print("| what | threads | right | silently wrong | errors |\n|---|---|---|---|---|")
    good = []

    def by_names(name: str) -> Any:
        return model.generate(**batch, adapter_names=[name] * rows, **OPTIONS).tolist()

    good.append(
        compare("`adapter_names=`, generate", [lambda name=name: by_names(name) for name in names], args.calls)  # type: ignore[misc]
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        pool = AdapterPool(model.unload())
        for name in names:
            pool.load(Path(folder) / name)

    def activated(name: str) -> Any:
        pool.activate(name)
        return pool.model.generate(**batch, **OPTIONS).tolist()

    def mixed(name: str) -> Any:
        with pool.mixed([name, None, names[0]]):
            return pool.model.generate(**batch, **OPTIONS).tolist()

    good.append(
        compare("`pool.activate`, generate", [lambda name=name: activated(name) for name in names], args.calls)
    )  # type: ignore[misc]
    both = [lambda name=name, kind=(activated, mixed)[index % 2]: kind(name) for index, name in enumerate(names)]  # type: ignore[misc]
    good.append(compare("`pool.mixed` and `pool.activate`, generate", both, args.calls))
    base = byte_models.model("llama")
    scorer = LabelScorer(base, tokenizer(), Task("In: {text}\nOut:", {"neg": " bad", "pos": " good"}))
    prompt = torch.tensor([[5, 9, 3]])
    jobs: list[Callable[[], Any]] = []
    for index in range(args.threads):
        if index % 2:
            jobs.append(lambda: base.generate(prompt, **OPTIONS).tolist())
        else:
            jobs.append(lambda index=index: scorer.score([f"text {index}", "it"]).log_probs.tolist())  # type: ignore[misc]
    good.append(compare("`LabelScorer.score` and generate", jobs, args.calls))
    language_model = tiny("llama")
    critic = random_critic(language_model)

    def steered(token: int, custom: bool) -> Any:
        text = torch.tensor([[token, 9, 3]])
        given = {"attention_mask": torch.ones_like(text), "min_new_tokens": 8, **OPTIONS}
        if custom:
            return language_model.generate(text, custom_generate=critic_generate, critic=critic, **given).tolist()
        with CriticLogitsProcessor(language_model, critic, strength=4.0) as processor:
            return language_model.generate(text, logits_processor=[processor], **given).tolist()

    both = [lambda index=index: steered(5 + index, index % 4 == 0) for index in range(args.threads)]
    good.append(compare("`CriticLogitsProcessor`, entered and left, and `critic_generate`", both, args.calls))
    classifier, words = tiny("bert"), tiny_tokenizer()

    def features(index: int) -> Any:
        texts = [f"w{5 + index} w6", "w7 " * (index + 1)]
        return [part.tolist() for part in extract(classifier, words, texts)]

    jobs = [lambda index=index: features(index) for index in range(args.threads)]
    good.append(compare("features for OOD detection", jobs, args.calls))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
