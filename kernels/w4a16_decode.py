"""W4A16 for few tokens on Hopper (M <= 16): every warp of a program takes its own part of K.

The same layout as `w4a16`; the difference is who reads what. A program owns BLOCK_N rows of W for all of K. Its warps
split K, tile by tile, so that small weights fill the machine without a second kernel or a workspace:

                    K, tiles of 128                  warp 0   warp 1  ...  warp 7
          +----+----+----+----+----+----+----+----+
    W     |  0 |  1 |  2 |  3 |  4 |  5 |  6 |  7 |  8 ...       stage = WARPS tiles
          +----+----+----+----+----+----+----+----+
    acc   [WARPS, BLOCK_N, BLOCK_M] float32, summed over WARPS at the end in shared memory, in a fixed order

Tiles and x arrive by bulk tensor copies, STAGES ahead. All of a stage is in order for 16-byte shared loads: a thread's
8 neighbouring words are the left operand of `mma.sync` for k_width = 8, and 8 neighbouring inputs of x the right one, so
nothing is shuffled. The weight's copies are started before the wait for the previous kernel (programmatic dependent
launch): weights do not depend on it.

Twin: `compress.kernels.reference.w4a16_linear`. Needs compute capability 9.0, K a multiple of 128 and N of 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, mma_v2, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from compress.kernels.gluon_parts import load_row, pdl_launch_next, pdl_wait, scale_group, slice_weights
from compress.kernels.w4a16 import KernelWeight


@dataclass(frozen=True)
class DecodeConfig:
    """Tile sizes of one launch. warps is the split of K; stages of `warps` tiles are in flight."""

    block_m: int
    block_n: int
    warps: int
    stages: int


@gluon.constexpr_function
def _thread_layout(warps, rows, slices):  # type: ignore[no-untyped-def]
    """[warps, rows, 32] (or [warps, 4, rows, 32]): lane 4 r + q holds elements 8 q .. 8 q + 7 of rows r, r + 8, ..."""
    middle = [0] if slices else []
    reg = [[0, *middle, 0, 1], [0, *middle, 0, 2], [0, *middle, 0, 4]]
    if slices:
        reg += [[0, 1, 0, 0], [0, 2, 0, 0]]
    row = 8
    while row < rows:
        reg.append([0, *middle, row, 0])
        row *= 2
    lane = [[0, *middle, 0, 8], [0, *middle, 0, 16], *([0, *middle, r, 0] for r in (1, 2, 4))]
    warp = []
    w = 1
    while w < warps:
        warp.append([w, *middle, 0, 0])
        w *= 2
    shape = [warps, 4, rows, 32] if slices else [warps, rows, 32]
    return gl.DistributedLinearLayout(reg, lane, warp, [], shape)


@gluon.jit
def _split_slices(x, WARPS: gl.constexpr, BLOCK_M: gl.constexpr):  # type: ignore[no-untyped-def]
    """[WARPS, 4, BLOCK_M, 32] -> four of [WARPS, BLOCK_M, 32]; only renames registers."""
    pairs = x.reshape([WARPS, 2, 2, BLOCK_M, 32]).permute(0, 2, 3, 4, 1)
    low, high = gl.split(pairs)  # slices 0, 1 and 2, 3
    x0, x1 = gl.split(low.permute(0, 2, 3, 1))
    x2, x3 = gl.split(high.permute(0, 2, 3, 1))
    return x0, x1, x2, x3


@gluon.jit(do_not_specialize=["M", "tiles"])
def _decode_kernel(  # type: ignore[no-untyped-def]
    x_desc, words_desc, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K, tiles,
    GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, EVEN_N: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """y[:, n0 : n0 + BLOCK_N]; see the module docstring."""
    dtype: gl.constexpr = x_desc.dtype
    base: gl.constexpr = 1024.0 if dtype == gl.float16 else 128.0
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    WORDS: gl.constexpr = _thread_layout(WARPS, BLOCK_N, False)
    X: gl.constexpr = _thread_layout(WARPS, BLOCK_M, True)
    PARTS: gl.constexpr = 1 if GROUP >= 128 else 128 // GROUP  # scale groups a tile
    SLICES: gl.constexpr = 4 // PARTS
    BYTES: gl.constexpr = WARPS * (BLOCK_N * 64 + BLOCK_M * 256)

    n0 = gl.program_id(0) * BLOCK_N
    words_smem = gl.allocate_shared_memory(gl.int16, [STAGES, WARPS, BLOCK_N, 32], words_desc.layout)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES, WARPS, 4, BLOCK_M, 32], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    steps = (tiles + WARPS - 1) // WARPS
    for i in gl.static_range(STAGES):
        mbarrier.expect(ready.index(i), BYTES, pred=i < steps)
        tma.async_copy_global_to_shared(
            words_desc, [i * WARPS, n0, 0], ready.index(i), words_smem.index(i), pred=i < steps
        )

    # [WARPS, BLOCK_N]: scales in the accumulator's rows, zeros in the words'
    S_ROWS: gl.constexpr = gl.SliceLayout(2, MMA)
    Z_ROWS: gl.constexpr = gl.SliceLayout(2, WORDS)
    s_tile = gl.expand_dims(gl.arange(0, WARPS, gl.SliceLayout(1, S_ROWS)), 1)
    s_n = gl.expand_dims(n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_ROWS)), 0)
    z_tile = gl.expand_dims(gl.arange(0, WARPS, gl.SliceLayout(1, Z_ROWS)), 1)
    z_n = gl.expand_dims(n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, Z_ROWS)), 0)
    scales = ()
    for s in gl.static_range(PARTS):
        scales = scales + (load_row(scale_ptr, scale_group(s_tile, s, tiles, K, GROUP), s_n, N, EVEN_N),)

    if PDL:
        pdl_launch_next()
        pdl_wait()
    for i in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(x_desc, [i * WARPS, 0, 0, 0], ready.index(i), x_smem.index(i), pred=i < steps)

    acc = gl.zeros((WARPS, BLOCK_N, BLOCK_M), gl.float32, MMA)
    stage = 0
    phase = 0
    for step in range(0, steps):
        t = step * WARPS
        coming = ()
        for s in gl.static_range(PARTS):
            g = scale_group(t + WARPS + s_tile, s, tiles, K, GROUP)
            coming = coming + (load_row(scale_ptr, g, s_n, N, EVEN_N),)
        minus_base = ()
        for s in gl.static_range(PARTS):
            if HAS_ZERO:
                zero = load_row(zero_ptr, scale_group(t + z_tile, s, tiles, K, GROUP), z_n, N, EVEN_N)
                minus_base = minus_base + (gl.expand_dims((-base - zero.to(gl.float32)).to(dtype), 2),)
            else:
                minus_base = minus_base + (gl.full((1, 1, 1), -base - 8.0, gl.float32, WORDS).to(dtype),)
        mbarrier.wait(ready.index(stage), phase)
        words = words_smem.index(stage).load(WORDS)
        x = _split_slices(x_smem.index(stage).load(X), WARPS, BLOCK_M)
        for s in gl.static_range(PARTS):
            part = gl.zeros((WARPS, BLOCK_N, BLOCK_M), gl.float32, MMA)
            for p in gl.static_range(s * SLICES, s * SLICES + SLICES):
                w = gl.convert_layout(slice_weights(words, minus_base[s], p, dtype), A, assert_trivial=True)
                part = mma_v2(w, gl.convert_layout(x[p].permute(0, 2, 1), B, assert_trivial=True), part)
            acc += part * gl.expand_dims(scales[s].to(gl.float32), 2)
        scales = coming
        if step + STAGES < steps:
            gl.thread_barrier()  # every warp has read the stage
            ahead = t + STAGES * WARPS
            mbarrier.expect(ready.index(stage), BYTES)
            tma.async_copy_global_to_shared(words_desc, [ahead, n0, 0], ready.index(stage), words_smem.index(stage))
            tma.async_copy_global_to_shared(x_desc, [ahead, 0, 0, 0], ready.index(stage), x_smem.index(stage))
        stage += 1
        if stage == STAGES:
            stage = 0
            phase = phase ^ 1

    y = gl.sum(acc, axis=0)
    OUT: gl.constexpr = gl.SliceLayout(0, MMA)
    rn = n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(1, OUT))
    rm = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT)), 0)
    if HAS_BIAS:
        y += gl.expand_dims(gl.load(bias_ptr + rn, mask=rn < N, other=0).to(gl.float32), 1)
    rn = gl.expand_dims(rn, 1)
    gl.store(out_ptr + rm * N + rn, y.to(out_ptr.dtype.element_ty), mask=(rm < M) & (rn < N))


def launch(x: Tensor, weight: KernelWeight, bias: Tensor | None, config: DecodeConfig, pdl: bool = True) -> Tensor:
    """y [M, N] = x [M, K] W^T + bias in x's dtype, 1 <= M <= config.block_m. Arguments are checked by the caller."""
    m, k, n = x.shape[0], weight.k, weight.n
    tiles = weight.words.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    x_desc = TensorDescriptor(
        x, [tiles, 4, m, 32], [128, 32, k, 1], [config.warps, 4, config.block_m, 32], gl.NVMMASharedLayout(64, 16, 4)
    )
    words_desc = TensorDescriptor(
        weight.words, [tiles, n, 32], [32 * n, 32, 1], [config.warps, config.block_n, 32],
        gl.NVMMASharedLayout(64, 16, 3),
    )  # fmt: skip
    _decode_kernel[(-(-n // config.block_n),)](
        x_desc, words_desc, weight.scale, weight.zero, bias, y, m, n, k, tiles,
        GROUP=weight.group_size, HAS_ZERO=weight.zero is not None, HAS_BIAS=bias is not None,
        EVEN_N=n % config.block_n == 0, BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.stages,
        PDL=pdl, WARPS=config.warps, num_warps=config.warps, launch_pdl=pdl,
    )  # fmt: skip
    return y
