# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Binary coding (BCQ): `W = sum_p alpha_p * B_p` with signs `B_p`, per output channel or per group of inputs.

Sources: AlphaTuning (Kwon et al., 2022, arXiv 2210.03858), section 3.1; alternating refinement as in Xu et al. (2018,
arXiv 1802.00150). Bit `p` of a code is set where `B_p` is +1, so codes pack into the same bit-planes as uniform ones.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from peft_ext.quant.uniform import check_format, check_weight, grouped_rows


BINARY_BITS = (1, 2, 3, 4, 8)
BINARY_METHODS = ("greedy", "alternating")
# Rounds of alternating refinement, as in LUT-GEMM's code.
ROUNDS = 15


class BinaryQuantized(NamedTuple):
    """A weight in binary coding: `codes` uint8 `[out, in]`, `alpha` float `[out, groups, bits]`.

    Greedy and alternating codes have alphas that are not negative and fall with `p`: alpha_1 is the largest.
    """

    codes: torch.Tensor
    alpha: torch.Tensor


def quantize_binary(
    weight: torch.Tensor,
    bits: int,
    group_size: int = -1,
    method: str = "alternating",
    rounds: int = ROUNDS,
    input_weight: Optional[torch.Tensor] = None,
) -> BinaryQuantized:
    """Binary codes of a weight.

    Args:
        weight: float `[out, in]`.
        bits: Number of sign planes: 1 to 4, or 8.
        group_size: Inputs that share their alphas; -1 for all inputs of an output channel.
        method: `"greedy"` (each plane takes the sign of what is left, and its mean size) or `"alternating"` (greedy,
            then in turn the best alphas for the codes and the best codes for the alphas).
        rounds: Rounds of refinement at most; the error never rises.
        input_weight: `[in]`, the second moment of each input; the error of input `j` counts `input_weight[j]` times.

    Returns:
        [`BinaryQuantized`]; the same weight and arguments give the same codes.

    Raises:
        ValueError: If the format or method is unknown, or the weight has NaN or infinity.
    """
    check_format(bits, group_size, weight.shape[1], BINARY_BITS)
    if method not in BINARY_METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {BINARY_METHODS}.")
    weight = check_weight(weight)
    size = weight.shape[1] if group_size == -1 else group_size
    counts = torch.ones(1, 1, size) if input_weight is None else input_weight.view(1, -1, size)
    counts = counts.to(weight)
    rounds = rounds if method == "alternating" else 0
    parts = [_code_rows(rows, counts, bits, rounds) for rows in grouped_rows(weight, size)]
    codes, alpha = map(torch.cat, zip(*parts))
    return BinaryQuantized(codes.view(weight.shape), alpha)


def dequantize_binary(codes: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """`sum_p alpha_p * B_p`.

    Args:
        codes: uint8 `[out, in]`.
        alpha: float `[out, groups, bits]`.

    Returns:
        `[out, in]` in the dtype of `alpha`.
    """
    groups = codes.view(codes.shape[0], alpha.shape[1], -1)
    return levels_of(alpha).gather(-1, groups.long()).view(codes.shape)


def levels_of(alpha: torch.Tensor) -> torch.Tensor:
    """The values that the codes `0 .. 2**bits - 1` stand for. `[..., bits]` -> `[..., 2**bits]`."""
    return alpha @ _signs(alpha.shape[-1], alpha).t()


def nearest_codes(groups: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """uint8 code of the nearest level. groups `[rows, groups, size]`, alpha `[rows, groups, bits]`."""
    _, middles, codes = sorted_levels(alpha)
    return codes.gather(-1, torch.searchsorted(middles, groups))


def sorted_levels(alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The values of all codes in rising order, what lies in the middle between two of them, and the uint8 codes."""
    levels, order = levels_of(alpha).sort(dim=-1, stable=True)
    return levels, ((levels[..., 1:] + levels[..., :-1]) / 2).contiguous(), order.to(torch.uint8)


def solve_alphas(gram: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Least squares: gram `[..., bits, bits]` of the planes, target `[..., bits]` -> `[..., bits]`, in float64."""
    # planes may coincide; a trace of ridge picks one of the solutions
    trace = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    gram = gram + 1e-7 * trace[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, target[..., None])[..., 0]


def _code_rows(
    groups: torch.Tensor, counts: torch.Tensor, bits: int, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and alphas of some rows. groups: `[rows, groups, size]`; counts: `[1, 1 or groups, size]`."""
    codes, alpha = _greedy(groups, counts, bits)
    error = _error(groups, counts, codes, alpha)
    for _ in range(rounds):
        new_alpha = _refit(groups, counts, codes, bits)
        new_codes = nearest_codes(groups, new_alpha)
        new_error = _error(groups, counts, new_codes, new_alpha)
        better = new_error < error
        if not better.any():
            break
        error = torch.where(better, new_error, error)
        alpha = torch.where(better[..., None], new_alpha, alpha)
        codes = torch.where(better[..., None], new_codes, codes)
    return codes, alpha


def _greedy(groups: torch.Tensor, counts: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each plane takes the sign of what is left, and its (weighted) mean size."""
    left, share = groups.clone(), counts / counts.sum(-1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)
    codes, alphas = torch.zeros_like(groups, dtype=torch.uint8), []
    for plane in range(bits):
        positive = left >= 0
        codes |= positive.to(torch.uint8) << plane
        alphas.append((left.abs() * share).sum(-1))
        left -= torch.where(positive, alphas[-1][..., None], -alphas[-1][..., None])
    return codes, torch.stack(alphas, -1)


def _refit(groups: torch.Tensor, counts: torch.Tensor, codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The alphas of least (weighted) squared error for given codes, not negative and falling.

    A plane whose alpha would be negative is the same plane with its signs turned; nearest codes see to that.
    """
    planes = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    # [rows, groups, bits, size]
    signs = ((codes[..., None, :] >> planes[:, None]) & 1).to(groups.dtype).mul_(2).sub_(1)
    weighted = signs * counts[..., None, :]
    gram = (weighted @ signs.transpose(-1, -2)).double()
    alpha = solve_alphas(gram, (weighted @ groups[..., None])[..., 0].double()).abs()
    return alpha.sort(dim=-1, descending=True).values.to(groups.dtype)


def _error(groups: torch.Tensor, counts: torch.Tensor, codes: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """(Weighted) squared error of each group, summed in float64."""
    value = levels_of(alpha).gather(-1, codes.long())
    return (value.sub_(groups).square_() * counts).sum(-1, dtype=torch.float64)


def _signs(bits: int, like: torch.Tensor) -> torch.Tensor:
    """Signs of the planes `[2**bits, bits]` under every code."""
    codes = torch.arange(2**bits, device=like.device)
    return ((codes[:, None] >> torch.arange(bits, device=like.device)) & 1).to(like.dtype) * 2 - 1
