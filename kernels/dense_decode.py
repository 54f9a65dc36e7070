"""A dense 16-bit matrix times one row, in Triton: the head of a decode step, a fifth of what an INT4 8B model reads.

    x [1, K] as h * norm          W [N, K]          y [1, N] = x W^T / rms(h)

A program takes BLOCK_N rows of W, BLOCK_K inputs at a time; products and sums are float32. RMSNorm needs no launch of
its own: the product before this one left sums of squares of h (`decode_reference.Around`), and dividing y by the root
of their mean is all that is left of it. Nor does counting up the position, once nobody before reads it. More rows are
cuBLAS's. `pdl`: see `compress.kernels.pdl`.

Twin: `decode_reference.dense_behind_norm`. Runs under TRITON_INTERPRET=1 on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compress.errors import ConfigError
from compress.kernels import pdl as pdl_launch
from compress.kernels.decode_ops import check_operands


@dataclass(frozen=True)
class DenseConfig:
    """Tile of one launch; as it stands measured on an H100 at 128256 x 4096 (NOTES.md)."""

    block_n: int = 8
    block_k: int = 1024
    warps: int = 8


@triton.jit(do_not_specialize=["n_squares"])
def _dense_kernel(
    x_ptr, w_ptr, squares_ptr, out_ptr, position_ptr, n_squares, eps, N, K,
    SQUARES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of y; see the module docstring. position_ptr: None where there is none."""
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)
    rows = w_ptr + tl.minimum(rn, N - 1).to(tl.int64)[:, None] * K  # beyond N the last row again: it is not stored
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if position_ptr is not None:
        first = tl.program_id(0) == 0
        tl.store(position_ptr, tl.load(position_ptr, mask=first, other=0) + 1, mask=first)
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        mask = start + rk < K
        w = tl.load(rows + (start + rk)[None, :], mask=mask[None, :], other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + start + rk, mask=mask, other=0.0).to(tl.float32)
        sums += w.to(tl.float32) * x[None, :]
    rs = tl.arange(0, SQUARES)
    mean = tl.sum(tl.load(squares_ptr + rs, mask=rs < n_squares, other=0.0), axis=0) / K
    y = tl.sum(sums, axis=1) * tl.rsqrt(mean + eps)
    tl.store(out_ptr + rn, y.to(out_ptr.dtype.element_ty), mask=rn < N)


def dense_behind_norm(
    x: Tensor, weight: Tensor, squares: Tensor, eps: float, position: Tensor | None = None, pdl: bool = False,
    config: DenseConfig = DenseConfig(),
) -> Tensor:  # fmt: skip
    """y [1, N] = x W^T / sqrt(sum(squares) / K + eps) in x's dtype. Arguments and twin:
    `decode_reference.dense_behind_norm`.

    Raises:
        ConfigError: a dtype, shape, stride or device that does not fit, or more than one row.
        EnvironmentProblem: the device cannot run the kernel.
    """
    (m, k), n = x.shape, weight.shape[0]
    check_operands(x, {"weight": (weight, (n, k)), "squares": (squares, (squares.shape[0], m))})
    if m != 1:
        raise ConfigError(f"x has {m} rows; this kernel takes one, use F.linear")
    if weight.dtype is not x.dtype or squares.dtype is not torch.float32:
        raise ConfigError(f"weight is {weight.dtype} and squares {squares.dtype}, expected {x.dtype} and float32")
    if position is not None and (position.dtype, position.shape, position.device) != (torch.int32, (1,), x.device):
        raise ConfigError(
            f"position is {position.dtype} {tuple(position.shape)} on {position.device}, expected int32 (1,) on "
            f"{x.device}"
        )
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    _dense_kernel[(triton.cdiv(n, config.block_n),)](
        x, weight, squares, y, position, squares.shape[0], eps, n, k, SQUARES=triton.next_power_of_2(squares.shape[0]),
        BLOCK_N=config.block_n, BLOCK_K=min(config.block_k, triton.next_power_of_2(k)), num_warps=config.warps,
        **pdl_launch.options(pdl, x.device),
    )  # fmt: skip
    return y
