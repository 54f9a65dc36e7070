"""Sums of a split tile, added up through the shared memory of a cluster, or of slices through a program's own: no
workspace, no second kernel.

Each program of the cluster has summed its share of K over the whole tile, and becomes the owner of a share of its
tokens. Where the stages were, it lays its sums out by owner; it adds those that the others send it in the order of the
programs: the same bits every run.

    cluster of 4      K: | program 0 | program 1 | program 2 | program 3 |   each a [BLOCK_N, BLOCK_M] sum in registers
      shared memory of 1: | stages, later [4 owners, tokens, ROW] own sums | [3 others, tokens, ROW] mail | mbarrier |
                         one bulk copy from each program to each other, whose bytes the mbarrier counts
                 tokens: | program 0 | program 1 | program 2 | program 3 |   each adds 4 sums of a quarter

Mail lies behind the stages, so that who is done may send to who still multiplies; all that a cluster waits for before
is that its programs run. Mail of two programs, half of a tile, is too large for that: it lies in the stages, behind a
program's own sums, and may be sent when both are done with them.

Where `sharers` programs, of neighbouring tiles, get x by one copy (`stage_barriers`), a cluster holds the programs of
all these tiles, and number s * sharers + r has share s of the K of tile r. Those of one r add up.

Gluon of Triton 3.6 has no name for the shared memory of another program, nor for the address of its own: offsets count
from the begin of what Triton allocates (`global_smem`), in PTX. A kernel that comes here allocates its stages and
mail behind them as one, which is by far the largest and therefore first.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from compress.kernels.gluon_parts import instruction
from compress.kernels.tile_layouts import sum_layout
from compress.kernels.tile_shape import (
    mail_barrier_offset,
    mail_offset,
    n_parts,
    out_offset,
    part_tokens,
    row_bytes,
    share_bytes,
    stages_bytes,
    token_bytes,
)


@gluon.jit
def _arrive():  # type: ignore[no-untyped-def]
    """At the barrier of the cluster. Relaxed: a releasing one waits until memory has all that was written."""
    instruction("barrier.cluster.arrive.relaxed.aligned")


@gluon.jit
def _wait():  # type: ignore[no-untyped-def]
    instruction("barrier.cluster.wait.acquire.aligned")


@gluon.jit
def open_cluster(T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Before all else but `open_stages`, by the warps that will `exchange`: a mailbox behind the stages, and mbarriers
    that others arrive at, are there as soon as a program runs."""
    if T.adders > 2:
        _open_mailbox(mail_barrier_offset(T), (T.adders - 1) * share_bytes(T))
    attend_opening(T)


@gluon.jit
def attend_opening(T: gl.constexpr):  # type: ignore[no-untyped-def]
    """`open_cluster`'s part for all other warps of a program: the cluster's barriers count every warp."""
    if T.adders > 2 or T.sharers > 1:
        _arrive()


