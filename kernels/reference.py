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


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [M, K] in 8 bits, symmetric: codes int8 [M, K], scale float32 [M]; the arithmetic is float32.

    A row that holds NaN or Inf gets codes 0 and scale NaN.
    """
    rows = x.float()
    largest = rows.abs().amax(-1, keepdim=True)
    # by a tensor: on a GPU, division by a number is multiplication with its reciprocal
    scale = (largest / torch.full_like(largest, 127)).clamp_min(torch.finfo(torch.float32).tiny)
    scale = scale.where(rows.isfinite().all(-1, keepdim=True), torch.tensor(float("nan"), device=x.device))
    return torch.round(rows / scale).nan_to_num(0.0).to(torch.int8), scale.squeeze(-1)


def w8a8_sums(x_codes: Tensor, codes: Tensor, zero: Tensor) -> Tensor:
    """The integer sums of `w8a8_linear`: int64 [G, M, N] of x_codes * (codes - zero) over each group.

    Args:
        x_codes: int8 [M, K], of `quantize_rows`.
        codes, zero: see `dequantize_weight`.
    """
    m, n, groups = x_codes.shape[0], codes.shape[0], zero.shape[1]
    left = x_codes.double().view(m, groups, -1).transpose(0, 1)
    centred = codes.double().view(n, groups, -1) - zero.double().unsqueeze(-1)
    return (left @ centred.permute(1, 2, 0)).long()  # float64 holds these integers exactly


def w8a8_linear(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None = None) -> Tensor:
    """Twin of `compress.kernels.w8a8`: float64 [M, N] from x rounded to 8 bits a row; arguments as `w4a16_linear`."""
    x_codes, x_scale = quantize_rows(x)
    sums = w8a8_sums(x_codes, codes, zero.expand(codes.shape[0], -1)).double()
    w_scale = scale.double().expand(codes.shape[0], -1).t().unsqueeze(1)  # [G, 1, N]
    y = (sums * w_scale).sum(0) * x_scale.double().unsqueeze(-1)
    return y if bias is None else y + bias.double()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN or Inf anywhere gives inf, so a bound rejects it."""
    a, e = actual.double(), expected.double()
    if a.shape != e.shape or not torch.isfinite(a).all():
        return float("inf")
    norm = float(e.norm())
    gap = float((a - e).norm())
    return gap if norm == 0.0 else gap / norm
