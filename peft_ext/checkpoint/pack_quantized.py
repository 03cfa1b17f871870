# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""compressed-tensors `pack-quantized`, which stock transformers and vLLM load, out of and into packed layers.

Writing hangs on transformers' own hook: `save_pretrained` asks `model.hf_quantizer` for the state dict. The library packs.

Two things in transformers 5.23 with compressed-tensors 0.20 shape the files. Asymmetric weights can't be loaded
compressed (the loader makes no room for their packed zero points), nor can models that read their layers' weights while
they are initialised (T5, Mamba, SigLIP, Falcon), so such a checkpoint asks for `dequantize` and stock transformers loads
it into float layers; `restore` then reads the codes from the files. And that path knows a
single scheme, so all layers are stored in containers of one width: the widest layer's, or a wider one that is asked
for; `packed_bits` in the model's config keeps the layers' own. (Layers of several widths that it leaves compressed have a
group each, which `mixed_precision` writes; see [`can_store_apart`].) A code is stored as a signed number around the middle
of its own range, so that symmetric codes stay symmetric in a wider container.

vLLM (`CompressedTensorsWNA16`) reads containers of 4 and 8 bits, per channel or in groups of 32, 64 or 128, with zero
points at 4 bits only; it rounds the scales to the model's float16 or bfloat16. [`vllm_notice`] tells what doesn't fit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from peft.utils.integrations import skip_init_on_device
from torch import nn
from transformers import CompressedTensorsConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file

from peft_ext.checkpoint.files import (
    TensorHeader,
    names_in_model,
    read_headers,
    read_json,
    read_tensor,
    stored_layers,
    tensors_of,
    unfuse_stored,
    weight_files,
)
from peft_ext.checkpoint.stock_loading import is_rebuilt, is_unfused_by_stock, loads_without_weights
from peft_ext.file_formats import check_fields, mapping_of, one_number_of
from peft_ext.quant.conversion import dequantize_layers, float_layers, packed_layers
from peft_ext.quant.embedding import packed_ends
from peft_ext.quant.experts import fused_experts, merges_experts, unfused_experts
from peft_ext.quant.formats import Uniform
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.packed_module import replace_layer
from peft_ext.quant.replaceable import acts_linearly
from peft_ext.quant.uniform import UNIFORM_BITS, Quantized
from peft_ext.tensor_files import PLACEHOLDER


# What vLLM's mixed-precision kernels (Marlin and its fallbacks) take.
VLLM_BITS, _VLLM_GROUP_SIZES = (4, 8), (32, 64, 128)
# In the model's config: the width of each layer that isn't stored at its own; also tells that weights were packed.
OWN_BITS = "packed_bits"
# Unpacking takes several bytes for a code, so large layers are unpacked some rows at a time.
CODES_AT_ONCE = 1 << 20
# What compressed-tensors keeps a code in; one of 5 or 6 bits lies in a container of 8.
CONTAINER_BITS = (2, 3, 4, 8)
TENSORS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


class PackQuantizedWriter(HfQuantizer):
    """Hands `save_pretrained` a model's state dict with its [`PackedLinear`] layers as compressed-tensors stores them.

    Args:
        model: Has packed layers of uniform integers, see [`can_store`].
        container_bits: Width of what holds a code in the file; by default the widest layer's own.

    Raises:
        ValueError: If that width doesn't exist, or is too narrow for a layer.
    """

    requires_calibration = True
    is_trainable = True

    def __init__(self, model: PreTrainedModel, container_bits: Optional[int] = None) -> None:
        self.container_bits = container_bits
        super().__init__(_describe(model, packed_layers(model), container_bits), pre_quantized=True)

    def is_serializable(self) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: Optional[torch.dtype] = None) -> nn.Module:
        return dequantize_layers(model, dtype)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """State dict with `weight_packed`, `weight_scale`, `weight_zero_point`, `weight_shape` for each packed layer."""
        layers = packed_layers(model)
        # the layers may have changed since the model was handed out; file and config must agree
        self.quantization_config = _describe(model, layers, self.container_bits)
        weights = self.quantization_config.quantization_config.config_groups["group_0"].weights
        state_dict = model.state_dict()
        for name, layer in layers.items():
            for key in ("planes", "scale", "zero_point"):
                state_dict.pop(f"{name}.{key}")
            tensors = compress(layer, weights.num_bits, bool(weights.symmetric))
            state_dict.update({f"{name}.{key}": tensor for key, tensor in tensors.items()})
        return state_dict, dict(PLACEHOLDER)


