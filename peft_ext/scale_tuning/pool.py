# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Thousands of adapters on one packed base, for serving: flat tensors of scales beside the model, switched by a copy."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Optional, Union

import torch
from peft import PeftConfig
from peft.utils import load_peft_weights
from torch import nn

from peft_ext.adapter_files import check_there
from peft_ext.checkpoint.saving import make_saveable, take_over
from peft_ext.quant import chosen_scales
from peft_ext.quant.conversion import packed_layers
from peft_ext.quant.experts import places
from peft_ext.quant.linear import PackedLinear
from peft_ext.scale_tuning.adapter_file import plain_scales
from peft_ext.scale_tuning.config import ScaleTuningConfig
from peft_ext.scale_tuning.layer import ScaleTuningLinear
from peft_ext.sharding import sharded_by
from peft_ext.targets import target_layers


# Scales of a mixed batch that are copied together.
_STACKED_BYTES = 2**28


class AdapterPool:
    """Adapters of one packed base outside the model, where `PeftModel` keeps them inside.

    PEFT walks all modules for every adapter that is loaded or activated, which a thousand adapters make slow. The pool
    gives all layers' scales one buffer, keeps an adapter as one tensor, and switches by copying it there. It trains
    nothing; an adapter is tuned, saved and shared as ever. Once there is an adapter that has trained zero points, too, these
    have a buffer of their own, and the layers' zero points become floats.

    Args:
        model: A model with packed layers and without tuner layers: as loaded from a packed checkpoint, or what
            `PeftModel.unload()` returns. Changed in place: its scales become views of one buffer. Move it to its device
            first.

    Raises:
        ValueError: If the model has no packed layers, has tuner layers, or its scales don't share a device and dtype.

    A pool serves many threads at once, each with its own choice: `mixed` is of the calls of its block, and `activate` of the
    thread that calls it (and of threads that never chose). A thread begins without a choice, so choose inside of it. What a
    thread has chosen it goes on with until it chooses again, also when the adapter is loaded anew or removed elsewhere.

    Example:

    ```py
    >>> pool = AdapterPool(AutoModelForCausalLM.from_pretrained("base"))
    >>> for folder in folders:
    ...     pool.load(folder, name=folder.name)
    >>> pool.activate("task7")
    >>> pool.model.generate(**inputs)
    >>> with pool.mixed(["task1", "task2", None]):  # a batch of three, the last without an adapter
    ...     pool.model.generate(**batch)
    ```
    """

    def __init__(self, model: nn.Module) -> None:
        if any(isinstance(module, ScaleTuningLinear) for module in model.modules()):
            raise ValueError("model has adapters inside; pass model.unload(), or merge_and_unload() to keep one.")
        by = sharded_by(model)
        if by is not None:
            raise ValueError(
                f"model is in pieces on several processes ({by}), and a pool's buffer of scales is one; make it of a model that "
                "is whole, in each process one."
            )
        take_over(model)
        self.model = model
        self._layers = packed_layers(model)
        if not self._layers:
            raise ValueError("model has no packed layers; load a packed checkpoint, or quantise it (see PeqaConfig).")
        make_saveable(model)
        kinds = {(layer.scale.device, layer.scale.dtype) for layer in self._layers.values()}
        if len(kinds) > 1:
            raise ValueError(
                f"the scales of model must share a device and dtype, but lie in {sorted(map(str, kinds))}."
            )
        self._base = torch.cat([layer.scale.detach().flatten() for layer in self._layers.values()])
        self._scales = self._base.clone()
        self._spans = dict(zip(self._layers, _spans(layer.scale.numel() for layer in self._layers.values())))
        for name, layer in self._layers.items():
            layer.scale.data = self._scales[self._spans[name]].view(layer.scale.shape)
        # of zero points, laid out like scales, once an adapter has its own
        self._base_zeros: Optional[torch.Tensor] = None
        self._zeros: Optional[torch.Tensor] = None
        self._adapters: dict[str, _Adapter] = {}
        self._positions_by_shapes: dict[tuple, Optional[torch.Tensor]] = {}
        self._fingerprints: dict[str, int] = {}
        self._places = {layer: self._spans[name] for name, layer in self._layers.items()}
        self._in_blocks = places(model)
        self._lock = threading.Lock()
        self._last: Optional[_Active] = None  # what the buffer holds; None: the base

    @property
    def names(self) -> list[str]:
        """The adapters in the pool."""
        return list(self._adapters)

    @property
    def active(self) -> Optional[str]:
        """The adapter that the model computes with in this thread; None for the base."""
        choice = self._choice() or self._last
        return None if choice is None else choice.name

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters."""
        parts = (part for adapter in self._adapters.values() for part in (adapter.values, adapter.zeros))
        return sum(part.nbytes for part in parts if part is not None)

    def load(self, path: str | os.PathLike, name: Optional[str] = None) -> str:
        """Read an adapter as `save_pretrained` wrote it; again under the same name replaces it.

        Args:
            path: Its folder, or its id on the hub.
            name: What to call it; the folder's name by default.

        Returns:
            The name.

        Raises:
            ValueError: If it isn't an adapter of scales, belongs to other codes, has trained modules beside them, or lacks
                a layer that its config names.
        """
        path = os.fspath(path)
        name = os.path.basename(os.path.normpath(path)) if name is None else name
        config = PeftConfig.from_pretrained(path)
        if not isinstance(config, ScaleTuningConfig):
            raise ValueError(
                f"adapter {name!r} is of type {config.peft_type}; the pool holds adapters of scales only."
            )
        if config.target_modules is None:
            raise ValueError(
                f"adapter {name!r}: its adapter_config.json has no target_modules, the layers that it is for; save it again."
            )
        if config.modules_to_save:
            raise ValueError(
                f"adapter {name!r} has modules_to_save={config.modules_to_save}, which the pool has no room for; load "
                "it through PeftModel.from_pretrained."
            )
        check_there(Path(path))
        tensors = load_peft_weights(path, device="cpu")
        found = plain_scales(tensors, self._base_scales, self._fingerprint, config, name)
        self._refuse_missing(set(found), config, name)
        scales = {layer: plain.scale for layer, plain in found.items()}
        shapes = tuple((layer, tuple(scale.shape)) for layer, scale in scales.items())
        if shapes not in self._positions_by_shapes:
            self._positions_by_shapes[shapes] = self._positions(scales)
        zeros = None
        if config.trains_zero_points:
            self._make_room_for_zero_points()
            zeros = self._flat(plain.zero_point for plain in found.values() if plain.zero_point is not None)
        self._adapters[name] = _Adapter(self._flat(scales.values()), self._positions_by_shapes[shapes], zeros)
        if name == self.active:
            self.activate(name)
        return name

    def remove(self, name: str) -> None:
        """Forget an adapter; the model goes back to the base if it was active."""
        self._find(name)
        if name == self.active:
            self.activate(None)
        del self._adapters[name]

    def activate(self, name: Optional[str]) -> None:
        """Let the model compute with an adapter, or with the base for None, in this thread from now on.

        Threads that never chose compute with what was activated last, by whichever thread; don't activate while one of them
        runs the model.

        Raises:
            ValueError: If there is no such adapter, or the model was moved or cast since the pool was made.
        """
        self._check_in_place()
        choice = _Active(self, name, self._whole(name), self._whole_zeros(name))
        mine = self._choice()
        with self._lock:
            # compiled graphs read the buffer as long as it holds what everybody has chosen
            alone = self._last is None or self._last is mine
            self._scales.copy_(choice.whole)
            if self._zeros is not None and choice.zeros is not None:
                self._zeros.copy_(choice.zeros)
            self._last = choice
        others = tuple(one for one in chosen_scales.KEPT.get() or () if one is not mine)
        chosen_scales.KEPT.keep((choice, *others), for_compilers=not alone)

    @contextmanager
    def mixed(self, names: Sequence[Optional[str]]) -> Iterator[None]:
        """Inside the block every sample of a batch uses its own adapter, in one product for all.

        Args:
            names: One for each sample, None for the base. Beams and `num_return_sequences` are the model's to add.

        Raises:
            ValueError: If there is no such adapter, within another such block, or if the model was moved or cast since
                the pool was made; inside the block, if a batch isn't a multiple of `names`.
        """
        self._check_in_place()
        others = chosen_scales.BLOCK.get() or ()
        if any(isinstance(one, _Mixed) and one.pool is self for one in others):
            raise ValueError("mixed can't be used within itself: one block names the adapters of all samples.")
        if isinstance(names, str) or not names:
            raise ValueError(f"names={names!r} must be a list with an adapter's name, or None, for each sample.")
        distinct = list(dict.fromkeys(names))
        wholes = [self._whole(name) for name in distinct]
        # one large copy here is cheaper than one in each layer, unless groups make scales as many as weights
        stacked = torch.stack(wholes) if len(wholes) * self._base.nbytes <= _STACKED_BYTES else None
        choice = torch.tensor([distinct.index(name) for name in names], device=self._base.device)
        zeros = [found for name in distinct if (found := self._whole_zeros(name)) is not None]
        if all(found is self._base_zeros for found in zeros):
            zeros = []
        with chosen_scales.BLOCK.block((_Mixed(self, wholes if stacked is None else stacked, choice, zeros), *others)):
            yield

    def _choice(self) -> Optional[_Active]:
        """What this thread has activated."""
        kept = chosen_scales.KEPT.get() or ()
        return next((one for one in kept if isinstance(one, _Active) and one.pool is self), None)

    def _holds(self, layer: PackedLinear) -> bool:
        """Whether the layer's scales are still a view of the pool's."""
        first = self._places[layer].start * self._scales.element_size()
        return layer.scale.data_ptr() == self._scales.data_ptr() + first

    def __repr__(self) -> str:
        return f"AdapterPool({len(self._adapters)} adapters, {self.nbytes / 1e6:.1f} MB, active={self.active!r})"

    def _check_in_place(self) -> None:
        first = next(iter(self._layers.values()))
        if first.scale.data_ptr() != self._scales.data_ptr():  # they would be written where nobody reads
            raise ValueError(
                "model was moved, cast or given other scales after the pool was made, so its scales are no views of the "
                "pool's any more; make the pool last."
            )

    def _find(self, name: str) -> _Adapter:
        if name not in self._adapters:
            some = ", ".join(map(repr, self.names[:5])) or "none"
            raise ValueError(f"there is no adapter {name!r} in the pool; it has {len(self.names)} ({some}...).")
        return self._adapters[name]

    def _refuse_missing(self, found: set[str], config: ScaleTuningConfig, name: str) -> None:
        missing = [
            layer for layer in target_layers(config, self.model) if layer in self._layers and layer not in found
        ]
        if missing:
            shown = ", ".join(map(repr, missing[:3])) + (", ..." if len(missing) > 3 else "")
            raise ValueError(
                f"adapter {name!r}: its file has no scales of {len(missing)} layers that its adapter_config.json names "
                f"({shown}); the file is damaged, or the config is another's. Save it again."
            )

    def _fingerprint(self, layer: str) -> int:
        if layer not in self._fingerprints:  # a digest of all codes, the slowest part of the first load
            self._fingerprints[layer] = self._layers[layer].fingerprint()
        return self._fingerprints[layer]

    @cached_property
    def _base_scales(self) -> dict[str, torch.Tensor]:
        return {
            name: self._base[span].view(self._layers[name].scale.shape).cpu() for name, span in self._spans.items()
        }

    def _whole(self, name: Optional[str]) -> torch.Tensor:
        """All scales under an adapter, flat like the buffer."""
        if name is None:
            return self._base
        adapter = self._find(name)
        if adapter.positions is None:
            return adapter.values
        return self._base.index_put((adapter.positions,), adapter.values)

    def _whole_zeros(self, name: Optional[str]) -> Optional[torch.Tensor]:
        """All zero points under an adapter, flat like the buffer; None as long as no adapter has any."""
        base = self._base_zeros
        adapter = None if name is None else self._find(name)
        if base is None or adapter is None or adapter.zeros is None:
            return base
        return adapter.zeros if adapter.positions is None else base.index_put((adapter.positions,), adapter.zeros)

    def _make_room_for_zero_points(self) -> None:
        """Make the layers' zero points views of a buffer of floats, which computes the same."""
        if self._zeros is not None:
            return
        for name in self._layers:  # of the zero points as adapters know them
            self._fingerprint(name)
        zeros = torch.zeros_like(self._base)
        for name, layer in self._layers.items():
            if layer.zero_point is not None:
                zeros[self._spans[name]] = layer.zero_point.detach().flatten().to(zeros)
        self._base_zeros, self._zeros = zeros, zeros.clone()
        for name, layer in self._layers.items():
            if layer.zero_point is not None:
                layer.set_zero_point(self._zeros[self._spans[name]].view(layer.scale.shape))

    def _flat(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensor.flatten() for tensor in tensors]).to(self._base)

    def _positions(self, scales: dict[str, torch.Tensor]) -> Optional[torch.Tensor]:
        positions = []
        for name, scale in scales.items():
            span, shape = self._spans[name], self._layers[name].scale.shape
            positions.append(torch.arange(span.start, span.stop).view(shape)[..., : scale.shape[-1]].flatten())
        flat = torch.cat(positions)
        return None if flat.numel() == self._base.numel() else flat.to(self._base.device)


