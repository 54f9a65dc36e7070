"""Dense weight from the W4A16 kernel layout, for matmuls with many tokens: dequantize once, then cuBLAS.

W[n, k] = (code - zero) * scale, computed in float32 and rounded once to the output dtype. One program writes a tile of
[BLOCK_N, 128]: it reads int16 words [BLOCK_N, 32] and stores four contiguous slices of 32 columns (layout: `w4a16`).
Twin: `compress.kernels.reference.dequantize_weight`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.errors import ConfigError
from compress.kernels import common
from compress.kernels.w4a16 import KernelWeight

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    words_ptr, scale_ptr, zero_ptr, out_ptr, N, K, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr
):
    t = tl.program_id(0)
    rn = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rj = tl.arange(0, 32)
    n_mask = rn < N
    words = tl.load(words_ptr + (t.to(tl.int64) * N + rn)[:, None] * 32 + rj[None, :], mask=n_mask[:, None], other=0)
    out = out_ptr + rn.to(tl.int64)[:, None] * K
    for p in tl.static_range(4):
        k = t * 128 + p * 32
        g = min(k, K - 1) // GROUP
        column = g.to(tl.int64) * N + rn
        scale = tl.load(scale_ptr + column, mask=n_mask, other=0).to(tl.float32)
        codes = ((words >> (4 * p)) & 15).to(tl.float32)
        if HAS_ZERO:
            codes -= tl.load(zero_ptr + column, mask=n_mask, other=0).to(tl.float32)[:, None]
        else:
            codes -= 8.0
        w = codes * scale[:, None]
        rk = k + rj
        tl.store(out + rk[None, :], w.to(out_ptr.dtype.element_ty), mask=n_mask[:, None] & (rk < K)[None, :])


def launch(weight: KernelWeight, dtype: torch.dtype) -> Tensor:
    """KernelWeight -> dense [N, K] in float32, float16 or bfloat16, on the weight's device.

    Raises:
        ConfigError: another dtype.
        EnvironmentProblem: the device cannot run Triton kernels.
    """
    common.check_device("dequantization", weight.words.device)
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype} is not supported; use float32, float16 or bfloat16")
    out = torch.empty(weight.n, weight.k, dtype=dtype, device=weight.words.device)
    if out.numel() == 0:
        return out
    block_n = 64
    grid = (weight.words.shape[0], -(-weight.n // block_n))
    _dequantize_kernel[grid](
        weight.words, weight.scale, weight.zero, out, weight.n, weight.k,
        GROUP=weight.group_size, HAS_ZERO=weight.zero is not None, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return out


torch.library.define(
    "compress::w4_dequantize",
    "(Tensor words, Tensor scale, Tensor? zero, int k, int group_size, ScalarType dtype) -> Tensor",
)


@torch.library.impl("compress::w4_dequantize", ["CUDA", "CPU"])
@common.on_operand_device
def _dequantize_impl(
    words: Tensor, scale: Tensor, zero: Tensor | None, k: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    return launch(KernelWeight(words, scale, zero, words.shape[1], k, group_size), dtype)


@torch.library.register_fake("compress::w4_dequantize")
def _dequantize_fake(
    words: Tensor, scale: Tensor, zero: Tensor | None, k: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    return scale.new_empty(words.shape[1], k, dtype=dtype)


def dense(weight: KernelWeight, dtype: torch.dtype) -> Tensor:
    """`launch` as the PyTorch operator `compress::w4_dequantize`."""
    return torch.ops.compress.w4_dequantize(weight.words, weight.scale, weight.zero, weight.k, weight.group_size, dtype)