class StoredConfig(CompressedTensorsConfig):
    """A compressed-tensors config whose JSON says that the checkpoint is to be dequantised at load."""

    def to_dict(self) -> dict[str, Any]:
        stored = super().to_dict()
        return {**stored, "dequantize": True} if self.dequantize else stored

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def compress(layer: PackedLinear, container_bits: int, sym: bool) -> dict[str, torch.Tensor]:
    """A packed layer's tensors under compressed-tensors' names; with zero points unless `sym`."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    def signed(values: torch.Tensor) -> torch.Tensor:
        return (values.to(torch.int16) - 2 ** (layer.bits - 1)).to(torch.int8)

    tensors = {
        "weight_packed": pack_to_int32(signed(layer.codes()), container_bits),
        "weight_scale": layer.scale.detach().clone(),
        "weight_shape": torch.tensor([layer.out_features, layer.in_features]),
    }
    if not sym and layer.zero_point is not None:
        words = pack_to_int32(signed(layer.zero_point), container_bits, packed_dim=0)
        # compressed-tensors can't unpack a single row of 4-bit codes, and reads no further than the layer's outputs
        lonely = container_bits == 4 and len(words) == 1
        tensors["weight_zero_point"] = nn.functional.pad(words, (0, 0, 0, 1)) if lonely else words
    return tensors


def expand(
    tensors: dict[str, torch.Tensor], container_bits: int, bits: int, bias: Optional[torch.Tensor], name: str
) -> PackedLinear:
    """The packed layer of `bits` bits that a checkpoint stores in wider or equal containers; the inverse of [`compress`].

    Raises:
        ValueError: If the codes don't fit into `bits`; names the layer.
    """
    shape = torch.Size(tensors["weight_shape"].tolist())
    scale = tensors["weight_scale"].detach().reshape(shape[0], -1).clone()
    packed_zero_point = tensors.get("weight_zero_point")
    try:
        # some rows at a time: unpacking takes several bytes for a code
        rows = max(1, CODES_AT_ONCE // shape[1])
        codes = torch.empty(shape, dtype=torch.uint8, device=scale.device)
        for start in range(0, shape[0], rows):
            part = tensors["weight_packed"][start : start + rows]
            codes[start : start + rows] = unpack_words(part, container_bits, bits, torch.Size((len(part), shape[1])))
        if packed_zero_point is None:
            zero_point = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
        else:
            zero_point = unpack_words(packed_zero_point, container_bits, bits, scale.shape, dim=0)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    sym = bool((zero_point == 2 ** (bits - 1)).all())
    return PackedLinear.from_quantized(Quantized(codes, scale, zero_point), bits, bias, sym=sym)


def unpack_words(
    words: torch.Tensor, container_bits: int, bits: int, shape: torch.Size, dim: Literal[0, 1] = 1
) -> torch.Tensor:
    """uint8 codes of `bits` bits out of int32 words that hold them one after the other, lowest bits first.

    Args:
        words: int32 matrix, `container_bits` for each code along `dim`.
        shape: What the matrix of codes measures.

    Raises:
        ValueError: If a code doesn't fit into `bits`.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    if dim == 0 and len(words) == 1:
        # a column must have the strides of one, or compressed-tensors can't look at its bytes
        words = words.flatten().unsqueeze(1).t()
    codes = unpack_from_int32(words, container_bits, shape, packed_dim=dim).to(torch.int16) + 2 ** (bits - 1)
    if bits < container_bits and codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise ValueError(
            f"the checkpoint holds codes that {bits} bits ({OWN_BITS} in its config.json) can't; the two files don't "
            "belong together. Save or download both again."
        )
    return codes.to(torch.uint8).contiguous()