class _Adapter(NamedTuple):
    values: torch.Tensor
    # of the values in the buffer; None where they are all of it, in order. Adapters that were tuned alike share them.
    positions: Optional[torch.Tensor]
    # zero points at the same places; None where it leaves them as they are
    zeros: Optional[torch.Tensor]


class _Active:
    """One adapter for all samples.

    Args:
        pool: Whose.
        name: The adapter's; None: the base.
        whole: All its scales, flat like the pool's buffer; not changed by anybody.
        zeros: All its zero points in the same way; None for the layers' own.
    """

    def __init__(
        self, pool: AdapterPool, name: Optional[str], whole: torch.Tensor, zeros: Optional[torch.Tensor]
    ) -> None:
        self.pool, self.name, self.whole, self.zeros = pool, name, whole, zeros
        self._views: dict[PackedLinear, tuple[torch.Tensor, Optional[torch.Tensor]]] = {}

    def product(self, layer: PackedLinear, x: torch.Tensor) -> Optional[torch.Tensor]:
        span = self.pool._places.get(layer)
        if span is None or not self.pool._holds(layer):  # moved or cast: it computes with what it was given then
            return None
        if (
            self.zeros is None and self.pool._base_zeros is not None
        ):  # it was chosen before any adapter had zero points
            self.zeros = self.pool._base_zeros
            self._views.clear()
        views = self._views.get(layer)
        if views is None:
            zeros = None if self.zeros is None or layer.zero_point is None else self.zeros[span]
            views = self._views[layer] = (
                self.whole[span].view(layer.scale.shape),
                None if zeros is None else zeros.view(layer.scale.shape),
            )
        return PackedLinear.forward(layer, x, views[0], zero_point=views[1])


