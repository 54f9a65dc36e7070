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

from compress.kernels.cluster_sums import add_up, attend_sums, depart, mail_bytes, sums_fit, wait_for_sharers
from compress.kernels.gluon_parts import (
    cluster_bases,
    cluster_rank,
    load_row,
    parts_of,
    pdl_launch_next,
    pdl_wait,
    scale_group,
)
from compress.kernels.stage_barriers import announce, copy_to_sharers, ready_of

GROUP_N = 8
_UNIT = 1024  # bytes that parts of shared memory are multiples of, for swizzled copies


@dataclass(frozen=True)
class TiledConfig:
    """Tile sizes of one launch. split_k programs, 1, 2, 4 or 8, share the K of each tile that does not fill a wave of
    the machine; cluster: so many of them, side by side, add up through shared memory, where sums fit the stages
    (`cluster_sums`). producer: copies by a warp of their own (`w4a16_producer`). sharers, 1 or 2: programs of so many
    tiles, neighbours in N, are one cluster and get x by one copy (`stage_barriers`), where there is a producer and no
    sum of a program alone goes to the workspace."""

    block_m: int
    block_n: int
    split_k: int
    warps: int
    stages: int
    cluster: int = 1
    producer: bool = False
    sharers: int = 1
    unroll: int = 1

    @property
    def adders(self) -> int:
        """Programs of a cluster that add up one tile."""
        return _adders(self)

    @property
    def ctas(self) -> int:
        """Programs of a cluster."""
        return self.adders * self.shares_x

    @property
    def shares_x(self) -> int:
        """`sharers`, or 1 where there is none to share x with."""
        return self.sharers if self.producer and (self.adders > 1 or self.split_k == 1) else 1

    def memory_bytes(self, bits: int = 4) -> int:
        """Shared memory of stages, mail and mbarriers."""
        return _memory_bytes(self, bits)


@cache  # both: a launch asks for them, and what kernels share is slow to call
def _adders(config: TiledConfig) -> int:
    """Where sums fit the stages of 4 bits, so that they do with more."""
    adders, stage_bytes = min(config.cluster, config.split_k), int(bytes_of_stage(config.block_m, config.block_n, 4))
    return adders if sums_fit(config.block_m, config.block_n, adders, config.stages * stage_bytes) else 1


@cache
def _memory_bytes(config: TiledConfig, bits: int) -> int:
    return int(_memory_units(config.block_m, config.block_n, bits, config.stages, config.adders)) * _UNIT


@gluon.constexpr_function
def bytes_of_stage(block_m, block_n, bits):  # type: ignore[no-untyped-def]
    """Words and x of a tile of K."""
    return block_n * 16 * bits + block_m * 256


@gluon.constexpr_function
def _memory_units(block_m, block_n, bits, stages, adders):  # type: ignore[no-untyped-def]
    behind = mail_bytes(block_m, block_n, adders) + 16 * stages
    return stages * bytes_of_stage(block_m, block_n, bits) // _UNIT + -(-behind // _UNIT)


@gluon.constexpr_function
def barrier_offset(block_m, block_n, bits, stages, adders):  # type: ignore[no-untyped-def]
    """BASE of `stage_barriers`: they are the end of the last unit."""
    return _memory_units(block_m, block_n, bits, stages, adders) * _UNIT - 16 * stages


@gluon.constexpr_function
def _memory_layout(ctas):  # type: ignore[no-untyped-def]
    return gl.SwizzledSharedLayout(1, 1, 1, [0], cga_layout=cluster_bases(ctas, 1))


