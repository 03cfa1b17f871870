# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The linear layers that decide which experts a token goes to: they stay float unless they are named."""

from __future__ import annotations

from torch import nn

from peft_ext.quant.experts import fused_experts, unfused_experts


def routers(model: nn.Module) -> set[str]:
    """The names of a model's routing layers: those beside the experts that have an output for each of them, or a single one
    (the gate of a shared expert)."""
    found = set()
    for prefix, experts in {**fused_experts(model), **unfused_experts(model)}.items():
        block = prefix.rpartition(".")[0]
        for name, module in model.get_submodule(block).named_modules():
            full = f"{block}.{name}" if block else name
            inside = full.startswith(f"{prefix}.")
            if not inside and isinstance(module, nn.Linear) and module.out_features in (1, experts.num_experts):
                found.add(full)
    return found
