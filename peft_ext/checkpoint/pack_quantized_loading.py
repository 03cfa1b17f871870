# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""compressed-tensors checkpoints of packed integers straight into packed layers; no float weight is made.

By plain `from_pretrained`, those that we write: a checkpoint is ours where its config has `packed_bits`, which
`pack_quantized` writes, and transformers' own quantizer stays in charge of everybody else's. By
[`peft_ext.load_packed`], which puts `QUANT_METHOD` into the config while it loads, also what others wrote.

The layers become [`PackedLinear`] as their tensors arrive. Which scheme of the config a layer has is found as
compressed-tensors finds it: by its name, by a regular expression, by its class, in that order. Layers of other schemes
(FP8, W8A8) stay what stock transformers makes of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Optional

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.utils.match import match_targets
from torch import nn
from transformers import CompressedTensorsConfig, PreTrainedModel
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from peft_ext.checkpoint.files import (
    TensorHeader,
    names_in_model,
    read_headers,
    read_tensor,
    stored_layers,
    tensors_of,
    unfuse_stored,
    without_merging,
)
from peft_ext.checkpoint.mixed_precision import let_gradients_through
from peft_ext.checkpoint.pack_quantized import CONTAINER_BITS, OWN_BITS, TENSORS, check_shape, expand, own_bits_of
from peft_ext.checkpoint.saving import make_saveable
from peft_ext.checkpoint.soundness import check_complete, check_numbers
from peft_ext.checkpoint.stored_layer import (
    StoredLayer,
    linear_layers_of,
    pack_stored_layers,
    release_pages,
)
from peft_ext.checkpoint.tied_weights import untie
from peft_ext.quant.conversion import weight_of
from peft_ext.quant.linear import PackedLinear
from peft_ext.sharding import refuse_distributed_loading


# Not "compressed-tensors", whose checkpoints load as stock transformers loads them; stands in configs while one is loaded.
QUANT_METHOD = "packed-compressed-tensors"
# What a layer of a file is matched as before it is known what the model has there.
_ANY_LINEAR = nn.Linear(1, 1)


