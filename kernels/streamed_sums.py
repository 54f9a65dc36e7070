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

Where the tiles left are no more than half of the programs, two that are a cluster may halve one each instead, and add
up through each other's shared memory (`cluster_sums`), which takes half as long.

    workspace   | sums [programs, ROWS BLOCK_M] float32 | marks [programs, WARPS, 4] int32 |

Each warp of the consumers gives to the same warp of another program, which has the same elements of a tile, in an order
in which a warp's are whole lines of memory. A warp with nothing else to do waits until these are there for all to see,
and marks them. Who has seen a mark takes it away, so that none outlives its launch. The workspace is memory as it
comes: a mark is 128 bits that nothing else is likely to have left there, 1 in 10^38.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from compress.kernels.gluon_parts import cluster_rank
from compress.kernels.stage_barriers import arrive_given, wait_given
from compress.kernels.tile_layouts import mma_layout
from compress.kernels.tile_parts import all_tiles
from compress.kernels.tile_shape import blocks_of, ctas_of, n_parts, part_tokens, rows_of

LEAST_STAGES = 4  # of a program: fewer would take longer to add up than to compute
WORTH_STAGES = 7  # of a program, that it has to save: what adding up takes
SHORT_STAGES = 16  # of a tile, up to which two add up a half each, however few tiles there are
_MARK = (0x9E3779B9, 0x7F4A7C15, 0xF39CC060, 0x5CEDC834)


@dataclass(frozen=True)
class Shares:
    """Of tiles, `whole` are computed by a program each, and `part` stages of the others by each program; in pairs: by
    clusters of two, half a tile each, which add up through each other's shared memory."""

    whole: int
    part: int
    in_pairs: bool = False


