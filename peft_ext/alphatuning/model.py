# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The AlphaTuning tuner."""

from __future__ import annotations

from typing import Any

from peft_ext.alphatuning.layer import AlphaTuningLinear
from peft_ext.scale_tuning.layer import ScaleTuningLinear
from peft_ext.scale_tuning.model import ScaleTuningModel


class AlphaTuningModel(ScaleTuningModel):
    """
    Creates an AlphaTuning model: weights in binary coding, frozen, whose first scaling factors are tuned. Paper:
    https://huggingface.co/papers/2210.03858

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to be adapted.
        config ([`AlphaTuningConfig`]): The configuration of the AlphaTuning model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The AlphaTuning model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from peft_ext import AlphaTuningConfig, calibrate

        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> config = AlphaTuningConfig(bits=3, init_method="calibrated")
        >>> model = get_peft_model(calibrate(model, config, batches), config)
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`AlphaTuningConfig`]): The configuration of the AlphaTuning model.
    """

    prefix: str = "alphatuning_"
    tuner_layer_cls = AlphaTuningLinear

    def _weighted_fields(self, adapters: list[str], held: dict[str, ScaleTuningLinear]) -> dict[str, Any]:
        kinds = {self.peft_config[name].trained_alphas for name in adapters}
        fields = super()._weighted_fields(adapters, held)
        return {**fields, "trained_alphas": "all" if "all" in kinds else "first"}
