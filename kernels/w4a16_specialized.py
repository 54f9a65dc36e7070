"""W4A16 with warpgroup MMAs on Hopper, warps specialized (compiled offline only)."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from compress.kernels.gluon_parts import load_row, pdl_launch_next, pdl_wait, scale_group, slice_weights, store_by_each
from compress.kernels.w4a16_tiled import _columns, _half_tile, _mma_layout, _load_words


@gluon.jit
def _produce(
    x_desc,
    words_desc,
    words_smem,
    x_smem,
    ready,
    empty,
    first,
    last,
    n0,
    m0,
    N,
    GROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    BYTES: gl.constexpr,
    PDL: gl.constexpr,
):
    """One warp: copies, STAGES tiles ahead of who reads them."""
    for i in gl.static_range(STAGES):
        mbarrier.expect(ready.index(i), BYTES, pred=first + i < last)
        for g in gl.static_range(GROUPS):
            tma.async_copy_global_to_shared(
                words_desc,
                [((first + i) * N + n0 + g * ROWS) // 2, 0],
                ready.index(i),
                words_smem.index(i * GROUPS + g),
                pred=first + i < last,
            )
    if PDL:
        pdl_launch_next()
        pdl_wait()
    for i in gl.static_range(STAGES):
        for h in gl.static_range(2):
            tma.async_copy_global_to_shared(
                x_desc, [m0, (first + i) * 128 + h * 64], ready.index(i), x_smem.index(2 * i + h), pred=first + i < last
            )
    stage = 0
    phase = 0
    for t in range(first + STAGES, last):
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(ready.index(stage), BYTES)
        for g in gl.static_range(GROUPS):
            tma.async_copy_global_to_shared(
                words_desc, [(t * N + n0 + g * ROWS) // 2, 0], ready.index(stage), words_smem.index(stage * GROUPS + g)
            )
        for h in gl.static_range(2):
            tma.async_copy_global_to_shared(
                x_desc, [m0, t * 128 + h * 64], ready.index(stage), x_smem.index(2 * stage + h)
            )
        stage += 1
        if stage == STAGES:
            stage = 0
            phase = phase ^ 1


@gluon.jit
def _consume(
    out_desc,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    sums_ptr,
    words_smem,
    x_smem,
    y_smem,
    ready,
    empty,
    first,
    last,
    n0,
    m0,
    N,
    K,
    tiles,
    g: gl.constexpr,
    GROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    EVEN_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    DTYPE: gl.constexpr,
):
    """A warpgroup: ROWS rows of W by BLOCK_M tokens."""
    MMA: gl.constexpr = _mma_layout(BLOCK_M, 4, 1)
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    PARTS: gl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    FIELDS: gl.constexpr = 2 * PARTS if HAS_ZERO else PARTS
    AHEAD: gl.constexpr = 2 if PARTS <= 2 else 1
    rn = n0 + g * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, A))
    columns = ()
    for i in gl.static_range(AHEAD):
        columns = columns + _columns(scale_ptr, zero_ptr, first + i, rn, N, K, tiles, GROUP, HAS_ZERO, EVEN_N, DTYPE)
    acc = gl.zeros((ROWS, BLOCK_M), gl.float32, MMA)
    mbarrier.wait(ready.index(0), 0, pred=first < last)
    words = _load_words(words_smem.index(g), ROWS, 4, 1, A)
    low = _half_tile(words, columns, 0, PARTS, HAS_ZERO, DTYPE, ROWS, A)
    high = low
    stage = 0
    phase = 0
    for t in range(first, last):
        acc = warpgroup_mma(low, x_smem.index(2 * stage).permute([1, 0]), acc, is_async=True)
        columns = columns + _columns(scale_ptr, zero_ptr, t + AHEAD, rn, N, K, tiles, GROUP, HAS_ZERO, EVEN_N, DTYPE)
        acc, high = warpgroup_mma_wait(1, deps=(acc, high))
        behind = stage - 1
        if behind < 0:
            behind = STAGES - 1
        mbarrier.arrive(empty.index(behind), count=1, pred=t > first)
        high = _half_tile(words, columns, 1, PARTS, HAS_ZERO, DTYPE, ROWS, A)
        acc = warpgroup_mma(high, x_smem.index(2 * stage + 1).permute([1, 0]), acc, is_async=True)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase = phase ^ 1
        later = ()
        for i in gl.static_range(FIELDS, (AHEAD + 1) * FIELDS):
            later = later + (columns[i],)
        columns = later
        mbarrier.wait(ready.index(stage), phase, pred=t + 1 < last)
        words = _load_words(words_smem.index(stage * GROUPS + g), ROWS, 4, 1, A)
        acc, low = warpgroup_mma_wait(1, deps=(acc, low))
        low = _half_tile(words, columns, 0, PARTS, HAS_ZERO, DTYPE, ROWS, A)
    acc, high = warpgroup_mma_wait(0, deps=(acc, high))
    rn = gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
    if SPLIT > 1:
        rm = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, MMA)), 0)
        gl.store(sums_ptr + rm * (GROUPS * ROWS) + g * ROWS + gl.expand_dims(rn, 1), acc)
    else:
        if HAS_BIAS:
            at = n0 + g * ROWS + rn
            acc += gl.expand_dims(gl.load(bias_ptr + at, mask=at < N, other=0).to(gl.float32), 1)
        y = y_smem.index(g)
        y.permute([1, 0]).store(acc.to(DTYPE))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [m0, n0 + g * ROWS], y)
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "tiles", "first_tile", "per_split"])
def _specialized_kernel(
    x_desc,
    words_desc,
    out_desc,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    workspace_ptr,
    M,
    N,
    K,
    tiles,
    first_tile,
    per_split,
    GROUP: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    EVEN_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    ROWS: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    GROUP_N: gl.constexpr,
    PDL: gl.constexpr,
    REGS: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    BLOCK_N: gl.constexpr = ROWS * GROUPS
    BYTES: gl.constexpr = BLOCK_N * 64 + BLOCK_M * 256
    pid = gl.program_id(0)
    tile = first_tile + pid // SPLIT
    rank = pid % SPLIT
    first = gl.minimum(rank * per_split, tiles)
    last = gl.minimum(first + per_split, tiles)
    m_tiles, n_tiles = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N)
    first_n = tile // (GROUP_N * m_tiles) * GROUP_N
    width = gl.minimum(n_tiles - first_n, GROUP_N)
    within = tile % (GROUP_N * m_tiles)
    n0, m0 = (first_n + within % width) * BLOCK_N, within // width * BLOCK_M
    words_smem = gl.allocate_shared_memory(gl.int16, [STAGES * GROUPS, ROWS // 2, 64], words_desc.layout)
    x_smem = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_M, 64], x_desc.layout)
    y_smem = gl.allocate_shared_memory(
        dtype, [GROUPS if SPLIT == 1 else 1, BLOCK_M if SPLIT == 1 else 8, ROWS], out_desc.layout
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()
    sums_ptr = workspace_ptr + gl.to_tensor(pid).to(gl.int64) * (BLOCK_M * BLOCK_N) if SPLIT > 1 else workspace_ptr
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        out_desc,
                        scale_ptr,
                        zero_ptr,
                        bias_ptr,
                        sums_ptr,
                        words_smem,
                        x_smem,
                        y_smem,
                        ready,
                        empty,
                        first,
                        last,
                        n0,
                        m0,
                        N,
                        K,
                        tiles,
                        0,
                        GROUPS,
                        ROWS,
                        GROUP,
                        HAS_ZERO,
                        HAS_BIAS,
                        EVEN_N,
                        BLOCK_M,
                        STAGES,
                        SPLIT,
                        dtype,
                    ),
                ),
                (
                    _consume,
                    (
                        out_desc,
                        scale_ptr,
                        zero_ptr,
                        bias_ptr,
                        sums_ptr,
                        words_smem,
                        x_smem,
                        y_smem,
                        ready,
                        empty,
                        first,
                        last,
                        n0,
                        m0,
                        N,
                        K,
                        tiles,
                        1,
                        GROUPS,
                        ROWS,
                        GROUP,
                        HAS_ZERO,
                        HAS_BIAS,
                        EVEN_N,
                        BLOCK_M,
                        STAGES,
                        SPLIT,
                        dtype,
                    ),
                ),
                (
                    _produce,
                    (
                        x_desc,
                        words_desc,
                        words_smem,
                        x_smem,
                        ready,
                        empty,
                        first,
                        last,
                        n0,
                        m0,
                        N,
                        GROUPS,
                        ROWS,
                        STAGES,
                        BYTES,
                        PDL,
                    ),
                ),
            ],
            [4, 1],
            [REGS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        out_desc,
                        scale_ptr,
                        zero_ptr,
                        bias_ptr,
                        sums_ptr,
                        words_smem,
                        x_smem,
                        y_smem,
                        ready,
                        empty,
                        first,
                        last,
                        n0,
                        m0,
                        N,
                        K,
                        tiles,
                        0,
                        GROUPS,
                        ROWS,
                        GROUP,
                        HAS_ZERO,
                        HAS_BIAS,
                        EVEN_N,
                        BLOCK_M,
                        STAGES,
                        SPLIT,
                        dtype,
                    ),
                ),
                (
                    _produce,
                    (
                        x_desc,
                        words_desc,
                        words_smem,
                        x_smem,
                        ready,
                        empty,
                        first,
                        last,
                        n0,
                        m0,
                        N,
                        GROUPS,
                        ROWS,
                        STAGES,
                        BYTES,
                        PDL,
                    ),
                ),
            ],
            [1],
            [24],
        )