def shares(n_tiles: int, stages: int, at_once: int, unroll: int, pairs: bool) -> Shares:
    """How persistent programs, so many at once, share out tiles of so many stages. Parts are multiples of `unroll`, as
    the stages of a tile are. In pairs where these may be and there is room for them, but for few tiles of a long K
    after a single round or none: after more of them programs are no longer in step, and the more add up a tile, the
    longer they wait. All tiles are whole where parts would be nearly as long."""
    rest = n_tiles % at_once
    fit = 2 * rest <= at_once and stages % (2 * unroll) == 0
    few = 4 * rest <= at_once and n_tiles < 2 * at_once and stages > SHORT_STAGES
    if pairs and rest and fit and not few:
        return Shares(n_tiles - rest, stages // 2, in_pairs=True)
    part = max(-(-rest * stages // at_once), LEAST_STAGES)
    part = -(-part // unroll) * unroll
    worth = rest > 0 and part + WORTH_STAGES < stages
    return Shares(n_tiles - rest, part) if worth else Shares(n_tiles, stages)


def workspace_floats(programs: int, block_m: int, rows: int, warps: int) -> int:
    """Of sums and marks, 4 bytes each."""
    return programs * (block_m * rows + 4 * warps)


@gluon.jit
def _program(T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Number of this program among all, clusters one behind the other, and how many there are."""
    program = gl.program_id(0) * ctas_of(T)
    if ctas_of(T) > 1:
        program += cluster_rank()
    return program, gl.num_programs(0) * ctas_of(T)


@gluon.jit
def _streamed(whole, tiles, part, M, N, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Which of the stages of all tiles behind the first `whole` this program computes: the first, and the one behind
    the last."""
    end = (all_tiles(M, N, T) - whole) * gl.cdiv(tiles, T.slices)
    program, _ = _program(T)
    first = gl.minimum(program * part, end)
    return first, gl.minimum(first + part, end)


@gluon.jit
def turns_of(whole, tiles, part, M, N, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """How many tiles this program of a persistent launch computes alone, and all that it computes any of."""
    program, programs = _program(T)
    alone = gl.cdiv(gl.maximum(whole - program, 0), programs)
    turns = alone
    if T.streams:
        stages = gl.cdiv(tiles, T.slices)
        first, last = _streamed(whole, tiles, part, M, N, T)
        if last > first:
            turns += (last - 1) // stages - first // stages + 1
    return alone, turns


@gluon.jit
def turn(i, alone, whole, tiles, part, M, N, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """The i-th tile that this program of a persistent launch computes any of, the first of its stages and the one
    behind the last, and the first of the programs that give to this one, up to which they do."""
    program, programs = _program(T)
    stages = gl.cdiv(tiles, T.slices)
    tile = program + i * programs
    first = 0
    last = stages
    giver = program
    if T.streams:
        if i >= alone:
            begin, end = _streamed(whole, tiles, part, M, N, T)
            later = (end - 1) // stages
            tile = begin // stages
            if (i == alone) & (later > tile):  # the begin of the later one first: another waits for it
                tile = later
            first = gl.maximum(begin - tile * stages, 0)
            last = gl.minimum(end - tile * stages, stages)
            if last == stages:
                giver = tile * stages // part
            tile = gl.minimum(tile + whole, all_tiles(M, N, T) - 1)  # one without any is not to look beyond W
    return tile, first, last, giver


@gluon.constexpr_function
def _mark_asm(warps):  # type: ignore[no-untyped-def]
    """Set the marks of this program's warps behind the address $1, lane w that of warp w; of two warps the even one."""
    words = "".join(f"mov.b32 {r}, {word}; " for r, word in zip("abcd", _MARK, strict=True))
    return (
        "{.reg .pred p, q; .reg .b32 a, b, c, d; .reg .b64 at; mov.u32 a, %tid.x; and.b32 a, a, 32; "
        f"setp.eq.u32 q, a, 0; mov.u32 a, %laneid; setp.lt.and.u32 p, a, {warps}, q; mul.wide.u32 at, a, 16; "
        "add.s64 at, at, $1; fence.acq_rel.gpu; " + words
        + "@p st.relaxed.gpu.global.v4.b32 [at], {a, b, c, d}; mov.b32 $0, 0;}"
    )  # fmt: skip


@gluon.constexpr_function
def _collect_asm(warps):  # type: ignore[no-untyped-def]
    """Wait for this warp's marks of programs $2 .. $3 - 1 behind the address $1, and take them away: each lane those of
    every 32nd program."""
    differ = "".join(f"xor.b32 {r}, {r}, {word}; " for r, word in zip("abcd", _MARK, strict=True))
    return (
        "{.reg .pred p; .reg .b32 a, b, c, d, program; .reg .b64 at; mov.u32 program, %laneid; "
        "add.s32 program, program, $2; next: setp.ge.s32 p, program, $3; @p bra all; "
        f"mov.u32 a, %tid.x; shr.u32 a, a, 5; mad.lo.s32 a, program, {warps}, a; mul.wide.u32 at, a, 16; "
        "add.s64 at, at, $1; again: ld.relaxed.gpu.global.v4.b32 {a, b, c, d}, [at]; " + differ
        + "or.b32 a, a, b; or.b32 c, c, d; or.b32 a, a, c; setp.ne.u32 p, a, 0; @p bra again; "
        "st.relaxed.gpu.global.v4.b32 [at], {a, a, a, a}; add.s32 program, program, 32; bra next; "
        "all: fence.acq_rel.gpu; bar.warp.sync 0xffffffff; mov.b32 $0, 0;}"
    )  # fmt: skip


@gluon.jit
def _marks(workspace_ptr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Address of the first program's."""
    sums = gl.num_programs(0).to(gl.int64) * (T.block_m * rows_of(T))
    return (workspace_ptr + sums).to(gl.int64)


@gluon.jit
def _in_lines(accs, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Sums [ROWS, tokens] of each part as [ROWS tokens], 4 neighbours in a thread and 128 in a warp: only renames
    registers."""
    lines = ()
    for p in gl.static_range(n_parts(T)):
        split = accs[p].reshape([blocks_of(T), T.warps, 2, 8, part_tokens(T) // 8, 4, 2])
        lines = lines + (split.permute(0, 4, 1, 3, 5, 2, 6).reshape([rows_of(T) * part_tokens(T)]),)
    return lines


@gluon.jit
def _from_lines(lines, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """The inverse."""
    accs = ()
    for p in gl.static_range(n_parts(T)):
        split = lines[p].reshape([blocks_of(T), part_tokens(T) // 8, T.warps, 8, 4, 2, 2])
        acc = split.permute(0, 2, 5, 3, 1, 4, 6).reshape([rows_of(T), part_tokens(T)])
        accs = accs + (gl.convert_layout(acc, mma_layout(T), assert_trivial=True),)
    return accs


@gluon.jit
def _sums_of(workspace_ptr, program, lines, p: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Addresses of what a program gives of a part, as its lines are laid out."""
    L: gl.constexpr = lines[p].type.layout
    first = program.to(gl.int64) * (rows_of(T) * T.block_m) + rows_of(T) * part_tokens(T) * p
    return workspace_ptr + first + gl.arange(0, lines[p].shape[0], L)


@gluon.jit
def _load_lines(workspace_ptr, program, lines, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Past the L1, which does not see what other multiprocessors write."""
    loaded = ()
    for p in gl.static_range(n_parts(T)):
        loaded = loaded + (gl.load(_sums_of(workspace_ptr, program, lines, p, T), cache_modifier=".cg"),)
    return loaded


@gluon.jit
def _added(lines, others, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Part by part."""
    sums = ()
    for p in gl.static_range(n_parts(T)):
        sums = sums + (lines[p] + others[p],)
    return sums


@gluon.jit
def give(accs, workspace_ptr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Leave sums, [ROWS, tokens] of each part, to who keeps their tile. Once in a launch; `mark_given` is another
    warp's part."""
    lines = _in_lines(accs, T)
    for p in gl.static_range(n_parts(T)):
        gl.store(_sums_of(workspace_ptr, gl.program_id(0), lines, p, T), lines[p])
    arrive_given(T)


@gluon.jit
def mark_given(workspace_ptr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Mark what this program gives, once it is there. By two warps without consumers' work, once in a launch."""
    mark: gl.constexpr = _mark_asm(T.warps)
    wait_given(T)
    own = _marks(workspace_ptr, T) + gl.program_id(0) * (16 * T.warps)
    gl.inline_asm_elementwise(mark, "=r,l", [own], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def with_given(accs, workspace_ptr, first, last, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Sums, [ROWS, tokens] of each part, and what programs first .. last - 1 give, once all of them do."""
    collect: gl.constexpr = _collect_asm(T.warps)
    TWO: gl.constexpr = blocks_of(T) * T.block_m <= 128  # programs' loads in flight, where registers allow it
    lines = _in_lines(accs, T)
    if first < last:
        marks = _marks(workspace_ptr, T)
        gl.inline_asm_elementwise(
            collect, "=r,l,r,r", [marks, gl.to_tensor(first), gl.to_tensor(last)], dtype=gl.int32, is_pure=False, pack=1
        )
        if TWO:
            even = first + (last - first) // 2 * 2
            for program in range(first, even, 2):
                one = _load_lines(workspace_ptr, program, lines, T)
                other = _load_lines(workspace_ptr, program + 1, lines, T)
                lines = _added(_added(lines, one, T), other, T)
            first = even
        for program in range(first, last):
            lines = _added(lines, _load_lines(workspace_ptr, program, lines, T), T)
    return _from_lines(lines, T)
