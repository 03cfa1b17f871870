# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""transformers' own `model.load_adapter` for adapters of scales; `from_pretrained(adapter)` and pipelines call it, too.

It copies tensors by the names that they have in the file. An adapter file of ours holds plain scales and fingerprints, of
which the model has neither. So `load_adapter` is given a state dict that looks as if the file held deltas. They are made
once transformers reads it, when the layers are there that know codes and scales; all else is transformers' work.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, ItemsView
from pathlib import Path
from typing import Any, Optional

import torch
from peft import PeftConfig
from peft.functional import delete_adapter
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file

from peft_ext.adapter_files import read_adapter, type_of
from peft_ext.scale_tuning import adapter_file
from peft_ext.scale_tuning.config import ScaleTuningConfig


_WEIGHTS = "adapter_model.safetensors"


class _Deltas(dict[str, torch.Tensor]):
    """What a file holds, and once its items are asked for: what the model's layers make of it.

    Args:
        tensors: The file's.
        model: Gets the adapter.
        config, adapter_name: Of the adapter.
    """

    def __init__(
        self, tensors: dict[str, torch.Tensor], model: PreTrainedModel, config: ScaleTuningConfig, adapter_name: str
    ) -> None:
        super().__init__(tensors)
        self._convert = functools.partial(adapter_file.from_file, model, config, adapter_name)

    def items(self) -> ItemsView[str, torch.Tensor]:  # type: ignore[override]
        return self._convert(dict(super().items())).items()


def extended(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `load_adapter` made right for adapters of scales; any other adapter is left to it as ever."""

    @functools.wraps(load_adapter)
    def load(
        self: PreTrainedModel,
        peft_model_id: Optional[str | os.PathLike] = None,
        adapter_name: Optional[str] = None,
        peft_config: Optional[PeftConfig] = None,
        adapter_state_dict: Optional[dict[str, torch.Tensor]] = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        load_config = kwargs.get("load_config")
        peft_model_id = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
        download = _download_arguments(kwargs)
        config = _config(peft_model_id, peft_config, download)
        if config is None:
            if adapter_state_dict is None:
                _check_file(peft_model_id, download)
            return load_adapter(self, peft_model_id, adapter_name, peft_config, adapter_state_dict, *args, **kwargs)
        if kwargs.get("hotswap") is True:
            raise ValueError("Hotswapping is currently only supported for LoRA, please set `hotswap=False`.")
        name = adapter_name or "default"
        if name in getattr(self, "peft_config", {}):
            raise ValueError(f"Adapter with name {name} already exists. Please use a different name.")
        if adapter_state_dict is None:
            adapter_state_dict = read_adapter(_weights(peft_model_id, download))
        active = _active(self)
        deltas = _Deltas(adapter_state_dict, self, config, name)
        try:
            return load_adapter(self, peft_model_id, name, config, deltas, *args, **kwargs)
        except ValueError:
            _forget(self, name, active)
            raise

    return load


def _active(model: nn.Module) -> list[str]:
    return next((layer.active_adapters for layer in model.modules() if isinstance(layer, BaseTunerLayer)), [])


def _forget(model: PreTrainedModel, adapter_name: str, active: list[str]) -> None:
    """Delete an adapter of which loading failed, and go back to those that were active."""
    configs = getattr(model, "peft_config", {})
    for layer in model.modules():
        if active and isinstance(layer, BaseTunerLayer):
            layer.set_adapter(active, inference_mode=configs[active[0]].inference_mode)
    if adapter_name in configs:
        # transformers' `delete_adapter` does this, too, but asks for the newest PEFT
        delete_adapter(model, adapter_name, prefix=PEFT_TYPE_TO_PREFIX_MAPPING[configs.pop(adapter_name).peft_type])
        if not configs:
            del model.peft_config
    model._hf_peft_config_loaded = bool(configs)


def _download_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Where the files are to be looked for, as transformers puts it together from `load_adapter`'s arguments."""
    load_config = kwargs.get("load_config")
    download = dict(load_config.download_kwargs or {}) if load_config is not None else {}
    download.update(kwargs.get("download_kwargs") or {})
    download.update(kwargs.get("adapter_kwargs") or {})
    if kwargs.get("local_files_only"):
        download["local_files_only"] = True
    return download


def _check_file(peft_model_id: Optional[str | os.PathLike], download: dict[str, Any]) -> None:
    """Check the file of an adapter of ours that transformers itself loads."""
    config = find_adapter_config_file(peft_model_id, **download) if peft_model_id is not None else None
    if config is not None and type_of(Path(config).parent) is not None:
        read_adapter(_weights(peft_model_id, download))


def _weights(peft_model_id: Optional[str | os.PathLike], download: dict[str, Any]) -> Path:
    """The adapter's safetensors file.

    Raises:
        FileNotFoundError: If there is none; names what is taken.
    """
    found = cached_file(peft_model_id, _WEIGHTS, _raise_exceptions_for_missing_entries=False, **download)
    if found is None:
        raise FileNotFoundError(
            f"{str(peft_model_id)!r} has no {_WEIGHTS}; adapters of ours are taken from safetensors alone, so save it again."
        )
    return Path(found)


def _config(
    peft_model_id: Optional[str | os.PathLike], peft_config: Optional[PeftConfig], download: dict[str, Any]
) -> Optional[ScaleTuningConfig]:
    """The adapter's config if it is one of scales, else None."""
    if peft_config is None:
        file = find_adapter_config_file(peft_model_id, **download)
        if file is None:
            return None
        kind = type_of(Path(file).parent)
        if kind is None or not issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[kind], ScaleTuningConfig):
            return None
        peft_config = PeftConfig.from_pretrained(peft_model_id, **download)
    return peft_config if isinstance(peft_config, ScaleTuningConfig) else None
