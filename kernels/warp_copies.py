"""Copies that each warp makes for itself: its own slots of shared memory, its own mbarriers, no barrier among warps.

    shared memory from its begin (`global_smem`)      [SLOTS, WARPS] pieces of BYTES, then [SLOTS, WARPS] mbarriers

A warp asks for a piece, waits for it, reads it, and asks for the next into the same slot; its lane 0 does the asking.
Triton's own copies are made by one thread for the whole program, which costs two barriers of all warps each and keeps
warps in step that have nothing to tell each other. This is PTX that Triton does not look into. The kernel allocates
pieces and mbarriers as one, its largest allocation and therefore the first, and the tensor descriptor of the copies is
its first parameter.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon


@gluon.constexpr_function
def piece_units(slots, warps, n_bytes):  # type: ignore[no-untyped-def]
    """Kilobytes of pieces and mbarriers."""
    return -(-slots * warps * (n_bytes + 8) // 1024)


@gluon.constexpr_function
def _open(slots, warps, n_bytes):  # type: ignore[no-untyped-def]
    base = slots * warps * n_bytes
    inits = ""
    for s in range(slots):
        inits += "mbarrier.init.shared::cta.b64 [a + " + str(base + 8 * warps * s) + "], 1; "
    return (
        "{.reg .pred p; .reg .b32 a, t; mov.u32 t, %tid.x; shr.u32 t, t, 5; shl.b32 t, t, 3; mov.b32 a, global_smem; "
        "add.s32 a, a, t; mov.u32 t, %laneid; setp.ne.u32 p, t, 0; @p bra out; "
        + inits
        + "fence.proxy.async.shared::cta; out: bar.warp.sync 0xffffffff; mov.b32 $0, 0;}"
    )


@gluon.jit
def open_slots(SLOTS: gl.constexpr, WARPS: gl.constexpr, BYTES: gl.constexpr):  # type: ignore[no-untyped-def]
    """Make the mbarriers of every warp's slots. Returns this warp's number, int32."""
    asm: gl.constexpr = _open(SLOTS, WARPS, BYTES)
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    return gl.inline_asm_elementwise(
        "{.reg .b32 t; mov.u32 t, %tid.x; shr.u32 $0, t, 5;}", "=r", [], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.constexpr_function
def _copy(kernel, n_bytes):  # type: ignore[no-untyped-def]
    return (
        "{.reg .pred p; .reg .b32 t, to, box; .reg .b64 d; mov.u32 t, %laneid; setp.eq.u32 p, t, 0; "
        "setp.ne.and.u32 p, $5, 0, p; mov.b32 t, global_smem; add.s32 to, t, $1; add.s32 box, t, $2; mov.b32 t, 0; "
        "mov.b64 d, " + kernel + "_param_0; cvta.param.u64 d, d; "
        "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [box], " + str(n_bytes) + "; "
        "@p cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [to], [d, {t, $4, $3}], [box]; "
        "mov.b32 $0, 0;}"
    )


@gluon.jit
def copy_piece(kernel: gl.constexpr, warp, slot, plane, row, live, SLOTS: gl.constexpr, WARPS: gl.constexpr,
               BYTES: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """If live: start the copy of [plane, row .., 0 ..] of the first parameter of the kernel of that name into a slot of
    this warp, who has read what was there."""
    asm: gl.constexpr = _copy(kernel, BYTES)
    piece = gl.to_tensor(slot) * WARPS + warp
    gl.inline_asm_elementwise(
        asm, "=r,r,r,r,r,r",
        [piece * BYTES, SLOTS * WARPS * BYTES + piece * 8, gl.to_tensor(plane), gl.to_tensor(row),
         gl.to_tensor(live).to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def wait_piece(warp, slot, phase, live, SLOTS: gl.constexpr, WARPS: gl.constexpr, BYTES: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """If live: until the copy into a slot of this warp is there."""
    gl.inline_asm_elementwise(
        "{.reg .pred p, q; .reg .b32 a; setp.eq.u32 q, $3, 0; mov.b32 a, global_smem; add.s32 a, a, $1; @q bra out; "
        "again: mbarrier.try_wait.parity.shared::cta.b64 p, [a], $2; @!p bra again; out: mov.b32 $0, 0;}",
        "=r,r,r,r",
        [SLOTS * WARPS * BYTES + (gl.to_tensor(slot) * WARPS + warp) * 8, gl.to_tensor(phase),
         gl.to_tensor(live).to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def done_with_piece():  # type: ignore[no-untyped-def]
    """All lanes of the warp have read their part of a slot."""
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