@gluon.jit
def wait_for_sharers(T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Until all that share x have opened their mbarriers: once in each warp, before `exchange` or `depart`."""
    if T.sharers > 1:
        _wait()


@gluon.jit
def attend_sums(T: gl.constexpr):  # type: ignore[no-untyped-def]
    """`exchange`'s and `depart`'s part for all other warps, behind `wait_for_sharers`."""
    if T.adders == 2:  # a mailbox in the stages opens only there
        _arrive()
    if T.adders == 2 or T.sharers == 1:
        _wait()
    _arrive()
    _wait()


@gluon.jit
def _open_mailbox(mbarrier, n_bytes):  # type: ignore[no-untyped-def]
    """Make the mbarrier at an offset one that n_bytes sent here will pass."""
    gl.inline_asm_elementwise(
        "{.reg .pred p; .reg .b32 t, a; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; mov.b32 a, global_smem; "
        "add.s32 a, a, $1; @p mbarrier.init.shared::cta.b64 [a], 1; @p fence.mbarrier_init.release.cluster; "
        "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [a], $2; mov.b32 $0, 0;}",
        "=r,r,r", [gl.to_tensor(mbarrier), gl.to_tensor(n_bytes)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _store(offset, value):  # type: ignore[no-untyped-def]
    """Write float32 values at offsets of the program's own shared memory."""
    gl.inline_asm_elementwise(
        "{.reg .b32 a; mov.b32 a, global_smem; add.s32 a, a, $1; st.shared.f32 [a], $2; mov.b32 $0, 0;}",
        "=r,r,f", [offset, value], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _lay_out(acc, BEGIN: gl.constexpr, ROW: gl.constexpr, OWNED: gl.constexpr, SHARE: gl.constexpr):  # type: ignore[no-untyped-def]
    """Write sums acc [ROWS, tokens] to the program's own shared memory from BEGIN on, a token in ROW bytes, SHARE bytes
    from one owner to the next, of OWNED tokens each."""
    ACC: gl.constexpr = acc.type.layout
    token = gl.arange(0, acc.shape[1], gl.SliceLayout(0, ACC))
    rn = gl.arange(0, acc.shape[0], gl.SliceLayout(1, ACC))
    at = token * ROW
    if SHARE > OWNED * ROW:  # other parts' tokens come between
        at += token // OWNED * (SHARE - OWNED * ROW)
    _store(BEGIN + gl.expand_dims(at, 0) + gl.expand_dims(rn * 4, 1), acc)


@gluon.jit
def _send(rank, first, step, split, share, mbarrier, mail):  # type: ignore[no-untyped-def]
    """Copy share t of this program's sums to the t-th of those that add up, number first + t step of the cluster, there
    behind `mail` and the mail of those before this one, the rank-th; thread t does. What was stored is visible to
    copies behind a fence."""
    gl.inline_asm_elementwise(
        "{.reg .pred p, before; .reg .b32 t, base, from, to, box, who; mov.u32 t, %tid.x; mov.b32 base, global_smem; "
        "setp.lt.u32 p, t, $2; setp.ne.and.u32 p, t, $1, p; setp.lt.u32 before, t, $1; "
        "mad.lo.s32 from, t, $3, base; "
        "selp.b32 to, -1, 0, before; add.s32 to, to, $1; mad.lo.s32 to, to, $3, base; add.s32 to, to, $5; "
        "add.s32 box, base, $4; mad.lo.s32 who, t, $7, $6; "
        "@p mapa.shared::cluster.u32 to, to, who; @p mapa.shared::cluster.u32 box, box, who; "
        "@p cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [to], [from], $3, [box]; "
        "mov.b32 $0, 0;}",
        "=r,r,r,r,r,r,r,r",
        [gl.to_tensor(rank), gl.to_tensor(split), gl.to_tensor(share), gl.to_tensor(mbarrier), gl.to_tensor(mail),
         gl.to_tensor(first), gl.to_tensor(step)],
        dtype=gl.int32, is_pure=False, pack=1,
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
def exchange(accs, rank, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Send sums, [ROWS, tokens] of each part, to the programs of the cluster that own them, an equal share of each
    part's tokens each, and wait for theirs. rank: of the program in its cluster. `total_of` and `depart` follow."""
    ADDERS: gl.constexpr = T.adders
    SHARERS: gl.constexpr = T.sharers
    SHARE: gl.constexpr = share_bytes(T)
    ROW: gl.constexpr = row_bytes(T)
    PARTS: gl.constexpr = n_parts(T)
    MAIL: gl.constexpr = mail_offset(T)
    MBARRIER: gl.constexpr = mail_barrier_offset(T)
    wait_for_sharers(T)
    share = rank // SHARERS
    gl.thread_barrier()  # other warps may have been reading what the stages held
    if ADDERS == 2:
        _open_mailbox(MBARRIER, SHARE)
        _arrive()
    for p in gl.static_range(PARTS):
        _lay_out(accs[p], p * part_tokens(T) // ADDERS * ROW, ROW, part_tokens(T) // ADDERS, SHARE)
    fence_async_shared()
    gl.thread_barrier()
    if ADDERS == 2 or SHARERS == 1:
        _wait()  # the mailboxes of all are open
    _send(share, rank % SHARERS, SHARERS, ADDERS, SHARE, MBARRIER, MAIL)
    _wait_for_mail(MBARRIER)
    _arrive()  # what the others sent here they need no longer keep


@gluon.jit
def total_of(part: gl.constexpr, rank, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Behind `exchange`, of a part: the totals float32 [tokens, SHARERS * BLOCK_N] of ADDERS programs for each of
    SHARERS tiles, in each program of the tokens that it owns; their tokens within the part, and columns."""
    BLOCK_N: gl.constexpr = T.block_n
    ADDERS: gl.constexpr = T.adders
    SLICES: gl.constexpr = T.slices
    SHARE: gl.constexpr = share_bytes(T)
    ROW: gl.constexpr = row_bytes(T)
    MAIL: gl.constexpr = mail_offset(T)
    TOKENS: gl.constexpr = part_tokens(T)
    BEGIN: gl.constexpr = part * TOKENS // ADDERS * ROW
    share = rank // T.sharers
    L: gl.constexpr = sum_layout(T)
    rm = gl.arange(0, TOKENS, gl.SliceLayout(1, L))
    rn = gl.arange(0, T.sharers * BLOCK_N, gl.SliceLayout(0, L))
    at = BEGIN + gl.expand_dims(rm % (TOKENS // ADDERS) * ROW, 1) + gl.expand_dims(rn % BLOCK_N * 4, 0)
    total = gl.zeros((TOKENS, T.sharers * BLOCK_N), gl.float32, L)
    for s in gl.static_range(ADDERS):
        begin = gl.where(s == share, share * SHARE, MAIL + (s - (s > share).to(gl.int32)) * SHARE)
        for piece in gl.static_range(SLICES):
            total += _load_fours(at + (begin + piece * BLOCK_N * 4))
    return total, rm, rn


@gluon.jit
def add_slices(acc, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Total float32 [tokens, BLOCK_N] of the slices of acc [ROWS, tokens], and tokens and columns, of a program that
    adds up with no other."""
    BEGIN: gl.constexpr = out_offset(T)
    ROW: gl.constexpr = token_bytes(T)
    SLICES: gl.constexpr = T.slices
    gl.static_assert(T.persistent or T.block_m * ROW <= stages_bytes(T) - BEGIN, "the stages of x do not hold the sums")
    gl.thread_barrier()  # other warps may still multiply from what the stages hold, or read sums of other tokens
    _lay_out(acc, BEGIN, ROW, acc.shape[1], acc.shape[1] * ROW)
    gl.thread_barrier()
    L: gl.constexpr = sum_layout(T)
    rm = gl.arange(0, acc.shape[1], gl.SliceLayout(1, L))
    rn = gl.arange(0, T.block_n, gl.SliceLayout(0, L))
    at = BEGIN + gl.expand_dims(rm * ROW, 1) + gl.expand_dims(rn * 4, 0)
    total = _load_fours(at)
    for part in gl.static_range(1, SLICES):
        total += _load_fours(at + part * T.block_n * 4)
    return total, rm, rn


@gluon.jit
def depart():  # type: ignore[no-untyped-def]
    """Wait, behind the last use of what `total_of` returns, until no other program sends from here."""
    _wait()
