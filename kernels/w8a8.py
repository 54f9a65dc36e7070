"""W8A8 matmul in Triton on int8 tensor cores: 8-bit weights, activations rounded to 8 bits a row at run time.

    sx[m] = max_k |x[m, k]| / 127        qx[m, k] = round(x[m, k] / sx[m])                       (dynamic, symmetric)
    y[m, n] = sx[m] * sum_g scale[g, n] * (sum_{k in g} qx[m, k] (code[n, k] - zero[n, g])) + bias[n]

The inner sums are int32 and exact: with one group a row a result is the same bits for every tile and split. A row of x
that holds NaN or Inf gives a row of NaN. Rounding x costs about 0.01 of ||y|| for normally distributed x and more with
outliers, so nothing takes this path unless it is named (Backend.W8A8).

    codes [N, KP] int8 = code - 128, KP = K padded with code 128 to a multiple of 128
    scale [G, N] float16/bfloat16/float32      zero [G, N] uint8, or None for a symmetric grid (zero = 128)

Three kernels: rows of x to int8 codes, scales and, for an asymmetric grid, sums of the codes over tiles of K; the
matmul with W as the left operand (why: `w4a16`), both operands from shared memory and contiguous in K, as int8 MMAs
demand; and for SPLIT > 1 a sum over the splits in order. code - zero itself would need nine bits, so
sum qx (code - zero) = sum qx (code - 128) - (zero - 128) sum qx.

Twins: `compress.kernels.reference.quantize_rows`, `w8a8_linear`. Runs under TRITON_INTERPRET=1 on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.errors import ConfigError
from compress.kernels import common, dispatch
from compress.kernels.common import load_column, tile_of_program
from compress.kernels.reference import dequantize_weight

TILE_K = 128
# 127 * 255 * K must stay below 2^31 for one int32 sum over all of K
MAX_K = 2**16


@dataclass(frozen=True)
class Int8Weight:
    """A weight in the layout above. group_size counts inputs; for one group a row it is KP."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    n: int
    k: int
    group_size: int


@dataclass(frozen=True)
class Config:
    """Tile sizes and pipeline of one launch."""

    block_m: int
    block_n: int
    split_k: int
    num_warps: int
    num_stages: int


