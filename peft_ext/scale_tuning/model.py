# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The tuner model: packs a model's layers at injection and manages the adapters' scales as PEFT expects."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Container, Iterable, Sequence
from typing import Any, Optional

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from peft_ext.checkpoint import mixed_precision, pack_quantized
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.modalities import other_parts, part_of
from peft_ext.quant.conversion import dequantize_layers
from peft_ext.quant.experts import fused_experts, future_layers, unfuse_experts
from peft_ext.quant.formats import LATTICE, Uniform
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.replaceable import bypassed_layers
from peft_ext.routers import routers
from peft_ext.scale_tuning import adapter_file
from peft_ext.scale_tuning.config import ScaleTuningConfig
from peft_ext.scale_tuning.embeddings import check_embeddings, frozen_ends, pack_embeddings
from peft_ext.scale_tuning.layer import Mixture, ScaleTuningLinear
from peft_ext.scale_tuning.quantization import (
    check_target,
    free_weight,
    modules_with_several_names,
    pack_layer,
    take_format_of_base,
    take_lattices,
)
from peft_ext.scale_tuning.report import announce
from peft_ext.sharding import refuse_cut, reshard, sharded_by
from peft_ext.targets import check_called, check_weights_stay, expand_all_linear, target_layers
from peft_ext.tuner import TunerModel


