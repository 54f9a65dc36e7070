"""What the two tiled kernels share, `w4a16_tiled` and `w4a16_producer`.

Which tile a program computes, its shared memory and copies, how words and scales are loaded, how a tile leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from compress.kernels.cluster_sums import add_up, depart, mail_bytes, sums_fit
from compress.kernels.gluon_parts import (
    cluster_bases,
    cluster_rank,
    load_row,
    parts_of,
    pdl_launch_next,
    pdl_wait,
    scale_group,
)
from compress.kernels.stage_barriers import announce, ready_of

GROUP_N = 8
_UNIT = 1024  # bytes that parts of shared memory are multiples of, for swizzled copies


@dataclass(frozen=True)
class TiledConfig:
    """Tile sizes of one launch. split_k programs, 1, 2, 4 or 8, share the K of each tile that does not fill a wave of
    the machine; cluster: so many of them, side by side, add up through shared memory, where sums fit the stages
    (`cluster_sums`). producer: copies by a warp of their own (`w4a16_producer`)."""

    block_m: int
    block_n: int
    split_k: int
    warps: int
    stages: int
    cluster: int = 1
    producer: bool = False

    @property
    def ctas(self) -> int:
        """Programs of a cluster."""
        return _sizes(self)[0]

    @property
    def memory_bytes(self) -> int:
        """Shared memory of stages, mail and mbarriers."""
        return _sizes(self)[1]


@cache
def _sizes(config: TiledConfig) -> tuple[int, int]:
    """ctas and memory_bytes: kept, for a launch asks for them and what kernels share is slow to call."""
    m, n = config.block_m, config.block_n
    ctas = min(config.cluster, config.split_k)
    ctas = ctas if sums_fit(m, n, ctas, config.stages * int(bytes_of_stage(m, n))) else 1
    return ctas, int(_memory_units(m, n, config.stages, ctas)) * _UNIT


@gluon.constexpr_function
def bytes_of_stage(block_m, block_n):  # type: ignore[no-untyped-def]
    """Words and x of a tile of K."""
    return block_n * 64 + block_m * 256


@gluon.constexpr_function
def _memory_units(block_m, block_n, stages, ctas):  # type: ignore[no-untyped-def]
    behind = mail_bytes(block_m, block_n, ctas) + 16 * stages
    return stages * bytes_of_stage(block_m, block_n) // _UNIT + -(-behind // _UNIT)


@gluon.constexpr_function
def barrier_offset(block_m, block_n, stages, ctas):  # type: ignore[no-untyped-def]
    """BASE of `stage_barriers`: they are the end of the last unit."""
    return _memory_units(block_m, block_n, stages, ctas) * _UNIT - 16 * stages


@gluon.constexpr_function
def _memory_layout(ctas):  # type: ignore[no-untyped-def]
    return gl.SwizzledSharedLayout(1, 1, 1, [0], cga_layout=cluster_bases(ctas, 1))


@gluon.jit
def stage_memory(words_desc, x_desc, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
                 CTAS: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Words int16 [STAGES, BLOCK_N / 2, 64] and x [2 STAGES, BLOCK_M, 64] in shared memory, what `cluster_sums` needs
    behind them, and mbarriers int64 [128, 1], the last 2 STAGES of which are those of the stages."""
    UNITS: gl.constexpr = _memory_units(BLOCK_M, BLOCK_N, STAGES, CTAS)
    memory = gl.allocate_shared_memory(gl.int8, [UNITS, 1024], _memory_layout(CTAS))
    words = memory.index(0)._reinterpret(gl.int16, [STAGES, BLOCK_N // 2, 64], words_desc.layout)
    x = memory.index(STAGES * BLOCK_N * 64 // 1024)._reinterpret(x_desc.dtype, [2 * STAGES, BLOCK_M, 64], x_desc.layout)
    barriers = memory.index(UNITS - 1)._reinterpret(gl.int64, [128, 1], _barrier_layout(CTAS))
    return words, x, barriers


@gluon.constexpr_function
def mma_layout(tokens, warps, ctas):  # type: ignore[no-untyped-def]
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, tokens, 16], cluster_bases(ctas, 2))


@gluon.constexpr_function
def _barrier_layout(ctas):  # type: ignore[no-untyped-def]
    return mbarrier.MBarrierLayout(cga_layout=cluster_bases(ctas, 1))


@gluon.constexpr_function
def words_layout(rows, warps, ctas):  # type: ignore[no-untyped-def]
    """[rows / 2, 64] int16, two rows of W side by side, held as wgmma holds its left operand [rows, 32]: lane 4 r + q
    of warp w has words 2 q, 2 q + 1 (and those 8, 16, 24 further) of rows 16 w + r and 16 w + r + 8."""
    reg = [[0, 1], [4, 0], [0, 8], [0, 16]]
    row = 16 * warps
    while row < rows:
        reg.append([row // 2, 0])
        row *= 2
    lane = [[0, 2], [0, 4], [0, 32], [1, 0], [2, 0]]
    warp = []
    w = 1
    while w < warps:
        warp.append([8 * w, 0])
        w *= 2
    return gl.DistributedLinearLayout(reg, lane, warp, cluster_bases(ctas, 2), [rows // 2, 64])


@gluon.jit
def load_words(smem, BLOCK_N: gl.constexpr, WARPS: gl.constexpr, CTAS: gl.constexpr, A: gl.constexpr):  # type: ignore[no-untyped-def]
    words = smem.load(words_layout(BLOCK_N, WARPS, CTAS)).reshape([BLOCK_N // 2, 2, 32]).reshape([BLOCK_N, 32])
    return gl.convert_layout(words, A, assert_trivial=True)


@gluon.constexpr_function
def in_units(has_zero, dtype):  # type: ignore[no-untyped-def]
    """Whether weights are dequantized by `scaled_slice`."""
    return not has_zero and dtype == gl.float16


@gluon.jit
def row_unit(scale_ptr, rn, N, K, GROUP: gl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [BLOCK_N]: the power of two at or above a row's scales, which is behind them; 1 beyond N."""
    at = scale_ptr + gl.to_tensor(gl.cdiv(K, GROUP)).to(gl.int64) * N + rn
    return gl.load(at, mask=rn < N, other=1.0).to(gl.float32)


@gluon.jit
def load_columns(scale_ptr, zero_ptr, part_of_unit, t, rn, N, K, tiles,
             GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, EVEN_N: gl.constexpr, DTYPE: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """What tile t is dequantized with: the scales of its groups in DTYPE, where `in_units` in those of the row, then
    their zeros, [BLOCK_N] each. part_of_unit: 1 / `row_unit`."""
    PARTS: gl.constexpr = parts_of(GROUP)
    columns = ()
    for s in gl.static_range(PARTS):
        scale = load_row(scale_ptr, scale_group(t, s, tiles, K, GROUP), rn, N, EVEN_N)
        if in_units(HAS_ZERO, DTYPE):
            scale = scale.to(gl.float32) * part_of_unit
        columns = columns + (scale.to(DTYPE),)
    if HAS_ZERO:
        for s in gl.static_range(PARTS):
            columns = columns + (load_row(zero_ptr, scale_group(t, s, tiles, K, GROUP), rn, N, EVEN_N),)
    return columns


@gluon.constexpr_function
def tiles_ahead(group):  # type: ignore[no-untyped-def]
    """How many tiles before they are used scales are loaded: they come from memory and are few; further ahead than a
    load takes, as far as registers allow."""
    return 2 if parts_of(group) <= 2 else 1


@gluon.jit
def rows_of_operand(n0, BLOCK_N: gl.constexpr, A: gl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of W [BLOCK_N] as the MMA's left operand has them."""
    return n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(1, A))


@gluon.jit
def first_columns(scale_ptr, zero_ptr, first, n0, N, K, tiles, GROUP: gl.constexpr, HAS_ZERO: gl.constexpr,
                  EVEN_N: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WARPS: gl.constexpr,
                  CTAS: gl.constexpr, DTYPE: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """1 / `row_unit`, and `load_columns` of the first tiles that `multiply_tiles` has to find loaded."""
    rn = rows_of_operand(n0, BLOCK_N, gl.DotOperandLayout(0, mma_layout(BLOCK_M, WARPS, CTAS), 2))
    part_of_unit = 1.0 / row_unit(scale_ptr, rn, N, K, GROUP)
    columns = ()
    for i in gl.static_range(tiles_ahead(GROUP)):
        columns = columns + load_columns(
            scale_ptr, zero_ptr, part_of_unit, first + i, rn, N, K, tiles, GROUP, HAS_ZERO, EVEN_N, DTYPE
        )
    return part_of_unit, columns


@gluon.jit
def copy_stage(words_desc, x_desc, barriers, words_smem, x_smem, t, n0, m0, N, stage, live, WORDS: gl.constexpr,
               X: gl.constexpr, FIRST: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
               STAGES: gl.constexpr, CTAS: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Start the copies of tile t into a stage: words (and announce all bytes), x, or both. FIRST: see `announce`."""
    ready = ready_of(barriers, stage, STAGES)
    if WORDS:
        BASE: gl.constexpr = barrier_offset(BLOCK_M, BLOCK_N, STAGES, CTAS)
        announce(stage, bytes_of_stage(BLOCK_M, BLOCK_N), live, FIRST, BASE)
        tma.async_copy_global_to_shared(words_desc, [(t * N + n0) // 2, 0], ready, words_smem.index(stage), pred=live)
    if X:
        for h in gl.static_range(2):
            tma.async_copy_global_to_shared(
                x_desc, [m0, t * 128 + h * 64], ready, x_smem.index(2 * stage + h), pred=live
            )


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    """The stage of the next tile, and the phase of its barrier."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase = phase ^ 1
    return stage, phase


@gluon.jit
def tile_origin(tile, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_N: gl.constexpr):  # type: ignore[no-untyped-def]
    """First row of W and first token of a tile: GROUP_N tiles of N share their x in the L2 before the next M tile."""
    m_tiles, n_tiles = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N)
    first_n = tile // (GROUP_N * m_tiles) * GROUP_N
    width = gl.minimum(n_tiles - first_n, GROUP_N)
    within = tile % (GROUP_N * m_tiles)
    return (first_n + within % width) * BLOCK_N, within // width * BLOCK_M


@gluon.jit
def share_of_tile(first_tile, tiles, per_split, SPLIT: gl.constexpr, CTAS: gl.constexpr):  # type: ignore[no-untyped-def]
    """Which tile this program computes, its number in its cluster, and its share of K: first tile, and the one behind
    the last."""
    CLUSTERS: gl.constexpr = SPLIT // CTAS
    pid = gl.program_id(0)  # of the cluster, where it is in one
    rank = 0
    if CTAS > 1:
        rank = cluster_rank()
    first = gl.minimum((pid % CLUSTERS * CTAS + rank) * per_split, tiles)
    return first_tile + pid // CLUSTERS, rank, first, gl.minimum(first + per_split, tiles)


@gluon.jit
def wait_for_previous(PDL: gl.constexpr, BEFORE_TAIL: gl.constexpr, IS_TAIL: gl.constexpr):  # type: ignore[no-untyped-def]
    """Before x is read. The launch before a tail lets the tail start once it has waited itself, so that the tail need
    not wait for what precedes both."""
    if PDL:
        if BEFORE_TAIL:
            pdl_wait()
            pdl_launch_next()
        elif IS_TAIL:
            pdl_launch_next()
        else:
            pdl_launch_next()
            pdl_wait()


@gluon.jit
def leave(acc, out_desc, out_ptr, bias_ptr, workspace_ptr, x_smem, rank, n0, m0, M, N, HAS_BIAS: gl.constexpr,
          BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
          WARPS: gl.constexpr, CTAS: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """A program's sums [BLOCK_N, BLOCK_M]: a tile of y, a share of one, or sums in the workspace for another kernel."""
    MMA: gl.constexpr = mma_layout(BLOCK_M, WARPS, CTAS)
    sums_ptr = workspace_ptr
    if SPLIT > CTAS:
        sums_ptr = workspace_ptr + gl.program_id(0).to(gl.int64) * (BLOCK_M * BLOCK_N)
    if CTAS > 1:
        total, rm, rn = add_up(acc, rank, BLOCK_M, BLOCK_N, CTAS, WARPS, STAGES * bytes_of_stage(BLOCK_M, BLOCK_N))
        if SPLIT > CTAS:
            gl.store(sums_ptr + gl.expand_dims(rm * BLOCK_N, 1) + gl.expand_dims(rn, 0), total)
        else:
            if HAS_BIAS:
                total += gl.expand_dims(gl.load(bias_ptr + n0 + rn, mask=n0 + rn < N, other=0).to(gl.float32), 0)
            mask = gl.expand_dims(m0 + rm < M, 1) & gl.expand_dims(n0 + rn < N, 0)
            y_at = gl.expand_dims((m0 + rm).to(gl.int64) * N, 1) + gl.expand_dims(n0 + rn, 0)
            gl.store(out_ptr + y_at, total.to(out_ptr.dtype.element_ty), mask=mask)
        depart()
    elif SPLIT > 1:
        rn = gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))
        rm = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, MMA)), 0)
        gl.store(sums_ptr + rm * BLOCK_N + gl.expand_dims(rn, 1), acc)
    else:
        store_tile(out_desc, acc, bias_ptr, x_smem, n0, m0, N, HAS_BIAS, BLOCK_M, BLOCK_N, MMA)


@gluon.jit
def store_tile(out_desc, acc, bias_ptr, x_smem, n0, m0, N, HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr,
               BLOCK_N: gl.constexpr, MMA: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """A tile of y^T and bias to y as whole lines, through the shared memory that the stages of x no longer need."""
    if HAS_BIAS:
        rn = gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))
        bias = gl.load(bias_ptr + n0 + rn, mask=n0 + rn < N, other=0).to(gl.float32)
        acc += gl.expand_dims(bias, 1)
    gl.static_assert(x_smem.shape[0] * 64 >= BLOCK_N, "the stages of x do not hold y")
    y_smem = x_smem._reinterpret(out_desc.dtype, [BLOCK_M, BLOCK_N], out_desc.layout)
    gl.thread_barrier()  # other warps may still be multiplying
    y_smem.permute([1, 0]).store(acc.to(out_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [m0, n0], y_smem)
    tma.store_wait(0)