@skip_init_on_device
def restore(model: nn.Module) -> None:
    """Turn float layers that transformers dequantised from a pack-quantized checkpoint back into packed ones, bit for bit.

    Layers that it left compressed learn the width of their codes. A layer whose weight is no longer the checkpoint's
    (it was trained, or adapters were merged) stays float, which a warning says.

    Raises:
        ValueError: If the model says that it was packed, but its checkpoint can't be found: its floats would be rounded
        again, to other codes.
    """
    if not isinstance(model, PreTrainedModel):
        return
    own_bits = own_bits_of(getattr(model.config, OWN_BITS, None))
    in_config = names_in_model(model, own_bits)
    for name, module in model.named_modules():
        if is_compressed(module):
            module.own_bits = own_bits.get(in_config.get(name, ""), module.quantization_scheme.weights.num_bits)
    # where stock transformers leaves layers compressed, it still makes floats of fused experts
    complete = any(map(is_packed, model.modules())) and not fused_experts(model)
    source = None if complete else _checkpoint(model)
    if source is None:
        return
    config, headers = source
    scheme = next(iter(config["quantization_config"]["config_groups"].values()))["weights"]
    own_bits, changed = own_bits_of(config.get(OWN_BITS)), []
    stored = stored_layers(headers, "weight_packed")
    unfuse_stored(model, stored)
    for name, key in names_in_model(model, stored).items():
        module = model.get_submodule(name)
        # a subclass, such as Falcon's, was packed where it computes the same
        plain = isinstance(module, nn.Linear) and not is_packed(module) and acts_linearly(module)
        if not plain or module.weight.device.type == "meta":
            continue
        found = tensors_of(headers, key, TENSORS)
        tensors = {part: read_tensor(header, f"{key}.{part}") for part, header in found.items()}
        missing = [part for part in ("weight_packed", "weight_scale", "weight_shape") if part not in tensors]
        if missing:
            raise ValueError(f"layer {key!r}: the checkpoint has no {missing[0]}; save or download it again.")
        check_shape(key, tensors["weight_shape"], tuple(module.weight.shape))
        packed = expand(tensors, scheme["num_bits"], own_bits.get(key, scheme["num_bits"]), module.bias, name)
        packed.to(module.weight.device).compute_dtype = module.weight.dtype
        if torch.equal(packed.weight, module.weight):
            replace_layer(model, name, packed)
        else:
            changed.append(name)
    if changed:
        warnings.warn(
            f"{len(changed)} layers of the packed checkpoint, such as {changed[0]!r}, have other weights by now (they were "
            "trained, adapters merged into them, or rounded to another dtype): they stay float. Load the checkpoint again to "
            "have them packed.",
            stacklevel=2,
        )


def own_bits_of(stored: Any) -> dict[str, int]:
    """The layers' own widths by name, as a model's config keeps them; none for None.

    Raises:
        ValueError: If they are no widths; names the entry.
    """
    stored = stored or {}
    fields = {OWN_BITS: mapping_of(one_number_of(*UNIFORM_BITS))}
    check_fields({OWN_BITS: stored}, fields, "config.json", "Save or download the checkpoint again.")
    return stored


