"""Weight-only matmul for 8, 4, 3 and 2 bits in Triton: y[M, N] = x[M, K] W[N, K]^T (+ bias), float16 or bfloat16 x.

W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g], packed as `wna16_layout` draws it. The structure is that of `w4a16`,
whose docstring has the picture and the reasons: W is the left operand and goes from packed words through registers into
the tensor cores; the p-th field of a tile's words meets a contiguous slice of x; codes stay exact small integers there,
and scales are applied to float32 sums. A run of SPAN slices that lie in one group is summed before its scale; with one
group a row the scale is applied once, after all of K.

            M (BLOCK_M)
          +-------------+         x^T  [S, BLOCK_M] per slice
      N   |  acc fp32   |   +=    W    [BLOCK_N, S] per slice, F slices a tile
          +-------------+

`matmul` for few rows of x; for many, `dense` writes W once and cuBLAS does the rest. On Hopper 8 bits are computed by
`w4a16_tiled`, which takes their layout. Twins:
`compress.kernels.reference.w4a16_linear` (for any bits) and `dequantize_weight`. Runs under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.errors import ConfigError
from compress.kernels import common, dispatch, wna16_layout
from compress.kernels.choose import hopper_kernels, hopper_takes
from compress.kernels.common import load_column, tile_of_program
from compress.kernels.wna16_layout import ROWS_BEHIND_SCALES, PackedWeight, decode_slice, slice_k

_DENSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Config:
    """Tile sizes and pipeline of one launch. use_asm: inline PTX dequantization instead of plain Triton."""

    block_m: int
    block_n: int
    split_k: int
    num_warps: int
    num_stages: int
    use_asm: bool = True


@triton.jit(do_not_specialize=["M", "tiles", "tiles_per_split"])
def _wna16_kernel(  # type: ignore[no-untyped-def]
    x_ptr, words_ptr, high_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K, tiles, tiles_per_split,
    out_split_stride, BITS: tl.constexpr, FIELDS: tl.constexpr, SLICE: tl.constexpr, ROW: tl.constexpr,
    GROUP: tl.constexpr, SPAN: tl.constexpr, GROUPED: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_N: tl.constexpr,
    STAGES: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_N, BLOCK_M] tile of y^T over one split of K. high_ptr: the words as int8; ROW: words a row and tile.

    SPAN: slices of one group that follow each other in a tile, dividing FIELDS. GROUPED: more than one group a row.
    """
    pid, split = tl.program_id(0), tl.program_id(1)
    pid_n, pid_m = tile_of_program(pid, M, N, BLOCK_M, BLOCK_N, GROUP_N)
    rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rj = tl.arange(0, SLICE)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    dot_dtype: tl.constexpr = tl.float32 if MODE == 2 else dtype
    x_tile = x_ptr + rm.to(tl.int64)[None, :] * K + rj[:, None]  # [S, BM], x^T
    w_step = (tl.zeros((), tl.int64) + N) * ROW
    w_tile = words_ptr + rn.to(tl.int64)[:, None] * ROW + rj[None, :]  # [BN, S]
    high_tile = high_ptr + rn.to(tl.int64)[:, None] * (2 * ROW) + 2 * SLICE + rj[None, :]  # [BN, S], 3 bits only
    m_mask, n_mask = rm[None, :] < M, rn[:, None] < N
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    zero = tl.full((BLOCK_N, 1), 1 << (BITS - 1), tl.float32)
    if HAS_ZERO and not GROUPED:
        zero = load_column(zero_ptr, rn, 0, N, EVEN_N)

    first = split * tiles_per_split
    for t in tl.range(first, min(first + tiles_per_split, tiles), num_stages=STAGES):
        if EVEN_N:
            words = tl.load(w_tile + w_step * t, eviction_policy="evict_first")
        else:
            words = tl.load(w_tile + w_step * t, mask=n_mask, other=0, eviction_policy="evict_first")
        high = words
        if BITS == 3:
            if EVEN_N:
                high = tl.load(high_tile + w_step * 2 * t, eviction_policy="evict_first")
            else:
                high = tl.load(high_tile + w_step * 2 * t, mask=n_mask, other=0, eviction_policy="evict_first")
        for p in tl.static_range(FIELDS):
            k = (t * FIELDS + p) * SLICE
            if EVEN_K:
                x = tl.load(x_tile + k, mask=m_mask, other=0.0, eviction_policy="evict_last")
            else:
                x = tl.load(x_tile + k, mask=m_mask & (k + rj[:, None] < K), other=0.0, eviction_policy="evict_last")
            if p % SPAN == 0:
                part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                if GROUPED:
                    g = min(k, K - 1) // GROUP  # slices beyond K hold x = 0; any scale in range will do
                    scale = load_column(scale_ptr, rn, g, N, EVEN_N)
                    if HAS_ZERO:
                        zero = load_column(zero_ptr, rn, g, N, EVEN_N)
            w = decode_slice(words, high, zero, p, BITS, dtype, MODE)
            # not into `acc`, one group a row or not: an accumulator carried around the loop serializes 8-bit WGMMAs
            part = tl.dot(w, x.to(dot_dtype), part)
            if p % SPAN == SPAN - 1:
                acc += part * scale if GROUPED else part

    if not GROUPED:
        acc *= load_column(scale_ptr, rn, 0, N, EVEN_N)
    if HAS_BIAS:
        acc += load_column(bias_ptr, rn, 0, N, EVEN_N)
    out = out_ptr + split.to(tl.int64) * out_split_stride + rm.to(tl.int64)[None, :] * N + rn[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=m_mask & n_mask)