class PackedTensorsConfig(CompressedTensorsConfig):
    """A compressed-tensors config of anybody's whose packed integers are to become packed layers; [`load_packed`] makes
    it."""

    def __init__(self, *args: Any, quant_method: str = QUANT_METHOD, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quant_method = quant_method


class PackedTensorsHfQuantizer(CompressedTensorsHfQuantizer):
    """transformers' quantizer for compressed-tensors, which packs what peft-ext has written."""

    takes_all = False  # also what others wrote, and then nothing but packed layers will do

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Optional[list[str]] = None, **kwargs: Any
    ) -> None:
        marked = self.takes_all or hasattr(model.config, OWN_BITS)
        if marked and self.quantization_config.quantization_config is None:
            raise ValueError(
                "config.json: quantization_config.config_groups is missing or empty, so nothing tells how the layers are packed; "
                "save or download the checkpoint again."
            )
        headers = read_headers(checkpoint_files or []) if marked else {}
        if marked:
            refuse_distributed_loading(model)
        self.packs = marked and self._make_room(model, headers)
        if not self.packs or self._keep_the_rest():
            super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)

    def _keep_the_rest(self) -> bool:
        """Leave stock transformers what isn't packed integers: layers of other schemes, and keys and values; False: nothing."""
        self.compressor.quantization_config = rest = copy.deepcopy(self.quantization_config.quantization_config)
        rest.config_groups = {
            key: scheme for key, scheme in rest.config_groups.items() if is_kept(scheme, rest.format)
        }
        return bool(rest.config_groups) or rest.kv_cache_scheme is not None

    def _make_room(self, model: PreTrainedModel, headers: dict[str, TensorHeader]) -> bool:
        """Put what takes a checkpoint's tensors in the place of the layers that it has packed; False: there are none.

        Raises:
            ValueError: If a layer can't be taken over; names it and what it has.
        """
        schemes = self.quantization_config.quantization_config
        stored = [
            name
            for name in stored_layers(headers, "weight_packed")
            if not is_kept(scheme_of(schemes, (name,), _ANY_LINEAR), schemes.format)
        ]
        unfuse_stored(model, stored)
        if not self.takes_all:
            in_file, modules = names_in_model(model, stored), dict(model.named_modules())
            if not in_file or not all(isinstance(modules[name], nn.Linear) for name in in_file):
                return False
        in_file, modules = linear_layers_of(model, stored), dict(model.named_modules())
        # stock transformers can't load zero points otherwise; we can
        self.quantization_config.dequantize = False
        own_bits = own_bits_of(getattr(model.config, OWN_BITS, None))
        untie(model, in_file)
        check_complete(model, headers, "weight_packed", ("weight_shape", "weight_zero_point"), in_file)
        for name, key in in_file.items():
            scheme = scheme_of(schemes, (key, name), modules[name])
            if is_kept(scheme, schemes.format):  # found by its name in the model only
                continue
            weights = check_scheme(key, scheme)
            tensors = tensors_of(headers, key, (*TENSORS, "weight_g_idx", "bias"))
            bits = own_bits.get(key, own_bits.get(name, weights.num_bits))
            model.set_submodule(name, _StoredIntegers(tensors, modules[name], weights, bits, key))
        return True

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        if not hasattr(model.config, OWN_BITS):  # we unfuse experts ourselves
            super()._convert_model_for_quantization(model)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        if not self.packs:
            return super().update_weight_conversions(weight_conversions, model)
        return without_merging(weight_conversions, model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.packs:
            return super()._process_model_after_weight_loading(model, **kwargs)
        pack_stored_layers(model)
        check_numbers(model)
        let_gradients_through(model)
        make_saveable(model)
        return model


class AnyTensorsHfQuantizer(PackedTensorsHfQuantizer):
    """The same for what others wrote."""

    takes_all = True


def has_packed_integers(stored: Mapping[str, Any]) -> bool:
    """Whether a compressed-tensors config, as config.json has it, packs integers of some layers and nothing else of them."""
    config = CompressedTensorsConfig(**stored).quantization_config
    schemes = [] if config is None else config.config_groups.values()
    return any(scheme.weights is not None and not is_kept(scheme, config.format) for scheme in schemes)


def is_kept(scheme: Optional[QuantizationScheme], config_format: str) -> bool:
    """Whether layers of a scheme are left to stock transformers: their weights aren't packed integers (FP8, NVFP4), or
    activations are quantised, too (W8A8, W4A8)."""
    if scheme is None or scheme.weights is None:
        return False
    integers = scheme.weights.type == "int" and (scheme.format or config_format) in (
        "pack-quantized",
        "mixed-precision",
    )
    return not integers or scheme.input_activations is not None or scheme.output_activations is not None


def scheme_of(config: Any, names: tuple[str, ...], module: nn.Module) -> Optional[QuantizationScheme]:
    """A layer's scheme under a compressed-tensors `QuantizationConfig`; `names`: what it is called, the files' first."""
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    for name in names:
        targets = match_targets(name, module, list(schemes))
        if targets:
            return schemes[targets[0]]
    return None


def check_scheme(name: str, scheme: Optional[QuantizationScheme]) -> Any:
    """The arguments of a scheme's weights, once it is known that packed layers have their width and groups.

    Raises:
        ValueError: Names the layer, what it has and the way out.
    """
    weights = getattr(scheme, "weights", None)
    if weights is None:
        raise ValueError(
            f"layer {name!r} is packed in the files, but no config_groups of config.json has it; one of the two isn't this "
            "checkpoint's. Save or download both again."
        )
    if weights.num_bits not in CONTAINER_BITS or weights.strategy not in ("channel", "group"):
        raise ValueError(
            f"layer {name!r} is {weights.num_bits}-bit {weights.type} per {weights.strategy}; only integers of {CONTAINER_BITS} "
            "bits per channel or group fit into packed layers. Load it with from_pretrained, or quantise the float model again."
        )
    return weights


class _StoredIntegers(StoredLayer):
    """A layer of integers in compressed-tensors' containers.

    Args:
        weights: compressed-tensors' arguments of the weight; their `num_bits` are the container's.
        bits: Width of a code.

    Raises:
        ValueError: If a tensor is missing, or doesn't belong to a weight of the layer's shape; names the layer.
    """

    def __init__(self, tensors: dict[str, TensorHeader], layer: Any, weights: Any, bits: int, name: str) -> None:
        order = tensors.pop("weight_g_idx", None)
        _check_tensors(name, tensors, tuple(weight_of(layer).shape), weights)
        # scales are float32 here, so that loading in bfloat16 doesn't round them
        super().__init__(tensors, layer, {"weight_scale": torch.float32})
        self.container_bits, self.bits = weights.num_bits, bits
        if bits > weights.num_bits:
            raise ValueError(
                f"layer {name!r}: {OWN_BITS} of config.json says {bits} bits, and its num_bits that codes are stored in "
                f"{weights.num_bits}; one of the two isn't this checkpoint's. Save or download it again."
            )
        if order is not None:
            _check_order(name, read_tensor(order, f"{name}.weight_g_idx"), self.in_features, weights)

    def packed(self, name: str) -> PackedLinear:
        """The packed layer with the same codes, zero points and scales."""
        tensors: dict[str, torch.Tensor] = {
            part: getattr(self, part).data for part in TENSORS if isinstance(getattr(self, part, None), torch.Tensor)
        }
        check_shape(name, tensors["weight_shape"], (self.out_features, self.in_features))
        zero_point = tensors.get("weight_zero_point")
        if zero_point is not None and zero_point.dtype == torch.int8:
            tensors["weight_zero_point"] = pack_to_int32(zero_point, self.container_bits, packed_dim=0)
        bias: Any = getattr(self, "bias", None)
        layer = expand(tensors, self.container_bits, self.bits, bias, name)
        layer.compute_dtype = self.compute_dtype
        release_pages(tensors["weight_packed"])
        return layer


def _check_tensors(
    name: str, tensors: Mapping[str, TensorHeader], weight_shape: tuple[int, ...], weights: Any
) -> None:
    """Refuse, before anything is loaded, a layer whose tensors don't fit.

    Raises:
        ValueError: Names the layer, what it has and what was expected.
    """
    out_features, in_features = weight_shape
    groups = 1
    if weights.strategy == "group":
        groups = in_features // weights.group_size
        if in_features % weights.group_size:
            raise ValueError(
                f"layer {name!r} has {in_features} inputs in groups of {weights.group_size}, the last one smaller, which "
                "packed layers don't have."
            )
    scale, rows = (out_features, groups), math.ceil(out_features * weights.num_bits / 32)
    packed = [("I32", (rows, groups))]
    if rows == 1:  # may be stored with a second one that nothing reads, see `compress`
        packed.append(("I32", (2, groups)))
    shapes: list[tuple[int, ...]] = [scale, scale[:1]] if groups == 1 else [scale]
    expected: dict[str, list[tuple[str, tuple[int, ...]]]] = {
        "weight_packed": [("I32", (out_features, math.ceil(in_features * weights.num_bits / 32)))],
        "weight_scale": [(kind, shape) for kind in ("F16", "BF16", "F32") for shape in shapes],
        "weight_shape": [("I64", (2,)), ("I32", (2,))],
    }
    if not weights.symmetric or "weight_zero_point" in tensors:
        # compressed-tensors before 0.9 left them as they are
        expected["weight_zero_point"] = [*packed, ("I8", scale)]
    for part, fitting in expected.items():
        if part not in tensors:
            raise ValueError(f"layer {name!r}: the checkpoint has no {part}; save or download it again.")
        found = (tensors[part].dtype, tensors[part].shape)
        if found not in fitting:
            raise ValueError(
                f"layer {name!r}: {part} is {found[0]} {list(found[1])}; a weight of [{out_features}, {in_features}] at "
                f"{weights.num_bits} bits per {weights.strategy} has {fitting[0][0]} {list(fitting[0][1])}. The checkpoint is "
                "damaged, or its config.json is another's."
            )


def _check_order(name: str, order: torch.Tensor, in_features: int, weights: Any) -> None:
    """Refuse groups that don't consist of neighbouring inputs; an order of -1 was never set."""
    if weights.strategy != "group" or bool((order == -1).any()):
        return
    in_order = torch.arange(in_features, device="cpu") // weights.group_size
    if not torch.equal(order.long().cpu(), in_order):
        raise ValueError(
            f"layer {name!r} has its inputs ordered by activation (actorder='group', a weight_g_idx that isn't in order), so "
            "its groups are scattered over the inputs, which packed layers don't have. Use a checkpoint made with "
            "actorder='static' (llm-compressor's default), which is as accurate, or per channel."
        )
