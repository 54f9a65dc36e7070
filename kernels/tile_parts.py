"""What the two tiled kernels share, `w4a16_tiled` and `w4a16_producer`.

Which tile a program computes, its copies, how words and scales are loaded. How it leaves: `tile_leave`. T is the
kernel's `Tile`.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from compress.kernels.cluster_sums import open_cluster
from compress.kernels.gluon_parts import (
    cluster_bases,
    cluster_rank,
    load_row,
    parts_of,
    pdl_launch_next,
    pdl_wait,
    scale_group,
)
from compress.kernels.stage_barriers import announce, copy_to_sharers, open_stages, ready_of
from compress.kernels.tile_layouts import memory_layout, operand_layout, words_layout
from compress.kernels.tile_shape import (
    GROUP_N,
    blocks_of,
    box_rows,
    common_rows,
    ctas_of,
    first_copied,
    in_units,
    last_copied,
    memory_units,
    n_parts,
    out_offset,
    part_tokens,
    piece_tokens,
    rows_of,
    stage_bytes,
    tiles_ahead,
    x_offset,
)

_GROUP_N: gl.constexpr = gl.constexpr(GROUP_N)


@gluon.constexpr_function
def _barrier_layout(t):  # type: ignore[no-untyped-def]
    return mbarrier.MBarrierLayout(cga_layout=cluster_bases(ctas_of(t), 1))


@gluon.jit
def open_memory(words_desc, x_desc, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Words int16 [STAGES BOXES, rows of a box BITS / 8, 64] and x [2 SLICES STAGES PARTS, tokens of a part, 64] in
    shared memory, and mbarriers int64 [128, 1], the last 2 STAGES of which are those of the stages; and where y leaves
    through. All of it is there for whoever runs behind this."""
    gl.static_assert(T.slices == 1 or (T.warps % (4 * T.slices) == 0 and blocks_of(T) == 1),
                     "a slice is whole warpgroups, 16 rows a warp")  # fmt: skip
    gl.static_assert(n_parts(T) == 1 or (T.slices == 1 and (blocks_of(T) == 1 or common_rows(T) > 0)),
                     "tokens are a power of two, or of programs of one slice and 16 rows a warp")  # fmt: skip
    gl.static_assert(common_rows(T) == 0 or (T.warps == 8 and T.split == 1 and not T.streams and T.block_m >= 64),
                     "common rows are of two warpgroups that share nothing out, from 64 tokens on")  # fmt: skip
    gl.static_assert(n_parts(T) == 1 or (part_tokens(T) >= 8 and T.block_m >= 32 and T.block_m <= 256),
                     "tokens are a power of two, or a multiple of 8 from 32 to 256")  # fmt: skip
    UNITS: gl.constexpr = memory_units(T)
    memory = gl.allocate_shared_memory(gl.int8, [UNITS, 1024], memory_layout(T))
    BOXES: gl.constexpr = T.stages * rows_of(T) // box_rows(T)
    words = memory.index(0)._reinterpret(gl.int16, [BOXES, box_rows(T) * T.bits // 8, 64], words_desc.layout)
    X_UNIT: gl.constexpr = x_offset(T) // 1024
    PARTS: gl.constexpr = 2 * T.slices * T.stages * n_parts(T)
    x = memory.index(X_UNIT)._reinterpret(x_desc.dtype, [PARTS, part_tokens(T), 64], x_desc.layout)
    OUT_UNIT: gl.constexpr = out_offset(T) // 1024
    barriers = memory.index(UNITS - 1)._reinterpret(gl.int64, [128, 1], _barrier_layout(T))
    open_stages(T)
    if ctas_of(T) > 1:
        open_cluster(T)
    fence_async_shared()
    gl.thread_barrier()
    return words, x, barriers, memory.index(OUT_UNIT)


@gluon.constexpr_function
def _slice_asm(t):  # type: ignore[no-untyped-def]
    shift = (32 * t.warps // t.slices).bit_length() - 1
    return "{.reg .b32 t; mov.u32 t, %tid.x; shr.u32 $0, t, " + str(shift) + ";}"


@gluon.jit
def slice_of_warp(T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Which slice of a stage this warp multiplies, of the consumers, which are the first of a program."""
    part = 0
    if T.slices > 1:
        asm: gl.constexpr = _slice_asm(T)
        part = gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=True, pack=1)
    return part


@gluon.jit
def rows_within(rows, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Of sums [ROWS]: which rows of the tile of W they are."""
    if T.slices > 1:
        rows = rows % T.block_n
    elif common_rows(T) > 0:
        rows -= (rows >= T.block_n).to(gl.int32) * common_rows(T)
    return rows


@gluon.jit
def load_words(words_smem, stage, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Of a stage, [ROWS, 8 BITS] int16 in the layout of the MMA's left operand."""
    ROWS: gl.constexpr = rows_of(T)
    BOXES: gl.constexpr = ROWS // box_rows(T)
    smem = words_smem.index(BOXES * stage)._reinterpret(gl.int16, [ROWS * T.bits // 8, 64], words_smem.layout)
    words = smem.load(words_layout(T))
    if T.bits == 4:
        words = words.reshape([ROWS // 2, 2, 32]).reshape([ROWS, 32])
    return gl.convert_layout(words, operand_layout(T), assert_trivial=True)


@gluon.jit
def row_unit(scale_ptr, rn, N, K, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [ROWS]: the power of two at or above a row's scales, which is behind them; 1 beyond N."""
    at = scale_ptr + gl.to_tensor(gl.cdiv(K, T.group)).to(gl.int64) * N + rn
    return gl.load(at, mask=rn < N, other=1.0).to(gl.float32)


@gluon.jit
def rows_of_operand(n0, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of W [ROWS] as the MMA's left operand has them."""
    return n0 + rows_within(gl.arange(0, rows_of(T), gl.SliceLayout(1, operand_layout(T))), T)


@gluon.jit
def load_columns(scale_ptr, zero_ptr, part_of_unit, t, n0, N, K, tiles, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """What stage t is dequantized with: the scales of its groups in x's dtype, where `in_units` in those of the row,
    then their zeros, [ROWS] each. part_of_unit: 1 / `row_unit`."""
    rn = rows_of_operand(n0, T)
    tile = t * T.slices + slice_of_warp(T)
    PARTS: gl.constexpr = parts_of(T.group)
    columns = ()
    for s in gl.static_range(PARTS):
        scale = load_row(scale_ptr, scale_group(tile, s, tiles, K, T.group), rn, N, T.even_n)
        if in_units(T):
            scale = scale.to(gl.float32) * part_of_unit
        columns = columns + (scale.to(T.dtype),)
    if T.has_zero:
        for s in gl.static_range(PARTS):
            columns = columns + (load_row(zero_ptr, scale_group(tile, s, tiles, K, T.group), rn, N, T.even_n),)
    return columns


@gluon.jit
def first_columns(scale_ptr, zero_ptr, first, n0, N, K, tiles, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """1 / `row_unit`, and `load_columns` of the first stages that `multiply_tiles` has to find loaded."""
    part_of_unit = 1.0
    if in_units(T):
        part_of_unit = 1.0 / row_unit(scale_ptr, rows_of_operand(n0, T), N, K, T)
    columns = ()
    for i in gl.static_range(tiles_ahead(T)):
        columns = columns + load_columns(scale_ptr, zero_ptr, part_of_unit, first + i, n0, N, K, tiles, T)
    return part_of_unit, columns


@gluon.jit
def copy_stage(words_desc, x_desc, x_piece_desc, barriers, words_smem, x_smem, t, n0, m0, M, N, stage, live,
               WORDS: gl.constexpr, X: gl.constexpr, FIRST: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Start the copies of the t-th tile or slices of K into a stage: words (and announce all bytes), x, or both.
    FIRST: see `announce`. Two programs that share x copy a half of it each, for both. A slice beyond K is zeros.

    Of a tile that M does not fill, x is copied in pieces, and none beyond: a copy fills rows that are not there with
    zeros several times more slowly than it copies rows. What is in their place is multiplied and goes nowhere. A tile
    of parts, which is only as wide as M asks for, has two copies for pieces, the second of which may copy some tokens
    again."""
    SLICES: gl.constexpr = T.slices
    FIRST_TOKENS: gl.constexpr = first_copied(T)
    PIECE: gl.constexpr = piece_tokens(T)
    LAST_TOKENS: gl.constexpr = last_copied(T)
    ready = ready_of(barriers, stage, T)
    tokens = gl.minimum(M - m0, T.block_m)
    second = tokens > T.block_m - LAST_TOKENS
    if WORDS:
        if n_parts(T) > 1:
            n_bytes = stage_bytes(T) - (T.block_m - FIRST_TOKENS) * 256 + second.to(gl.int32) * (LAST_TOKENS * 256)
        else:
            n_bytes = stage_bytes(T) - (T.block_m // PIECE - gl.cdiv(tokens, PIECE)) * (PIECE * SLICES * 256)
        announce(stage, n_bytes, live, FIRST, T)
        BOXES: gl.constexpr = rows_of(T) // (SLICES * box_rows(T))
        for s in gl.static_range(SLICES):
            for b in gl.static_range(BOXES):
                n = n0 + min(b * box_rows(T), T.block_n - box_rows(T))  # common rows once for each warpgroup
                row = ((t * SLICES + s) * N + n) // (8 // T.bits)
                box = words_smem.index((SLICES * stage + s) * BOXES + b)
                tma.async_copy_global_to_shared(words_desc, [row, 0], ready, box, pred=live)
    if X and T.sharers > 1:
        gl.static_assert(T.sharers == 2)
        h = cluster_rank() % 2
        into = x_offset(T) + (2 * stage + h) * T.block_m * 128
        copy_to_sharers("_producer_kernel", into, t * 128 + h * 64, m0, stage, live, T)
    elif X and n_parts(T) > 1:
        for h in gl.static_range(2):
            begin = (2 * stage + h) * n_parts(T)
            end = begin + (T.block_m - LAST_TOKENS) // part_tokens(T)
            tma.async_copy_global_to_shared(
                x_desc, [m0, t * 128 + h * 64], ready, _tokens_of_x(x_smem, begin, FIRST_TOKENS, T), pred=live
            )
            tma.async_copy_global_to_shared(
                x_piece_desc, [m0 + T.block_m - LAST_TOKENS, t * 128 + h * 64], ready,
                _tokens_of_x(x_smem, end, LAST_TOKENS, T), pred=live & second,
            )  # fmt: skip
    elif X:
        whole = live & (tokens == T.block_m)
        for h in gl.static_range(2 * SLICES):  # 64 inputs each
            tma.async_copy_global_to_shared(
                x_desc, [m0, t * (128 * SLICES) + h * 64], ready, x_smem.index(2 * SLICES * stage + h), pred=whole
            )
        if live & (tokens < T.block_m):
            PIECES: gl.constexpr = T.block_m // PIECE
            small = x_smem._reinterpret(x_desc.dtype, [2 * SLICES * T.stages * PIECES, PIECE, 64], x_piece_desc.layout)
            for piece in range(gl.cdiv(tokens, PIECE)):
                for h in gl.static_range(2 * SLICES):
                    into = small.index((2 * SLICES * stage + h) * PIECES + piece)
                    at = [m0 + piece * PIECE, t * (128 * SLICES) + h * 64]
                    tma.async_copy_global_to_shared(x_piece_desc, at, ready, into)


@gluon.jit
def _tokens_of_x(x_smem, part, TOKENS: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """x [TOKENS, 64] of 64 inputs in shared memory, from a part on."""
    return x_smem.index(part)._reinterpret(x_smem.dtype, [TOKENS, 64], x_smem.layout)


@gluon.jit
def next_stage(stage, phase, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """The stage of the next tile, and the phase of its barrier."""
    stage += 1
    if stage == T.stages:
        stage = 0
        phase = phase ^ 1
    return stage, phase


@gluon.jit
def all_tiles(M, N, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Tiles of y."""
    return gl.cdiv(M, T.block_m) * gl.cdiv(N, T.block_n)


@gluon.jit
def tile_origin(tile, M, N, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """First row of W and first token of a tile: GROUP_N tiles of N share their x in the L2 before the next M tile."""
    m_tiles, n_tiles = gl.cdiv(M, T.block_m), gl.cdiv(N, T.block_n)
    first_n = tile // (_GROUP_N * m_tiles) * _GROUP_N
    width = gl.minimum(n_tiles - first_n, _GROUP_N)
    within = tile % (_GROUP_N * m_tiles)
    return (first_n + within % width) * T.block_n, within // width * T.block_m


@gluon.jit
def share_of_tile(first_tile, tiles, per_split, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Which tile this program computes, its number in its cluster, and its share of K of so many tiles: the first of
    its stages, and the one behind the last."""
    stages = gl.cdiv(tiles, T.slices)
    CLUSTERS: gl.constexpr = T.split // T.adders
    pid = gl.program_id(0)  # of the cluster, where it is in one
    rank = 0
    if ctas_of(T) > 1:
        rank = cluster_rank()
    first = gl.minimum((pid % CLUSTERS * T.adders + rank // T.sharers) * per_split, stages)
    last = gl.minimum(first + per_split, stages)
    if T.split == 1 and T.bits == 8:
        # ptxas serializes the MMAs of a loop that might not run (C7515): with 8 bits, 128 tokens and 8 warps it did
        gl.assume(first < last)
    tile = first_tile + pid // CLUSTERS * T.sharers + rank % T.sharers
    return tile, rank, first, last


@gluon.jit
def wait_for_previous(T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Before x is read. The launch before a tail lets the tail start once it has waited itself, so that the tail need
    not wait for what precedes both."""
    if T.pdl:
        if T.before_tail:
            pdl_wait()
            pdl_launch_next()
        elif T.is_tail:
            pdl_launch_next()
        else:
            pdl_launch_next()
            pdl_wait()
