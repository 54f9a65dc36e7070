"""Layouts of what a tiled kernel has in registers and in shared memory, which follow from its `Tile`."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from compress.kernels.gluon_parts import cluster_bases, cluster_shares
from compress.kernels.tile_shape import ctas_of, part_tokens, rows_of, tokens_at_once


@gluon.constexpr_function
def memory_layout(t):  # type: ignore[no-untyped-def]
    return gl.SwizzledSharedLayout(1, 1, 1, [0], cga_layout=cluster_bases(ctas_of(t), 1))


@gluon.constexpr_function
def sums_layout(t, tokens):  # type: ignore[no-untyped-def]
    """Of sums [ROWS, tokens]."""
    return gl.NVMMADistributedLayout([3, 0], [t.warps, 1], [16, tokens, 16], cluster_bases(ctas_of(t), 2))


@gluon.constexpr_function
def leaving_layout(t):  # type: ignore[no-untyped-def]
    """Of the sums [ROWS, tokens_at_once]."""
    return sums_layout(t, tokens_at_once(t))


@gluon.constexpr_function
def mma_layout(t):  # type: ignore[no-untyped-def]
    """Of the sums [ROWS, tokens] of a part."""
    return sums_layout(t, part_tokens(t))


@gluon.constexpr_function
def operand_layout(t):  # type: ignore[no-untyped-def]
    """Of the MMA's left operand, weights."""
    return gl.DotOperandLayout(0, mma_layout(t), 2)


@gluon.constexpr_function
def words_layout(t):  # type: ignore[no-untyped-def]
    """[ROWS BITS / 8, 64] int16, in 4 bits two rows of W side by side, held as wgmma holds its left operand
    [ROWS, 8 BITS]: lane 4 r + q of warp w has words 2 q, 2 q + 1 (and those 8, 16, 24 .. further) of rows 16 w + r
    and 16 w + r + 8."""
    bits = t.bits
    if bits == 4:
        reg, lane = [[0, 1], [4, 0], [0, 8], [0, 16]], [[0, 2], [0, 4], [0, 32], [1, 0], [2, 0]]
    else:
        reg, lane = [[0, 1], [8, 0], [0, 8], [0, 16], [0, 32]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    row = 16 * t.warps
    while row < rows_of(t):
        reg.append([row * bits // 8, 0])
        row *= 2
    warp = []
    w = 1
    while w < t.warps:
        warp.append([2 * bits * w, 0])
        w *= 2
    return gl.DistributedLinearLayout(reg, lane, warp, cluster_bases(ctas_of(t), 2), [rows_of(t) * bits // 8, 64])


@gluon.constexpr_function
def sum_layout(t):  # type: ignore[no-untyped-def]
    """[BLOCK_M, SHARERS * BLOCK_N] float32 dealt out to a cluster, 16 bytes a thread along the columns."""
    wide = t.block_n // 4 if t.block_n < 128 else 32
    return gl.BlockedLayout([1, 4], [32 // wide, wide], [t.warps, 1], [1, 0], cluster_shares(t.adders, t.sharers))