@triton.jit
def _dense_kernel(  # type: ignore[no-untyped-def]
    words_ptr, high_ptr, scale_ptr, zero_ptr, out_ptr, N, K, BITS: tl.constexpr, FIELDS: tl.constexpr,
    SLICE: tl.constexpr, ROW: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of K for BLOCK_N rows: (code - zero) * scale in float32, rounded once."""
    t = tl.program_id(0)
    rn = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rj = tl.arange(0, SLICE)
    n_mask = rn[:, None] < N
    row = (t.to(tl.int64) * N + rn)[:, None] * ROW
    words = tl.load(words_ptr + row + rj[None, :], mask=n_mask, other=0)
    high = words
    if BITS == 3:
        high = tl.load(high_ptr + 2 * (row + SLICE) + rj[None, :], mask=n_mask, other=0)
    zero = tl.full((BLOCK_N, 1), 1 << (BITS - 1), tl.float32)
    for p in tl.static_range(FIELDS):
        k = (t * FIELDS + p) * SLICE
        g = min(k, K - 1) // GROUP
        if HAS_ZERO:
            zero = load_column(zero_ptr, rn, g, N, False)
        w = decode_slice(words, high, zero, p, BITS, tl.float32, 2) * load_column(scale_ptr, rn, g, N, False)
        rk = k + rj
        out = out_ptr + rn.to(tl.int64)[:, None] * K + rk[None, :]
        tl.store(out, w.to(out_ptr.dtype.element_ty), mask=n_mask & (rk < K)[None, :])


def choose_config(weight: PackedWeight, m: int, sms: int, shared_bytes: int) -> Config:
    """Tiles, split and pipeline for y[m, N]; pure, so that it can be tested.

    The rules of `w4a16.choose_config`, not measured again for other widths. Stages are given up until the buffers fit
    the shared memory of a block, which is 99 KiB on some GPUs and 227 on others.
    """
    if m <= 16:
        block_m, block_n, warps, programs_per_sm, min_inputs = 16, 64, 4, 7, 512
    else:
        # 128 rows of x next to a 256-wide tile of K leave the accumulators too few registers
        block_m = 32 if m <= 32 else (128 if m > 256 and weight.tile <= 128 else 64)
        block_n, warps, programs_per_sm, min_inputs = 128, 8, 2, 1024
    stage_bytes = 2 * (weight.tile * block_m + weight.words.shape[2] * block_n)
    stages = max(1, min(3, shared_bytes // stage_bytes))
    programs = -(-weight.n // block_n) * -(-m // block_m)
    split = max(1, min(programs_per_sm * sms // max(programs, 1), weight.k // min_inputs, 16))
    return Config(block_m, block_n, 1 << (split.bit_length() - 1), warps, stages)


def configuration(x: Tensor, weight: PackedWeight) -> Any:
    """The measured choice for this GPU, scheme and shape, or the rule of the kernel that takes it where no table
    answers: a `TiledConfig` for 8 bits on Hopper."""
    m, n, k, choice = x.shape[0], weight.n, weight.k, None
    if x.is_cuda:
        symmetric = weight.zero is None
        choice = dispatch.choose(x.device, x.dtype, weight.bits, weight.group_size, symmetric, n, k, m)
    sms, shared = common.n_sms(x.device), common.shared_bytes(x.device)
    if hopper_kernels(x.device) and hopper_takes(n, k, weight.group_size, weight.bits) and common.aligned(x, weight):
        from compress.kernels import w4a16_tiled

        tiled = dispatch.as_config(choice, "w8a16_tiled", w4a16_tiled.TiledConfig)
        if tiled is not None and w4a16_tiled.suits(tiled, m):
            return tiled
        return w4a16_tiled.choose_config(m, n, k, sms, shared, weight.bits)
    return dispatch.as_config(choice, "wna16", Config) or choose_config(weight, m, sms, shared)


def _check_weight(kernel: str, weight: PackedWeight, device: torch.device) -> None:
    common.check_device(kernel, device)
    problem = wna16_layout.layout_problem(weight.words, weight.bits, weight.k)
    if problem:
        raise ConfigError(problem)


def launch(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, config: Any = None, pdl: bool = True) -> Tensor:
    """y [M, N] = x [M, K] W^T + bias in x's dtype; float32 accumulation. Twin: `reference.w4a16_linear`.

    Args:
        x: float16 or bfloat16 [M, K], contiguous, on the weight's device. M = 0 gives an empty result.
        bias: [N] or None.
        config: a Config or TiledConfig instead of the measured choice (`configuration`).
        pdl: programmatic dependent launch of the Hopper kernel (`pdl`); the portable kernel has none.

    Raises:
        ConfigError: a dtype, shape, stride or device that does not fit.
        EnvironmentProblem: the device cannot run the kernel.
    """
    bits, words, k, n = weight.bits, weight.words, weight.k, weight.n
    common.check_activations(f"W{bits}A16", x, k)
    _check_weight(f"W{bits}A16", weight, x.device)
    behind = ROWS_BEHIND_SCALES[bits]
    common.check_operands(x, words, weight.scale, weight.zero, bias, weight.group_size, behind)
    m = x.shape[0]
    if m == 0 or n == 0:
        return torch.empty(m, n, dtype=x.dtype, device=x.device)
    config = config or configuration(x, weight)
    if not isinstance(config, Config):
        from compress.kernels import w4a16_tiled

        return w4a16_tiled.launch(x, weight, bias, config, pdl)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    tiles, size = words.shape[0], slice_k(words, bits)
    per_split = -(-tiles // config.split_k)
    split = -(-tiles // per_split)
    out = y if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)
    mode = (2 if x.dtype is torch.bfloat16 else 0) if common.INTERPRETED else int(config.use_asm)
    grid = (-(-n // config.block_n) * -(-m // config.block_m), split)
    _wna16_kernel[grid](
        x, words, words.view(torch.int8), weight.scale, weight.zero, bias if split == 1 else None, out, m, n, k, tiles,
        per_split, m * n, BITS=bits, FIELDS=weight.tile // size, SLICE=size, ROW=words.shape[2],
        GROUP=weight.group_size, SPAN=math.gcd(weight.group_size, weight.tile) // size,
        GROUPED=weight.scale.shape[0] - behind > 1, HAS_ZERO=weight.zero is not None,
        HAS_BIAS=bias is not None and split == 1, EVEN_N=n % config.block_n == 0, EVEN_K=k % weight.tile == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, GROUP_N=8, STAGES=config.num_stages, MODE=mode,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if split > 1:
        common.sum_splits(out, bias, y)
    return y


def launch_dense(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """PackedWeight -> dense [N, K] in float32, float16 or bfloat16, on the weight's device.

    Raises:
        ConfigError: another dtype, or a weight that `wna16_layout.pack` did not make.
        EnvironmentProblem: the device cannot run Triton kernels.
    """
    words = weight.words
    _check_weight("dequantization", weight, words.device)
    if dtype not in _DENSE_DTYPES:
        raise ConfigError(f"dtype={dtype} is not supported; use float32, float16 or bfloat16")
    out = torch.empty(weight.n, weight.k, dtype=dtype, device=words.device)
    if out.numel() == 0:
        return out
    size, block_n = slice_k(words, weight.bits), 64
    _dense_kernel[(words.shape[0], -(-weight.n // block_n))](
        words, words.view(torch.int8), weight.scale, weight.zero, out, weight.n, weight.k, BITS=weight.bits,
        FIELDS=weight.tile // size, SLICE=size, ROW=words.shape[2], GROUP=weight.group_size,
        HAS_ZERO=weight.zero is not None, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return out


torch.library.define(
    "compress::wna16",
    "(Tensor x, Tensor words, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size, bool pdl=True) -> "
    "Tensor",
)
torch.library.define(
    "compress::wna16_dense",
    "(Tensor words, Tensor scale, Tensor? zero, int bits, int k, int group_size, ScalarType dtype) -> Tensor",
)


@torch.library.impl("compress::wna16", ["CUDA", "CPU"])
@common.on_operand_device
def _matmul_impl(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    pdl: bool = True,
) -> Tensor:  # fmt: skip
    return launch(x, PackedWeight(words, scale, zero, bits, words.shape[1], x.shape[1], group_size), bias, pdl=pdl)


@torch.library.register_fake("compress::wna16")
def _matmul_fake(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    pdl: bool = True,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], words.shape[1])


@torch.library.impl("compress::wna16_dense", ["CUDA", "CPU"])
@common.on_operand_device
def _dense_impl(
    words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, k: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    return launch_dense(PackedWeight(words, scale, zero, bits, words.shape[1], k, group_size), dtype)


@torch.library.register_fake("compress::wna16_dense")
def _dense_fake(
    words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, k: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    return scale.new_empty(words.shape[1], k, dtype=dtype)


def matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, pdl: bool = True) -> Tensor:
    """`launch` as the PyTorch operator `compress::wna16`, which torch.compile and CUDA graphs take as it is."""
    common.check_activations("WnA16", x, weight.k)
    w = weight
    return torch.ops.compress.wna16(x, w.words, w.scale, w.zero, bias, w.bits, w.group_size, pdl)


def dense(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """`launch_dense` as the PyTorch operator `compress::wna16_dense`."""
    w = weight
    return torch.ops.compress.wna16_dense(w.words, w.scale, w.zero, w.bits, w.k, w.group_size, dtype)
