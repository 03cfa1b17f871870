# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The tuner layer of PEQA: all scales of integer weights are trained."""

from __future__ import annotations

from typing import Any

from peft_ext.scale_tuning.layer import ScaleTuningLinear


class PeqaLinear(ScaleTuningLinear):
    """A [`PackedLinear`] of uniform integers whose scales, and perhaps zero points, adapters replace."""

    prefix = "peqa_"
    adapter_layer_names = ("peqa_delta", "peqa_zero_delta")
    keep_product = False  # until an adapter asks for it

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add an adapter."""
        super().update_layer(adapter_name, config)
        self.keep_product = self.keep_product or config.keep_product

    def product_options(self) -> dict[str, Any]:
        return {"keep_product": self.keep_product}
