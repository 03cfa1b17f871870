# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Different adapters for the samples of one batch: what PEFT's `adapter_names=` asks of a tuner's model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_ext.quant.experts import Place, places
from peft_ext.threads import PerCall


# what a call hands each layer, from the layer's input
_GIVEN: PerCall[dict[nn.Module, Callable[[Any], dict[str, Any]]]] = PerCall("peft_ext_adapter_names")
_hooking = threading.Lock()


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
        """For the time of a forward, or of a whole `generate`, hand every tuner layer the name of each sample's adapter, in this
        thread: others may run the model with other names, or none, at the same time.

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
        of_layers: dict[nn.Module, Callable[[torch.Tensor], dict[str, Any]]] = {}
        in_blocks = places(self.model)
        for module in self.modules():
            if isinstance(module, self.tuner_layer_cls) and module in in_blocks:
                rows = partial(self._row_arguments, arguments[False])
                of_layers[module] = partial(_of_rows, in_blocks[module], len(expanded), rows, arguments[False])
            elif isinstance(module, self.tuner_layer_cls):
                of_layers[module] = partial(_of_all, arguments[module in in_encoder])
            elif isinstance(module, AuxiliaryTrainingWrapper):
                of_layers[module] = partial(
                    _of_all, {"adapter_names": adapter_names if module in in_encoder else expanded}
                )
                _hand_names_to(module)
        with _GIVEN.block(of_layers):
            yield


def mixed_forward(layer: nn.Module, x: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> Optional[torch.Tensor]:
    """A tuner layer's output with what `adapter_names=` says of it in this call; None where it says nothing."""
    return _GIVEN.apply(_mixed_forward, layer, x, args, kwargs)


def _mixed_forward(
    of_layers: dict[nn.Module, Any], layer: nn.Module, x: torch.Tensor, args: tuple, kwargs: dict[str, Any]
) -> Optional[torch.Tensor]:
    more = of_layers.get(layer)
    return None if more is None else type(layer).forward(layer, x, *args, **kwargs, **more(x))


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


def _of_all(arguments: dict[str, Any], x: torch.Tensor) -> dict[str, Any]:
    return arguments


def _of_rows(
    place: Place,
    count: int,
    rows: Callable[[torch.Tensor], dict[str, Any]],
    arguments: dict[str, Any],
    x: torch.Tensor,
) -> dict[str, Any]:
    samples = place.samples(x, count)
    return arguments if samples is None else rows(samples)


def _hand_names_to(wrapper: nn.Module) -> None:
    """PEFT's own wrapper takes the names as an argument: from a hook, which stays, and reads what the call has."""
    with _hooking:
        if _names_of_call not in wrapper._forward_pre_hooks.values():
            wrapper.register_forward_pre_hook(_names_of_call, with_kwargs=True)


def _names_of_call(module: nn.Module, args: tuple, kwargs: Optional[dict[str, Any]] = None) -> Any:
    if kwargs is None:  # torch registers in two steps, and another thread, which has no names, came between them
        return None
    return _GIVEN.apply(_with_names, module, args, kwargs)


def _with_names(of_layers: dict[nn.Module, Any], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    more = of_layers.get(module)
    return None if more is None else (args, {**kwargs, **more(args[0] if args else None)})