def pack(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Int8Weight:
    """Codes uint8 [N, K], scale float [N', G], zero uint8 [N', G] or None (symmetric) -> Int8Weight, on their device.

    Raises:
        ConfigError: other codes, a group size that does not divide K or is not a multiple of 32 (unless G = 1, where
            any K up to MAX_K will do).
    """
    n, k = codes.shape
    groups = scale.shape[1]
    if codes.dtype is not torch.uint8:
        raise ConfigError(f"codes are {codes.dtype}; W8A8 takes uint8")
    if groups == 0 or k % groups or (groups > 1 and (k // groups) % 32):
        raise ConfigError(
            f"K={k} in {groups} groups: the W8A8 kernel takes groups of a multiple of 32 inputs, or one group a row; "
            "use another group_size or backend=auto"
        )
    _check_k(k, groups)
    signed = (codes.to(torch.int16) - 128).to(torch.int8)
    padded = torch.nn.functional.pad(signed, (0, -k % TILE_K)).contiguous()
    group_size = k // groups if groups > 1 else padded.shape[1]

    def columns(t: Tensor) -> Tensor:
        return t.expand(n, groups).t().contiguous()

    return Int8Weight(padded, columns(scale), None if zero is None else columns(zero), n, k, group_size)


def unpack(weight: Int8Weight) -> Tensor:
    """The inverse: codes uint8 [N, K]."""
    return (weight.codes[:, : weight.k].to(torch.int16) + 128).to(torch.uint8)


def dense(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """Int8Weight -> dense [N, K], computed in float32 and rounded once to `dtype`; plain PyTorch, for comparisons."""
    zero = torch.full_like(weight.scale, 128) if weight.zero is None else weight.zero
    return dequantize_weight(unpack(weight), weight.scale.t(), zero.t()).to(dtype)


def _check_k(k: int, groups: int) -> None:
    if groups == 1 and k > MAX_K:
        raise ConfigError(f"K={k} with one scale a row may overflow int32 sums; use groups, or backend=auto")


@triton.jit(do_not_specialize=["M"])
def _quantize_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scale_ptr, sums_ptr, M, K, KP, HAS_SUMS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr
):
    """Row m of x [M, K] -> codes int8 [M, KP], scale float32 [M], sums int32 [KP / SPAN, M] of SPAN codes each."""
    m = tl.program_id(0).to(tl.int64)
    rk = tl.arange(0, BLOCK)
    largest = 0.0
    broken = 0.0
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + m * K + start + rk, mask=start + rk < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
        broken += tl.sum(x * 0.0, 0)  # NaN if x holds NaN or Inf
    # the floor, the smallest normal number, is for rows of zeros
    scale = tl.maximum(tl.div_rn(largest, 127.0), 1.1754943508222875e-38) + broken
    tl.store(scale_ptr + m, scale)
    for start in range(0, KP, BLOCK):
        x = tl.load(x_ptr + m * K + start + rk, mask=start + rk < K, other=0.0).to(tl.float32)
        q = tl.div_rn(x, tl.zeros((BLOCK,), tl.float32) + scale)
        q = (q + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to nearest, ties to even
        q = tl.where(q == q, q, 0.0).to(tl.int32)
        tl.store(codes_ptr + m * KP + start + rk, q.to(tl.int8), mask=start + rk < KP)
        if HAS_SUMS:
            r = start // SPAN + tl.arange(0, BLOCK // SPAN)
            sums = tl.sum(tl.reshape(q, (BLOCK // SPAN, SPAN)), 1)
            tl.store(sums_ptr + r.to(tl.int64) * M + m, sums, mask=r < KP // SPAN)


@triton.jit(do_not_specialize=["M", "tiles", "tiles_per_split", "last_group"])
def _w8a8_kernel(  # type: ignore[no-untyped-def]
    x_ptr, x_scale_ptr, sums_ptr, codes_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, KP, tiles, tiles_per_split,
    last_group, out_split_stride, GROUP: tl.constexpr, GROUPED: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_N, BLOCK_M] tile of y^T over one split of K; WHOLE: of one, so the scales of x and W apply here."""
    pid, split = tl.program_id(0), tl.program_id(1)
    pid_n, pid_m = tile_of_program(pid, M, N, BLOCK_M, BLOCK_N, GROUP_N)
    rn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rk = tl.arange(0, BLOCK_K)
    m_mask, n_mask = rm[None, :] < M, rn[:, None] < N
    w_tile = codes_ptr + rn.to(tl.int64)[:, None] * KP + rk[None, :]  # [BN, BK]
    x_tile = x_ptr + rm.to(tl.int64)[None, :] * KP + rk[:, None]  # [BK, BM], x^T
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32 if GROUPED else tl.int32)
    sums_step = tl.zeros((), tl.int64) + M
    row_sum = tl.zeros((1, BLOCK_M), tl.int32)

    first = split * tiles_per_split
    for t in tl.range(first, min(first + tiles_per_split, tiles), num_stages=STAGES):
        if EVEN_N:
            w = tl.load(w_tile + t * BLOCK_K, eviction_policy="evict_first")
        else:
            w = tl.load(w_tile + t * BLOCK_K, mask=n_mask, other=0, eviction_policy="evict_first")
        x = tl.load(x_tile + t * BLOCK_K, mask=m_mask, other=0, eviction_policy="evict_last")
        if HAS_ZERO:
            tile_sum = tl.load(sums_ptr + sums_step * t + rm[None, :], mask=m_mask, other=0)
        if GROUPED:
            g = min(t * BLOCK_K // GROUP, last_group)  # codes of x are 0 beyond K; any scale in range will do
            part = tl.dot(w, x, out_dtype=tl.int32)
            if HAS_ZERO:
                part -= (load_column(zero_ptr, rn, g, N, EVEN_N).to(tl.int32) - 128) * tile_sum
            acc += part.to(tl.float32) * load_column(scale_ptr, rn, g, N, EVEN_N)
        else:
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
            if HAS_ZERO:
                row_sum += tile_sum

    if HAS_ZERO and not GROUPED:
        acc -= (load_column(zero_ptr, rn, 0, N, EVEN_N).to(tl.int32) - 128) * row_sum
    out = out_ptr + split.to(tl.int64) * out_split_stride + rm.to(tl.int64)[None, :] * N + rn[:, None]
    if WHOLE:
        y = acc.to(tl.float32)
        if not GROUPED:
            y *= load_column(scale_ptr, rn, 0, N, EVEN_N)
        y *= tl.load(x_scale_ptr + rm, mask=rm < M, other=0.0)[None, :]
        if HAS_BIAS:
            y += load_column(bias_ptr, rn, 0, N, EVEN_N)
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=m_mask & n_mask)
    else:
        tl.store(out, acc, mask=m_mask & n_mask)


@triton.jit(do_not_specialize=["size", "N"])
def _finish_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, x_scale_ptr, scale_ptr, bias_ptr, out_ptr, size, N, GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [M, N] = (sum over s of partial [SPLIT, M, N], in order) * scales + bias, as _w8a8_kernel does for WHOLE."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    total = tl.zeros((BLOCK,), partial_ptr.dtype.element_ty)
    for s in tl.static_range(SPLIT):
        total += tl.load(partial_ptr + (tl.zeros((), tl.int64) + size) * s + i, mask=mask, other=0)
    y = total.to(tl.float32)
    if not GROUPED:
        y *= tl.load(scale_ptr + i % N, mask=mask, other=0.0).to(tl.float32)
    y *= tl.load(x_scale_ptr + i // N, mask=mask, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + i % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, y.to(out_ptr.dtype.element_ty), mask=mask)


def choose_config(m: int, n: int, k: int, sms: int, shared_bytes: int) -> Config:
    """Tiles, split and pipeline for y[m, n]; pure, so that it can be tested. The rules of `wna16.choose_config`."""
    if m <= 16:
        block_m, block_n, warps, programs_per_sm, min_inputs = 16, 64, 4, 7, 512
    else:
        block_m = 32 if m <= 32 else (64 if m <= 256 else 128)
        block_n, warps, programs_per_sm, min_inputs = 128, 8, 2, 1024
    stages = max(1, min(4, shared_bytes // (TILE_K * (block_m + block_n))))
    programs = -(-n // block_n) * -(-m // block_m)
    split = max(1, min(programs_per_sm * sms // max(programs, 1), k // min_inputs, 16))
    return Config(block_m, block_n, 1 << (split.bit_length() - 1), warps, stages)


def configuration(x: Tensor, weight: Int8Weight) -> Config:
    """The measured choice for this GPU, scheme and shape, or `choose_config` where no table answers."""
    m, n, k, choice = x.shape[0], weight.n, weight.k, None
    if x.is_cuda:
        choice = dispatch.choose(x.device, x.dtype, 8, weight.group_size, weight.zero is None, n, k, m, int8=True)
    measured = dispatch.as_config(choice, "w8a8", Config)
    return measured or choose_config(m, n, k, common.n_sms(x.device), common.shared_bytes(x.device))


def quantize_rows(x: Tensor, kp: int, span: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x float [M, K] -> codes int8 [M, kp], 0 beyond K; scale float32 [M]; with span also sums int32 [kp / span, M]."""
    m, k = x.shape
    codes = torch.empty(m, kp, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    sums = torch.empty(kp // span, m, dtype=torch.int32, device=x.device) if span else None
    block = min(4096, triton.next_power_of_2(kp))
    _quantize_rows_kernel[(m,)](
        x, codes, scale, sums, m, k, kp, HAS_SUMS=sums is not None, SPAN=span or TILE_K, BLOCK=block,
        num_warps=max(1, min(8, block // 512)),
    )  # fmt: skip
    return codes, scale, sums


def _check(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> None:
    common.check_device("W8A8", x.device)
    common.check_activations("W8A8", x, weight.k)
    codes, wanted = weight.codes, -(-weight.k // TILE_K) * TILE_K
    if codes.dtype is not torch.int8 or codes.dim() != 2 or codes.shape[1] != wanted:
        raise ConfigError(
            f"codes are {codes.dtype} {tuple(codes.shape)}, not int8 [N, {wanted}] for K={weight.k}; build them with "
            "w8a8.pack"
        )
    _check_k(weight.k, weight.scale.shape[0])
    common.check_operands(x, codes, weight.scale, weight.zero, bias, weight.group_size)


def launch(x: Tensor, weight: Int8Weight, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """y [M, N] = the formula above in x's dtype. Twin: `reference.w8a8_linear`.

    Args:
        x: float16 or bfloat16 [M, K], contiguous, on the weight's device. M = 0 gives an empty result.
        bias: [N] or None.
        config: instead of the measured choice (`configuration`).

    Raises:
        ConfigError: a dtype, shape, stride or device that does not fit.
        EnvironmentProblem: the device cannot run the kernel.
    """
    _check(x, weight, bias)
    m, n, kp = x.shape[0], weight.n, weight.codes.shape[1]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    config = config or configuration(x, weight)
    block_k = math.gcd(weight.group_size, TILE_K)
    codes, x_scale, sums = quantize_rows(x, kp, None if weight.zero is None else block_k)
    tiles = kp // block_k
    per_split = -(-tiles // config.split_k)
    split = -(-tiles // per_split)
    grouped = weight.scale.shape[0] > 1
    partial = torch.float32 if grouped else torch.int32
    out = y if split == 1 else torch.empty(split, m, n, dtype=partial, device=x.device)
    _w8a8_kernel[(-(-n // config.block_n) * -(-m // config.block_m), split)](
        codes, x_scale, sums, weight.codes, weight.scale, weight.zero, bias, out, m, n, kp, tiles, per_split,
        weight.scale.shape[0] - 1, m * n, GROUP=weight.group_size, GROUPED=grouped, HAS_ZERO=weight.zero is not None,
        HAS_BIAS=bias is not None, WHOLE=split == 1, EVEN_N=n % config.block_n == 0, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, BLOCK_K=block_k, GROUP_N=8, STAGES=config.num_stages, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    if split > 1:
        _finish_kernel[(-(-y.numel() // 256),)](
            out, x_scale, weight.scale, bias, y, y.numel(), n, GROUPED=grouped, HAS_BIAS=bias is not None, SPLIT=split,
            BLOCK=256, num_warps=2,
        )  # fmt: skip
    return y


torch.library.define(
    "compress::w8a8",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int group_size) -> Tensor",
)


@torch.library.impl("compress::w8a8", ["CUDA", "CPU"])
@common.on_operand_device
def _w8a8_impl(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    return launch(x, Int8Weight(codes, scale, zero, codes.shape[0], x.shape[1], group_size), bias)


@torch.library.register_fake("compress::w8a8")
def _w8a8_fake(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def matmul(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """`launch` as the PyTorch operator `compress::w8a8`, which torch.compile and CUDA graphs take as it is."""
    common.check_activations("W8A8", x, weight.k)
    return torch.ops.compress.w8a8(x, weight.codes, weight.scale, weight.zero, bias, weight.group_size)