@gluon.jit
def stage_memory(words_desc, x_desc, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BITS: gl.constexpr,
                 STAGES: gl.constexpr, CTAS: gl.constexpr, SHARERS: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Words int16 [STAGES, BLOCK_N BITS / 8, 64] and x [2 STAGES, BLOCK_M, 64] in shared memory, what `cluster_sums`
    needs behind them, and mbarriers int64 [128, 1], the last 2 STAGES of which are those of the stages."""
    UNITS: gl.constexpr = _memory_units(BLOCK_M, BLOCK_N, BITS, STAGES, CTAS // SHARERS)
    memory = gl.allocate_shared_memory(gl.int8, [UNITS, 1024], _memory_layout(CTAS))
    words = memory.index(0)._reinterpret(gl.int16, [STAGES, BLOCK_N * BITS // 8, 64], words_desc.layout)
    X_UNIT: gl.constexpr = STAGES * BLOCK_N * 16 * BITS // 1024
    x = memory.index(X_UNIT)._reinterpret(x_desc.dtype, [2 * STAGES, BLOCK_M, 64], x_desc.layout)
    barriers = memory.index(UNITS - 1)._reinterpret(gl.int64, [128, 1], _barrier_layout(CTAS))
    return words, x, barriers


@gluon.constexpr_function
def mma_layout(tokens, warps, ctas):  # type: ignore[no-untyped-def]
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, tokens, 16], cluster_bases(ctas, 2))


@gluon.constexpr_function
def _barrier_layout(ctas):  # type: ignore[no-untyped-def]
    return mbarrier.MBarrierLayout(cga_layout=cluster_bases(ctas, 1))


@gluon.constexpr_function
def words_layout(rows, bits, warps, ctas):  # type: ignore[no-untyped-def]
    """[rows bits / 8, 64] int16, in 4 bits two rows of W side by side, held as wgmma holds its left operand
    [rows, 8 bits]: lane 4 r + q of warp w has words 2 q, 2 q + 1 (and those 8, 16, 24 .. further) of rows 16 w + r and
    16 w + r + 8."""
    if bits == 4:
        reg, lane = [[0, 1], [4, 0], [0, 8], [0, 16]], [[0, 2], [0, 4], [0, 32], [1, 0], [2, 0]]
    else:
        reg, lane = [[0, 1], [8, 0], [0, 8], [0, 16], [0, 32]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    row = 16 * warps
    while row < rows:
        reg.append([row * bits // 8, 0])
        row *= 2
    warp = []
    w = 1
    while w < warps:
        warp.append([2 * bits * w, 0])
        w *= 2
    return gl.DistributedLinearLayout(reg, lane, warp, cluster_bases(ctas, 2), [rows * bits // 8, 64])


@gluon.jit
def load_words(smem, BLOCK_N: gl.constexpr, BITS: gl.constexpr, WARPS: gl.constexpr, CTAS: gl.constexpr,
               A: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """[BLOCK_N, 8 BITS] int16 in the layout of the MMA's left operand."""
    words = smem.load(words_layout(BLOCK_N, BITS, WARPS, CTAS))
    if BITS == 4:
        words = words.reshape([BLOCK_N // 2, 2, 32]).reshape([BLOCK_N, 32])
    return gl.convert_layout(words, A, assert_trivial=True)


@gluon.constexpr_function
def in_units(bits, has_zero, dtype):  # type: ignore[no-untyped-def]
    """Whether weights are dequantized by `scaled_slice`."""
    return bits == 4 and not has_zero and dtype == gl.float16


@gluon.jit
def row_unit(scale_ptr, rn, N, K, GROUP: gl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [BLOCK_N]: the power of two at or above a row's scales, which is behind them; 1 beyond N."""
    at = scale_ptr + gl.to_tensor(gl.cdiv(K, GROUP)).to(gl.int64) * N + rn
    return gl.load(at, mask=rn < N, other=1.0).to(gl.float32)


@gluon.jit
def load_columns(scale_ptr, zero_ptr, part_of_unit, t, rn, N, K, tiles,
                 BITS: gl.constexpr, GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, EVEN_N: gl.constexpr,
                 DTYPE: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """What tile t is dequantized with: the scales of its groups in DTYPE, where `in_units` in those of the row, then
    their zeros, [BLOCK_N] each. part_of_unit: 1 / `row_unit`."""
    PARTS: gl.constexpr = parts_of(GROUP)
    columns = ()
    for s in gl.static_range(PARTS):
        scale = load_row(scale_ptr, scale_group(t, s, tiles, K, GROUP), rn, N, EVEN_N)
        if in_units(BITS, HAS_ZERO, DTYPE):
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
                  EVEN_N: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BITS: gl.constexpr,
                  WARPS: gl.constexpr, CTAS: gl.constexpr, DTYPE: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """1 / `row_unit`, and `load_columns` of the first tiles that `multiply_tiles` has to find loaded."""
    rn = rows_of_operand(n0, BLOCK_N, gl.DotOperandLayout(0, mma_layout(BLOCK_M, WARPS, CTAS), 2))
    part_of_unit = 1.0
    if in_units(BITS, HAS_ZERO, DTYPE):
        part_of_unit = 1.0 / row_unit(scale_ptr, rn, N, K, GROUP)
    columns = ()
    for i in gl.static_range(tiles_ahead(GROUP)):
        columns = columns + load_columns(
            scale_ptr, zero_ptr, part_of_unit, first + i, rn, N, K, tiles, BITS, GROUP, HAS_ZERO, EVEN_N, DTYPE
        )
    return part_of_unit, columns


@gluon.jit
def copy_stage(words_desc, x_desc, barriers, words_smem, x_smem, t, n0, m0, N, stage, live, WORDS: gl.constexpr,
               X: gl.constexpr, FIRST: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BITS: gl.constexpr,
               STAGES: gl.constexpr, CTAS: gl.constexpr, SHARERS: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Start the copies of tile t into a stage: words (and announce all bytes), x, or both. FIRST: see `announce`.
    Two programs that share x copy a half of it each, for both."""
    ready = ready_of(barriers, stage, STAGES)
    BASE: gl.constexpr = barrier_offset(BLOCK_M, BLOCK_N, BITS, STAGES, CTAS // SHARERS)
    if WORDS:
        announce(stage, bytes_of_stage(BLOCK_M, BLOCK_N, BITS), live, FIRST, BASE)
        row = (t * N + n0) // (8 // BITS)
        tma.async_copy_global_to_shared(words_desc, [row, 0], ready, words_smem.index(stage), pred=live)
    if X and SHARERS > 1:
        gl.static_assert(SHARERS == 2)
        h = cluster_rank() % 2
        into = STAGES * BLOCK_N * 16 * BITS + (2 * stage + h) * BLOCK_M * 128
        copy_to_sharers("_producer_kernel", into, t * 128 + h * 64, m0, stage, live, BASE, SHARERS)
    elif X:
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
def share_of_tile(first_tile, tiles, per_split, BITS: gl.constexpr, SPLIT: gl.constexpr, CTAS: gl.constexpr,
                  SHARERS: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Which tile this program computes, its number in its cluster, and its share of K: first tile, and the one behind
    the last."""
    CLUSTERS: gl.constexpr = SPLIT * SHARERS // CTAS
    pid = gl.program_id(0)  # of the cluster, where it is in one
    rank = 0
    if CTAS > 1:
        rank = cluster_rank()
    first = gl.minimum((pid % CLUSTERS * (CTAS // SHARERS) + rank // SHARERS) * per_split, tiles)
    last = gl.minimum(first + per_split, tiles)
    if SPLIT == 1 and BITS == 8:
        # ptxas serializes the MMAs of a loop that might not run (C7515): with 8 bits, 128 tokens and 8 warps it did
        gl.assume(first < last)
    tile = first_tile + pid // CLUSTERS * SHARERS + rank % SHARERS
    return tile, rank, first, last


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
          BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BITS: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
          WARPS: gl.constexpr, CTAS: gl.constexpr, SHARERS: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """A program's sums [BLOCK_N, BLOCK_M]: a tile of y, a share of one, or sums in the workspace for another kernel."""
    MMA: gl.constexpr = mma_layout(BLOCK_M, WARPS, CTAS)
    ADDERS: gl.constexpr = CTAS // SHARERS
    CLUSTERS: gl.constexpr = SPLIT // ADDERS
    pid = gl.program_id(0)
    if ADDERS > 1:
        total, rm, rn = add_up(acc, rank, BLOCK_M, BLOCK_N, ADDERS, SHARERS, WARPS,
                               STAGES * bytes_of_stage(BLOCK_M, BLOCK_N, BITS))  # fmt: skip
        if CLUSTERS > 1:
            sums_ptr = workspace_ptr + (pid // CLUSTERS * (SHARERS * CLUSTERS) + pid % CLUSTERS).to(gl.int64) * (
                BLOCK_M * BLOCK_N
            )
            tile = rn // BLOCK_N * (CLUSTERS * BLOCK_M * BLOCK_N)
            gl.store(sums_ptr + gl.expand_dims(rm * BLOCK_N, 1) + gl.expand_dims(tile + rn % BLOCK_N, 0), total)
        else:
            first = n0 - rank % SHARERS * BLOCK_N
            if HAS_BIAS:
                bias = gl.load(bias_ptr + first + rn, mask=first + rn < N, other=0)
                total += gl.expand_dims(bias.to(gl.float32), 0)
            mask = gl.expand_dims(m0 + rm < M, 1) & gl.expand_dims(first + rn < N, 0)
            y_at = gl.expand_dims((m0 + rm).to(gl.int64) * N, 1) + gl.expand_dims(first + rn, 0)
            gl.store(out_ptr + y_at, total.to(out_ptr.dtype.element_ty), mask=mask)
        depart()
    elif SPLIT > 1:
        sums_ptr = workspace_ptr + pid.to(gl.int64) * (BLOCK_M * BLOCK_N)
        rn = gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))
        rm = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, MMA)), 0)
        gl.store(sums_ptr + rm * BLOCK_N + gl.expand_dims(rn, 1), acc)
    else:
        wait_for_sharers(SHARERS)
        store_tile(out_desc, acc, bias_ptr, x_smem, n0, m0, N, HAS_BIAS, BLOCK_M, BLOCK_N, MMA)
        if SHARERS > 1:
            attend_sums(1, SHARERS)


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
