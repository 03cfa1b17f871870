# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What of a model is packed, what isn't and why, and how the codes were found; as an object, and as one line."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

from peft.tuners.tuners_utils import SEQ_CLS_HEAD_NAMES, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from peft_ext.checkpoint.pack_quantized import can_take_over, format_of, is_compressed
from peft_ext.language_model import unwrapped
from peft_ext.modalities import PARTS, other_parts, part_of
from peft_ext.quant.conversion import LINEAR_LAYERS
from peft_ext.quant.embedding import PackedEmbedding, packed_ends, shared_ends
from peft_ext.quant.formats import CALIBRATED, GPTQ, LATTICE, NumberFormat
from peft_ext.quant.linear import PackedLinear
from peft_ext.quant.replaceable import foreign_weight
from peft_ext.routers import routers
from peft_ext.tables import mebibytes
from peft_ext.targets import left_out


logger = logging.getLogger(__name__)
# Why a layer is float; towers and projectors are called what `modalities` calls them.
OUTPUT, HEAD, TRAINED, ROUTER, EXPERTS, OTHER = (
    "output layer",
    "head",
    "trained in full",
    "router",
    "fused experts",
    "no target",
)
KEPT, FOREIGN = "stored in another format, which is kept", "quantised by others"
# What everybody expects to stay float.
_EXPECTED = (OUTPUT, HEAD, TRAINED, ROUTER, OTHER)
_SHOWN = 3
_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


class PackedPart(NamedTuple):
    """A packed layer: its format, the numbers that it stands for, the bytes that it takes (with its bias), and how its
    codes were found: by which `init_method` (`"calibrated"`, `"minmax"`, ...), or None where they were loaded."""

    format: NumberFormat
    weights: int
    nbytes: int
    origin: Optional[str]


class LeftPart(NamedTuple):
    """A layer that isn't packed here: why, how many numbers its weight has, and the bytes that it takes."""

    reason: str
    weights: int
    nbytes: int