class _Mixed:
    """An adapter for each sample.

    Args:
        pool: Whose.
        wholes: All scales under each adapter, flat; together or one by one.
        choice: int64, for each sample which of them.
        zeros: All zero points under each adapter in the same way; none where all have the base's.
    """

    def __init__(
        self,
        pool: AdapterPool,
        wholes: Union[torch.Tensor, list[torch.Tensor]],
        choice: torch.Tensor,
        zeros: list[torch.Tensor],
    ) -> None:
        self.pool, self.wholes, self.choice, self.zeros = pool, wholes, choice, zeros
        self._parts: dict[PackedLinear, torch.Tensor] = {}

    def product(self, layer: PackedLinear, x: torch.Tensor) -> Optional[torch.Tensor]:
        if layer not in self.pool._places:
            return None
        choice, place = self.choice, self.pool._in_blocks.get(layer)
        samples = None if place is None else place.samples(x, len(choice))
        choice = choice if samples is None else choice[samples]
        repeats, rest = divmod(len(x), len(choice))
        if rest or (repeats != 1 and x.dim() < 3):  # rows of two dimensions may be tokens of anything
            raise ValueError(
                f"mixed: {len(choice)} names for a batch of {len(x)}; pass one name for each sample. (A model that "
                "reshapes its batch before a layer can't mix adapters in it.)"
            )
        choice = choice if repeats == 1 else choice.repeat_interleave(repeats)
        return layer.forward_mixed(x, self._scales(layer), choice, self._zeros(layer))

    def _zeros(self, layer: PackedLinear) -> Optional[torch.Tensor]:
        """The layer's zero points: of all `[out, groups]`, or under each adapter `[n, out, groups]`; None: its own."""
        base, span = self.pool._base_zeros, self.pool._places[layer]
        if base is None or layer.zero_point is None:
            return None
        if not self.zeros:  # its own may be those of the adapter that is active
            return base[span].view(layer.scale.shape)
        return torch.stack([zeros[span] for zeros in self.zeros]).view(-1, *layer.scale.shape)

    def _scales(self, layer: PackedLinear) -> torch.Tensor:
        """The layer's scales under each adapter `[n, out, groups(, bits)]`."""
        span = self.pool._places[layer]
        if not isinstance(self.wholes, torch.Tensor):
            return torch.stack([whole[span] for whole in self.wholes]).view(-1, *layer.scale.shape)
        if layer not in self._parts:
            self._parts[layer] = self.wholes[:, span].contiguous().view(-1, *layer.scale.shape)
        return self._parts[layer]


def _spans(sizes: Iterable[int]) -> list[slice]:
    spans, start = [], 0
    for size in sizes:
        spans.append(slice(start, start + size))
        start += size
    return spans
