# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Quantise a model's layers on the user's own data: one forward pass, each layer on the inputs that it will see."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import nn
from tqdm.auto import tqdm

from peft_ext.checkpoint.pack_quantized import is_packed
from peft_ext.language_model import inference
from peft_ext.modalities import other_parts, part_of
from peft_ext.quant.experts import Pairing, unfused_experts
from peft_ext.quant.formats import CALIBRATED, Uniform
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.matmul import linear
from peft_ext.scale_tuning.bit_budget import allocate_bits, announce_bits
from peft_ext.scale_tuning.config import ScaleTuningConfig
from peft_ext.scale_tuning.model import asks_for_everything, check_targets, unmatched_targets
from peft_ext.scale_tuning.quantization import free_weight, modules_with_several_names, pack_layer
from peft_ext.scale_tuning.report import announce


Batch = Union[torch.Tensor, Mapping[str, Any]]
# The inputs behind a Hessian are added up in blocks of about this many numbers, so that their float32 copy is small.
_CHUNK = 1 << 23
# A token counts less from this many times the median energy on: where the first token and some delimiters have activations
# thousands of times the others' (SmolLM2's 11th layer: 1,100 times the median on average), the mean would be theirs alone.
_MOST_ENERGY = 8.0
# Token ids and the masks that say which of them count.
_MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
# What belongs to images and sounds, in the order of the texts: patches, tiles, grids, features. Their first dimension isn't
# the batch's.
_ITEMS = ("pixel", "image", "video", "audio", "feature", "grid")
# Which tokens stand for something else than text: nothing does where a batch doesn't say.
_KINDS = ("token_type_ids", "mm_token_type_ids")
# An expert whose router sends it fewer tokens than this is quantised without data. Calibration is damped enough to gain from
# few tokens, but with 8 of them clips what they don't show (docs/moe.md has the figures).
_LEAST_TOKENS = 32
_NO_LABEL = -100  # transformers' padding of labels
_NO_TOKENS = "the batches hold no tokens (all padding, or of length 0); pass some training data."


def calibrate(
    model: nn.Module, config: ScaleTuningConfig, batches: Iterable[Batch], progressbar: bool = True
) -> nn.Module:
    """
    Quantise the target layers of a float model in place on the data that they will see.

    The batches run through the model once, together, and twice side by side: one copy sees the float model, the other
    the layers packed so far. When the forward reaches a target layer, the layer is quantised on the second copy's
    inputs, and towards what it gives on the first copy's; then the copies go on through the float and the packed
    layer. So the peak of extra memory is one layer, its moments and the activations of the batches; about 8,000 tokens
    do. After the last target layer the pass stops.

    Where the config has a `bits_budget`, one backward pass before that chooses the layers' widths, see [`allocate_bits`].

    An expert is calibrated on the tokens that its router sends it. Where these are too few, its layers are quantised without
    data, which a warning says; pass more batches then.

    Args:
        model (`nn.Module`):
            A float model; transformers or any other.
        config (`PeqaConfig` or `AlphaTuningConfig`):
            Target modules and format; `init_method` must be `"calibrated"`, or of integers `"gptq"`.
        batches (iterable of `dict` or `torch.Tensor`):
            What the model takes: dicts of keyword arguments such as `{"input_ids": [batch, tokens]}`, or tensors.
            Samples of different length are padded on the right; padding doesn't count. Of a multimodal model, what its
            processor makes of texts with images or sounds (`pixel_values`, `image_grid_thw`, `input_features`, ...);
            batches of text alone may be among them.
        progressbar (`bool`, defaults to `True`):
            Whether to show one step per layer.

    Returns:
        `nn.Module`: The model, for `get_peft_model(model, config)`.

    Raises:
        ValueError: If the config doesn't ask for calibration, a layer can't be quantised, or there is no data.

    Layers that the data never reach (a vision tower that is named as a target, and texts alone) are rounded without data;
    one warning names them, and so does [`peft_ext.report`].

    Example:

        ```py
        >>> config = PeqaConfig(bits=3, init_method="calibrated")
        >>> model = get_peft_model(calibrate(model, config, [{"input_ids": tokens}]), config)
        ```
    """
    if not config.needs_data:
        raise ValueError(
            f"init_method={config.init_method!r} needs no data; pass init_method='calibrated' to calibrate."
        )
    if config.bits_budget is not None:
        batches = list(batches)
        announce_bits(allocate_bits(model, config, batches, progressbar))
    config = copy.copy(config)
    everything, unmatched = asks_for_everything(config), unmatched_targets(config, model)
    config.target_modules = config.target_modules or "all-linear"
    targets = check_targets(config, model)
    if not targets:
        raise ValueError(f"Target modules {config.target_modules} not found in the base model.")
    targets = {name: module for name, module in targets.items() if not is_packed(module)}
    inputs = joined(model, list(batches))
    calibration = _Pass(model, config, targets, inputs, progressbar)
    with inference(model), _without_cache(getattr(model, "config", None)), _forgotten(model):
        calibration.run()
    announce(model, everything=everything, unmatched=unmatched, unreached=calibration.unreached)
    return model


