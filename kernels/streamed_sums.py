"""Sums of tiles whose K is shared out among programs without regard to where one tile ends and the next begins
(stream-K), added up through memory.

Persistent programs compute whole tiles as long as these fill rounds of all programs. The stages of the tiles that are
left stand in one line, of which each program has an equal part (`shares`): the end of one tile, maybe, and the begin of
the next.

    stages    | tile 0                 | tile 1                 | tile 2                 |
    programs  | 0           | 1           | 2           | 3           | 4           | 5  |
    gives       all           begin of 1    middle of 1   begin of 2    middle of 2
    keeps                     end of 0                    end of 1                    end of 2

Who has the end of a tile keeps it, adds what others give of it in their order, the same bits every run, and stores it.
What a program gives it computes first, and it waits only for programs of lower number, which started no later: no two
wait for each other.

    workspace   | sums [programs, BLOCK_M, ROWS] float32 | marks [programs, WARPS, 4] int32 |

Each warp of the consumers gives to the same warp of another program, which has the same elements of a tile. It writes
its mark behind its sums; who has seen the mark takes it away, so that none outlives its launch. The workspace is memory
as it comes: a mark is 128 bits that nothing else is likely to have left there, 1 in 10^38.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from compress.kernels.tile_shape import mma_layout, rows_of

LEAST_STAGES = 4  # of a program: fewer would take longer to add up than to compute
_MARK = (0x9E3779B9, 0x7F4A7C15, 0xF39CC060, 0x5CEDC834)


def shares(n_tiles: int, stages: int, at_once: int, unroll: int) -> tuple[int, int]:
    """How many tiles of so many stages each programs, so many at once, compute alone, and the stages of the others that
    each has: a multiple of `unroll`, as those of a tile are."""
    rest = n_tiles % at_once
    part = max(-(-rest * stages // at_once), LEAST_STAGES)
    return n_tiles - rest, min(-(-part // unroll) * unroll, stages)


def workspace_floats(programs: int, block_m: int, rows: int, warps: int) -> int:
    """Of sums and marks, 4 bytes each."""
    return programs * (block_m * rows + 4 * warps)


@gluon.constexpr_function
def _of_warp(do):  # type: ignore[no-untyped-def]
    """PTX on the 16 bytes at `at`: those of this warp, behind the address $1. p: whether this is its first lane."""
    declared = "{.reg .pred p, q; .reg .b32 a, b, c, d; .reg .b64 at; "
    place = "mov.u32 a, %tid.x; shr.u32 a, a, 5; mul.wide.u32 at, a, 16; add.s64 at, at, $1; "
    return declared + place + "mov.u32 a, %laneid; setp.eq.u32 p, a, 0; " + do + "mov.b32 $0, 0;}"


@gluon.constexpr_function
def _mark_asm():  # type: ignore[no-untyped-def]
    words = "".join(f"mov.b32 {r}, {word}; " for r, word in zip("abcd", _MARK, strict=True))
    store = "@p st.relaxed.gpu.global.v4.b32 [at], {a, b, c, d}; "
    return _of_warp("bar.warp.sync 0xffffffff; fence.acq_rel.gpu; " + words + store)


@gluon.constexpr_function
def _wait_asm():  # type: ignore[no-untyped-def]
    differ = "".join(f"xor.b32 {r}, {r}, {word}; " for r, word in zip("abcd", _MARK, strict=True))
    load = "again: ld.relaxed.gpu.global.v4.b32 {a, b, c, d}, [at]; " + differ
    return _of_warp(load + "or.b32 a, a, b; or.b32 c, c, d; or.b32 a, a, c; setp.ne.u32 q, a, 0; @q bra again; "
                    "fence.acq_rel.gpu; ")  # fmt: skip


@gluon.constexpr_function
def _unmark_asm():  # type: ignore[no-untyped-def]
    clear = "mov.b32 a, 0; @p st.relaxed.gpu.global.v4.b32 [at], {a, a, a, a}; "
    return _of_warp("bar.warp.sync 0xffffffff; " + clear)


@gluon.jit
def _at_marks(workspace_ptr, program, asm: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    sums = gl.num_programs(0).to(gl.int64) * (T.block_m * rows_of(T))
    marks = (workspace_ptr + (sums + program * (4 * T.warps))).to(gl.int64)
    gl.inline_asm_elementwise(asm, "=r,l", [marks], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _sums_of(workspace_ptr, program, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Addresses [ROWS, BLOCK_M] of the sums that a program gives: a row of W next to the other, as a warp has them."""
    L: gl.constexpr = mma_layout(T)
    ROWS: gl.constexpr = rows_of(T)
    token = gl.expand_dims(gl.arange(0, T.block_m, gl.SliceLayout(0, L)), 0)
    row = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, L)), 1)
    return workspace_ptr + program.to(gl.int64) * (T.block_m * ROWS) + (token * ROWS + row)


@gluon.jit
def give(acc, workspace_ptr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Leave sums acc [ROWS, BLOCK_M] to who keeps their tile. Once in a launch."""
    mark: gl.constexpr = _mark_asm()
    gl.store(_sums_of(workspace_ptr, gl.program_id(0), T), acc)
    _at_marks(workspace_ptr, gl.program_id(0), mark, T)


@gluon.jit
def with_given(acc, workspace_ptr, first, last, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """acc [ROWS, BLOCK_M] and what programs first .. last - 1 give, as soon as they do."""
    wait: gl.constexpr = _wait_asm()
    unmark: gl.constexpr = _unmark_asm()
    for program in range(first, last):
        _at_marks(workspace_ptr, program, wait, T)
        acc += gl.load(_sums_of(workspace_ptr, program, T), cache_modifier=".cg")
        _at_marks(workspace_ptr, program, unmark, T)
    return acc
