# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A contender of `benchmarks.loading`: loads a checkpoint, generates, and says what that took.

It imports peft-ext only where its contender does: stock transformers has to be stock.
"""

from __future__ import annotations

import time
from typing import Any, Optional

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


def load(folder: str, how: str, prompt_tokens: int, new_tokens: int, threads: Optional[int] = None) -> dict[str, Any]:
    """Load, generate.

    Args:
        folder: The checkpoint.
        how: `"stock"`; `"peft_ext"`: with it imported, as a user of packed models does; `"packed here"`: the float model that was
            loaded is packed, and never saved.
        prompt_tokens: Of the prompt.
        new_tokens: Generated behind it.
        threads: Of torch; None: as it likes.
    """
    if threads:
        torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if how != "stock":
        import peft_ext  # noqa: F401 (registers the formats)
    import compressed_tensors.compressors  # noqa: F401 (which both stock transformers and peft-ext read with)

    ids = torch.randint(3, 200, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    # what the libraries allocate at their first use isn't the checkpoint's
    tiny = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    first_token(LlamaForCausalLM(tiny).bfloat16(), ids)
    reset_peak()
    before, begin = resident_bytes(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder)
    if how == "packed here":
        model = _packed(model)
    model.eval()
    load_seconds, load_peak = time.perf_counter() - begin, peak_resident_bytes() - before
    cold = first_token(model, ids)
    return {
        "load_seconds": load_seconds,
        "load_peak_bytes": load_peak,
        "first_call_seconds": cold,
        "first_token_seconds": min(first_token(model, ids) for _ in range(3)),
        "tokens_per_second": tokens_per_second(model, ids, new_tokens),
        # by now everything that takes part has been read from the file, which is mapped
        "peak_bytes": peak_resident_bytes() - before,
        "layers": sorted({type(module).__name__ for name, module in model.named_modules() if "q_proj" in name}),
    }


def _packed(model: Any) -> Any:
    from peft import get_peft_model

    from peft_ext import PeqaConfig

    return get_peft_model(model, PeqaConfig(bits=4)).merge_and_unload()
