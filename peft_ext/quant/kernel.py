# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The CPU kernel for few rows: loads it, says what it takes, and makes it an operator that torch's compiler keeps.

`PEFT_EXT_KERNEL` chooses how packed layers multiply: `auto` (the default: the kernel where it is faster, activations rounded
to 8 bits), `exact` (the kernel, activations in 24 bits) or `torch` (torch's own operations alone).
`PEFT_EXT_CPU_CAPABILITY` (`portable`, `avx2`, `avx512`) holds the kernel back, as `ATEN_CPU_CAPABILITY` does torch.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Optional

import torch

from peft_ext.quant.packing import SUPPORTED_BITS, planes_shape


KERNEL_VARIABLE = "PEFT_EXT_KERNEL"
KERNELS = ("auto", "exact", "torch")
CAPABILITY_VARIABLE = "PEFT_EXT_CPU_CAPABILITY"
CAPABILITIES = ("portable", "avx2", "avx512")

# What the module was built from must be what this file calls: PEFT_EXT_KERNEL_VERSION in csrc/packed_linear.h.
VERSION = 1
# Up to so many rows the kernel takes over from unpacking and a dense product, by capability. Only roughly known: for 400 tokens
# of SmolLM2 it took 2.2 s (AVX-512), 4.6 s (AVX2) and 24 s (portable) against torch's 3.1 to 3.7 s, on one thread.
MAX_ROWS = (8, 64, 1024)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INPUTS_OF_BYTE = 8


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


def packed_linear(
    x: torch.Tensor,
    planes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    out_features: int,
    choice: Optional[torch.Tensor] = None,
) -> Optional[torch.Tensor]:
    """`[..., in] -> [..., out]` by the kernel; None where it doesn't serve.

    It serves few rows on a CPU without gradients, in float32, bfloat16 or float16, where groups are whole bytes of the planes.

    Args:
        x: float `[..., in]`.
        planes: uint8 `[tiles, input bytes, bits, 32]`.
        scale: `[out, groups]`, of a binary coding `[out, groups, bits]`; with `choice` another dimension in front.
        zero_point: uint8 `[out, groups]`; None for a binary coding.
        bias: `[out]` or None.
        out_features: Rows of the weight.
        choice: int64, for each row of `x` (its leading dimensions flattened) which scale it takes.
    """
    # called for every layer and token: tensors' cheapest properties only, see benchmarks/kernels.py
    if torch.is_grad_enabled() or not (x.is_cpu and planes.is_cpu):
        return None
    shape = x.shape
    in_features, groups = shape[-1], scale.shape[-1 if zero_point is not None else -2]
    if x.dtype not in _DTYPES or scale.dtype not in _DTYPES:
        return None
    if groups > 1 and in_features % (groups * _INPUTS_OF_BYTE):
        return None
    mode, level = kernel(), capability()
    if mode == "torch" or not available() or x.numel() > in_features * MAX_ROWS[level]:
        return None
    exact = mode == "exact"
    if torch.compiler.is_compiling() or not _is_plain(x) or torch._C._len_torch_dispatch_stack():
        return torch.ops.peft_ext.packed_linear(x, planes, scale, zero_point, bias, choice, out_features, exact)
    return _run(x, planes, scale, zero_point, bias, choice, out_features, exact, level)


def _run(
    x: torch.Tensor,
    planes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    choice: Optional[torch.Tensor],
    out_features: int,
    exact: bool,
    level: int,
) -> torch.Tensor:
    module = _module()
    if module is None:  # an exported program on a machine without it
        raise RuntimeError(
            "this program was exported with peft-ext's CPU kernel, which is not built here; reinstall peft-ext."
        )
    *ahead, in_features = x.shape
    y = x.new_empty((*ahead, out_features))
    if not (x.is_contiguous() or (len(ahead) == 1 and x.stride(1) == 1)):
        x = x.contiguous()
    # each a check where it is one already; zero points read from checkpoints often aren't
    planes, scale = planes.contiguous(), scale.contiguous()
    if zero_point is not None:
        zero_point = zero_point.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype in _DTYPES else bias.float()).contiguous()
    if choice is not None:
        choice = choice.contiguous()
    module.packed_linear(
        x.data_ptr(),
        y.data_ptr(),
        _DTYPES[x.dtype],
        x.numel() // in_features if in_features else 0,
        x.stride(0) if len(ahead) == 1 else in_features,
        planes.data_ptr(),
        planes.shape[2],
        zero_point is None,
        out_features,
        in_features,
        scale.data_ptr(),
        _DTYPES[scale.dtype],
        scale.shape[-1 if zero_point is not None else -2],
        0 if choice is None else choice.data_ptr(),
        0 if zero_point is None else zero_point.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else _DTYPES[bias.dtype],
        exact,
        torch.get_num_threads(),
        level,
        VERSION,
    )
    return y


def _is_plain(x: torch.Tensor) -> bool:
    return type(x) is torch.Tensor or type(x) is torch.nn.Parameter


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
    """What `torch.ops.peft_ext.packed_linear` runs. It can be called with anything, and the kernel trusts sizes.

    Raises:
        ValueError: If the tensors don't fit each other.
    """
    in_features = x.shape[-1]
    ahead = [] if choice is None else [scale.shape[0]]
    groups = scale.shape[len(ahead) + 1] if scale.dim() > len(ahead) + 1 else 0
    bits = planes.shape[2] if planes.dim() == 4 else 0
    layout = [*ahead, out_features, groups] + ([bits] if zero_point is None else [])
    rows = x.numel() // in_features if in_features else 0
    fits = (
        planes.dtype == torch.uint8
        and planes.shape == planes_shape(out_features, in_features, bits)
        and bits in SUPPORTED_BITS
        and list(scale.shape) == layout
        and (groups == 1 or (groups > 1 and in_features % (groups * _INPUTS_OF_BYTE) == 0))
        and (
            zero_point is None
            or (zero_point.dtype == torch.uint8 and list(zero_point.shape) == [out_features, groups])
        )
        and (bias is None or list(bias.shape) == [out_features])
        and (
            choice is None
            or (choice.dtype == torch.int64 and list(choice.shape) == [rows] and _in_range(choice, ahead[0]))
        )
        and x.dtype in _DTYPES
        and scale.dtype in _DTYPES
    )
    if not fits:
        shapes = {
            name: None if tensor is None else (tuple(tensor.shape), tensor.dtype)
            for name, tensor in (
                ("x", x), ("planes", planes), ("scale", scale), ("zero_point", zero_point), ("bias", bias), ("choice", choice)
            )
        }  # fmt: skip
        raise ValueError(
            f"peft_ext::packed_linear can't multiply {shapes} to out_features={out_features}; see peft_ext/quant/kernel.py for "
            "the layouts, or call peft_ext.quant.functional.packed_linear, which takes any group size and dtype."
        )
    return _run(x, planes, scale, zero_point, bias, choice, out_features, exact, capability())


def _in_range(choice: torch.Tensor, count: int) -> bool:
    return not choice.numel() or (int(choice.min()) >= 0 and int(choice.max()) < count)


def _fake(x, planes, scale, zero_point, bias, choice, out_features, exact):
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