class ScaleTuningModel(TunerModel):
    """Base of [`PeqaModel`] and [`AlphaTuningModel`], which say what `prefix` and `tuner_layer_cls` are."""

    tuner_layer_cls: type[ScaleTuningLinear]
    # of the injection under way
    _progress: Optional[tqdm] = None
    _several: Container[nn.Module] = ()  # of the model's modules those with more than one name
    _news: Optional[dict[str, Any]] = None

    def _prepare_adapter_config(self, peft_config: ScaleTuningConfig, model_config: dict) -> ScaleTuningConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _prepare_model(self, peft_config: ScaleTuningConfig, model: nn.Module) -> None:
        """Check every target before any is changed."""
        everything, unmatched = asks_for_everything(peft_config), unmatched_targets(peft_config, model)
        targets = check_targets(peft_config, model)
        fresh = [
            name
            for name, module in targets.items()
            if not isinstance(module, ScaleTuningLinear) and not pack_quantized.is_packed(module)
        ]
        if peft_config.bits_budget is not None:
            raise ValueError(budget_unspent(peft_config, fresh))
        if fresh and peft_config.needs_data:
            raise ValueError(_calibration_missing(peft_config, fresh))
        everything = everything and bool(fresh or mixed_precision.kept_layers(model))
        if fresh or unmatched or everything:
            self._news = {"everything": everything, "unmatched": unmatched}
        if peft_config.embedding_bits is not None:
            check_embeddings(model, peft_config.embedding_bits)
        self._several = modules_with_several_names(model)
        # shown on a terminal, and only if it takes a while
        self._progress = tqdm(total=len(fresh), desc="Quantising", unit="layer", delay=1.0, disable=None, leave=False)
        if fresh and any(isinstance(module, ScaleTuningLinear) for module in model.modules()):
            warnings.warn(
                f"The new adapter quantises {len(fresh)} layers that were float so far, such as {fresh[0]!r}. All "
                "adapters share one packed base, so the outputs of the others change too.",
                stacklevel=2,
            )

    def _layer_around(self, target: nn.Module, adapter_name: str, peft_config: Any, name: str) -> nn.Module:
        return self.tuner_layer_cls(pack_layer(target, peft_config, name), adapter_name, peft_config)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)  # a module that was trained in full; it needn't have a weight
        elif isinstance(new_module, (ScaleTuningLinear, PackedLinear)):
            # made on the right device, with a weight of its own; PEFT's version would copy the float weight over
            setattr(parent, child_name, new_module)
            free_weight(child, self._several)
            if self._progress is not None:
                self._progress.update()
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        pack_quantized.release_hook(model)
        if config.embedding_bits is not None:
            pack_embeddings(model, config.embedding_bits)
        self._several = ()
        if self._progress is not None:
            self._progress.close()
            self._progress = None  # it can't be copied
        if self._news is not None:
            announce(model, **self._news)
            self._news = None

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Optional[list[str]] = None,
        dequantize: bool = False,
    ) -> nn.Module:
        r"""
        Write the adapter's scales into the base model and return it, still packed.

        `save_pretrained` of the returned transformers model writes a packed checkpoint: of uniform integers a
        compressed-tensors one (`pack-quantized`), which stock transformers and vLLM load; of a binary coding and of
        `Conv1D` layers our own (`bcq`), which transformers loads once `peft_ext` is imported.

        Args:
            progressbar (`bool`):
                whether to show a progressbar indicating the unload and merge process (default: False).
            safe_merge (`bool`):
                whether to check the merged scales for NaN and infinity before writing them.
            adapter_names (`List[str]`, *optional*):
                The list of adapter names that should be merged. If None, all active adapters will be merged.
            dequantize (`bool`):
                whether to return plain float `nn.Linear` (`Conv1D`) layers instead of packed ones.
        """
        model = self._unload_and_optionally_merge(
            progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        if dequantize:
            make_saveable(dequantize_layers(model))
        return model

    def merge_adapter(self, adapter_names: Optional[list[str]] = None, safe_merge: bool = False) -> None:
        reshard(self)
        super().merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        reshard(self)
        super().unmerge_adapter()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        if any(isinstance(module, ScaleTuningLinear) and module.merged for module in self.modules()):
            reshard(self)  # PEFT unmerges first
        super().set_adapter(adapter_name, inference_mode)

    def _unload_and_optionally_merge(self, *args, **kwargs) -> nn.Module:
        sharder = sharded_by(self)
        if sharder is not None:
            raise ValueError(
                f"{sharder} shards the model, and its wrapping goes by the adapters' layers, so they can't be taken out here. "
                "Save the adapter (save_pretrained with the gathered state dict, or trainer.save_model) and merge it in one "
                "process: PeftModel.from_pretrained(base, folder).merge_and_unload()."
            )
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        make_saveable(model)
        return model

    def _weighted_fields(self, adapters: list[str], held: dict[str, ScaleTuningLinear]) -> dict[str, Any]:
        if len({type(self.peft_config[name].target_modules) for name in adapters}) > 1:
            raise ValueError("All adapter configs should have the same type for target_modules, a list or a regex.")
        first = self.peft_config[adapters[0]]
        formats = {name: layer.base_layer.number_format for name, layer in held.items()}
        # the sum may be of any sign, which the log can't stand for
        return {
            "bits_pattern": {name: one.bits for name, one in formats.items() if one.bits != first.bits},
            "group_size_pattern": {
                name: one.group_size for name, one in formats.items() if one.group_size != first.group_size
            },
            **{name: None for name in ("sym", "zero") if hasattr(first, name)},  # as the layers have it
            **(
                {"trained": _trained(self.peft_config[name] for name in adapters)} if hasattr(first, "trained") else {}
            ),
            "parametrization": "relative" if first.parametrization == "log" else first.parametrization,
        }

    def _layer_arguments(self, adapter_names: list[str]) -> dict[str, Any]:
        return {"mixture": Mixture(adapter_names)}

    def _row_arguments(self, arguments: dict[str, Any], samples: torch.Tensor) -> dict[str, Any]:
        return {"mixture": arguments["mixture"].of_rows(samples)}

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return adapter_file.to_file(model, adapter_name, selected, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        state_dict = adapter_file.from_file(model, config, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _trained(configs: Iterable[Any]) -> str:
    """What the sum of adapters trains: zero points if any of them does."""
    return max((config.trained for config in configs), key=lambda trained: trained == "scales+zeros")


def check_targets(config: ScaleTuningConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The layers that a config targets in a model, by name, once all of them have been checked.

    Layers that were loaded dequantised from a packed checkpoint become packed again; "all-linear" and the format are
    spelt out in the config.

    Raises:
        ValueError: If a layer can't be tuned under this config; names it.
    """
    if not any(isinstance(module, ScaleTuningLinear) for module in model.modules()):
        refuse_cut(model)
    check_weights_stay(model)
    pack_quantized.restore(model)
    unfuse_targets(config, model)
    resolve_all_linear(config, model)
    targets = target_layers(config, model)
    if not config.inference_mode:  # an earlier release's adapter holds such layers too, as they were
        check_called(targets, model)
    if config.init_method == LATTICE:
        targets = take_lattices(config, model, targets)
    take_format_of_base(config, targets)
    ends = frozen_ends(model, config.embedding_bits)
    for name, module in targets.items():
        if name in ends:
            raise ValueError(
                f"target_modules has {name!r}, which is packed with the embedding and stays frozen; leave it out"
                f"{', or leave out embedding_bits' if config.embedding_bits is not None else ''}."
            )
        check_target(module, config, name)
    integers = config.number_format_cls is Uniform and getattr(config, "zero", None) != "float"
    mixed_precision.check_room(model, targets, integers and not any(isinstance(m, Conv1D) for m in targets.values()))
    mixed_precision.let_gradients_through(model)
    return targets


def asks_for_everything(config: ScaleTuningConfig) -> bool:
    """Whether the targets are "all-linear", which they are by default."""
    targets = config.target_modules
    return targets is None or (isinstance(targets, str) and targets.lower() == "all-linear")


def unmatched_targets(config: ScaleTuningConfig, model: nn.Module) -> list[str]:
    """The names in `target_modules` that no module of the model has, which PEFT passes over as long as another one fits."""
    if not isinstance(config.target_modules, (list, set)):
        return []
    names = [*future_layers(model), *(name for name, _ in model.named_modules())]
    endings = {name[start:] for name in names for start in _starts(name)}
    return sorted(set(config.target_modules) - endings)


def _starts(name: str) -> list[int]:
    return [0, *(index + 1 for index, letter in enumerate(name) if letter == ".")]


def unfuse_targets(config: ScaleTuningConfig, model: nn.Module) -> None:
    """Give experts that are fused in 3-D parameters a layer each where the config targets one of them.

    "all-linear" means them, too, unless the base has packed layers already.
    """
    if not fused_experts(model):
        return
    parts: dict[str, str] = {}
    if asks_for_everything(config):
        if any(map(_has_codes, model.modules())):
            return
        config, parts = copy.copy(config), other_parts(model)
        config.target_modules = ".*"
    unfuse_experts(
        model, lambda name: part_of(name, parts) is None and BaseTuner._check_target_module_exists(config, name)
    )


def resolve_all_linear(config: ScaleTuningConfig, model: nn.Module) -> None:
    """Spell "all-linear" out. On a base with packed layers it means these; on a float one, what PEFT means by it but for the
    routers, which stay float, and of a multimodal model in its language model only: what isn't trained on or calibrated with
    images should see them unrounded."""
    if not asks_for_everything(config) or config.target_modules is None:
        return
    packed = {name for name, module in model.named_modules() if _has_codes(module)}
    if packed:
        inner = {f"{name}.base_layer" for name in packed}
        tunable = packed - inner - set(bypassed_layers(model)) - frozen_ends(model)
        config.target_modules = tunable  # type: ignore[assignment]  # PEFT, too, keeps a set here
    else:
        expand_all_linear(config, model)
        parts, left = other_parts(model), routers(model)
        found = config.target_modules or ()
        config.target_modules = {name for name in found if name not in left and part_of(name, parts) is None}  # type: ignore[assignment]


def _has_codes(module: nn.Module) -> bool:
    if isinstance(module, (ScaleTuningLinear, PackedLinear)):
        return True
    return pack_quantized.is_compressed(module) and pack_quantized.can_take_over(module)


def budget_unspent(config: ScaleTuningConfig, fresh: Sequence[str]) -> str:
    """Why layers can't be quantised under a budget from which no widths have been chosen yet.

    Args:
        fresh: Names of those that are float; none: all are packed.
    """
    if not fresh:
        return (
            f"bits_budget={config.bits_budget:g} chooses widths of float layers, and all targets are packed already; leave it "
            "out to take what each has, or start from the float model."
        )
    return (
        f"bits_budget={config.bits_budget:g} needs data to weigh {len(fresh)} layers, such as {fresh[0]!r}. Call "
        "peft_ext.calibrate(model, config, batches) before get_peft_model; without calibration, peft_ext.allocate_bits(...)."
    )


def _calibration_missing(config: ScaleTuningConfig, names: list[str]) -> str:
    missing = (
        f"init_method={config.init_method!r} needs data, and layer {names[0]!r} ({len(names)} in all) is still float. "
    )
    if config.inference_mode:
        return missing + (
            "An adapter that is being loaded needs the packed base that it was trained on, the folder that "
            "model.unload().save_pretrained(...) wrote: load that, then PeftModel.from_pretrained(base, adapter). The "
            f"adapter's base_model_name_or_path, {config.base_model_name_or_path!r}, is what that base was made from, or "
            "the base itself."
        )
    data_free = config.number_format_cls.default_method
    return missing + (
        f"Call peft_ext.calibrate(model, config, batches) before get_peft_model, or pass init_method={data_free!r}."
    )
