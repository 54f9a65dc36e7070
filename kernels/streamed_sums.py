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

    workspace   | sums [programs, ROWS BLOCK_M] float32 | marks [programs, WARPS, 4] int32 |

Each warp of the consumers gives to the same warp of another program, which has the same elements of a tile, in an order
in which a warp's are whole lines of memory. A warp with nothing else to do waits until these are there for all to see,
and marks them. Who has seen a mark takes it away, so that none outlives its launch. The workspace is memory as it
comes: a mark is 128 bits that nothing else is likely to have left there, 1 in 10^38.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from compress.kernels.stage_barriers import arrive_given, wait_given
from compress.kernels.tile_shape import blocks_of, mma_layout, rows_of

LEAST_STAGES = 4  # of a program: fewer would take longer to add up than to compute
WORTH_STAGES = 5  # of a program, that it has to save: what adding up takes
_MARK = (0x9E3779B9, 0x7F4A7C15, 0xF39CC060, 0x5CEDC834)


def shares(n_tiles: int, stages: int, at_once: int, unroll: int) -> tuple[int, int]:
    """How many tiles of so many stages each programs, so many at once, compute alone, and the stages of the others that
    each has: a multiple of `unroll`, as those of a tile are. All alone where nearly all would have a tile."""
    rest = n_tiles % at_once
    part = max(-(-rest * stages // at_once), LEAST_STAGES)
    part = -(-part // unroll) * unroll
    return (n_tiles - rest, part) if part + WORTH_STAGES < stages else (n_tiles, stages)


def halves(n_tiles: int, stages: int, at_once: int) -> tuple[int, int]:
    """`shares` where clusters of two add up, which half a tile each: where that is room for the rest."""
    rest = n_tiles % at_once
    return (n_tiles - rest, stages // 2) if 2 * rest <= at_once else (n_tiles, stages)


def workspace_floats(programs: int, block_m: int, rows: int, warps: int) -> int:
    """Of sums and marks, 4 bytes each."""
    return programs * (block_m * rows + 4 * warps)


@gluon.constexpr_function
def _at_mark(warp, do):  # type: ignore[no-untyped-def]
    """PTX on the 16 bytes `at` of a warp, its number made `a` by PTX `warp`, behind the address $1."""
    declared = "{.reg .pred p, q; .reg .b32 a, b, c, d; .reg .b64 at; "
    return declared + warp + "mul.wide.u32 at, a, 16; add.s64 at, at, $1; " + do + "mov.b32 $0, 0;}"


_OWN: gl.constexpr = gl.constexpr("mov.u32 a, %tid.x; shr.u32 a, a, 5; ")


@gluon.constexpr_function
def _mark_asm(warps):  # type: ignore[no-untyped-def]
    """By lane w, for warp w, of one of two warps, the even one."""
    even = "mov.u32 a, %tid.x; and.b32 a, a, 32; setp.eq.u32 q, a, 0; mov.u32 a, %laneid; "
    words = "".join(f"mov.b32 {r}, {word}; " for r, word in zip("abcd", _MARK, strict=True))
    store = "@p st.relaxed.gpu.global.v4.b32 [at], {a, b, c, d}; "
    return _at_mark(even, f"setp.lt.and.u32 p, a, {warps}, q; fence.acq_rel.gpu; " + words + store)


@gluon.constexpr_function
def _wait_asm():  # type: ignore[no-untyped-def]
    differ = "".join(f"xor.b32 {r}, {r}, {word}; " for r, word in zip("abcd", _MARK, strict=True))
    load = "again: ld.relaxed.gpu.global.v4.b32 {a, b, c, d}, [at]; " + differ
    repeat = "or.b32 a, a, b; or.b32 c, c, d; or.b32 a, a, c; setp.ne.u32 q, a, 0; @q bra again; "
    return _at_mark(_OWN.value, load + repeat + "fence.acq_rel.gpu; ")


@gluon.constexpr_function
def _unmark_asm():  # type: ignore[no-untyped-def]
    first = "bar.warp.sync 0xffffffff; mov.u32 a, %laneid; setp.eq.u32 p, a, 0; mov.b32 a, 0; "
    return _at_mark(_OWN.value, first + "@p st.relaxed.gpu.global.v4.b32 [at], {a, a, a, a}; ")


@gluon.jit
def _with_marks(workspace_ptr, program, asm: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    sums = gl.num_programs(0).to(gl.int64) * (T.block_m * rows_of(T))
    marks = (workspace_ptr + (sums + program * (4 * T.warps))).to(gl.int64)
    gl.inline_asm_elementwise(asm, "=r,l", [marks], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _in_lines(acc, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """acc [ROWS, BLOCK_M] as [ROWS BLOCK_M], 4 neighbours in a thread and 128 in a warp: only renames registers."""
    parts = acc.reshape([blocks_of(T), T.warps, 2, 8, T.block_m // 8, 4, 2])
    return parts.permute(0, 4, 1, 3, 5, 2, 6).reshape([rows_of(T) * T.block_m])


@gluon.jit
def _from_lines(lines, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """The inverse."""
    parts = lines.reshape([blocks_of(T), T.block_m // 8, T.warps, 8, 4, 2, 2])
    acc = parts.permute(0, 2, 5, 3, 1, 4, 6).reshape([rows_of(T), T.block_m])
    return gl.convert_layout(acc, mma_layout(T), assert_trivial=True)


@gluon.jit
def _sums_of(workspace_ptr, program, lines):  # type: ignore[no-untyped-def]
    """Addresses of what a program gives, as `lines` are laid out."""
    SIZE: gl.constexpr = lines.shape[0]
    L: gl.constexpr = lines.type.layout
    return workspace_ptr + program.to(gl.int64) * SIZE + gl.arange(0, SIZE, L)


@gluon.jit
def give(acc, workspace_ptr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Leave sums acc [ROWS, BLOCK_M] to who keeps their tile. Once in a launch; `mark_given` is another warp's part."""
    lines = _in_lines(acc, T)
    gl.store(_sums_of(workspace_ptr, gl.program_id(0), lines), lines)
    arrive_given(T)


@gluon.jit
def mark_given(workspace_ptr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Mark what this program gives, once it is there. By two warps without consumers' work, once in a launch."""
    mark: gl.constexpr = _mark_asm(T.warps)
    wait_given(T)
    _with_marks(workspace_ptr, gl.program_id(0), mark, T)


@gluon.jit
def with_given(acc, workspace_ptr, first, last, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """acc [ROWS, BLOCK_M] and what programs first .. last - 1 give, as soon as they do."""
    wait: gl.constexpr = _wait_asm()
    unmark: gl.constexpr = _unmark_asm()
    lines = _in_lines(acc, T)
    for program in range(first, last):
        _with_marks(workspace_ptr, program, wait, T)
        lines += gl.load(_sums_of(workspace_ptr, program, lines), cache_modifier=".cg")
        _with_marks(workspace_ptr, program, unmark, T)
    return _from_lines(lines, T)