@contextlib.contextmanager
def _without_cache(model_config: Any) -> Iterator[None]:
    """Keys and values of all layers would be kept for nothing."""
    use_cache = getattr(model_config, "use_cache", None)
    if use_cache:
        model_config.use_cache = False
    try:
        yield
    finally:
        if use_cache:
            model_config.use_cache = use_cache


@contextlib.contextmanager
def _forgotten(model: nn.Module) -> Iterator[None]:
    """Qwen's multimodal models remember the positions of their last batch, which would stand for those of the next one."""
    remembered = [(module, module.rope_deltas) for module in model.modules() if hasattr(module, "rope_deltas")]
    try:
        yield
    finally:
        for module, positions in remembered:
            module.rope_deltas = positions


class _Finished(Exception):
    """Ends the forward pass after the last target layer."""


class _Pass:
    """One forward pass that quantises every target layer when it is reached.

    The first half of the batch is the float model's, the second half has come through the packed layers.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ScaleTuningConfig,
        targets: dict[str, nn.Module],
        inputs: Batch,
        progressbar: bool,
    ) -> None:
        self.model, self.config, self.targets = model, config, dict(targets)
        # alphas, and error feedback alone, are found as they always were
        self.limited = config.init_method == CALIBRATED and config.number_format_cls is Uniform
        self.several = modules_with_several_names(model)
        self.training = {name: module.training for name, module in targets.items()}
        masks = inputs if isinstance(inputs, Mapping) else {}
        self.masks = [mask for mask in map(masks.get, _MASKS.values()) if mask is not None]
        self.inputs, sizes = _twice(inputs)
        # a layer sees samples, or flattened tokens; experts see tokens that a router has picked, in pairs
        self.halves = {2 * size for size in sizes}
        # towers and projectors keep their rows in order: patches, merged patches, tiles
        parts = other_parts(model)
        self.in_order = {name for name in targets if part_of(name, parts) is not None}
        self.unreached: list[str] = []
        self.blocks = {
            prefix: module
            for prefix, module in unfused_experts(model).items()
            if any(f"{prefix}.{name}" in targets for name, _ in module.layers())
        }
        self.experts = {
            f"{prefix}.{name}": module for prefix, module in self.blocks.items() for name, _ in module.layers()
        }
        self.starved: list[str] = []  # experts' layers that too few tokens reached
        self.progress = tqdm(total=len(targets), desc="Calibrating", unit="layer", disable=not progressbar)
        self.both = torch.empty(0)  # the input of the layer that runs at the moment
        self.last: tuple[torch.Tensor, _Moments] | None = None

    def run(self) -> None:
        handles = [handle for name, module in self.targets.items() for handle in self._hook(name, module)]
        for prefix, block in self.blocks.items():
            block.pairing = Pairing(tuple(self.masks))
            handles.append(block.register_forward_hook(partial(self._pack_unreached, prefix)))
        try:
            self.model(self.inputs) if isinstance(self.inputs, torch.Tensor) else self.model(**self.inputs)
        except _Finished:
            pass
        finally:
            for handle in handles:
                handle.remove()
            for block in self.blocks.values():
                block.pairing = None
        self.unreached = [name for name in self.targets if name not in self.experts]
        for name in list(self.targets):
            self._pack(name)
        self.progress.close()
        self._warn_of_starved()

    def _hook(self, name: str, module: nn.Module):
        def before(_, args):
            if name not in self.targets or not args[0].numel():
                return None  # called again: a layer that the model uses more than once; or for no token at all
            self.both = args[0]
            if self.last is None and not self._halves_match(name, args[0]):
                self.halves, self.in_order = set(), set()
                for block in self.blocks.values():
                    block.pairing = None
            dim = self._dim_of_halves(name, args[0])
            return None if dim is None else (args[0].chunk(2, dim)[0], *args[1:])

        def after(_, args, float_output):
            if name not in self.targets or not args[0].numel():
                return None
            x = self.both
            moments = self._moments_of(name, x)
            packed = self._pack(name, *(moments or ()))
            if not self.targets:
                raise _Finished
            dim = self._dim_of_halves(name, x)
            if dim is None:
                return packed(x)
            return torch.cat([float_output, packed(x.chunk(2, dim)[1])], dim)

        return module.register_forward_pre_hook(before), module.register_forward_hook(after)

    def _pack(self, name: str, *moments: torch.Tensor | None) -> PackedLinear:
        """Put the packed layer in a target's place; without moments it is quantised without data."""
        module = self.targets.pop(name)
        packed = pack_layer(module, self.config, name, *moments)
        packed.train(self.training[name])
        self.model.set_submodule(name, packed)
        free_weight(module, self.several)
        if name in self.experts and not moments:
            self.starved.append(name)
        self.progress.update()
        return packed

    def _pack_unreached(self, prefix: str, *_: Any) -> None:
        """Behind a block: what none of its tokens went to, so that the pass can end after the last layer."""
        unreached = [name for name in self.targets if name.startswith(f"{prefix}.")]
        for name in unreached:
            self._pack(name)
        if unreached and not self.targets:
            raise _Finished

    def _warn_of_starved(self) -> None:
        if self.starved:
            starved = list(dict.fromkeys(name.rpartition(".")[0] for name in self.starved))
            count = sum(block.num_experts for block in self.blocks.values())
            method = self.config.format_of(self.starved[0]).default_method
            warnings.warn(
                f"calibrate: {len(starved)} of {count} experts, such as {starved[0]!r}, were sent fewer than {_LEAST_TOKENS} of "
                f"the batches' tokens and are quantised without data ({method!r}), {len(self.starved)} layers in all; pass more "
                "batches to reach more.",
                stacklevel=4,
            )

    def _moments_of(self, name: str, both: torch.Tensor) -> _Moments | None:
        """Moments over the tokens that count; layers that share their input (q, k, v) share them. None if they are too few."""
        if self.last is None or self.last[0] is not both:
            dim = self._dim_of_halves(name, both)
            halves = (both,) if dim is None else both.chunk(2, dim)
            # what experts are sent counts
            halves = halves if name in self.experts else tuple(map(self._rows, halves))
            if name in self.experts and len(halves[-1]) < _LEAST_TOKENS:
                return None
            self.last = both, _moments(halves[-1], None if dim is None else halves[0], self.limited)
        return self.last[1]

    def _dim_of_halves(self, name: str, both: torch.Tensor) -> Optional[int]:
        """The dimension of a layer's input along which the two copies lie one after the other; None if they don't."""
        if name in self.experts:
            return None if self.experts[name].pairing is None else 0
        if both.shape[0] in self.halves:
            return 0
        if name not in self.in_order:
            return None
        # some towers make a single sample of all images' patches
        dim = 1 if both.shape[0] == 1 and both.dim() > 2 else 0
        return dim if both.shape[dim] % 2 == 0 else None

    def _halves_match(self, name: str, both: torch.Tensor) -> bool:
        """Before anything is packed the copies are equal; where they aren't, the batch isn't the first dimension."""
        dim = self._dim_of_halves(name, both)
        if dim is None:
            return False
        one, other = both.chunk(2, dim)
        return torch.allclose(one, other, rtol=1e-2, atol=1e-3)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        fitting = [mask for mask in self.masks if x.shape[:-1] in (mask.shape, (mask.numel(),))]
        if not fitting:
            return x.reshape(-1, x.shape[-1])
        # encoder and decoder inputs of one shape can't be told apart: tokens that count in both
        counts = functools.reduce(torch.logical_and, (mask.bool() for mask in fitting))
        return x[counts.view(x.shape[:-1])]


