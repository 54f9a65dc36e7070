"""Naive PyTorch twin of every kernel in this folder. Each kernel must agree with its twin; nothing here is fast.

Shapes as in `compress.quant`: x [M, K], codes [N, K], scale and zero [N', G], y [M, N].
"""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize_weight(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """W[n, k] = (codes[n, k] - zero[n, g]) * scale[n, g], computed in `dtype`.

    Args:
        codes: uint8 [N, K].
        scale: float [N', G], N' = N or 1, G a divisor of K.
        zero: uint8 [N', G].

    Returns:
        [N, K] in `dtype`.
    """
    n, k = codes.shape
    groups = codes.to(dtype).view(n, scale.shape[1], -1)
    w = (groups - zero.to(dtype).unsqueeze(-1)) * scale.to(dtype).unsqueeze(-1)
    return w.view(n, k)


def w4a16_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Twin of `compress.kernels.w4a16` (and of every other path of QuantLinear): y = x W^T + bias in `dtype`.

    Args:
        x: [M, K], any float dtype.
        codes, scale, zero: see `dequantize_weight`.
        bias: [N] or None.

    Returns:
        [M, N] in `dtype`; float64 by default, so that a kernel's own rounding is all that a comparison shows.
    """
    y = x.to(dtype) @ dequantize_weight(codes, scale, zero, dtype).t()
    return y if bias is None else y + bias.to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN or Inf anywhere gives inf, so a bound rejects it."""
    a, e = actual.double(), expected.double()
    if a.shape != e.shape or not torch.isfinite(a).all():
        return float("inf")
    norm = float(e.norm())
    gap = float((a - e).norm())
    return gap if norm == 0.0 else gap / norm