def check_shape(name: str, stored: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Refuse a layer whose `weight_shape` says something else than the model.

    Raises:
        ValueError: Names the layer and both.
    """
    if tuple(stored.tolist()) != expected:
        raise ValueError(
            f"layer {name!r}: weight_shape holds {stored.tolist()}, and the model has a weight of {list(expected)} there; the "
            "checkpoint is damaged, or its config.json is another's."
        )


def is_packed(module: nn.Module) -> bool:
    """Whether a layer has codes already: ours, or those of a compressed-tensors checkpoint."""
    return isinstance(module, PackedLinear) or is_compressed(module)


def _not_found(model: PreTrainedModel, name: str) -> str:
    return (
        f"the model was loaded from a packed checkpoint, but there is no {name} at {model.config._name_or_path!r} to take "
        "its integers from; load it from its own folder, without subfolder= and variant=. (To round its floats again, "
        f"del model.config.{OWN_BITS} first.)"
    )


def _own_bits(module: Any) -> int:
    """The width of a compressed layer's codes, which may lie in wider containers; see [`restore`]."""
    return getattr(module, "own_bits", module.quantization_scheme.weights.num_bits)


def is_compressed(module: nn.Module) -> bool:
    """Whether a layer was loaded by transformers from a compressed-tensors checkpoint."""
    scheme = getattr(module, "quantization_scheme", None)
    return isinstance(module, nn.Linear) and getattr(scheme, "weights", None) is not None


def take_over(module: Any, name: str) -> PackedLinear:
    """The packed layer with the very codes, zero points and scales of a pack-quantized one.

    Raises:
        ValueError: If the layer's format has no packed counterpart here; names the layer and what it has.
    """
    from compressed_tensors.compressors import compress_module

    check_taken_over(module, name)
    if not hasattr(module, "weight_packed"):
        compress_module(module)  # a forward pass has decompressed it; its values lie on the grid, so this is exact
    container_bits = module.quantization_scheme.weights.num_bits
    tensors = {key: getattr(module, key) for key in TENSORS if hasattr(module, key)}
    return expand(tensors, container_bits, _own_bits(module), module.bias, name)


def format_of(module: Any, name: str) -> Uniform:
    """What a compressed layer is quantised to.

    Raises:
        ValueError: If the layer's format has no packed counterpart here; names the layer and what it has.
    """
    check_taken_over(module, name)
    weights = module.quantization_scheme.weights
    group_size = weights.group_size if weights.strategy == "group" else -1
    return Uniform(_own_bits(module), group_size, bool(weights.symmetric))


def can_take_over(module: nn.Module) -> bool:
    """Whether a compressed layer has a packed counterpart; others (FP8, W8A8) are kept as they are."""
    try:
        check_taken_over(module, "")
    except ValueError:
        return False
    return True


def check_taken_over(module: Any, name: str) -> None:
    """Refuse compressed layers that aren't uniform integers per channel or group in a width that we have.

    Raises:
        ValueError: Names the layer and what it has.
    """
    scheme = module.quantization_scheme
    weights = scheme.weights
    found = f"{weights.num_bits}-bit {weights.type} per {weights.strategy}"
    if weights.type != "int" or weights.num_bits not in CONTAINER_BITS or weights.strategy not in ("channel", "group"):
        raise ValueError(
            f"layer {name!r} is {found}; only integers of {CONTAINER_BITS} bits per channel or group fit."
        )
    if scheme.input_activations is not None or scheme.output_activations is not None:
        raise ValueError(f"layer {name!r} quantises activations too; only weight-only checkpoints can be tuned.")
    if weights.actorder not in (None, "static", "weight") or hasattr(module, "weight_g_idx"):
        raise ValueError(f"layer {name!r} orders its groups by activation (g_idx), which packed layers don't have.")


def release_hook(model: nn.Module) -> None:
    """Remove compressed-tensors' decompress-at-first-forward hook once no layer of its own is left."""
    hook = getattr(model, "ct_decompress_hook", None)
    if hook is not None and not any(is_compressed(module) for module in model.modules()):
        hook.remove()
        del model.ct_decompress_hook


def vllm_notice(config: CompressedTensorsConfig) -> Optional[str]:
    """What keeps vLLM's kernels from a checkpoint with this config, and the way out; None if nothing does."""
    schemes = [scheme.weights for scheme in config.quantization_config.config_groups.values()]
    narrow = sorted({weights.num_bits for weights in schemes} - set(VLLM_BITS))
    obstacles = []
    if narrow:
        most = max(weights.num_bits for weights in schemes)
        way_out = (
            f"container_bits={4 if most <= 4 else 8} stores the same numbers in {4 if most <= 4 else 8}-bit containers"
            if narrow[0] < 4
            else "use 4 or 8"
        )
        obstacles.append(f"it takes codes of 4 and 8 bits, not {' and '.join(map(str, narrow))} ({way_out})")
    if any(weights.num_bits == 8 and not weights.symmetric for weights in schemes):
        obstacles.append("at 8 bits it takes no zero points (quantise with sym=True)")
    for weights in schemes:
        if weights.strategy == "group" and weights.group_size not in _VLLM_GROUP_SIZES:
            obstacles.append(f"it takes groups of {_VLLM_GROUP_SIZES} or whole channels, not {weights.group_size}")
            break
    return f"vLLM won't run this checkpoint: {'; '.join(obstacles)}." if obstacles else None


def _describe(
    model: PreTrainedModel, layers: dict[str, PackedLinear], container_bits: Optional[int]
) -> CompressedTensorsConfig:
    """Write the format of the packed layers into the model's config, and return it."""
    widest = max(layer.bits for layer in layers.values())
    bits = container_of(widest) if container_bits is None else container_bits
    if bits not in CONTAINER_BITS or bits < widest:
        fitting = tuple(width for width in CONTAINER_BITS if width >= widest)
        raise ValueError(f"container_bits={bits!r} can't hold codes of {widest} bits; choose one of {fitting}.")
    group_size = max(group_sizes(layers))
    sym = all(layer.sym for layer in layers.values())
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": sym,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
    }
    config = StoredConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=list(float_layers(model)),
        dequantize=not sym or not loads_without_weights(model, _outside_of_experts(model, layers)),
    )
    model.config.quantization_config = config
    # stock transformers drops quantization_config from a model that it dequantises, and keeps this
    setattr(model.config, OWN_BITS, {name: layer.bits for name, layer in layers.items() if layer.bits != bits})
    return config


