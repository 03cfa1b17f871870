# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Configuration of bottleneck adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from peft.utils import PeftType
from transformers.activations import ACT2FN

from peft_ext.targets import TargetConfig


PLACEMENTS = ("houlsby", "pfeiffer")
INIT_METHODS = ("identity", "houlsby")
DEFAULT_REDUCTION_FACTOR = 16


@dataclass
class BottleneckConfig(TargetConfig):
    """
    This is the configuration class to store the configuration of a [`BottleneckModel`].

    A bottleneck adapter is a small network behind a sub-layer of a transformer block, beside a skip connection: with y
    the sub-layer's output, `y + up(non_linearity(down(y)))`. Papers: https://huggingface.co/papers/1902.00751 (Houlsby
    et al.), https://huggingface.co/papers/2005.00247 (Pfeiffer et al.).

    Args:
        bottleneck_dim (`int`, *optional*):
            Width of the adapter, the same in every layer. Give either this or `reduction_factor`.
        reduction_factor (`int`, *optional*):
            Width as a fraction: the size of the sub-layer's output over this factor (at least 1). 16 if neither is
            given, as Pfeiffer et al. found best.
        placement (`str`, *optional*, defaults to `"houlsby"`):
            Which sub-layers get an adapter. `"houlsby"`: attention (and cross-attention) and feed-forward layers;
            `"pfeiffer"`: feed-forward layers only, so half the parameters and time. In both, the adapter sits on the
            output projection, before dropout, the block's residual connection and a layer norm behind it: Houlsby's
            position. (Pfeiffer et al. feed theirs with the normalised sum of output and residual instead.) Has no
            effect if `target_modules` is given.
        non_linearity (`str`, *optional*, defaults to `"relu"`):
            Activation in the middle, a name that transformers knows (`"relu"`, `"gelu"`, `"silu"`, ...).
        init_method (`str`, *optional*, defaults to `"identity"`):
            How adapters are initialised. `"identity"`: the model as it was, exactly (`up` is zero, `down` Kaiming uniform as
            LoRA's A); `"houlsby"`: close to it, both normal with a deviation of 0.01, cut at two deviations, as in the
            paper. Biases start at zero.
        target_modules (`Union[List[str], str]`, *optional*):
            The names of the modules that get an adapter behind them, or a regular expression. Only `nn.Linear`,
            transformers' `Conv1D` and packed layers are supported. Default: the output projections that `placement`
            asks for, known for the common families.
        exclude_modules (`Union[List[str], str]`, *optional*):
            The names of the modules to leave as they are, or a regular expression.
        modules_to_save (`List[str]`, *optional*):
            Modules apart from the adapters that are trained in full and saved with them.
        layers_to_transform (`Union[List[int], int]`, *optional*):
            Indexes of the layers that get adapters; the others stay as they are. Only for targets that are names.
        layers_pattern (`Union[List[str], str]`, *optional*):
            Name of the `nn.ModuleList` that `layers_to_transform` indexes, often `"layers"` or `"h"`.
        init_weights (`bool`, *optional*, defaults to `True`):
            Initialise as `init_method` says; False: with random numbers. Don't change this setting, except if you know
            exactly what you're doing.
    """

    bottleneck_dim: Optional[int] = field(default=None, metadata={"help": "Width of the adapter."})
    reduction_factor: Optional[int] = field(
        default=None,
        metadata={"help": "Size of the sub-layer's output over the adapter's width; 16 if neither is given."},
    )
    placement: str = field(
        default="houlsby",
        metadata={"help": "'houlsby': behind attention and feed-forward layers; 'pfeiffer': feed-forward only."},
    )
    non_linearity: str = field(
        default="relu", metadata={"help": "Activation in the middle, a name that transformers knows."}
    )
    init_method: str = field(
        default="identity",
        metadata={"help": "'identity': start as the model was; 'houlsby': close to it, as in the paper."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.BOTTLENECK
        if self.bottleneck_dim is None and self.reduction_factor is None:
            self.reduction_factor = DEFAULT_REDUCTION_FACTOR
        self._check_width()
        _check_choice("placement", self.placement, PLACEMENTS)
        _check_choice("init_method", self.init_method, INIT_METHODS)
        if self.non_linearity not in ACT2FN:
            raise ValueError(f"non_linearity={self.non_linearity!r} is unknown; choose one of {sorted(ACT2FN)}.")

    def width_for(self, features: int) -> int:
        """Width of the adapter behind a layer with so many outputs."""
        if self.bottleneck_dim is not None:
            return self.bottleneck_dim
        return max(1, features // (self.reduction_factor or DEFAULT_REDUCTION_FACTOR))

    def _check_width(self) -> None:
        if self.bottleneck_dim is not None and self.reduction_factor is not None:
            raise ValueError(
                f"bottleneck_dim={self.bottleneck_dim!r} and reduction_factor={self.reduction_factor!r} both say how wide "
                "the adapter is; pass one of them."
            )
        for name in ("bottleneck_dim", "reduction_factor"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} is no int; pass a whole number of at least 1.")
            if value < 1:
                raise ValueError(f"{name}={value!r} is too small; pass a whole number of at least 1.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {choices}.")
