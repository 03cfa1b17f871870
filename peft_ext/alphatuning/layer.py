# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The tuner layer of AlphaTuning: the first alphas of a binary coding are trained, or all of them."""

from __future__ import annotations

from typing import Any

from peft_ext.scale_tuning.layer import ScaleTuningLinear


class AlphaTuningLinear(ScaleTuningLinear):
    """A [`PackedLinear`] in binary coding whose alphas adapters replace."""

    prefix = "alphatuning_"
    adapter_layer_names = ("alphatuning_delta",)

    def product_options(self) -> dict[str, Any]:
        # of frozen alphas no gradient is computed
        trained = [self.delta(name).shape[-1] for name in self.active_adapters if name in self.deltas]
        return {"trained_planes": max(trained, default=1)}
