"""Refinement of codes that are there already: better scales for the codes, better codes for the scales, in turns.

Paper: QuantEase, arXiv 2309.01885 (cyclic coordinate descent over the codes). For every row w of a weight, with D the
difference from it, both halves lower the same output error

    f(codes, scale) = d H d^T,    d = (codes - zero) * scale - w

  scales  for given codes f is a quadratic of the row's G scales: the G x G normal equations are solved, and the
          result kept where it is still better once rounded to the dtype that stores it;
  codes   column after column, every row moves its code to the minimiser of f in that code alone,
          code - (d H)_k / (H_kk scale), rounded: exact, so f never rises.

Differs from the paper: it starts from GPTQ's codes instead of the real weights and moves the scales too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quant import Granularity, QuantizedWeight


def refine(weight: Tensor, hessian: Tensor, start: QuantizedWeight, rounds: int, block_size: int) -> QuantizedWeight:
    """Lower trace(D H D^T) from `start`, `rounds` times scales and then codes.

    Args:
        weight: float32 [N, K]; hessian: float32 [K, K], positive diagonal.
        start: codes, scale and zero of weight; zero points stay.
    """
    n, k = weight.shape
    size = k // start.scale.shape[1]
    zero = start.zero.float().expand(n, -1)
    scale = start.scale
    levels = start.codes.float() - zero.repeat_interleave(size, 1)
    for _ in range(rounds):
        scale = _refit_scales(weight, hessian, levels, scale, start.scheme.granularity is Granularity.TENSOR)
        levels = _sweep(weight, hessian, levels, scale, zero, start.scheme.max_code, block_size)
    codes = (levels + zero.repeat_interleave(size, 1)).to(torch.uint8)
    return QuantizedWeight(codes, scale, start.zero, start.scheme)


def _refit_scales(weight: Tensor, hessian: Tensor, levels: Tensor, scale: Tensor, shared: bool) -> Tensor:
    """Scales [N', G] in their own dtype that minimise the error of levels = codes - zero [N, K]; rows (all together
    when one scale is `shared` by them) that would not gain keep theirs."""
    n, k = weight.shape
    g = scale.shape[1]
    size = k // g

    def by_group(values: Tensor) -> Tensor:
        return (values * levels).view(n, g, size).sum(-1, dtype=torch.float64)

    right = by_group(weight @ hessian)
    left = torch.stack(
        [by_group(levels[:, i : i + size] @ hessian[i : i + size]) for i in range(0, k, size)], 1
    )  # [N, G, G]
    if shared:
        right, left = right.sum(0, keepdim=True), left.sum(0, keepdim=True)
    # groups whose codes are all zero have nothing to say about their scale
    diagonal = left.diagonal(dim1=1, dim2=2)
    diagonal += 1e-9 * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float64).tiny
    solved, info = torch.linalg.solve_ex(left, right.unsqueeze(-1))
    found = solved.squeeze(-1).to(scale.dtype)
    usable = (found > 0) & torch.isfinite(found) & (info == 0).unsqueeze(-1)
    found = torch.where(usable, found, scale)
    before, after = _row_errors(weight, hessian, levels, scale), _row_errors(weight, hessian, levels, found)
    if shared:
        before, after = before.sum(0, keepdim=True), after.sum(0, keepdim=True)
    return torch.where((after < before).unsqueeze(-1), found, scale)


def _row_errors(weight: Tensor, hessian: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    delta = levels * scale.float().repeat_interleave(weight.shape[1] // scale.shape[1], 1) - weight
    return ((delta @ hessian) * delta).sum(1, dtype=torch.float64)


def _sweep(
    weight: Tensor, hessian: Tensor, levels: Tensor, scale: Tensor, zero: Tensor, max_code: int, block_size: int
) -> Tensor:
    """One pass of coordinate descent over the columns: levels [N, K] -> levels [N, K].

    On the transpose, where a column is a contiguous row; the gradient of later batches of columns is brought up to
    date once a batch, as in GPTQ.
    """
    n, k = weight.shape
    size = k // scale.shape[1]
    scale_t = scale.float().expand(n, -1).t().contiguous()  # [G, N]
    lowest = -zero.t().contiguous()
    highest = max_code + lowest
    Lt = levels.t().contiguous()
    diagonal = hessian.diagonal().tolist()
    gradient = hessian @ (Lt * scale_t.repeat_interleave(size, 0) - weight.t())  # [K, N]
    for i1 in range(0, k, block_size):
        i2 = min(i1 + block_size, k)
        here, H1 = gradient[i1:i2], hessian[i1:i2, i1:i2]
        moved = torch.empty_like(here)
        for i in range(i2 - i1):
            g = (i1 + i) // size
            old = Lt[i1 + i].clone()
            wanted = old - here[i] / (scale_t[g] * diagonal[i1 + i])
            torch.clamp(wanted.round_(), lowest[g], highest[g], out=Lt[i1 + i])
            torch.mul(Lt[i1 + i] - old, scale_t[g], out=moved[i])
            if i + 1 < i2 - i1:
                here[i + 1 :].addr_(H1[i, i + 1 :], moved[i])
        if i2 < k:
            gradient[i2:].addmm_(hessian[i2:, i1:i2], moved)
    return Lt.t().contiguous()