@dataclass(frozen=True)
class Report:
    """
    What of a model is packed and what isn't; `str()` of it is a page, `summary` a line.

    Attributes:
        packed (`dict`): The packed layers, by name.
        left (`dict`): The layers that could be packed by their kind and aren't, by name, with the reason:
            `"output layer"`, `"head"`, `"trained in full"` (of `modules_to_save`), `"vision tower"`, `"audio tower"`,
            `"projector"`, `"router"`, `"fused experts"`, `"never called by MambaMixer"` (which reads the layer's weight),
            `"computes something else, a ..."` (a layer that looks linear only), `"quantised by others"`, or `"no target"`.
            All but those of others are float.
        tuned (`list`): The packed layers that have an adapter.
        other_bytes (`int`): Bytes of everything else: embeddings, norms, convolutions, adapters.
        embeddings (`dict`): The packed embeddings, by name, and the output heads that are packed with them, which `packed`
            has as well. A tied one has the bytes of the weight that both share.
    """

    packed: Mapping[str, PackedPart]
    left: Mapping[str, LeftPart]
    tuned: list[str] = field(default_factory=list)
    other_bytes: int = 0
    embeddings: Mapping[str, PackedPart] = field(default_factory=dict)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed layers."""
        return sum(part.nbytes for part in self.packed.values())

    @property
    def left_bytes(self) -> int:
        """Bytes of the layers that are left."""
        return sum(part.nbytes for part in self.left.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the whole model."""
        return self.packed_bytes + self.left_bytes + self.other_bytes

    @property
    def bits_per_weight(self) -> float:
        """Of the packed layers, with their scales, zero points and biases."""
        weights = sum(part.weights for part in self.packed.values())
        return 8 * self.packed_bytes / weights if weights else 0.0

    @property
    def uncalibrated(self) -> list[str]:
        """The layers that were rounded without data in a model of which others were calibrated; heads that are packed with
        the embedding, which no data are for, aren't among them."""
        layers = {name: part for name, part in self.packed.items() if name not in self.embeddings}
        origins = {name: part.origin for name, part in layers.items() if part.origin is not None}
        missed = [name for name, origin in origins.items() if origin not in (CALIBRATED, GPTQ, LATTICE)]
        return missed if len(missed) < len(origins) else []

    @property
    def summary(self) -> str:
        """One line, such as `packed 24 of 26 linear layers; left: lm_head (output layer), vision tower x12`."""
        line = f"packed {len(self.packed)} of {len(self.packed) + len(self.left)} linear layers"
        return f"{line}; left: {_counted(self.left)}" if self.left else line

    def __str__(self) -> str:
        lines = [self.summary]
        formats = Counter((part.format, part.origin) for part in self.packed.values())
        lines += [f"  {n} x {_described(form)}, {origin or 'loaded'}" for (form, origin), n in formats.items()]
        if self.embeddings:
            (name, part), *heads = self.embeddings.items()
            also = f"; with it {', '.join(head for head, _ in heads)}" if heads else ""
            lines.append(f"  embedding {name}: {_described(part.format)}, {mebibytes(part.nbytes)}, frozen{also}")
        if self.packed:
            lines.append(f"  {self.bits_per_weight:.2f} bits a weight, with scales; {len(self.tuned)} layers tuned")
        for reason in dict.fromkeys(part.reason for part in self.left.values()):
            names = [name for name, part in self.left.items() if part.reason == reason]
            size = mebibytes(sum(self.left[name].nbytes for name in names))
            lines.append(f"  left, {reason}: {_listed(names)}, {size}")
        if self.uncalibrated:
            lines.append(f"  without calibration data: {_listed(self.uncalibrated)}")
        sizes = (self.packed_bytes, self.left_bytes, self.other_bytes, self.nbytes)
        lines.append("  packed {}, left {}, everything else {}; {} in all".format(*map(mebibytes, sizes)))
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """
    Look over a model: which of its linear layers are packed, in what format and from what data, and which aren't.

    Args:
        model (`nn.Module`):
            A model with packed layers or without, with PEFT's wrapper or without, of transformers or any other.

    Returns:
        [`Report`]

    Example:

        ```py
        >>> model = get_peft_model(calibrate(model, config, batches), config)
        >>> print(peft_ext.report(model))
        >>> assert not peft_ext.report(model).uncalibrated
        ```
    """
    base = unwrapped(model)
    reasons = _Reasons(base)
    wrappers = {name for name, module in base.named_modules() if isinstance(module, _WRAPPERS)}
    packed: dict[str, PackedPart] = {}
    left: dict[str, LeftPart] = {}
    counted: set[int] = set()
    tuned: list[str] = []
    embeddings = _packed_embeddings(base)
    for full_name, module in base.named_modules():
        name = _plain(full_name, wrappers)
        if name is None:
            continue
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), PackedLinear):
            tuned.append(name)
        part = _part(module, name, reasons)
        if part is None:
            continue
        (packed if isinstance(part, PackedPart) else left)[name] = part  # type: ignore[assignment]
        counted |= {id(parameter) for parameter in module.parameters()}
    rest = {id(p): p.nbytes for p in model.parameters() if id(p) not in counted}
    return Report(packed, left, tuned, sum(rest.values()), embeddings)


def _packed_embeddings(base: nn.Module) -> dict[str, PackedPart]:
    """The packed ends of a model, the embedding that others share first."""
    shared, ends = shared_ends(base), packed_ends(base)
    names = sorted(ends, key=lambda name: (name in shared, not isinstance(ends[name], PackedEmbedding)))
    return {
        name: PackedPart(
            ends[name].number_format,
            ends[name].in_features * ends[name].out_features,
            sum(parameter.nbytes for parameter in ends[name].parameters()),
            ends[name].origin,
        )
        for name in names
    }