def has_room_for(layer: PackedLinear) -> bool:
    """Whether a layer's numbers have a place in pack-quantized: whole zero points, and an `nn.Linear`."""
    number_format = layer.number_format
    return isinstance(number_format, Uniform) and number_format.zero == "int" and not layer.conv1d


def container_of(bits: int) -> int:
    """The smallest container of a code."""
    return next(width for width in CONTAINER_BITS if width >= bits)


def can_store(model: PreTrainedModel) -> bool:
    """Whether pack-quantized has room for a model's layers: uniform integers of one group size, no `Conv1D`, no float zero
    points (the library packs them among the codes, whatever the schema's `zp_dtype` says), no packed embedding (which stock
    transformers has no module for).

    Experts have room where stock transformers finds each of them in the file, and reads it without zero points: all packed,
    symmetric, of a family whose checkpoints keep them apart.
    """
    layers = packed_layers(model)
    uniform = all(has_room_for(layer) for layer in layers.values()) and not packed_ends(model)
    return uniform and len(group_sizes(layers)) == 1 and not is_rebuilt(model) and _experts_fit(model, layers)


def containers(model: nn.Module) -> set[int]:
    """The widths that hold the codes of a model's packed layers, each as narrow as can be."""
    return {container_of(layer.bits) for layer in packed_layers(model).values()}


def can_store_apart(model: PreTrainedModel) -> bool:
    """Whether stock transformers reads layers of several widths: it leaves them compressed, since it dequantises by a single
    scheme, and then has no room for zero points."""
    layers = packed_layers(model)
    symmetric = all(layer.sym for layer in layers.values())
    return symmetric and not unfused_experts(model) and loads_without_weights(model, list(layers))


def _outside_of_experts(model: PreTrainedModel, layers: Iterable[str]) -> list[str]:
    """Stock transformers makes one float tensor of a block's experts in any case."""
    inside = tuple(f"{name}." for name in unfused_experts(model))
    return [name for name in layers if not name.startswith(inside)]


def _experts_fit(model: PreTrainedModel, layers: dict[str, PackedLinear]) -> bool:
    converters = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]
    unfused = unfused_experts(model)
    if not converters and not unfused:
        return True
    inside = [layer for experts in unfused.values() for _, layer in experts.layers()]
    apart = all(merges_experts(entry) for entry in converters) if converters else is_unfused_by_stock(unfused.values())
    return (
        apart
        and not fused_experts(model)
        and all(isinstance(layer, PackedLinear) for layer in inside)
        and all(layer.sym for layer in layers.values())
    )


def group_sizes(layers: dict[str, PackedLinear]) -> set[int]:
    """The group sizes among the layers; -1 if all are per channel. A layer may consist of a single group."""
    if all(layer.group_size == -1 for layer in layers.values()):
        return {-1}
    return {layer.in_features // layer.scale.shape[1] for layer in layers.values()}


def _checkpoint(model: PreTrainedModel) -> Optional[tuple[dict[str, Any], dict[str, TensorHeader]]]:
    """config.json and headers of the pack-quantized integer checkpoint that a model came from, if it did."""
    folder = _checkpoint_folder(model)
    if folder is None:
        if hasattr(model.config, OWN_BITS):
            raise ValueError(_not_found(model, "config.json"))
        return None
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config") or {}
    groups = quantization.get("config_groups") or {}
    weights = [group.get("weights") or {} for group in groups.values()]
    fits = len(weights) == 1 and weights[0].get("type") == "int" and weights[0].get("num_bits") in CONTAINER_BITS
    ours = quantization.get("quant_method") == "compressed-tensors" and quantization.get("format") == "pack-quantized"
    if not (ours and fits):
        return None
    files = weight_files(folder)
    if not files:
        raise ValueError(_not_found(model, "model.safetensors"))
    return config, read_headers(files)


def _checkpoint_folder(model: PreTrainedModel) -> Optional[Path]:
    """The folder, or that of a cached hub repository, which a model was loaded from; never downloads."""
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not source:
        return None
    try:
        found = cached_file(source, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return None if found is None else Path(found).parent
