"""The loop of the tiled kernels: words of a tile of K become the left operand of MMAs, x is the right one.

A warp that issues MMAs with an operand in registers is held until all but some two of them are done (measured on an
H100: eight of 64 rows and 64 tokens, then 242 cycles of other work, take 442 cycles, and 257 alone). Work that is to
go on meanwhile has to stand between them, so their groups are small:

    two groups     inputs 0 .. 63 and 64 .. 127 of a tile; while one runs, the operand of the other is dequantized
    four groups    the same of each of two blocks of rows, where a warp has two; while one is issued, the operand of the
                   next is dequantized

Of 192 rows the second block of both warpgroups is the same 64, each with half of the tokens; so it is in the stage
twice:

    rows of W    | 0 .. 63, all tokens      | 64 .. 127, all tokens    |
                 | 128 .. 191, first half   | 128 .. 191, last half    |
    warps        | 0 .. 3                   | 4 .. 7                   |

A `wgmma` reads its registers while it runs, and nobody but the wait for it knows: not ptxas, which gives them to others
once it has been issued. An operand is therefore handed on to the wait that means its group.

A tile begins with a wait for its words, and its first operand is made of them while nothing but the last group of the
tile before is left to multiply: ptxas serializes the MMAs of a loop that carries registers of an operand from one
iteration to the next, or past another loop (C7513), and a wait for an mbarrier is a loop. With UNROLL > 1 another warp
does the waiting and meets this one at a named barrier (`stage_barriers`), which is one instruction; UNROLL tiles are
then one block of code, all but the first of which begin early:

    tile t      | group 0 | group 1 | ... | last group          |
    meanwhile   |         |         |     | words of tile t + 1 | its group 0 dequantized
    tile t + 1                                                  | group 0 | group 1 | ...

A stage is a tile of K; with SLICES > 1 so many, each of which one part of the warps multiplies, with all rows.

A program's share of K is some of these blocks, whole, and not none (`TiledConfig.within`): what is left over would want
a loop that may not run, which C7515 is about.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from compress.kernels.gluon_parts import (
    SCALED_UNIT,
    byte_weights,
    parts_of,
    scaled_byte,
    scaled_slice,
    slice_weights,
)
from compress.kernels.part_mma import multiply_parts, wait_for_parts
from compress.kernels.stage_barriers import arrive_empty, wait_passed_on, wait_ready
from compress.kernels.tile_layouts import mma_layout, operand_layout, sums_layout
from compress.kernels.tile_parts import (
    copy_stage,
    load_columns,
    load_words,
    next_stage,
    slice_of_warp,
)
from compress.kernels.tile_shape import (
    blocks_of,
    common_part,
    common_rows,
    common_tokens,
    fields_per_tile,
    in_units,
    n_parts,
    part_tokens,
    rows_of,
    tiles_ahead,
    x_offset,
)


@gluon.jit
def block_of_rows(t, b: gl.constexpr, BLOCKS: gl.constexpr, L: gl.constexpr):  # type: ignore[no-untyped-def]
    """Part b of one or two equal parts of the rows of t [BLOCK_N] or [BLOCK_N, C], in layout L: only renames
    registers."""
    part = t
    if BLOCKS == 2:
        if len(t.shape) == 1:
            parts = gl.split(t.reshape([2, t.shape[0] // 2]).permute(1, 0))
        else:
            parts = gl.split(t.reshape([2, t.shape[0] // 2, t.shape[1]]).permute(1, 2, 0))
        part = gl.convert_layout(parts[b], L, assert_trivial=True)
    return part


@gluon.jit
def part_of_tile(words, columns, h: gl.constexpr, b: gl.constexpr, BLOCKS: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Inputs 64 h .. of block b of rows of a tile, dequantized and scaled: [rows, 64] as the MMA's left operand. Where
    `in_units`, in those of `row_unit` and SCALED_UNIT, which `to_size` brings back."""
    A: gl.constexpr = operand_layout(T)
    PARTS: gl.constexpr = parts_of(T.group)
    ROWS: gl.constexpr = gl.SliceLayout(1, A)
    words = block_of_rows(words, b, BLOCKS, A)
    FIELDS: gl.constexpr = 8 // T.bits  # of a word within 64 inputs
    fields = ()
    for p in gl.static_range(FIELDS * h, FIELDS * h + FIELDS):
        scale = gl.expand_dims(block_of_rows(columns[p * PARTS // (2 * FIELDS)], b, BLOCKS, ROWS), 1)
        zero = gl.full((1, 1), 2.0 ** (T.bits - 1), gl.float32, A)
        if T.has_zero:
            zero = block_of_rows(columns[PARTS + p * PARTS // (2 * FIELDS)], b, BLOCKS, ROWS)
            zero = gl.expand_dims(zero.to(gl.float32), 1)
        if in_units(T):
            fields = fields + (scaled_slice(words, scale, p) if T.bits == 4 else scaled_byte(words, scale, p),)
        elif T.bits == 4:
            fields = fields + (slice_weights(words, zero, p, T.dtype) * scale,)
        else:
            fields = fields + (byte_weights(words, zero, p, T.dtype) * scale,)
    w = fields[0]
    if T.bits == 4:
        w = gl.join(fields[0], fields[1]).permute(0, 2, 1).reshape([words.shape[0], 64])
    return gl.convert_layout(w, A, assert_trivial=True)


@gluon.jit
def to_size(accs, part_of_unit, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of products with `part_of_tile`, in its units -> those with weights. Rows are where the operand has
    them."""
    sized = accs
    if in_units(T):
        BLOCKS: gl.constexpr = 2 if common_rows(T) > 0 else 1
        ROWS: gl.constexpr = gl.SliceLayout(1, operand_layout(T))
        sized = ()
        for p in gl.static_range(len(accs)):
            unit = block_of_rows(SCALED_UNIT / part_of_unit, p // n_parts(T) if BLOCKS > 1 else 0, BLOCKS, ROWS)
            by = gl.convert_layout(unit, gl.SliceLayout(1, accs[p].type.layout), assert_trivial=True)
            sized = sized + (accs[p] * gl.expand_dims(by, 1),)
    return sized


@gluon.jit
def multiply_tiles(  # type: ignore[no-untyped-def]
    words_desc, x_desc, x_piece_desc, scale_ptr, zero_ptr, words_smem, x_smem, barriers, columns, part_of_unit, first,
    last, n0, m0, M, N, K, tiles, stage, phase, again, COPIES: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """float32 [ROWS, tokens] of each part: the sums of a tile over stages first .. last - 1 of K, the first STAGES of
    which are on their way. COPIES: copy what follows here; otherwise another warp does, as stages are left empty."""
    if T.unroll > 1 or T.persistent:
        gl.assume(first < last)
    if blocks_of(T) == 2:
        accs, stage, phase = _in_four_groups(
            words_desc, x_desc, x_piece_desc, scale_ptr, zero_ptr, words_smem, x_smem, barriers, columns, part_of_unit,
            first, last, n0, m0, M, N, K, tiles, stage, phase, again, COPIES, T,
        )  # fmt: skip
    else:
        accs, stage, phase = _in_two_groups(
            words_desc, x_desc, x_piece_desc, scale_ptr, zero_ptr, words_smem, x_smem, barriers, columns, part_of_unit,
            first, last, n0, m0, M, N, K, tiles, stage, phase, again, COPIES, T,
        )  # fmt: skip
    return to_size(accs, part_of_unit, T), stage, phase


@gluon.jit
def _no_sums(T: gl.constexpr):  # type: ignore[no-untyped-def]
    """For MMAs to add to: [ROWS, tokens] of each part."""
    if n_parts(T) > 1:
        accs = _no_sums_of(T.block_m, part_tokens(T), T)
    else:
        ROWS: gl.constexpr = rows_of(T)
        accs = (warpgroup_mma_init(gl.zeros((ROWS, part_tokens(T)), gl.float32, mma_layout(T))),)
    return accs


@gluon.jit
def _no_sums_of(TOKENS: gl.constexpr, PART: gl.constexpr, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """[rows, PART] of each part of TOKENS, of 16 rows a warp."""
    ROWS: gl.constexpr = 16 * T.warps
    accs = ()
    for _ in gl.static_range(TOKENS // PART):
        accs = accs + (gl.zeros((ROWS, PART), gl.float32, sums_layout(T, PART)),)
    return accs


@gluon.jit
def _multiply(left, x_smem, half, accs, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Start a group of MMAs of a left operand [ROWS, 64] with all tokens of 64 inputs, the half-th of all stages'."""
    if n_parts(T) > 1:
        sums = multiply_parts(left, x_offset(T) + half * (T.block_m * 128), accs, T.block_m, part_tokens(T), T)
    else:
        sums = (warpgroup_mma(left, x_smem.index(half).permute([1, 0]), accs[0], is_async=True),)
    return sums


@gluon.jit
def _wait_but(groups: gl.constexpr, accs, operands, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """accs when all but so many groups are done, behind which registers of the operands may be written."""
    if n_parts(T) > 1:
        sums = wait_for_parts(groups, accs, operands, part_tokens(T), T)
    else:
        sums = (warpgroup_mma_wait(groups, deps=accs + operands)[0],)
    return sums


@gluon.jit
def _copy_into(words_desc, x_desc, x_piece_desc, barriers, words_smem, x_smem, behind, t, first, last, n0, m0, M, N,
               T: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """The next tile into the stage behind that of tile t. After its last MMA, which runs meanwhile: every one of these
    copies costs a barrier."""
    gl.thread_barrier()
    ahead = t - 1 + T.stages
    copy_stage(words_desc, x_desc, x_piece_desc, barriers, words_smem, x_smem, ahead, n0, m0, M, N, behind,
               (t > first) & (ahead < last), True, True, True, T)  # fmt: skip


@gluon.jit
def _filled_again(t, first, last, again, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Whether there is a stage before the t-th, and it is filled another time, if anybody else is to be told. again:
    this is not a program's first tile of y."""
    live = (t > first) | again
    if T.sharers > 1:
        live = live & (t - 1 + T.stages < last)
    return live


@gluon.jit
def _behind_first(columns, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Columns of the tiles behind the first, of one more than are loaded ahead."""
    later = ()
    for i in gl.static_range(fields_per_tile(T), (tiles_ahead(T) + 1) * fields_per_tile(T)):
        later = later + (columns[i],)
    return later


@gluon.jit
def _stage_behind(stage, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Of the tile before."""
    behind = stage - 1
    if behind < 0:
        behind = T.stages - 1
    return behind


@gluon.jit
def _words_of(words_smem, stage, phase, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """The words of a tile, once its copies are there."""
    if T.unroll > 1:
        wait_passed_on(stage, T)
    else:
        wait_ready(stage, phase, T)
    return load_words(words_smem, stage, T)


@gluon.jit
def _in_two_groups(  # type: ignore[no-untyped-def]
    words_desc, x_desc, x_piece_desc, scale_ptr, zero_ptr, words_smem, x_smem, barriers, columns, part_of_unit, first,
    last, n0, m0, M, N, K, tiles, stage, phase, again, COPIES: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """`multiply_tiles`, all rows at once. Nothing but accs outlives an iteration, for which ptxas would move registers:
    low and high are handed on to the wait alone."""
    ROWS: gl.constexpr = rows_of(T)
    UNROLL: gl.constexpr = T.unroll
    accs = _no_sums(T)
    low = gl.zeros((ROWS, 64), T.dtype, operand_layout(T))
    high = low
    part = slice_of_warp(T)
    for first_of_run in range(first, last, UNROLL):
        words = _words_of(words_smem, stage, phase, T)
        for i in gl.static_range(UNROLL):
            t = first_of_run + i
            # all but the last group is done: the registers of the other operand may be written again. A wgmma reads its
            # registers while it runs and nobody but the wait knows, so the operand is a dependency of the wait.
            accs = _wait_but(1, accs, (low,), T)
            low = part_of_tile(words, columns, 0, 0, 1, T)
            accs = _multiply(low, x_smem, 2 * (T.slices * stage + part), accs, T)
            columns = columns + load_columns(scale_ptr, zero_ptr, part_of_unit, t + tiles_ahead(T), n0, N, K, tiles, T)
            accs = _wait_but(1, accs, (high,), T)  # and the stage of the last tile may be filled again
            behind = _stage_behind(stage, T)
            if not COPIES:
                arrive_empty(behind, _filled_again(t, first, last, again, T), T)
            high = part_of_tile(words, columns, 1, 0, 1, T)
            half = 2 * (T.slices * stage + part) + 1
            if i + 1 < UNROLL:
                stage, phase = next_stage(stage, phase, T)
                words = _words_of(words_smem, stage, phase, T)
            accs = _multiply(high, x_smem, half, accs, T)
            if COPIES:
                _copy_into(words_desc, x_desc, x_piece_desc, barriers, words_smem, x_smem, behind, t, first, last, n0,
                           m0, M, N, T)  # fmt: skip
            columns = _behind_first(columns, T)
        stage, phase = next_stage(stage, phase, T)
    accs = _wait_but(0, accs, (low, high), T)
    return accs, stage, phase


@gluon.constexpr_function
def _later_tokens_asm(t):  # type: ignore[no-untyped-def]
    """Bytes of x before the tokens that this warpgroup multiplies common rows with, in rows of 128 bytes."""
    n_bytes = 128 * (t.block_m - common_tokens(t))
    return f"{{.reg .b32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; mul.lo.u32 $0, t, {n_bytes};}}"


@gluon.jit
def _no_sums_of_blocks(T: gl.constexpr):  # type: ignore[no-untyped-def]
    """For MMAs of each of two blocks of rows to add to, and where in x the tokens of the second begin, in bytes."""
    if common_rows(T) > 0:
        asm: gl.constexpr = _later_tokens_asm(T)
        later = gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=True, pack=1)
        first = _no_sums(T)
        second = _no_sums_of(common_tokens(T), common_part(T), T)
    else:
        ROWS: gl.constexpr = rows_of(T) // 2
        TOKENS: gl.constexpr = T.block_m
        later = gl.to_tensor(0)
        acc = gl.zeros((ROWS, TOKENS), gl.float32, mma_layout(T))
        first = (acc,)
        second = (warpgroup_mma_init(acc),)
    return first, second, later


@gluon.jit
def _wait_of_block(b: gl.constexpr, first, second, words, operand, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of both blocks, and words, when all groups but one are done, behind which registers of the operand may be
    written; of block b a group follows."""
    if common_rows(T) > 0:
        if b == 0:
            first = _wait_but(1, first, (operand,), T)
        else:
            second = wait_for_parts(1, second, (operand,), common_part(T), T)
    else:
        acc, other, words, _ = warpgroup_mma_wait(1, deps=(first[0], second[0], words, operand))
        first = (acc,)
        second = (other,)
    return first, second, words


@gluon.jit
def _multiply_block(b: gl.constexpr, left, x_smem, half, later, first, second, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """`_multiply` of block b of rows, of common ones with a warpgroup's tokens alone: sums of both."""
    if b == 0:
        first = _multiply(left, x_smem, half, first, T)
    elif common_rows(T) > 0:
        x = x_offset(T) + half * (T.block_m * 128) + later
        second = multiply_parts(left, x, second, common_tokens(T), common_part(T), T)
    else:
        second = _multiply(left, x_smem, half, second, T)
    return first, second


@gluon.jit
def _in_four_groups(  # type: ignore[no-untyped-def]
    words_desc, x_desc, x_piece_desc, scale_ptr, zero_ptr, words_smem, x_smem, barriers, columns, part_of_unit, first,
    last, n0, m0, M, N, K, tiles, stage, phase, again, COPIES: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """`multiply_tiles`, the rows in two blocks, with common rows sums of the first, then of the second. Without, an
    operand is made of words that have gone through the last wait: no earlier, or its registers might still be read, by
    the group four before it."""
    ROWS: gl.constexpr = rows_of(T) // 2
    gl.static_assert(T.slices == 1, "slices take one block of rows a warp")
    UNROLL: gl.constexpr = T.unroll
    low, high, later = _no_sums_of_blocks(T)
    last_but_one = gl.zeros((ROWS, 64), T.dtype, operand_layout(T))
    before = last_but_one
    for first_of_run in range(first, last, UNROLL):
        behind = _stage_behind(stage, T)
        words = _words_of(words_smem, stage, phase, T)
        for i in gl.static_range(UNROLL):
            t = first_of_run + i
            here = stage
            for g in gl.static_range(4):
                w = part_of_tile(words, columns, g // 2, g % 2, 2, T)
                if g == 3 and i + 1 < UNROLL:
                    stage, phase = next_stage(stage, phase, T)
                    words = _words_of(words_smem, stage, phase, T)
                low, high, words = _wait_of_block(g % 2, low, high, words, last_but_one, T)
                if g == 1 and not COPIES:  # all but group 0 of this tile are done: the stage of the last may be filled
                    arrive_empty(behind, _filled_again(t, first, last, again, T), T)
                low, high = _multiply_block(g % 2, w, x_smem, 2 * here + g // 2, later, low, high, T)
                last_but_one = before
                before = w
                if g == 0:
                    columns = columns + load_columns(
                        scale_ptr, zero_ptr, part_of_unit, t + tiles_ahead(T), n0, N, K, tiles, T
                    )
            if COPIES:
                _copy_into(words_desc, x_desc, x_piece_desc, barriers, words_smem, x_smem, behind, t, first, last, n0,
                           m0, M, N, T)  # fmt: skip
            columns = _behind_first(columns, T)
            behind = here
        stage, phase = next_stage(stage, phase, T)
    if common_rows(T) > 0:
        low = _wait_but(0, low, (last_but_one, before), T)
        accs = low + wait_for_parts(0, high, (), common_part(T), T)
    else:
        acc, second, last_but_one, before = warpgroup_mma_wait(0, deps=(low[0], high[0], last_but_one, before))
        both = gl.join(acc, second).permute(2, 0, 1).reshape([2 * ROWS, T.block_m])
        accs = (gl.convert_layout(both, mma_layout(T), assert_trivial=True),)
    return accs, stage, phase
