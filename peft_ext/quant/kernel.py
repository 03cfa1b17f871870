# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The CPU kernel for few rows: loads it, says what it takes, and makes it an operator that torch's compiler keeps.

`PEFT_EXT_KERNEL` chooses how packed layers multiply: `auto` (the default: the kernel where it is faster, activations rounded
to 8 bits), `exact` (the kernel, activations in 24 bits) or `torch` (torch's own operations alone).
`PEFT_EXT_CPU_CAPABILITY` (`portable`, `avx2`, `avx512`) holds the kernel back, as `ATEN_CPU_CAPABILITY` does torch.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Optional

import torch

from peft_ext.quant.packing import SUPPORTED_BITS, TILE_ROWS, planes_shape


KERNEL_VARIABLE = "PEFT_EXT_KERNEL"
KERNELS = ("auto", "exact", "torch")
CAPABILITY_VARIABLE = "PEFT_EXT_CPU_CAPABILITY"
CAPABILITIES = ("portable", "avx2", "avx512")

# What the module was built from must be what this file calls: PEFT_EXT_KERNEL_VERSION in csrc/packed_linear.h.
VERSION = 4
# Up to so many rows the kernel takes over from unpacking and a dense product, by capability. Only roughly known: for 400 tokens
# of SmolLM2 it took 2.2 s (AVX-512), 4.6 s (AVX2) and 24 s (portable) against torch's 3.1 to 3.7 s, on one thread.
MAX_ROWS = (8, 64, 1024)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INPUTS_OF_BYTE = 8
_PLAIN = (torch.Tensor, torch.nn.Parameter)


@torch.compiler.assume_constant_result
def kernel() -> str:
    """The value of PEFT_EXT_KERNEL.

    Raises:
        ValueError: If it isn't one of `KERNELS`.
    """
    return _mode()


@torch.compiler.assume_constant_result
def capability() -> int:
    """The index in `CAPABILITIES` of the instructions that the kernel uses.

    Raises:
        ValueError: If PEFT_EXT_CPU_CAPABILITY isn't one of `CAPABILITIES`.
    """
    return _level()


@contextlib.contextmanager
def using(**variables: str) -> Iterator[None]:
    """Other values of PEFT_EXT_KERNEL and PEFT_EXT_CPU_CAPABILITY inside the block, for all threads.

    They are otherwise read once, at first use: looking them up takes as long as a small product.
    """
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    _forget()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        _forget()


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernel is built and of this version; says once if it isn't."""
    return _module() is not None


def check(
    x: torch.Tensor,
    planes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    out_features: int,
    in_features: int,
    choice: Optional[torch.Tensor] = None,
    samples: Optional[int] = None,
) -> tuple[int, int]:
    """Refuse what doesn't fit together, before anything reads it: the kernel trusts sizes, and torch would stretch some.

    Args:
        x, planes, scale, zero_point, bias, out_features, choice: As [`packed_linear`] takes them.
        in_features: Inputs of the weight.
        samples: How many `choice` has to be for; None: one for each row of `x`.

    Returns:
        The bits of a code, and the groups of inputs with a scale of their own.

    Raises:
        TypeError: If `x` isn't float.
        ValueError: If something has another shape, dtype or device than the rest wants, or `choice` names a scale that isn't
            there.
    """
    # called for every layer and token: what fits is told by tensors' cheapest properties, what doesn't is then looked for.
    # All of this file's checks took 1.1 us of the 15.1 us of one row times 576 x 576 (EPYC, 1 thread, best of 1,500 bursts).
    packed, layout, shape = planes.shape, scale.shape, x.shape
    whole_layout = layout
    if choice is not None:
        layout = layout[1:]
    fits = (
        len(packed) == 4
        and len(layout) == (3 if zero_point is None else 2)
        and packed == (-(-out_features // TILE_ROWS), -(-in_features // 8), packed[2], TILE_ROWS)
        and 1 <= packed[2] <= SUPPORTED_BITS[-1]
        and layout[0] == out_features
        and layout[1] > 0
        and in_features % layout[1] == 0
        and (
            layout[2] == packed[2]
            if zero_point is None
            else (zero_point.shape == layout and zero_point.dtype == torch.uint8)
            or (zero_point.dtype.is_floating_point and zero_point.shape in (layout, whole_layout))
        )
        and planes.dtype == torch.uint8
        and (bias is None or (bias.shape == (out_features,) and bias.dtype.is_floating_point))
        and scale.dtype.is_floating_point
        and x.dtype.is_floating_point
        and len(shape) > 0
        and shape[-1] == in_features
        and (
            (planes.is_cpu and scale.is_cpu and (zero_point is None or zero_point.is_cpu) and (bias is None or bias.is_cpu))
            if x.is_cpu  # comparing devices takes much longer
            else all(one is None or one.device == x.device for one in (planes, scale, zero_point, bias))
        )
    )  # fmt: skip
    if not fits:
        raise _misfit(x, planes, scale, zero_point, bias, out_features, in_features, layout)
    if choice is not None:
        _check_choice(choice, scale, x, samples)
    return packed[2], layout[1]


def packed_linear(
    x: torch.Tensor,
    planes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    size: tuple[int, int, int, int],
    choice: Optional[torch.Tensor] = None,
) -> Optional[torch.Tensor]:
    """`[..., in] -> [..., out]` by the kernel, of what [`check`] has let through; None where it doesn't serve.

    It serves few rows on a CPU without gradients, in float32, bfloat16 or float16, where groups are whole bytes of the planes.

    Args:
        x: float `[..., in]`.
        planes: uint8 `[tiles, input bytes, bits, 32]`.
        scale: `[out, groups]`, of a binary coding `[out, groups, bits]`; with `choice` another dimension in front.
        zero_point: uint8 or float `[out, groups]`; float ones, with `choice`, perhaps `[n, out, groups]`; None for a binary
            coding.
        bias: `[out]` or None.
        size: The weight's outputs and inputs, and what `check` gives: bits and groups.
        choice: int64, for each row of `x` (its leading dimensions flattened) which scale it takes.
    """
    # called for every layer and token: tensors' cheapest properties only, see benchmarks/kernels.py
    if torch.is_grad_enabled() or not x.is_cpu:
        return None
    out_features, in_features, _, groups = size
    if x.dtype not in _DTYPES or scale.dtype not in _DTYPES:
        return None
    if groups > 1 and in_features % (groups * _INPUTS_OF_BYTE):
        return None
    compiling = torch.compiler.is_compiling()
    if compiling:  # which takes these for constants
        mode, level, there = kernel(), capability(), available()
    else:
        mode, level, there = _mode(), _level(), _module() is not None
    if mode == "torch" or not there or not in_features or x.numel() > in_features * MAX_ROWS[level]:
        return None
    exact = mode == "exact"
    if compiling or type(x) not in _PLAIN or torch._C._len_torch_dispatch_stack():
        return torch.ops.peft_ext.packed_linear(x, planes, scale, zero_point, bias, choice, out_features, exact)
    # views of the negated numbers, which are not in memory; layers hold their planes as they are
    if (
        x.is_neg()
        or scale.is_neg()
        or (bias is not None and bias.is_neg())
        or (type(planes) in _PLAIN and planes.is_neg())
    ):
        return None
    return _run(x, planes, scale, zero_point, bias, choice, size, exact, level)


def _run(
    x: torch.Tensor,
    planes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    choice: Optional[torch.Tensor],
    size: tuple[int, int, int, int],
    exact: bool,
    level: int,
) -> torch.Tensor:
    module = _module()
    if module is None:  # an exported program on a machine without it
        raise RuntimeError(
            "this program was exported with peft-ext's CPU kernel, which is not built here; reinstall peft-ext."
        )
    out_features, in_features, bits, groups = size
    ahead = x.shape[:-1]
    y = x.new_empty((*ahead, out_features))
    if not y.numel():
        return y
    if not (x.is_contiguous() or (len(ahead) == 1 and x.stride(1) == 1)):
        x = x.contiguous()
    # each a check where it is one already; zero points read from checkpoints often aren't
    planes, scale = planes.contiguous(), scale.contiguous()
    float_zero = 0
    if zero_point is not None:
        if zero_point.dtype != torch.uint8:
            zero_point, float_zero = zero_point.float().resolve_neg(), 1 if zero_point.dim() == 2 else 2
        zero_point = zero_point.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype in _DTYPES else bias.float()).contiguous()
    if choice is not None:
        choice = choice.contiguous()
    of_x, of_planes, of_scale = x.data_ptr(), planes.data_ptr(), scale.data_ptr()
    of_zero_point = 0 if zero_point is None else zero_point.data_ptr()
    of_choice = 0 if choice is None else choice.data_ptr()
    of_bias = 0 if bias is None else bias.data_ptr()
    if not (
        of_x
        and of_planes
        and of_scale
        and (of_zero_point or zero_point is None)
        and (of_choice or choice is None)
        and (of_bias or bias is None)
    ):
        raise ValueError(
            "a packed product was given tensors without memory (fake or wrapped ones, such as DTensors) beside plain ones; "
            "pass tensors of one kind, or set PEFT_EXT_KERNEL=torch."
        )
    rows, stride = x.numel() // in_features, x.stride(0) if len(ahead) == 1 else in_features
    left_range = module.packed_linear(
        of_x,
        y.data_ptr(),
        _DTYPES[x.dtype],
        rows,
        stride,
        of_planes,
        bits,
        zero_point is None,
        out_features,
        in_features,
        of_scale,
        _DTYPES[scale.dtype],
        groups,
        of_choice,
        of_zero_point,
        float_zero,
        of_bias,
        0 if bias is None else _DTYPES[bias.dtype],
        exact,
        torch.get_num_threads(),
        level,
        # what there is at the addresses, which the kernel holds the sizes against
        x.nelement() if stride == in_features else (rows - 1) * stride + in_features,
        y.nelement(),
        planes.nelement(),
        scale.nelement(),
        0 if choice is None else choice.nelement(),
        0 if zero_point is None else zero_point.nelement(),
        0 if bias is None else bias.nelement(),
        VERSION,
    )
    return _in_double(x, planes, scale, zero_point, bias, choice, size) if left_range else y


def _in_double(
    x: torch.Tensor,
    planes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    choice: Optional[torch.Tensor],
    size: tuple[int, int, int, int],
) -> torch.Tensor:
    """The product where a number left the range of float32 on the way (or an input isn't finite), by torch's operations."""
    from peft_ext.quant import functional  # it imports this module

    weight = functional.PackedWeight(planes, zero_point, *size[:2])
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).double()
    bias = None if bias is None else bias.double()
    if choice is None:
        y = functional.unpacked_linear(rows, weight, scale.double(), bias)
    else:
        y = functional.mixed_unpacked_linear(rows, weight, scale.double(), choice, bias)
    return y.view(*x.shape[:-1], weight.out_features).to(x.dtype)


def _check_choice(choice: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, samples: Optional[int]) -> None:
    """Whether it has an index of a scale for each sample (for each row, by default)."""
    wanted = math.prod(x.shape[:-1]) if samples is None else samples
    if choice.dtype != torch.int64 or choice.shape != (wanted,) or choice.device != x.device:
        raise ValueError(
            f"choice is {_told(choice)}; expected int64 [{wanted}] on {x.device}: which of the {scale.shape[0]} scales each "
            "sample takes."
        )
    # what isn't there yet (compilers' stand-ins) or would have to be waited for is left to the operators that index with it
    if choice.is_cpu and type(choice) is torch.Tensor and not torch.compiler.is_compiling():
        if not torch._C._len_torch_dispatch_stack():
            check_range(choice.tolist(), scale.shape[0])


def check_range(indices: list[int], count: int) -> None:
    """Refuse indices that none of `count` scales has; a negative one would be taken from the end.

    Raises:
        ValueError: If there is one; names it.
    """
    if indices and not (0 <= min(indices) and max(indices) < count):
        wrong = next(index for index in indices if not 0 <= index < count)
        raise ValueError(f"choice has {wrong}, but there are {count} scales, numbered from 0.")


def _misfit(
    x: torch.Tensor,
    planes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    out_features: int,
    in_features: int,
    layout: torch.Size,
) -> Exception:
    """The error for what `check` found not to fit; names the first that doesn't."""
    if not x.is_floating_point():
        return TypeError(f"the input has dtype {x.dtype}; a packed linear layer takes float inputs (x.float()).")
    if x.dim() == 0 or x.shape[-1] != in_features:
        return ValueError(
            f"the input has shape {tuple(x.shape)}, but this layer takes in_features={in_features} as the last dimension."
        )
    given = {"planes": planes, "scale": scale, "zero_point": zero_point, "bias": bias}
    for name, tensor in given.items():
        if tensor is not None and tensor.device != x.device:
            return ValueError(
                f"{name} is on {tensor.device} and the input on {x.device}; move the layer or the input."
            )
    bits = planes.shape[2] if planes.dim() == 4 else 0
    if (
        planes.dtype != torch.uint8
        or bits not in SUPPORTED_BITS
        or planes.shape != planes_shape(out_features, in_features, bits)
    ):
        return ValueError(
            f"planes are {_told(planes)}; a weight of {out_features} x {in_features} takes uint8 [ceil(out / {TILE_ROWS}), "
            f"ceil(in / 8), bits, {TILE_ROWS}] with bits from {SUPPORTED_BITS[0]} to {SUPPORTED_BITS[-1]}."
        )
    if bias is not None and (not bias.is_floating_point() or bias.shape != (out_features,)):
        return ValueError(f"bias is {_told(bias)}; expected float [{out_features}].")
    if zero_point is not None and len(layout) == 2 and layout[0] == out_features and layout[1] > 0:
        kind = zero_point.dtype == torch.uint8 or zero_point.is_floating_point()
        if not kind or zero_point.shape != layout:
            return ValueError(
                f"zero_point is {_told(zero_point)}; expected uint8 or float [{layout[0]}, {layout[1]}] like scale."
            )
    wanted = f"{out_features}, groups" + ("" if zero_point is not None else f", {bits}")
    if len(layout) < scale.dim():
        wanted = f"n, {wanted}"
    return ValueError(
        f"scale is {_told(scale)}; expected float [{wanted}] with in_features={in_features} a multiple of groups."
    )


def _told(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


@functools.cache
def _module() -> Optional[ModuleType]:
    try:
        from peft_ext.quant import _kernel  # type: ignore[attr-defined]
    except ImportError as error:
        warnings.warn(
            f"peft-ext's CPU kernel is not there ({error}), so packed layers run on torch's own operations: correct, but "
            "generation is several times slower. With a C++ compiler on the machine, reinstall: pip install --force-reinstall "
            "--no-deps peft-ext.",
            stacklevel=2,
        )
        return None
    if _kernel.VERSION != VERSION:
        warnings.warn(
            f"peft-ext's CPU kernel was built for version {_kernel.VERSION} of its interface and this is version {VERSION}, so "
            "packed layers run on torch's own operations, several times slower. Reinstall: pip install --force-reinstall "
            "--no-deps peft-ext.",
            stacklevel=2,
        )
        return None
    return _kernel


@functools.cache
def _mode() -> str:
    return _choice(KERNEL_VARIABLE, KERNELS, "auto")


@functools.cache
def _level() -> int:
    module, best = _module(), CAPABILITIES[-1]
    most = CAPABILITIES.index(_choice(CAPABILITY_VARIABLE, CAPABILITIES, best))
    return min(most, module.BEST_LEVEL if module is not None else 0)


def _forget() -> None:
    _mode.cache_clear()
    _level.cache_clear()


def _choice(variable: str, values: tuple[str, ...], default: str) -> str:
    value = os.environ.get(variable) or default
    if value not in values:
        raise ValueError(f"{variable}={value!r} is unknown; choose one of {values}, or unset it.")
    return value


def _operator(
    x: torch.Tensor,
    planes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    choice: Optional[torch.Tensor],
    out_features: int,
    exact: bool,
) -> torch.Tensor:
    """What `torch.ops.peft_ext.packed_linear` runs. It can be called with anything.

    Raises:
        TypeError, ValueError: If the tensors don't fit each other, or the kernel doesn't take them.
    """
    size = _check_operator(x, planes, scale, zero_point, bias, choice, out_features)
    if not x.shape[-1]:  # no inputs, which the kernel doesn't know
        return _in_double(x, planes, scale, zero_point, bias, choice, size)
    return _run(x, planes, scale, zero_point, bias, choice, size, exact, capability())


def _check_operator(
    x: torch.Tensor,
    planes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    choice: Optional[torch.Tensor],
    out_features: int,
) -> tuple[int, int, int, int]:
    in_features = x.shape[-1] if x.dim() else 0
    bits, groups = check(x, planes, scale, zero_point, bias, out_features, in_features, choice)
    whole_bytes = groups == 1 or in_features % (groups * _INPUTS_OF_BYTE) == 0
    if x.dtype not in _DTYPES or scale.dtype not in _DTYPES or not whole_bytes:
        raise ValueError(
            f"peft_ext::packed_linear takes float32, bfloat16 and float16, and groups of whole bytes (of {_INPUTS_OF_BYTE} "
            f"inputs), got x {_told(x)} and scale {_told(scale)}; call peft_ext.quant.functional.packed_linear, which takes "
            "any group size and dtype."
        )
    return out_features, in_features, bits, groups


def _fake(x, planes, scale, zero_point, bias, choice, out_features, exact):
    _check_operator(x, planes, scale, zero_point, bias, choice, out_features)
    return x.new_empty((*x.shape[:-1], out_features))


# torch keeps an operator for good, so a module that is imported again finds it there
if not hasattr(torch.ops.peft_ext, "packed_linear"):
    torch.library.define(
        "peft_ext::packed_linear",
        "(Tensor x, Tensor planes, Tensor scale, Tensor? zero_point, Tensor? bias, Tensor? choice, "
        "int out_features, bool exact) -> Tensor",
    )
    torch.library.impl("peft_ext::packed_linear", "CPU", _operator)
    torch.library.register_fake("peft_ext::packed_linear", _fake)