class _Moments(NamedTuple):
    """Means over the calibration inputs of a layer, `[in, in]`: `hessian` of `x x^T`, `shift` of `(x_float - x) x^T`."""

    hessian: torch.Tensor
    shift: torch.Tensor | None


def _row_weights(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How much each row `[rows, in]` counts, `[rows, 1]` with a sum of 1: alike up to `_MOST_ENERGY` medians of energy, and no
    more than that in all beyond."""
    size = max(1, _CHUNK // x.shape[-1])
    energy = torch.cat([part.to(dtype).square().sum(-1, keepdim=True) for part in x.split(size)])
    most = _MOST_ENERGY * energy.median()
    weights = torch.where(energy > most, most / energy, 1.0) if most > 0 else torch.ones_like(energy)
    return weights / weights.sum()


def _moments(x: torch.Tensor, x_float: torch.Tensor | None, limited: bool) -> _Moments:
    """Of rows x, x_float `[rows, in]`.

    Args:
        limited: Whether rows of very much energy count less (that of the float model, where there are its rows).
    """
    if not x.numel():
        raise ValueError(_NO_TOKENS)
    dtype = torch.promote_types(x.dtype, torch.float32)
    weights = _row_weights(x if x_float is None else x_float, dtype) if limited else None
    share = 1 / len(x) if weights is None else 1.0
    hessian = torch.zeros(x.shape[-1], x.shape[-1], dtype=dtype, device=x.device)
    shift = torch.zeros_like(hessian)
    size = max(1, _CHUNK // x.shape[-1])
    for start in range(0, len(x), size):
        rows = x[start : start + size].to(dtype)
        weighted = rows if weights is None else rows * weights[start : start + size]
        hessian.add_(linear(rows.t(), weighted.t()), alpha=share)
        if x_float is not None:
            moved = x_float[start : start + size].to(dtype) - rows
            shift.add_(linear(moved.t(), weighted.t()), alpha=share)
    return _Moments(hessian, None if x_float is None else shift)


def _twice(inputs: Batch) -> tuple[Batch, set[int]]:
    """The batch twice, one copy after the other; and the numbers of rows (samples, or tokens) of one copy."""
    values = [inputs] if isinstance(inputs, torch.Tensor) else inputs.values()
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.dim()]
    if not all(tensor.numel() for tensor in tensors):
        raise ValueError(_NO_TOKENS)
    if isinstance(inputs, torch.Tensor):
        return torch.cat([inputs, inputs]), _sizes(inputs)
    sizes = set().union(*(_sizes(value) for value in tensors))
    texts = [value for key, value in inputs.items() if key in _MASKS and isinstance(value, torch.Tensor)]
    samples = len((texts or tensors)[0]) if tensors else 0

    def twice(key: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        dim = _batch_dim(key, value)
        whole = value.shape[dim] == samples or _of_items(key)
        return torch.cat([value, value], dim) if whole else value

    return {key: twice(key, value) for key, value in inputs.items()}, sizes


def _of_items(key: str) -> bool:
    """Whether an input belongs to images or sounds."""
    return any(part in key for part in _ITEMS)


def _batch_dim(key: str, value: torch.Tensor) -> int:
    """The dimension along which a model's inputs lie side by side; positions in several directions are `[3, batch, tokens]`."""
    return 1 if key == "position_ids" and value.dim() == 3 else 0


def _sizes(tensor: torch.Tensor) -> set[int]:
    return {len(tensor), tensor[..., 0].numel() if tensor.is_floating_point() else tensor.numel()}


def joined(model: nn.Module, batches: list[Any]) -> Batch:
    """All batches as one; see [`calibrate`]."""
    return _join(batches, getattr(model, "prepare_decoder_input_ids_from_labels", None))


def _join(batches: list[Any], decoder_inputs_of: Callable[..., torch.Tensor] | None) -> Batch:
    """All batches as one. Labels are dropped; `decoder_inputs_of` makes an encoder-decoder's inputs of them first."""
    if not batches:
        raise ValueError("batches is empty; pass a few batches of training data to calibrate on.")
    if all(isinstance(batch, torch.Tensor) for batch in batches):
        return _pad_and_cat(batches)
    if not all(isinstance(batch, Mapping) for batch in batches):
        raise TypeError(f"batches must be dicts of model inputs or tensors, got {type(batches[0]).__name__}.")
    if decoder_inputs_of is not None:
        batches = [_with_decoder_inputs(batch, decoder_inputs_of) for batch in batches]
    keys = list(dict.fromkeys(key for batch in batches for key in batch if key != "labels"))
    reads = all(any(ids in batch for ids in _MASKS) for batch in batches)
    optional = {key for key in keys if reads and (_of_items(key) or key in _KINDS)}
    if any(set(keys) - set(batch) - optional for batch in batches):
        raise ValueError(
            f"the batches have different keys; the first has {sorted(batches[0])}, all together have {sorted(keys)}."
        )
    batches = [_with_kinds(batch, [key for key in _KINDS if key in keys]) for batch in batches]
    # images and sounds of several sizes may be padded where the model is told of it
    padded = any(_of_items(key) and ("sizes" in key or "mask" in key) for key in keys)
    joined = {
        key: _join_values(key, [batch[key] for batch in batches if key in batch], padded and _of_items(key))
        for key in keys
    }
    for ids, mask in _MASKS.items():
        if isinstance(joined.get(ids), torch.Tensor) and mask not in joined:
            ones = [torch.ones_like(batch[ids]) for batch in batches]
            if len({tuple(one.shape[1:]) for one in ones}) > 1:
                joined[mask] = _pad_and_cat(ones)
    return joined


def _with_decoder_inputs(
    batch: Mapping[str, Any], decoder_inputs_of: Callable[..., torch.Tensor]
) -> Mapping[str, Any]:
    if "labels" not in batch or "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch:
        return batch
    labels = batch["labels"]
    counts = (labels != _NO_LABEL).long()
    return {"decoder_attention_mask": counts, **batch, "decoder_input_ids": decoder_inputs_of(labels=labels)}


def _with_kinds(batch: Mapping[str, Any], kinds: list[str]) -> Mapping[str, Any]:
    """A batch of text alone says nothing about its tokens' kinds; next to others it has to."""
    missing = [key for key in kinds if key not in batch]
    return {**batch, **{key: torch.zeros_like(batch["input_ids"]) for key in missing}} if missing else batch


def _join_values(key: str, values: list[Any], every_dim: bool) -> Any:
    if not isinstance(values[0], torch.Tensor) or not values[0].dim():
        return values[0]
    dim = _batch_dim(key, values[0])
    return _pad_and_cat([value.transpose(0, dim) for value in values], every_dim).transpose(0, dim)


def _pad_and_cat(tensors: list[torch.Tensor], every_dim: bool = False) -> torch.Tensor:
    """Concatenate along the first dimension; the second (tokens), or every other one, is padded to the longest."""
    padded = tensors[0].dim() - 1 if every_dim else min(1, tensors[0].dim() - 1)
    longest = [max(sizes) for sizes in zip(*(tensor.shape[1 : 1 + padded] for tensor in tensors))]
    return torch.cat([_pad(tensor, longest) for tensor in tensors])


def _pad(tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Zeros at the end of the dimensions after the first."""
    missing = [size - own for size, own in zip(sizes, tensor.shape[1:])] + [0] * (tensor.dim() - 1 - len(sizes))
    return torch.nn.functional.pad(tensor, [amount for size in reversed(missing) for amount in (0, size)])
