# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""RLSF's answers, written by a merged copy of the policy.

TRL's trainers write with the policy as it trains: through its adapter, in its weights' float type under autocast, each
prompt once for every answer, and finished answers until the last one ends. A copy with the adapter merged, in the type
that training multiplies in, writes several times as many tokens a second.
"""

from __future__ import annotations

import copy
from typing import Any, Optional, Union

import torch
from peft import PeftModel
from torch import nn
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from generation_ext.shared_prefix.sampling import Sampling
from trl_ext.almost.writing.backends import TransformersBackend


class _MergedGeneration:
    """Goes before a trainer of TRL in the list of bases. The copy lives while it writes."""

    _written = (-1, 0)  # the step, and the batches that were written in it

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "merged_generation copies the policy, which FSDP and DeepSpeed have in pieces; leave it out, or launch without "
                "them."
            )

    def _generate_single_turn(
        self: Any, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, *args: Any, **kwargs: Any
    ) -> Any:
        step, batch = self.state.global_step, 0
        if self._written[0] == step:
            batch = self._written[1] + 1
        self._written = (step, batch)
        batch_key = f"rlsf/{step}/{batch}/{self.accelerator.process_index}"
        sampling = Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k or 0,
            max_new_tokens=self.max_completion_length,
            seed=self.args.seed,
        )
        policy = self.accelerator.unwrap_model(self.model_wrapped)
        writer = TransformersBackend(merged_copy(policy, training_dtype(self.args)), self._tokenizer)
        writer.ends = set(self.eos_token_ids)
        written = writer.write_tokens(prompt_ids, [f"{batch_key}/{n}" for n in range(len(prompt_ids))], sampling)
        return (written, None) if isinstance(self, GRPOTrainer) else written


class MergedRLOOTrainer(_MergedGeneration, RLOOTrainer):
    """TRL's RLOO trainer whose answers a merged copy of the policy writes."""


class MergedGRPOTrainer(_MergedGeneration, GRPOTrainer):
    """TRL's GRPO trainer whose answers a merged copy of the policy writes."""


def merged_copy(policy: nn.Module, dtype: Optional[torch.dtype] = None) -> nn.Module:
    """A copy of a policy with its adapter merged, in another float type if one is given."""
    model = copy.deepcopy(policy)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    model.__dict__.pop("forward", None)  # accelerate's, which casts the weights at every call
    return model.to(dtype).eval()


def training_dtype(args: Union[RLOOConfig, GRPOConfig]) -> Optional[torch.dtype]:
    """What training multiplies in, if that isn't the weights' own type."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def check_merged_generation(args: Union[RLOOConfig, GRPOConfig]) -> None:
    """Refuse settings that only TRL's own generation has.

    Raises:
        ValueError: If there is one; names it.
    """
    plain: dict[str, tuple[Any, ...]] = {
        "use_vllm": (False,),
        "use_transformers_continuous_batching": (False,),
        "generation_kwargs": (None, {}),
        "cache_implementation": (None,),
        "min_p": (None, 0, 0.0),
        "repetition_penalty": (None, 1.0),
        "deepspeed": (None,),
        "fsdp": (None, "", [], False),
    }
    for name, values in plain.items():
        value = getattr(args, name, values[0])
        if value not in values:
            raise ValueError(
                f"{name}={value!r} doesn't go with merged_generation, which writes by its own loop in every process; leave "
                "out one."
            )
