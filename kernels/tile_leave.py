"""How a tile leaves the two tiled kernels: as lines of y, as a share of them, or as sums for who adds up the rest.

T is the kernel's `Tile`. Sums of a tile are [ROWS, tokens] of each of its parts, of which there is one where its tokens
are a power of two.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from compress.kernels.cluster_sums import add_slices, attend_sums, depart, exchange, total_of, wait_for_sharers
from compress.kernels.gluon_parts import columns_part
from compress.kernels.tile_layouts import leaving_layout, mma_layout, sums_layout
from compress.kernels.tile_shape import (
    box_rows,
    common_part,
    common_tokens,
    copies_at_once,
    n_parts,
    out_copies,
    out_rows,
    part_tokens,
    stages_bytes,
    token_bytes,
    tokens_at_once,
    x_offset,
)


@gluon.jit
def leave(accs, out_desc, out_ptr, bias_ptr, workspace_ptr, out_smem, rank, n0, m0, M, N, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """A program's sums, [ROWS, tokens] of each part, over its share of K: a tile of y, a share of one, or sums in the
    workspace for another kernel."""
    PARTS: gl.constexpr = n_parts(T)
    if T.adders > 1:
        exchange(accs, rank, T)
        for p in gl.static_range(PARTS):
            total, rm, rn = total_of(p, rank, T)
            rm += p * part_tokens(T)
            _store_sums(out_ptr, workspace_ptr, total, bias_ptr, n0 - rank % T.sharers * T.block_n, m0, rm, rn, M, N, T)
        depart()
    elif T.split > 1 and T.slices == 1:
        sums_ptr = workspace_ptr + gl.program_id(0).to(gl.int64) * (T.block_m * T.block_n)
        for p in gl.static_range(PARTS):
            rn = gl.arange(0, T.block_n, gl.SliceLayout(1, mma_layout(T)))
            rm = p * part_tokens(T) + gl.arange(0, part_tokens(T), gl.SliceLayout(0, mma_layout(T)))
            gl.store(sums_ptr + gl.expand_dims(rm * T.block_n, 0) + gl.expand_dims(rn, 1), accs[p])
    else:
        leave_alone(accs, out_desc, out_ptr, bias_ptr, workspace_ptr, out_smem, n0, m0, M, N, T)


@gluon.jit
def leave_alone(accs, out_desc, out_ptr, bias_ptr, workspace_ptr, out_smem, n0, m0, M, N, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """`leave` of sums that no other program of a cluster has a share of."""
    if T.slices > 1:
        TOKENS: gl.constexpr = tokens_at_once(T)
        COPIES: gl.constexpr = T.block_m // TOKENS
        for i in gl.static_range(COPIES):
            total, rm, rn = add_slices(columns_part(accs[0], i, COPIES, leaving_layout(T)), T)
            _store_sums(out_ptr, workspace_ptr, total, bias_ptr, n0, m0, rm + i * TOKENS, rn, M, N, T)
    else:
        wait_for_sharers(T)
        _store_tile(out_desc, accs, bias_ptr, out_smem, n0, m0, N, T)
        if T.sharers > 1:
            attend_sums(T)


@gluon.jit
def _store_sums(out_ptr, workspace_ptr, total, bias_ptr, n0, m0, rm, rn, M, N, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Sums [tokens, columns] of tokens rm and columns rn: where they are all of K, with bias to y from token m0 and
    column n0 on; else to the workspace, for the tile of each sharer one cluster's or program's behind another's."""
    BLOCK: gl.constexpr = T.block_m * T.block_n
    CLUSTERS: gl.constexpr = T.split // T.adders
    if CLUSTERS > 1:
        pid = gl.program_id(0)
        sums_ptr = workspace_ptr + (pid // CLUSTERS * (T.sharers * CLUSTERS) + pid % CLUSTERS).to(gl.int64) * BLOCK
        tile = rn // T.block_n * (CLUSTERS * BLOCK)
        gl.store(sums_ptr + gl.expand_dims(rm * T.block_n, 1) + gl.expand_dims(tile + rn % T.block_n, 0), total)
    else:
        if T.has_bias:
            bias = gl.load(bias_ptr + n0 + rn, mask=n0 + rn < N, other=0)
            total += gl.expand_dims(bias.to(gl.float32), 0)
        mask = gl.expand_dims(m0 + rm < M, 1) & gl.expand_dims(n0 + rn < N, 0)
        y_at = gl.expand_dims((m0 + rm).to(gl.int64) * N, 1) + gl.expand_dims(n0 + rn, 0)
        gl.store(out_ptr + y_at, total.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _leaving(accs, first: gl.constexpr, PARTS: gl.constexpr, PART: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """PARTS sums from the first on, of PART tokens each, as [rows, tokens_at_once] one behind the other; the last may
    have tokens of the one before again."""
    TOKENS: gl.constexpr = tokens_at_once(T)
    TOGETHER: gl.constexpr = TOKENS // PART
    found = ()
    if TOGETHER > 1:
        for p in gl.static_range(0, PARTS, TOGETHER):
            found = found + (_parts_together(accs, first + min(p, PARTS - TOGETHER), TOGETHER, T),)
    else:
        for p in gl.static_range(PARTS):
            for i in gl.static_range(PART // TOKENS):
                found = found + (columns_part(accs[first + p], i, PART // TOKENS, leaving_layout(T)),)
    return found


@gluon.jit
def _parts_together(accs, first: gl.constexpr, PARTS: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """PARTS parts from the first on, as one [ROWS, tokens]: only renames registers."""
    if PARTS == 1:
        acc = accs[first]
    else:
        low = _parts_together(accs, first, PARTS // 2, T)
        high = _parts_together(accs, first + PARTS // 2, PARTS // 2, T)
        acc = gl.join(low, high).permute(0, 2, 1).reshape([low.shape[0], 2 * low.shape[1]])
    return gl.convert_layout(acc, sums_layout(T, acc.shape[1]), assert_trivial=True)


@gluon.jit
def _store_tile(out_desc, accs, bias_ptr, out_smem, n0, m0, N, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of y^T and bias to y as whole lines, through shared memory: that of the stages of x, which are no longer
    needed, or of a persistent program its own, of which copies may still read when this returns."""
    TOKENS: gl.constexpr = tokens_at_once(T)
    ALL: gl.constexpr = out_copies(T)
    COPIES: gl.constexpr = ALL[0]
    OWN: gl.constexpr = ALL[1]
    ROWS: gl.constexpr = out_rows(T)
    BOX: gl.constexpr = box_rows(T)
    BOXES: gl.constexpr = ROWS // BOX
    ROOM: gl.constexpr = copies_at_once(T)
    ROUNDS: gl.constexpr = -(-COPIES // ROOM)
    ROOM_BYTES: gl.constexpr = stages_bytes(T) - x_offset(T)
    gl.static_assert(T.persistent or ROOM * TOKENS * token_bytes(T) <= ROOM_BYTES, "the stages of x do not hold y")
    y_smem = out_smem._reinterpret(out_desc.dtype, [ROOM, TOKENS, ROWS], out_desc.layout)
    boxes = out_smem._reinterpret(out_desc.dtype, [ROOM * BOXES, TOKENS, BOX], out_desc.layout)
    sums = _leaving(accs, 0, n_parts(T), part_tokens(T), T)
    if COPIES > OWN:
        sums = sums + _leaving(accs, n_parts(T), common_tokens(T) // common_part(T), common_part(T), T)
    for r in gl.static_range(ROUNDS):
        if T.persistent:
            tma.store_wait(0)
        gl.thread_barrier()  # other warps may still be multiplying, or not know that copies have read what was here
        for i in gl.static_range(min(ROOM, COPIES - r * ROOM)):
            y = sums[r * ROOM + i]
            if T.has_bias:
                rn = gl.arange(0, ROWS, gl.SliceLayout(1, leaving_layout(T)))
                if r * ROOM + i >= OWN:
                    rn = ROWS + rn % BOX
                bias = gl.load(bias_ptr + n0 + rn, mask=n0 + rn < N, other=0).to(gl.float32)
                y += gl.expand_dims(bias, 1)
            y_smem.index(i).permute([1, 0]).store(y.to(out_desc.dtype))
        fence_async_shared()
        for i in gl.static_range(min(ROOM, COPIES - r * ROOM)):
            for b in gl.static_range(BOXES):
                if r * ROOM + i < OWN:
                    at = [m0 + min((r * ROOM + i) * TOKENS, T.block_m - TOKENS), n0 + b * BOX]
                else:  # of the warpgroup's tokens
                    token = min((r * ROOM + i - OWN) * TOKENS, common_tokens(T) - TOKENS)
                    at = [m0 + token + b * (T.block_m - common_tokens(T)), n0 + ROWS]
                tma.async_copy_shared_to_global(out_desc, at, boxes.index(i * BOXES + b))
    if not T.persistent:
        tma.store_wait(0)
