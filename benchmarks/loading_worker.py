# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A contender of `benchmarks.loading`: loads a checkpoint, generates, prints what that took as JSON.

It imports peft-ext only where its contender does: stock transformers has to be stock.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.resident import peak_resident_bytes, reset_peak, resident_bytes


def first_token(model: Any, ids: torch.Tensor) -> float:
    """Seconds to the first token behind a prompt."""
    begin = time.perf_counter()
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    return time.perf_counter() - begin


def tokens_per_second(model: Any, ids: torch.Tensor, count: int) -> float:
    """Of the tokens after the first one."""
    first, begin = first_token(model, ids), time.perf_counter()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
    )
    return (count - 1) / (time.perf_counter() - begin - first)


def main() -> None:
    """Load, generate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--peft-ext", action="store_true", help="import it, as a user of packed models does")
    parser.add_argument("--pack", action="store_true", help="pack the float model that was loaded: never saved")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.peft_ext or args.pack:
        import peft_ext  # noqa: F401 (registers the formats)
    import compressed_tensors.compressors  # noqa: F401 (which both stock transformers and peft-ext read with)

    ids = torch.randint(3, 200, (1, args.prompt_tokens), generator=torch.Generator().manual_seed(0))
    # what the libraries allocate at their first use isn't the checkpoint's
    tiny = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    first_token(LlamaForCausalLM(tiny).bfloat16(), ids)
    reset_peak()
    before, begin = resident_bytes(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.folder)
    if args.pack:
        model = _packed(model)
    model.eval()
    load_seconds, load_peak = time.perf_counter() - begin, peak_resident_bytes() - before
    cold = first_token(model, ids)
    figures = {
        "load_seconds": load_seconds,
        "load_peak_bytes": load_peak,
        "first_call_seconds": cold,
        "first_token_seconds": min(first_token(model, ids) for _ in range(3)),
        "tokens_per_second": tokens_per_second(model, ids, args.new_tokens),
        # by now everything that takes part has been read from the file, which is mapped
        "peak_bytes": peak_resident_bytes() - before,
        "layers": sorted({type(module).__name__ for name, module in model.named_modules() if "q_proj" in name}),
    }
    print(json.dumps(figures))


def _packed(model: Any) -> Any:
    from peft import get_peft_model

    from peft_ext import PeqaConfig

    return get_peft_model(model, PeqaConfig(bits=4)).merge_and_unload()


if __name__ == "__main__":
    main()
