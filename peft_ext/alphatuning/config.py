# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Configuration of AlphaTuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Optional

from peft.utils import PeftType

from peft_ext.quant.formats import BinaryCoding, NumberFormat
from peft_ext.scale_tuning.config import ScaleTuningConfig


TRAINED_ALPHAS = ("first", "all")


@dataclass
class AlphaTuningConfig(ScaleTuningConfig):
    """
    This is the configuration class to store the configuration of an [`AlphaTuningModel`].

    AlphaTuning writes the weights of the target layers in binary coding, `W = sum_p alpha_p * B_p` with signs `B_p`,
    freezes the signs and trains the first, largest scaling factor `alpha_1` of each output channel (or of each group
    of inputs). Paper: https://huggingface.co/papers/2210.03858.

    Args:
        bits (`int` or `str`, *optional*):
            Number of sign planes: 1, 2, 3, 4 or 8. Left out, it is what each layer of a packed base has, whose codes
            are taken over as they are, and `4` on a float one. `"base"`: the same, and a float layer is refused. After
            injection it is the number; or `"base"`, where the layers of a packed base differ.
        group_size (`int`, *optional*):
            Number of inputs that share their alphas. -1, the paper's setting, gives every output channel one set.
            Smaller groups (256, 128, 64, 32; any divisor of the layer's inputs) are closer to the float model and
            train more alphas. Left out, it is what each layer of a packed base has, and `-1` on a float one.
        trained_alphas (`str`, *optional*, defaults to `"first"`):
            `"first"`, the paper's: only `alpha_1` is trained, one number per channel (group). `"all"`: every alpha is,
            `bits` numbers per channel (group). Adapters of both kinds may share a base.
        init_method (`str`, *optional*, defaults to `"alternating"`):
            Where the codes come from: `"greedy"`, the paper's (each plane takes the sign of what is left);
            `"alternating"` refines these codes and alphas in turn; `"calibrated"` needs a call of [`calibrate`] with
            some training data first. Per channel the first two wreck small models at any width (they clip the few
            large weights), so calibrate, or choose small groups.
        parametrization (`str`, *optional*, defaults to `"relative"`):
            What the optimiser sees. `"relative"`: alpha = alpha0 * (1 + delta), so that one learning rate (about 1e-2)
            suits every model and width; `"log"`: alpha = alpha0 * exp(delta); `"absolute"`: alpha = alpha0 + delta,
            the paper's, whose learning rate depends on the model. Adapter files hold plain alphas in every case.
        target_modules (`Union[List[str], str]`, *optional*):
            The names of the modules to quantise, or a regular expression. Only `nn.Linear` and transformers' `Conv1D`
            are supported. Default: `"all-linear"`, every linear layer but the output layer, of a model that
            sees or hears those of its language model; on a packed base, its packed layers.
        exclude_modules (`Union[List[str], str]`, *optional*):
            The names of the modules to leave as they are, or a regular expression.
        modules_to_save (`List[str]`, *optional*):
            Modules apart from the quantised layers that are trained in full and saved with the adapter.
        layers_to_transform (`Union[List[int], int]`, *optional*):
            Indexes of the layers to quantise; the others stay as they are. Only for `target_modules` given as a list.
        layers_pattern (`Union[List[str], str]`, *optional*):
            Name of the `nn.ModuleList` that `layers_to_transform` indexes, often `"layers"` or `"h"`.
        bits_pattern (`dict`, *optional*):
            Other widths for some layers: module names or regular expressions mapped to bits, as LoRA's `rank_pattern`.
        bits_budget (`float`, *optional*):
            Instead of `bits` and `bits_pattern`: an average width from 2 to 8, such as 3.0. Each layer gets 2, 3, 4 or 8 planes,
            by what the loss loses where it is rounded, within the bytes that all would take at that width. [`calibrate`] or
            [`allocate_bits`] chooses them, on some training data, and writes them into `bits` and `bits_pattern`.
        group_size_pattern (`dict`, *optional*):
            Other group sizes for some layers, in the same way.
        embedding_bits (`int`, *optional*):
            Pack the token embedding and the output head, too: 8 (integers around zero, one scale for each token) or 4 (groups
            of 32). They stay frozen, and tied ones tied; the checkpoint is `bcq`. Default: they stay as they are.
        fan_in_fan_out (`bool`, *optional*, defaults to `False`):
            Whether the target layers store their weight as (fan_in, fan_out). Kept so that settings carry over from
            PEFT's other methods; the layout is read off the layer (`Conv1D` or `nn.Linear`), with a warning if this
            differs.
        init_weights (`bool`, *optional*, defaults to `True`):
            Start from the quantised model. Don't change this setting, except if you know exactly what you're doing.
    """

    number_format_cls: ClassVar[type[BinaryCoding]] = BinaryCoding

    init_method: str = field(
        default=BinaryCoding.default_method,
        metadata={
            "help": "Where the codes come from: 'greedy', 'alternating' or 'calibrated' (call calibrate first)."
        },
    )
    trained_alphas: str = field(
        default="first", metadata={"help": "Which scaling factors are trained: 'first' or 'all'."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.ALPHATUNING
        if self.trained_alphas not in TRAINED_ALPHAS:
            raise ValueError(f"trained_alphas={self.trained_alphas!r} is unknown; choose one of {TRAINED_ALPHAS}.")

    def number_format(self, bits: int, group_size: int, base: Optional[NumberFormat] = None) -> BinaryCoding:
        """That many sign planes."""
        return BinaryCoding(bits, group_size)

    def trained_shape(self, scale_shape: Sequence[int]) -> tuple[int, ...]:
        """All alphas `[out, groups, bits]`, or the first ones `[out, groups, 1]`."""
        return (*scale_shape[:2], 1) if self.trained_alphas == "first" else tuple(scale_shape)
