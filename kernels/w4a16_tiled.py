"""W4A16 with warpgroup MMAs on Hopper, from M = 17 to prefill: the dequantized weight never leaves the registers.

The same layout as `w4a16`. A program computes a tile of y^T, BLOCK_N rows of W (64 or 128 a warpgroup) by BLOCK_M
tokens:

    words [BLOCK_N, 32] --bulk copy--> shared --ldmatrix--> registers --lop3, add, mul--> left operand  \\
                                                                                           wgmma += [BLOCK_N, BLOCK_M]
    x [BLOCK_M, 2 x 64] --bulk copy--> shared (128-byte swizzle) ------------------------> right operand /

A tile of K is two MMA groups, `low` (nibbles 0, 1) and `high` (2, 3), 64 inputs each. While one runs, the other's
operand is dequantized; two groups are in flight, so the tensor cores never wait for the integer units:

    MMA            | low t        | high t       | low t+1      | ...
    dequantize     | high t       | low t+1      | high t+1     |

Weights are scaled in x's dtype before the MMA: (code - zero) is exact there, its product with the scale rounded once.
That is the rounding of a dense weight in that dtype; a second float32 accumulator for each group would cost half of the
registers. Symmetric weights in float16 take one fused multiply-add on the bare code, a subnormal number
(`gluon_parts.scaled_slice`), in units of the power of two that the layout keeps of each row. y leaves through shared
memory as whole lines.

Tiles that fill whole waves of the machine are computed by one program each. With split_k > 1 the rest, all of them
where there are few, are computed by split_k programs each, which share out K and leave float32 sums in a workspace.
With `cluster` they run side by side on neighbouring multiprocessors, and after the barrier of the cluster each adds up
its share of the tile's tokens, in order: the same bits every run, no counter, no second kernel. Two keep what is their
own share in registers and exchange the rest. A cluster needs room
for all of its programs at once, which costs more where each runs long; without, a second kernel adds up.

    cluster of 4      K: | program 0 | program 1 | program 2 | program 3 |       each a [BLOCK_N, BLOCK_M] sum
                         ------------- barrier of the cluster -------------
                 tokens: | program 0 | program 1 | program 2 | program 3 |       each adds 4 sums of a quarter

Where whole waves come first, the split tiles are a launch of their own that fills the machine as those drain.

Twin: `compress.kernels.reference.w4a16_linear`. Needs compute capability 9.0, K and N multiples of 8.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.experimental.gluon.language as gl
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compress.kernels.common import n_sms, shared_bytes, tile_of_program
from compress.kernels.gluon_parts import (
    cluster_barrier,
    cluster_bases,
    cluster_rank,
    cluster_shares,
    pdl_wait,
    store_by_each,
    store_eights_by_each,
)
from compress.kernels.tile_parts import (
    GROUP_N,
    TiledConfig,
    copy_stage,
    first_columns,
    mma_layout,
    multiply_tiles,
    store_tile,
    tile_origin,
    wait_for_previous,
)
from compress.kernels.w4a16 import KernelWeight
from compress.kernels.w4a16_producer import launch_producer


@gluon.constexpr_function
def _barrier_layout(ctas):  # type: ignore[no-untyped-def]
    return mbarrier.MBarrierLayout(cga_layout=cluster_bases(ctas, 1))


@gluon.constexpr_function
def _sum_layout(columns, warps, ctas):  # type: ignore[no-untyped-def]
    """[tokens, columns] float32 dealt out to the cluster by tokens, 16 bytes a thread along the columns."""
    wide = columns // 4 if columns < 128 else 32
    return gl.BlockedLayout([1, 4], [32 // wide, wide], [warps, 1], [1, 0], cluster_shares(ctas, 2))


@gluon.jit
def _add_up(sums_ptr, bias_ptr, out_ptr, m0, n0, M, N,
            HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SPLIT: gl.constexpr,
            WARPS: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """A tile of y: sums [SPLIT, BLOCK_M, BLOCK_N] added in order, and bias; each program of the cluster has tokens."""
    L: gl.constexpr = _sum_layout(BLOCK_N, WARPS, SPLIT)
    rm = gl.arange(0, BLOCK_M, gl.SliceLayout(1, L))
    rn = gl.arange(0, BLOCK_N, gl.SliceLayout(0, L))
    at = gl.expand_dims(rm * BLOCK_N, 1) + gl.expand_dims(rn, 0)
    mask = gl.expand_dims(m0 + rm < M, 1) & gl.expand_dims(n0 + rn < N, 0)
    total = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, L)
    for s in gl.static_range(SPLIT):
        total += gl.load(sums_ptr + s * (BLOCK_M * BLOCK_N) + at, mask=mask, other=0.0)
    if HAS_BIAS:
        total += gl.expand_dims(gl.load(bias_ptr + n0 + rn, mask=n0 + rn < N, other=0).to(gl.float32), 0)
    y_at = gl.expand_dims((m0 + rm).to(gl.int64) * N, 1) + gl.expand_dims(n0 + rn, 0)
    gl.store(out_ptr + y_at, total.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.constexpr_function
def _out_layout(columns, warps):  # type: ignore[no-untyped-def]
    """[tokens, columns] of 16 bits, each program of a pair with its own; 16 bytes a thread along the columns."""
    wide = columns // 8 if columns < 256 else 32
    return gl.BlockedLayout([1, 8], [32 // wide, wide], [warps, 1], [1, 0], cluster_bases(2, 2))


@gluon.jit
def _exchange_halves(acc, sums_ptr, bias_ptr, out_ptr, rank, m0, n0, M, N, HAS_BIAS: gl.constexpr,
                     BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WARPS: gl.constexpr, WAIT: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """A tile of y from a cluster of two: each keeps half of the tokens in registers and hands over the other's, half of
    the traffic of handing over all. The sum of two is the same in either order."""
    HALF: gl.constexpr = BLOCK_M // 2
    H: gl.constexpr = mma_layout(HALF, WARPS, 2)
    low, high = gl.split(acc.reshape([BLOCK_N, 2, HALF]).permute(0, 2, 1))
    low = gl.convert_layout(low, H, assert_trivial=True)
    high = gl.convert_layout(high, H, assert_trivial=True)
    rn = gl.arange(0, BLOCK_N, gl.SliceLayout(1, H))
    at = gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(0, H)), 0) * BLOCK_N + gl.expand_dims(rn, 1)
    store_by_each(sums_ptr + rank * (HALF * BLOCK_N) + at, gl.where(rank == 0, high, low))
    if WAIT:
        pdl_wait()
    cluster_barrier()
    total = gl.where(rank == 0, low, high) + gl.load(sums_ptr + (1 - rank) * (HALF * BLOCK_N) + at)
    if HAS_BIAS:
        total += gl.expand_dims(gl.load(bias_ptr + n0 + rn, mask=n0 + rn < N, other=0).to(gl.float32), 1)
    L: gl.constexpr = _out_layout(BLOCK_N, WARPS)
    y = gl.convert_layout(total.to(out_ptr.dtype.element_ty).permute(1, 0), L)
    token = m0 + rank * HALF + gl.arange(0, HALF, gl.SliceLayout(1, L))
    column = n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, L))
    y_at = out_ptr + (gl.expand_dims(token.to(gl.int64) * N, 1) + gl.expand_dims(column, 0))
    store_eights_by_each(y_at, y, gl.expand_dims(token < M, 1) & gl.expand_dims(column < N, 0))


@gluon.jit(do_not_specialize=["M", "tiles", "first_tile", "per_split"])
def _tiled_kernel(  # type: ignore[no-untyped-def]
    x_desc, words_desc, out_desc, out_ptr, scale_ptr, zero_ptr, bias_ptr, workspace_ptr,
    M, N, K, tiles, first_tile, per_split,
    GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, EVEN_N: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr, GROUP_N: gl.constexpr,
    CTAS: gl.constexpr, PDL: gl.constexpr, BEFORE_TAIL: gl.constexpr, IS_TAIL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """One [BLOCK_N, BLOCK_M] tile of y^T, or one split of it; see the module docstring."""
    dtype: gl.constexpr = x_desc.dtype
    MMA: gl.constexpr = mma_layout(BLOCK_M, WARPS, CTAS)
    BYTES: gl.constexpr = BLOCK_N * 64 + BLOCK_M * 256

    pid = gl.program_id(0)  # of a cluster, where there are any
    tile = first_tile + pid
    sums = pid * SPLIT  # first of the tile's sums in the workspace
    rank = 0
    first = 0
    last = tiles
    if SPLIT > 1:
        if CTAS > 1:
            rank = cluster_rank()
        else:
            tile = first_tile + pid // SPLIT
            rank = pid % SPLIT
            sums = pid - rank
        first = gl.minimum(rank * per_split, tiles)
        last = gl.minimum(first + per_split, tiles)
    n0, m0 = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_N)

    words_smem = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK_N // 2, 64], words_desc.layout)
    x_smem = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_M, 64], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], _barrier_layout(CTAS))
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    for i in gl.static_range(STAGES):
        copy_stage(words_desc, x_desc, ready, words_smem, x_smem, first + i, n0, m0, N, i, first + i < last,
                   True, False, BYTES)  # fmt: skip
    part_of_unit, columns = first_columns(scale_ptr, zero_ptr, first, n0, N, K, tiles, GROUP, HAS_ZERO, EVEN_N, BLOCK_M,
                                          BLOCK_N, WARPS, CTAS, dtype)  # fmt: skip
    wait_for_previous(PDL, BEFORE_TAIL, IS_TAIL)
    for i in gl.static_range(STAGES):
        copy_stage(words_desc, x_desc, ready, words_smem, x_smem, first + i, n0, m0, N, i, first + i < last,
                   False, True, BYTES)  # fmt: skip

    acc = multiply_tiles(words_desc, x_desc, scale_ptr, zero_ptr, words_smem, x_smem, ready, None, columns,
                         part_of_unit, first, last, n0, m0, N, K, tiles, GROUP, HAS_ZERO, EVEN_N, BLOCK_M, BLOCK_N,
                         STAGES, WARPS, CTAS, BYTES, dtype)  # fmt: skip
    if SPLIT > 1:
        sums_ptr = workspace_ptr + gl.to_tensor(sums).to(gl.int64) * (BLOCK_M * BLOCK_N)
        if CTAS == 2:
            _exchange_halves(acc, sums_ptr, bias_ptr, out_ptr, rank, m0, n0, M, N, HAS_BIAS, BLOCK_M, BLOCK_N, WARPS,
                             IS_TAIL and PDL)  # fmt: skip
            return
        rn = gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))
        rm = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, MMA)), 0)
        store_by_each(sums_ptr + rank * (BLOCK_M * BLOCK_N) + rm * BLOCK_N + gl.expand_dims(rn, 1), acc)
        if IS_TAIL and PDL:
            pdl_wait()  # whoever waits for this launch means the one before it, too
        if CTAS > 1:
            cluster_barrier()
            _add_up(sums_ptr, bias_ptr, out_ptr, m0, n0, M, N, HAS_BIAS, BLOCK_M, BLOCK_N, SPLIT, WARPS)
        return
    store_tile(out_desc, acc, bias_ptr, n0, m0, N, HAS_BIAS, BLOCK_M, BLOCK_N, MMA)


@triton.jit(do_not_specialize=["M", "first_tile"])
def _sum_kernel(  # type: ignore[no-untyped-def]
    sums_ptr, bias_ptr, out_ptr, M, N, first_tile,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, GROUP_N: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`_add_up` as a kernel of its own: ROWS tokens of a tile each, for splits that are not a cluster."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile, part = tl.program_id(0), tl.program_id(1)
    tile_n, tile_m = tile_of_program(tile + first_tile, M, N, BLOCK_M, BLOCK_N, GROUP_N)
    rows, columns = part * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_N)
    rm, rn = tile_m * BLOCK_M + rows, tile_n * BLOCK_N + columns
    at = sums_ptr + tile.to(tl.int64) * (SPLIT * BLOCK_M * BLOCK_N) + rows[:, None] * BLOCK_N + columns[None, :]
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for s in tl.static_range(SPLIT):
        total += tl.load(at + s * (BLOCK_M * BLOCK_N), mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + rm.to(tl.int64)[:, None] * N + rn[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


def slots(config: TiledConfig, n_sms: int, shared_bytes: int) -> int:
    """Programs of a configuration that run at once: one or two a multiprocessor, by shared memory and registers."""
    used = config.stages * (config.block_n * 64 + config.block_m * 256) + 64
    return n_sms * max(1, min(shared_bytes // used, 2 if config.warps <= 4 else 1))


def choose_config(m: int, n: int, k: int, n_sms: int, shared_bytes: int) -> TiledConfig:
    """Tiles without a table; pure. The widest tile of tokens that M fills, and K split over what would stay idle.
    Measured on an H100 by `compress.kernels.tune` (NOTES.md)."""
    tiles = -(-k // 128)
    if m <= 128:
        block_m = max(16, 1 << (m - 1).bit_length())
        block_n, warps = (64 if n <= 8192 and m > 32 else 128), 4
    elif m <= 256 and n <= 8192:
        block_m, block_n, warps = 128, 64, 4
    else:
        block_m, block_n, warps = 256, 128, 8
    config = TiledConfig(block_m, block_n, 1, warps, 4 if block_m <= 32 else 3)
    at_once, programs = slots(config, n_sms, shared_bytes), -(-n // block_n) * -(-m // block_m)
    rest = programs % at_once
    split = min(8, at_once // rest, tiles // 4) if rest else 1
    split = 1 << (max(split, 1).bit_length() - 1)
    cluster = split > 1 and (m > 128 or tiles // split <= 8)
    return replace(config, split_k=split, cluster=cluster, producer=not cluster)


def launch(x: Tensor, weight: KernelWeight, bias: Tensor | None, config: TiledConfig, pdl: bool = True) -> Tensor:
    """y [M, N] = x [M, K] W^T + bias in x's dtype, M >= 1. Arguments are checked by the caller."""
    m, n, split = x.shape[0], weight.n, config.split_k
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    programs = -(-n // config.block_n) * -(-m // config.block_m)
    if split == 1:
        _launch_tiles(x, weight, bias, y, config, 0, programs, pdl)
        return y
    at_once = slots(config, n_sms(x.device), shared_bytes(x.device))
    whole = programs // at_once * at_once
    if whole:
        _launch_tiles(x, weight, bias, y, replace(config, split_k=1), 0, whole, pdl, before_tail=whole < programs)
    if whole < programs:
        _launch_tiles(x, weight, bias, y, config, whole, programs - whole, pdl, is_tail=whole > 0)
    return y


def _launch_tiles(
    x: Tensor, weight: KernelWeight, bias: Tensor | None, y: Tensor, config: TiledConfig, first_tile: int, n_tiles: int,
    pdl: bool, before_tail: bool = False, is_tail: bool = False,
) -> None:  # fmt: skip
    m, k, n, split = x.shape[0], weight.k, weight.n, config.split_k
    tiles, workspace = weight.words.shape[0], None
    if split > 1:
        workspace = torch.empty(n_tiles * split * config.block_m * config.block_n, dtype=torch.float32, device=x.device)
    ctas = split if config.cluster and not config.producer else 1
    wide = gl.NVMMASharedLayout(128, 16, 2, cga_layout=cluster_bases(ctas, 2))
    x_desc = TensorDescriptor(x, [m, k], [k, 1], [config.block_m, 64], wide)
    out_desc = TensorDescriptor(y, [m, n], [n, 1], [config.block_m, config.block_n], wide)
    words_desc = TensorDescriptor(weight.words, [tiles * n // 2, 64], [64, 1], [config.block_n // 2, 64], wide)
    if config.producer:
        launch_producer(
            x_desc, words_desc, out_desc, weight, bias, workspace, m, first_tile, n_tiles, config, pdl, before_tail,
            is_tail,
        )  # fmt: skip
    else:
        _tiled_kernel[(n_tiles * split // ctas,)](
            x_desc, words_desc, out_desc, y, weight.scale, weight.zero, bias, workspace, m, n, k, tiles, first_tile,
            -(-tiles // split),
            GROUP=weight.group_size, HAS_ZERO=weight.zero is not None, HAS_BIAS=bias is not None,
            EVEN_N=n % config.block_n == 0, BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.stages,
            SPLIT=split, GROUP_N=GROUP_N, CTAS=ctas, PDL=pdl, BEFORE_TAIL=before_tail, IS_TAIL=is_tail,
            WARPS=config.warps, num_warps=config.warps, num_ctas=ctas, launch_pdl=pdl,
        )  # fmt: skip
    if split > ctas:
        rows = 512 // config.block_n  # small programs: this kernel is short, and all of the machine should take part
        _sum_kernel[(n_tiles, config.block_m // rows)](
            workspace, bias, y, m, n, first_tile, HAS_BIAS=bias is not None, BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, SPLIT=split, GROUP_N=GROUP_N, ROWS=rows, PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
