"""The mbarriers of a pipeline's stages, at which warps meet one by one.

Triton puts a barrier of all warps before its own wait for an mbarrier and on both sides of its arrival, which keeps all
warps of a program in step: none dequantizes while another multiplies. Here these are PTX that Triton does not look
into, on offsets from the begin of what it allocates (`global_smem`): 2 STAGES mbarriers of 8 bytes at `barrier_offset`.

    ready[s]    the s-th            a stage's copies arrive, once announced; warps wait
    empty[s]    the STAGES + s-th   all consumer warps arrive that are done with the stage; who copies waits
    given       before those        all consumer warps arrive that have written sums for another program

Where SHARERS programs of a cluster get x by one copy (`copy_to_sharers`), that copy may start when all of them are done
with the stage: the warps of each arrive at empty[s] of each.

Waiting for an mbarrier is a loop. Where consumers can do with none, another warp waits for `ready` and meets them at a
named barrier of the hardware (`pass_on`).

`ready_of` is the same mbarrier as Triton's copies want it, from a view of the same memory. Order among a warp's other
instructions is kept by volatile PTX; order among warps begins with a barrier behind `open_stages`.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from compress.kernels.tile_shape import barrier_offset

# named barriers of the hardware, one for each warpgroup and stage: of 16, Triton takes two and one for each partition
NAMED: gl.constexpr = gl.constexpr(8)


@gluon.constexpr_function
def _init_all(t):  # type: ignore[no-untyped-def]
    inits = ""
    for s in range(2 * t.stages):
        count = 1 if s < t.stages else t.warps * t.sharers
        inits += "mbarrier.init.shared::cta.b64 [a + " + str(barrier_offset(t) + 8 * s) + "], " + str(count) + "; "
    if t.streams:
        inits += f"mbarrier.init.shared::cta.b64 [a + {barrier_offset(t) - 8}], {t.warps}; "
    head = "{.reg .pred p; .reg .b32 a, t; mov.u32 t, %tid.x; setp.ne.u32 p, t, 0; mov.b32 a, global_smem; @p bra out; "
    fence = "fence.mbarrier_init.release.cluster; " if t.sharers > 1 else ""
    return head + inits + fence + "out: mov.b32 $0, 0;}"


@gluon.jit
def open_stages(T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Make the mbarriers, by thread 0; a fence for copies and a barrier for other warps are up to the caller, and one
    of the cluster where x is shared."""
    asm: gl.constexpr = _init_all(T)
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def ready_of(barriers, stage, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """The mbarrier of a stage's copies. barriers: int64 [128, 1], of which `ready` and `empty` are the last."""
    return barriers.index(128 - 2 * T.stages + stage)


@gluon.jit
def announce(stage, n_bytes, live, FIRST: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """If live: so many bytes will come to a stage. By one thread: the first of the program, or with FIRST false of
    each warp that comes here."""
    which: gl.constexpr = "%tid.x" if FIRST else "%laneid"
    asm: gl.constexpr = (
        "{.reg .pred p; .reg .b32 a, t; mov.u32 t, " + which + "; setp.eq.u32 p, t, 0; setp.ne.and.u32 p, $3, 0, p; "
        "mov.b32 a, global_smem; add.s32 a, a, $1; @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [a], $2; "
        "mov.b32 $0, 0;}"
    )
    gl.inline_asm_elementwise(
        asm, "=r,r,r,r",
        [gl.to_tensor(barrier_offset(T) + 8 * stage), gl.to_tensor(n_bytes), gl.to_tensor(live).to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _wait(offset, phase):  # type: ignore[no-untyped-def]
    gl.inline_asm_elementwise(
        "{.reg .pred p; .reg .b32 a; mov.b32 a, global_smem; add.s32 a, a, $1; "
        "again: mbarrier.try_wait.parity.shared::cta.b64 p, [a], $2; @!p bra again; mov.b32 $0, 0;}",
        "=r,r,r", [gl.to_tensor(offset), gl.to_tensor(phase)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def wait_ready(stage, phase, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Until the copies of a stage are there."""
    _wait(barrier_offset(T) + 8 * stage, phase)


@gluon.jit
def wait_empty(stage, phase, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Until all warps are done with a stage."""
    _wait(barrier_offset(T) + 8 * T.stages + 8 * stage, phase)


@gluon.constexpr_function
def _arrive_at(sharers):  # type: ignore[no-untyped-def]
    at_all = (
        "mov.u32 r, %cluster_ctarank; and.b32 r, r, " + str(-sharers) + "; add.u32 r, r, t; "
        "mapa.shared::cluster.u32 a, a, r; @p mbarrier.arrive.shared::cluster.b64 _, [a]; "
    )
    return (
        "{.reg .pred p; .reg .b32 a, t, r; mov.u32 t, %laneid; setp.lt.u32 p, t, " + str(sharers) + "; "
        "setp.ne.and.u32 p, $2, 0, p; mov.b32 a, global_smem; add.s32 a, a, $1; "
        + (at_all if sharers > 1 else "@p mbarrier.arrive.shared::cta.b64 _, [a]; ")
        + "mov.b32 $0, 0;}"
    )


@gluon.jit
def arrive_empty(stage, live, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """If live: this warp is done with a stage, which all that share x want to know. A program must not be told so that
    may have ended: live only where the stage will be filled again."""
    asm: gl.constexpr = _arrive_at(T.sharers)
    gl.inline_asm_elementwise(
        asm, "=r,r,r", [gl.to_tensor(barrier_offset(T) + 8 * T.stages + 8 * stage), gl.to_tensor(live).to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _arrive_given_asm(t):  # type: ignore[no-untyped-def]
    return (
        "{.reg .pred p; .reg .b32 a, t; bar.warp.sync 0xffffffff; mov.u32 t, %laneid; setp.eq.u32 p, t, 0; "
        f"mov.b32 a, global_smem; @p mbarrier.arrive.shared::cta.b64 _, [a + {barrier_offset(t) - 8}]; "
        "mov.b32 $0, 0;}"
    )


@gluon.jit
def arrive_given(T: gl.constexpr):  # type: ignore[no-untyped-def]
    """This warp of the consumers has written what it gives (`streamed_sums`): once in a launch."""
    asm: gl.constexpr = _arrive_given_asm(T)
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_given(T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Until all consumers have written what they give."""
    _wait(barrier_offset(T) - 8, 0)


@gluon.constexpr_function
def _copy_to(kernel, sharers):  # type: ignore[no-untyped-def]
    return (
        "{.reg .pred p; .reg .b32 t, to, box; .reg .b16 all; .reg .b64 d; mov.u32 t, %laneid; setp.eq.u32 p, t, 0; "
        "setp.ne.and.u32 p, $5, 0, p; mov.b32 t, global_smem; add.s32 to, t, $1; add.s32 box, t, $2; "
        "mov.u32 t, %cluster_ctarank; and.b32 t, t, " + str(-sharers) + "; shl.b32 t, " + str(2**sharers - 1) + ", t; "
        "cvt.u16.u32 all, t; mov.b64 d, " + kernel + "_param_0; cvta.param.u64 d, d; "
        "@p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[to], [d, {$3, $4}], [box], all; mov.b32 $0, 0;}"
    )


@gluon.jit
def copy_to_sharers(kernel: gl.constexpr, offset, column, row, stage, live, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """If live: start the copy of [row .., column ..] of the first parameter of the kernel of that name to an offset of
    the shared memory of all that share x with this program, and of its bytes to their ready[stage]. By one warp."""
    asm: gl.constexpr = _copy_to(kernel, T.sharers)
    gl.inline_asm_elementwise(
        asm, "=r,r,r,r,r,r",
        [gl.to_tensor(offset), gl.to_tensor(barrier_offset(T) + 8 * stage), gl.to_tensor(column), gl.to_tensor(row),
         gl.to_tensor(live).to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def pass_on(stage, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """That the copies of a stage are there, to all warpgroups of consumers. By one warp, which has waited for them."""
    for group in gl.static_range(T.warps // 4):
        gl.inline_asm_elementwise(
            "barrier.cta.arrive.aligned $1, 160; mov.b32 $0, 0;", "=r,r",
            [gl.to_tensor(NAMED + group * T.stages + stage)], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def wait_passed_on(stage, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Until another warp has passed on that the copies of a stage are there: `wait_ready` without a loop. The warps of
    a warpgroup wait for each other, which their MMAs make them do anyway; warpgroups do not."""
    first = 0
    if T.warps > 4:
        first = gl.inline_asm_elementwise(
            "{.reg .b32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; mul.lo.u32 $0, t, $1;}", "=r,r",
            [gl.to_tensor(T.stages)], dtype=gl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    gl.inline_asm_elementwise(
        "barrier.cta.sync.aligned $1, 160; mov.b32 $0, 0;", "=r,r", [gl.to_tensor(NAMED + stage) + first],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
