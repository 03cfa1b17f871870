# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""An adapter of one scale per output channel, as an (IA)^3 adapter, which PEFT loads without us.

`W' = diag(s' / s) W`: what tuning makes of a layer's scales multiplies its outputs, and that is (IA)^3 (Liu et al., 2022) on a
layer that isn't called feed-forward.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Union

import torch
from peft import IA3Config, PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig

from peft_ext.checkpoint.stock_loading import names_in_stock
from peft_ext.files import written_whole
from peft_ext.scale_tuning.layer import ScaleTuningLinear


def save_ia3(model: PeftModel, folder: Union[str, Path], adapter_name: str = "default") -> Path:
    """Write an adapter as (IA)^3 into a new folder; whole or not at all.

    Args:
        model: The base with the adapter, not merged. `base_model_name_or_path` of the adapter's config is written as it is.
        folder: Gets `adapter_config.json` and `adapter_model.safetensors`, which `PeftModel.from_pretrained` takes onto the same
            base, packed or as floats.

    Raises:
        ValueError: If (IA)^3 computes something else: groups, zero points or alphas that were tuned, biases, layers that stock
            transformers doesn't have; names the layer and the way out.
    """
    folder, config = Path(folder).expanduser(), model.peft_config[adapter_name]
    vectors = ia3_vectors(model, adapter_name)
    base = config.base_model_name_or_path
    if base and how_packed(base, config.revision) is None:
        raise _refusal(
            f"its base {base!r} is floats, and (IA)^3 doesn't round them as {config.peft_type.value} does when it is loaded; "
            "save the packed base (model.unload().save_pretrained(folder)) and name that folder as the adapter's "
            "base_model_name_or_path"
        )
    ia3 = IA3Config(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        target_modules=sorted(vectors),
        feedforward_modules=[],
        inference_mode=True,
    )
    with written_whole(folder) as partial:
        partial.mkdir()
        ia3.save_pretrained(str(partial))
        tensors = {f"base_model.model.{name}.ia3_l": vector for name, vector in vectors.items()}
        save_file(tensors, str(partial / "adapter_model.safetensors"), metadata={"format": "pt"})
    return folder


def how_packed(name: str, revision: Optional[str] = None) -> Optional[str]:
    """The `quant_method` of a base, a folder or hub id; None where it is stored as floats."""
    stored = getattr(AutoConfig.from_pretrained(name, revision=revision), "quantization_config", None)
    return None if stored is None else str(stored.get("quant_method"))


@torch.no_grad()
def ia3_vectors(model: PeftModel, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """What an adapter multiplies each layer's outputs by: float32 `[out, 1]`, by the layer's name in the base.

    Raises:
        ValueError: As [`save_ia3`].
    """
    base = model.get_base_model()
    config = model.peft_config[adapter_name]
    if config.modules_to_save:
        raise _refusal(f"it has modules_to_save={sorted(config.modules_to_save)}")
    layers = {
        name: layer
        for name, layer in base.named_modules()
        if isinstance(layer, ScaleTuningLinear) and layer.holds(adapter_name)
    }
    if not layers:
        raise _refusal(f"{adapter_name!r} is no PEQA adapter")
    lacking = sorted(set(layers) - names_in_stock(base))
    if lacking:
        raise _refusal(f"stock transformers has no layer {lacking[0]!r} (an expert is part of a fused tensor there)")
    return {name: _vector(name, layer, adapter_name) for name, layer in layers.items()}


def _vector(name: str, layer: ScaleTuningLinear, adapter_name: str) -> torch.Tensor:
    base, scale = layer.base_scale().float(), layer.scale_of(adapter_name).float()
    if base.dim() > 2:
        raise _refusal(f"layer {name!r} is a binary coding, whose alphas were tuned one by one")
    if base.shape[1] > 1:
        raise _refusal(
            f"layer {name!r} has {base.shape[1]} scales for an output (group_size={layer.base_layer.group_size})"
        )
    if layer.zero_delta(adapter_name) is not None:
        raise _refusal(f"layer {name!r} has tuned zero points")
    if layer.base_layer.bias is not None:
        raise _refusal(f"layer {name!r} has a bias, which (IA)^3 would multiply, too")
    ratio = torch.where(base == 0, torch.ones_like(base), scale / base)
    return ratio.cpu().contiguous()


def _refusal(why: str) -> ValueError:
    return ValueError(
        f"the adapter is no (IA)^3 adapter: {why}. Load it with peft_ext installed, or merge it (--to compressed-tensors, gguf "
        "or dequantized)."
    )
