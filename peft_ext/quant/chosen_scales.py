# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Scales that packed layers multiply with in this call, in place of their own."""

from __future__ import annotations

from typing import Any, Optional, Protocol

import torch

from peft_ext.threads import PerCall


class ChosenScales(Protocol):
    """The scales of some packed layers."""

    def product(self, layer: Any, x: torch.Tensor) -> Optional[torch.Tensor]:
        """A packed layer's product with them; None if it isn't one of these layers."""


# of a block, and from now on; the first goes before the second
BLOCK: PerCall[tuple[ChosenScales, ...]] = PerCall("peft_ext_scales_of_block")
KEPT: PerCall[tuple[ChosenScales, ...]] = PerCall("peft_ext_scales_kept")


def product(layer: Any, x: torch.Tensor) -> Optional[torch.Tensor]:
    """A packed layer's product with the scales that this call has chosen for it; None if it has chosen none."""
    if not (BLOCK.ever or KEPT.ever):
        return None
    found = BLOCK.apply(_product, layer, x)
    return KEPT.apply(_product, layer, x) if found is None else found


def _product(chosen: tuple[ChosenScales, ...], layer: Any, x: torch.Tensor) -> Optional[torch.Tensor]:
    for one in chosen:
        found = one.product(layer, x)
        if found is not None:
            return found
    return None