def announce(
    model: nn.Module, *, everything: bool, unmatched: Iterable[str] = (), unreached: Iterable[str] = ()
) -> None:
    """Say in one line what has been packed: as a warning where something stayed float that nobody would expect to, where
    calibration missed a layer, or a target doesn't exist; else to the log, at level INFO.

    Args:
        everything: Whether all linear layers were asked for; what a user's own choice leaves out is no surprise.
        unmatched: Entries of `target_modules` that match nothing.
        unreached: Layers that calibration never reached.
    """
    found = report(model)
    unexpected = [part for part in found.left.values() if part.reason not in _EXPECTED]
    parts = [found.summary]
    unmatched, unreached = list(unmatched), list(unreached)
    if unreached:
        methods = sorted({str(found.packed[name].origin) for name in unreached if name in found.packed})
        parts.append(
            f"the calibration data never reached {_listed(unreached)}, rounded without data ({', '.join(methods)}): pass "
            "batches that do (images, sounds, longer texts), or leave them out of target_modules"
        )
    if unmatched:
        parts.append(f"target_modules has {', '.join(map(repr, unmatched))}, which no module is called")
    if everything and any(part.reason in PARTS for part in unexpected):
        parts.append("what isn't the language model is packed where target_modules names it")
    if unreached or unmatched or (everything and unexpected):
        warnings.warn("; ".join(parts) + ". peft_ext.report(model) has the details.", stacklevel=3)
    else:
        logger.info("%s.", found.summary)


class _Reasons:
    """Why a layer of a model is float."""

    def __init__(self, base: nn.Module) -> None:
        self.parts, self.routers = other_parts(base), routers(base)
        self.output = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
        self.unfit = left_out(base)
        modules = base.named_modules()
        self.trained = tuple(f"{name}." for name, module in modules if isinstance(module, AuxiliaryTrainingWrapper))

    def of(self, module: nn.Module, name: str) -> str:
        """The reason; `name`: the module's."""
        if f"{name}.".startswith(self.trained):
            return TRAINED
        if foreign_weight(module) is not None:
            return FOREIGN
        if module is self.output:
            return OUTPUT
        part = part_of(name, self.parts)
        if part is not None:
            return self.parts[part]
        if name in self.routers or name.rpartition(".")[2] in ("router", "gate"):
            return ROUTER
        if any(part.endswith(tuple(SEQ_CLS_HEAD_NAMES)) for part in name.split(".")):
            return HEAD  # or a layer of one: RoBERTa's classifier.dense, DistilBERT's pre_classifier
        return self.unfit.get(name, OTHER)


def _part(module: nn.Module, name: str, reasons: _Reasons) -> PackedPart | LeftPart | None:
    """What a module is, if it is a linear layer, a router or fused experts."""
    own = dict(module.named_parameters(recurse=False))
    if not own:
        return None
    nbytes = sum(parameter.nbytes for parameter in module.parameters())
    if isinstance(module, PackedLinear):
        return PackedPart(module.number_format, module.in_features * module.out_features, nbytes, module.origin)
    if is_compressed(module):
        compressed: Any = module
        if not can_take_over(module):
            return LeftPart(KEPT, compressed.in_features * compressed.out_features, nbytes)
        return PackedPart(format_of(module, name), compressed.in_features * compressed.out_features, nbytes, None)
    numbers = sum(parameter.numel() for parameter in own.values())
    if isinstance(module, LINEAR_LAYERS):
        return LeftPart(reasons.of(module, name), numbers, nbytes)
    if "router" in type(module).__name__.lower() and own.get("weight") is not None and own["weight"].ndim == 2:
        return LeftPart(ROUTER, numbers, nbytes)
    if "experts" in type(module).__name__.lower() and any(parameter.ndim == 3 for parameter in own.values()):
        return LeftPart(EXPERTS, numbers, nbytes)
    return None


def _plain(name: str, wrappers: set[str]) -> Optional[str]:
    """A module's name in the model without adapters; None for what adapters have brought."""
    plain: list[str] = []
    path: list[str] = []
    for part in name.split("."):
        inside = ".".join(path) in wrappers
        if inside and part not in ("base_layer", "original_module"):
            return None
        if not inside:
            plain.append(part)
        path.append(part)
    return ".".join(plain)


def _described(number_format: NumberFormat) -> str:
    groups = "per channel" if number_format.group_size == -1 else f"in groups of {number_format.group_size}"
    return f"{number_format.bits} bits {groups} ({number_format.title})"


def _counted(left: Mapping[str, LeftPart]) -> str:
    """`lm_head (output layer), vision tower x12`."""
    names: dict[str, list[str]] = {}
    for name, part in left.items():
        names.setdefault(part.reason, []).append(name)
    return ", ".join(
        f"{found[0]} ({reason})" if len(found) == 1 else f"{reason} x{len(found)}" for reason, found in names.items()
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} others"
