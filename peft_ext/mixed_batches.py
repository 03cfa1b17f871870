# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Different adapters for the samples of one batch: what PEFT's `adapter_names=` asks of a tuner's model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_ext.quant.experts import Place, places


class MixedBatches:
    """Part of a tuner's model: with `adapter_names=`, each sample of a batch has its own adapter."""

    def _layer_arguments(self, adapter_names: list[str]) -> dict[str, Any]:
        """What a tuner layer's forward takes, from the names of the samples that it will see."""
        return {"adapter_names": adapter_names}

    def _row_arguments(self, arguments: dict[str, Any], samples: torch.Tensor) -> dict[str, Any]:
        """The same where a layer doesn't see samples but rows of them, `samples` says of which: in a block with experts."""
        names = arguments["adapter_names"]
        return {"adapter_names": [names[sample] for sample in samples.tolist()]}

    @contextmanager
    def _enable_peft_forward_hooks(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        """For the time of a forward, or of a whole `generate`, hand every tuner layer the name of each sample's adapter.

        Args:
            **kwargs: Of the forward. `adapter_names`: one for each sample, `"__base__"` for none; None: nothing is handed
                over. `num_beams`: behind the encoder, every sample is repeated so many times.

        Raises:
            ValueError: In training mode, or if an adapter doesn't exist.
            TypeError: If `adapter_names` is no list.
        """
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        _check_adapter_names(self, adapter_names)
        expanded = [name for name in adapter_names for _ in range(kwargs.get("num_beams") or 1)]
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        # an encoder sees the batch before it is repeated for each beam
        in_encoder = set(encoder.modules()) if encoder is not None and encoder is not self.model else set()
        arguments = {False: self._layer_arguments(expanded), True: self._layer_arguments(adapter_names)}
        handles = []
        in_blocks = places(self.model)
        for module in self.modules():
            if isinstance(module, self.tuner_layer_cls) and module in in_blocks:
                rows = partial(self._row_arguments, arguments[False])
                more_of = partial(_more_of_rows, in_blocks[module], len(expanded), rows, arguments[False])
                handles.append(
                    module.register_forward_pre_hook(partial(_pass_rows, more_of=more_of), with_kwargs=True)
                )
                continue
            if isinstance(module, self.tuner_layer_cls):
                more = arguments[module in in_encoder]
            elif isinstance(module, AuxiliaryTrainingWrapper):
                more = {"adapter_names": adapter_names if module in in_encoder else expanded}
            else:
                continue
            handles.append(module.register_forward_pre_hook(partial(_pass, more=more), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def check_length(names: int, samples: int) -> None:
    """Refuse names that don't go with the samples that reach a layer, in the words of PEFT's own layers."""
    if names != samples:
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {names} and {samples} "
            "respectively. (A model that reshapes its batch before this layer can't mix adapters in it.)"
        )


def _check_adapter_names(tuner: BaseTuner, adapter_names: list[str]) -> None:
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    unknown = sorted(set(adapter_names) - {"__base__"} - set(tuner.peft_config))
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")


def _pass(module: nn.Module, args: tuple, kwargs: dict, more: dict[str, Any]) -> tuple[tuple, dict]:
    return args, {**kwargs, **more}


def _more_of_rows(
    place: Place,
    count: int,
    rows: Callable[[torch.Tensor], dict[str, Any]],
    arguments: dict[str, Any],
    x: torch.Tensor,
) -> dict[str, Any]:
    samples = place.samples(x, count)
    return arguments if samples is None else rows(samples)


def _pass_rows(
    module: nn.Module, args: tuple, kwargs: dict, more_of: Callable[[torch.Tensor], dict[str, Any]]
) -> tuple[tuple, dict]:
    return args, {**kwargs, **more_of(args[0])}
