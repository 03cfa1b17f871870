# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The linear layers that decide which experts a token goes to: they stay float unless they are named."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ext.quant.experts import fused_experts, unfused_experts
from peft_ext.quant.replaceable import acts_linearly, foreign_weight


def routers(model: nn.Module) -> set[str]:
    """The names of a model's routing layers.

    They are told by what they do: a layer whose output is no plain product (routers of Llama 4 and PhiMoE choose the experts
    in their forward); and a layer beside the experts with an output for each expert, or one (the gate of a shared expert).
    """
    found = {name for name, module in model.named_modules() if _is_linear(module) and _chooses(module)}
    for prefix, experts in {**fused_experts(model), **unfused_experts(model)}.items():
        block = prefix.rpartition(".")[0]
        for name, module in model.get_submodule(block).named_modules():
            full = f"{block}.{name}" if block else name
            inside = full.startswith(f"{prefix}.")
            if not inside and _is_linear(module) and _outputs(module) in (1, experts.num_experts):
                found.add(full)
    return found


def _chooses(layer: nn.Module) -> bool:
    return foreign_weight(layer) is None and not acts_linearly(layer)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _outputs(module: Any) -> int:
    return module.nf if isinstance(module, Conv1D) else module.out_features
