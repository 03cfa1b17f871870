# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Configuration of PEQA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Optional

from peft.utils import PeftType

from peft_ext.quant.formats import NumberFormat, Uniform
from peft_ext.scale_tuning.config import ScaleTuningConfig


TRAINED = ("scales", "scales+zeros")


@dataclass
class PeqaConfig(ScaleTuningConfig):
    """
    This is the configuration class to store the configuration of a [`PeqaModel`].

    PEQA turns the weights of the target layers into integers, freezes them, and trains one scale per output channel
    (or per group of inputs). Paper: https://huggingface.co/papers/2305.14152.

    Args:
        bits (`int` or `str`, *optional*):
            Width of an integer weight: 2, 3, 4, 5, 6 or 8. Left out, it is what each layer of a packed base has, whose
            integers are taken over as they are, and `4` on a float one. `"base"`: the same, and a float layer is
            refused. After injection it is the number; or `"base"`, where the layers of a packed base differ.
        group_size (`int`, *optional*):
            Number of inputs that share a scale. -1, the paper's setting, gives every output channel one scale. Smaller
            groups (256, 128, 64, 32; any divisor of the layer's inputs) are closer to the float model and train more
            scales. Left out, it is what each layer of a packed base has, and `-1` on a float one.
        sym (`bool`, *optional*):
            Keep every zero point in the middle of the range. Some engines run only symmetric weights. Left out, it is
            what each layer of a packed base has, and `False` on a float one.
        zero (`str`, *optional*):
            What zero points are: `"int"`, one of the codes in 8 bits, which stock transformers and vLLM read; or `"float"`,
            any number in 32 bits, so that a group keeps its own minimum (as GGUF's Q4_1 and K-quants, MLX and HQQ have it).
            Floats pay in small groups, where a rounded zero point costs most; the checkpoint is then our own (`bcq`).
            Left out, it is what each layer of a packed base has, and `"int"` on a float one.
        init_method (`str`, *optional*, defaults to `"minmax"`):
            Where the integers come from: `"minmax"` rounds to the nearest level of each channel's range; `"mse"`
            shrinks the range to the least squared error, as in the paper; `"calibrated"` needs a call of [`calibrate`]
            with some training data first and is by far the best at 3 and 2 bits; so does `"gptq"`, its first step alone
            (error feedback on a grid that stays), which is faster and further off. `"lattice"` takes weights over
            exactly that are integers with scales already, written out as floats (releases of quantisation-aware
            training, dequantised GGUFs): bits, groups and zero points are found where they are left out, and what
            lies on no lattice is rounded by `"minmax"`.
        parametrization (`str`, *optional*, defaults to `"relative"`):
            What the optimiser sees. `"relative"`: scale = s0 * (1 + delta), so that one learning rate (about 1e-2)
            suits every model and width; `"log"`: scale = s0 * exp(delta); `"absolute"`: scale = s0 + delta, the
            paper's, whose learning rate depends on the model. Adapter files hold plain scales in every case.
        trained (`str`, *optional*, defaults to `"scales"`):
            What is trained of a layer: `"scales"`, as in the paper; or `"scales+zeros"`, zero points as well (as MLX's DWQ
            trains scales and biases): zero point = z0 + delta, in steps of the grid, for twice as many parameters. The base
            may have zero points of either kind; once the adapter is merged, they are floats.
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
            Instead of `bits` and `bits_pattern`: an average width from 2 to 8, such as 3.0. Each layer gets 2, 3, 4 or 8 bits,
            by what the loss loses where it is rounded, within the bytes that all would take at that width. [`calibrate`] or
            [`allocate_bits`] chooses them, on some training data, and writes them into `bits` and `bits_pattern`.
        group_size_pattern (`dict`, *optional*):
            Other group sizes for some layers, in the same way.
        embedding_bits (`int`, *optional*):
            Pack the token embedding and the output head, too: 8 (integers around zero, one scale for each token) or 4 (groups
            of 32). They stay frozen, and tied ones tied; the checkpoint is `bcq`. Default: they stay as they are.
        fan_in_fan_out (`bool`, *optional*, defaults to `False`):
            Whether the target layers store their weight as (fan_in, fan_out). Kept so that settings carry over from
            PEFT's other methods; PEQA reads the layout off the layer (`Conv1D` or `nn.Linear`) and warns if this
            differs.
        keep_product (`bool`, *optional*, defaults to `False`):
            Per channel, keep each layer's product before scaling for the backward instead of its output. Costs memory;
            needed only for models that change a layer's output in place (PyTorch then says so in the backward).
        init_weights (`bool`, *optional*, defaults to `True`):
            Start from the quantised model. Don't change this setting, except if you know exactly what you're doing.
    """

    number_format_cls: ClassVar[type[Uniform]] = Uniform

    sym: Optional[bool] = field(
        default=None,
        metadata={
            "help": "Keep every zero point in the middle of the range. Default: as a packed base has them, or False."
        },
    )
    zero: Optional[str] = field(
        default=None,
        metadata={
            "help": "Zero points: 'int' (one of the codes) or 'float' (a group's own minimum). Default: as a packed base "
            "has them, or 'int'."
        },
    )
    init_method: str = field(
        default=Uniform.default_method,
        metadata={
            "help": "Where the integers come from: 'minmax', 'mse', 'lattice', or 'calibrated' or 'gptq' (call calibrate first)."
        },
    )
    trained: str = field(
        default="scales", metadata={"help": "What is trained: 'scales', or 'scales+zeros', zero points as well."}
    )
    keep_product: bool = field(
        default=False,
        metadata={"help": "Keep each layer's unscaled product for the backward instead of its output."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.PEQA
        if self.trained not in TRAINED:
            raise ValueError(f"trained={self.trained!r} is unknown; choose one of {TRAINED}.")

    @property
    def trains_zero_points(self) -> bool:
        """Whether zero points are trained beside the scales."""
        return self.trained == "scales+zeros"

    def number_format(self, bits: int, group_size: int, base: Optional[NumberFormat] = None) -> Uniform:
        """Integers of that width; symmetric as `sym` says, with zero points as `zero` says."""
        sym = getattr(base, "sym", False) if self.sym is None else self.sym
        zero = getattr(base, "zero", "int") if self.zero is None else self.zero
        return Uniform(bits, group_size, sym, zero)
