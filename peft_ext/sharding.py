# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What of a model lies in pieces on several processes, and what can't be done with it there."""

from __future__ import annotations

import os
from typing import Optional

import torch
from torch import nn


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether a tensor is but a part here: FSDP's, or DeepSpeed's. Reading it would wait for the other processes."""
    return is_dtensor(tensor) or hasattr(tensor, "ds_id") or tensor.numel() == 0


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is torch's `DTensor`: FSDP2's, or tensor parallelism's."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, gathered where it is a `DTensor`; all processes have to ask for it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def gathered_for_now(module: nn.Module, tensor: torch.Tensor) -> bool:
    """Whether FSDP2 shards a module's tensor but has it whole at the moment: what is written to it then is lost."""
    return bool(getattr(module, "_is_fsdp_managed_module", False)) and not is_dtensor(tensor)


def sharded_by(model: nn.Module) -> Optional[str]:
    """Who has a model's parameters in pieces, as users call it; None if nobody."""
    for module in model.modules():
        if getattr(module, "_is_fsdp_managed_module", False):
            return "FSDP"
        for parameter in module.parameters(recurse=False):
            if hasattr(parameter, "ds_id"):
                return "DeepSpeed ZeRO-3"
            if is_dtensor(parameter):
                return "tensor parallelism"
    return None


def reshard(model: nn.Module) -> None:
    """Give back what FSDP2 has gathered, so that its own copies can be written to."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def refuse_distributed_loading(model: nn.Module) -> None:
    """Refuse to load a packed base that transformers would cut to pieces by its `distributed_config` (or `tp_plan`): its plans
    are of float weights, so that codes and scales would end up of different sizes.

    Raises:
        ValueError: Before anything is loaded; says what works.
    """
    refuse_fsdp1()
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    if config is None:
        return
    sizes = {
        name: size
        for name in ("tp_size", "fsdp_size", "dp_replicate_size", "pp_size", "ep_size")
        if isinstance(size := getattr(config, name, None), int) and size > 1
    }
    if sizes:
        told = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"distributed_config ({told}; tp_plan sets it): a packed base can't be cut to pieces while transformers loads it. "
            "Load it without; to shard it, use FSDP2 (accelerate launch --use_fsdp --fsdp_version 2); to serve it on several "
            "GPUs, vLLM."
        )


def refuse_cut(model: nn.Module) -> None:
    """Refuse to put the first adapter on a model whose weights lie in pieces already: they can't be quantised, and what is
    trained would belong to no one's pieces.

    Raises:
        ValueError: Before anything is changed; says by whom, and the way out.
    """
    refuse_fsdp1()
    by = sharded_by(model)
    if by is not None:
        raise ValueError(
            f"the model's weights are in pieces on several processes ({by}), which can't be quantised or tuned. Load it without "
            "tp_plan and distributed_config, put the adapter on it (get_peft_model), and shard it after that (accelerate launch "
            "--use_fsdp --fsdp_version 2)."
        )


def refuse_fsdp1() -> None:
    """Refuse accelerate's first FSDP, which `accelerate launch --use_fsdp` means unless it is told otherwise: it flattens
    parameters, and codes are integers ("Cannot flatten integer dtype tensors", once the model has been made).

    Raises:
        ValueError: With the line that works.
    """
    if (
        os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
        and os.environ.get("FSDP_VERSION", "1") == "1"
    ):
        raise ValueError(
            "FSDP of version 1 (accelerate's default) can't shard packed layers, whose codes are integers; launch with "
            "accelerate launch --use_fsdp --fsdp_version 2, or --config_file configs/fsdp2.yaml."
        )
