"""Sums of a split tile, added up through the shared memory of a cluster: no workspace, no second kernel.

Each program of the cluster has summed its share of K over the whole tile, and becomes the owner of a share of its
tokens. When all have read what their stages held, that memory is a mailbox: each program sends every owner its tokens,
and each owner adds what has come in the order of the senders, the same bits every run.

    cluster of 4      K: | program 0 | program 1 | program 2 | program 3 |   each a [BLOCK_N, BLOCK_M] sum in registers
                         open_mailbox: a barrier of the cluster
                         st.async to [SPLIT, tokens, BLOCK_N + 4] of each owner, whose mbarrier counts the bytes
                 tokens: | program 0 | program 1 | program 2 | program 3 |   each adds 4 sums of a quarter

Gluon of Triton 3.6 has no name for the shared memory of another program, nor for the address of its own: offsets count
from the begin of what Triton allocates (`global_smem`), in PTX. Whoever uses these functions allocates at least
`mailbox_bytes` for stages, first of all, and needs nothing in there after `open_mailbox`.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from compress.kernels.gluon_parts import cluster_shares


@gluon.constexpr_function
def _row_bytes(block_n):  # type: ignore[no-untyped-def]
    """With 4 columns more, the 8 rows and 4 pairs of tokens that a warp sends at a time lie in 32 banks."""
    return 4 * (block_n + 4)


@gluon.constexpr_function
def mailbox_bytes(block_m, block_n):  # type: ignore[no-untyped-def]
    """Shared memory that is written to: the sums, and an mbarrier behind them."""
    return block_m * 4 * (block_n + 4) + 8


@gluon.constexpr_function
def _sum_layout(columns, warps, ctas):  # type: ignore[no-untyped-def]
    """[tokens, columns] float32 dealt out to the cluster by tokens, 16 bytes a thread along the columns."""
    wide = columns // 4 if columns < 128 else 32
    return gl.BlockedLayout([1, 4], [32 // wide, wide], [warps, 1], [1, 0], cluster_shares(ctas, 2))


@gluon.jit
def meet_cluster():  # type: ignore[no-untyped-def]
    """Wait for all warps of the cluster. Orders nothing that was written before: a releasing barrier would wait until
    memory had it."""
    gl.inline_asm_elementwise(
        "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.acquire.aligned; // $0",
        "=r", [], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def open_mailbox(BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):  # type: ignore[no-untyped-def]
    """Let the cluster's programs write to this one's shared memory, once all of them have come here. Warps of other
    partitions `meet_cluster` meanwhile."""
    gl.thread_barrier()  # the mbarrier lies where a stage was that other warps may still read
    gl.inline_asm_elementwise(
        "{.reg .pred p; .reg .b32 t, a; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; mov.b32 a, global_smem; "
        "add.s32 a, a, $1; @p mbarrier.init.shared::cta.b64 [a], 1; @p fence.mbarrier_init.release.cluster; "
        "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [a], $2; mov.b32 $0, 0;}",
        "=r,r,r", [gl.to_tensor(mailbox_bytes(BLOCK_M, BLOCK_N) - 8), gl.to_tensor(BLOCK_M * BLOCK_N * 4)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    meet_cluster()


@gluon.jit
def _address(rank, offset):  # type: ignore[no-untyped-def]
    """Addresses, int32, of offsets in the shared memory of programs of the cluster."""
    return gl.inline_asm_elementwise(
        "{.reg .b32 a; mov.b32 a, global_smem; add.s32 a, a, $2; mapa.shared::cluster.u32 $0, a, $1;}",
        "=r,r,r", [rank, offset], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _send(at, value, mbarrier):  # type: ignore[no-untyped-def]
    """Store float32 values at addresses and let the mbarrier at another, of the same program, count them."""
    gl.inline_asm_elementwise(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [$1], $2, [$3]; mov.b32 $0, 0;",
        "=r,r,f,r", [at, value, mbarrier], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _wait_for_mail(mbarrier):  # type: ignore[no-untyped-def]
    """Until all bytes have come that the mbarrier at this offset expects."""
    gl.inline_asm_elementwise(
        "{.reg .pred p; .reg .b32 a; mov.b32 a, global_smem; add.s32 a, a, $1; "
        "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [a], 0; @!p bra again; mov.b32 $0, 0;}",
        "=r,r", [gl.to_tensor(mbarrier)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _load_fours(offset):  # type: ignore[no-untyped-def]
    """float32 values at offsets of the program's own shared memory, four neighbours at a time: 16 bytes, aligned."""
    return gl.inline_asm_elementwise(
        "{.reg .b32 a; mov.b32 a, global_smem; add.s32 a, a, $4; ld.shared.v4.f32 {$0, $1, $2, $3}, [a];}",
        "=f,=f,=f,=f,r,r,r,r", [offset], dtype=gl.float32, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def add_up(acc, bias_ptr, out_ptr, rank, m0, n0, M, N, HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr,
           BLOCK_N: gl.constexpr, SPLIT: gl.constexpr, WARPS: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """The tile of y at token m0 and column n0, and bias, from acc float32 [BLOCK_N, BLOCK_M] of SPLIT programs, each of
    which has been through `open_mailbox`."""
    TOKENS: gl.constexpr = BLOCK_M // SPLIT
    ROW: gl.constexpr = _row_bytes(BLOCK_N)
    ACC: gl.constexpr = acc.type.layout
    MBARRIER: gl.constexpr = mailbox_bytes(BLOCK_M, BLOCK_N) - 8
    token = gl.arange(0, BLOCK_M, gl.SliceLayout(0, ACC))
    owner = token // TOKENS
    row = _address(owner, (rank * TOKENS + token % TOKENS) * ROW)
    mbarrier = _address(owner, gl.full((BLOCK_M,), MBARRIER, gl.int32, gl.SliceLayout(0, ACC)))
    rn = gl.arange(0, BLOCK_N, gl.SliceLayout(1, ACC))
    _send(gl.expand_dims(row, 0) + gl.expand_dims(rn * 4, 1), acc, gl.expand_dims(mbarrier, 0))
    _wait_for_mail(MBARRIER)

    L: gl.constexpr = _sum_layout(BLOCK_N, WARPS, SPLIT)
    rm = gl.arange(0, BLOCK_M, gl.SliceLayout(1, L))
    rn = gl.arange(0, BLOCK_N, gl.SliceLayout(0, L))
    at = gl.expand_dims(rm % TOKENS * ROW, 1) + gl.expand_dims(rn * 4, 0)
    total = _load_fours(at)
    for s in gl.static_range(1, SPLIT):
        total += _load_fours(at + s * (TOKENS * ROW))
    if HAS_BIAS:
        total += gl.expand_dims(gl.load(bias_ptr + n0 + rn, mask=n0 + rn < N, other=0).to(gl.float32), 0)
    mask = gl.expand_dims(m0 + rm < M, 1) & gl.expand_dims(n0 + rn < N, 0)
    y_at = gl.expand_dims((m0 + rm).to(gl.int64) * N, 1) + gl.expand_dims(n0 + rn, 0)
    gl.store(out_ptr + y_at, total.to(out_ptr.dtype.element_ty), mask=mask)
