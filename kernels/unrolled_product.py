"""The loop of `w4a16_producer` over several tiles of K in a straight line.

    tile t      | group 0 | group 1 | ... | last group          |
    meanwhile   |         |         |     | words of tile t + 1 | its group 0 dequantized
    tile t + 1                                                  | group 0 | group 1 | ...

In `tile_product` a tile begins with a wait for its words, and its first operand is made of them while nothing but the
last group of the tile before is left to multiply: ptxas serializes the MMAs of a loop that carries registers of an
operand from one iteration to the next, or past another loop (C7513), and a wait for an mbarrier is a loop. So here the
waiting is done by a warp that has nothing else to do (`relay`), which then arrives at a named barrier of the hardware,
and waiting for that is one instruction. UNROLL tiles are then one block of code, all but the first of which begin
early; what is left of a program's tiles follows one by one.

Groups of MMAs are those of `tile_product`, one for each half of a tile and block of rows.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from compress.kernels.stage_barriers import arrive_empty, pass_on, wait_passed_on, wait_ready
from compress.kernels.tile_parts import load_columns, load_words, next_stage
from compress.kernels.tile_product import behind_first, filled_again, part_of_tile, to_size
from compress.kernels.tile_shape import blocks_of, mma_layout, operand_layout, tiles_ahead


@gluon.jit
def relay(first, last, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Tell the consumers of each tile whose copies are there. By one warp."""
    stage = 0
    phase = 0
    for _ in range(first, last):
        wait_ready(stage, phase, T)
        pass_on(stage, T)
        stage, phase = next_stage(stage, phase, T)


@gluon.jit
def multiply_unrolled(  # type: ignore[no-untyped-def]
    scale_ptr, zero_ptr, words_smem, x_smem, columns, part_of_unit, first, last, n0, N, K, tiles, T: gl.constexpr
):  # fmt: skip
    """`tile_product.multiply_tiles` where other warps copy and `relay`."""
    BLOCKS: gl.constexpr = blocks_of(T)
    gl.static_assert(BLOCKS <= 2, "a warp has one or two blocks of rows")
    ROWS: gl.constexpr = T.block_n // BLOCKS
    TOKENS: gl.constexpr = T.block_m
    acc = gl.zeros((ROWS, TOKENS), gl.float32, mma_layout(T))
    sums = (warpgroup_mma_init(acc),)
    if BLOCKS == 2:
        sums = (acc, warpgroup_mma_init(acc))
    none = gl.zeros((ROWS, 64), T.dtype, operand_layout(T))
    operands = (none, none)
    stage = 0
    middle = first + (last - first) // T.unroll * T.unroll
    for t in range(first, middle, T.unroll):
        sums, operands, columns, stage = _multiply_some(
            scale_ptr, zero_ptr, words_smem, x_smem, sums, operands, columns, part_of_unit, stage, t, first, last, n0,
            N, K, tiles, T.unroll, T,
        )  # fmt: skip
    for t in range(middle, last):
        sums, operands, columns, stage = _multiply_some(
            scale_ptr, zero_ptr, words_smem, x_smem, sums, operands, columns, part_of_unit, stage, t, first, last, n0,
            N, K, tiles, 1, T,
        )  # fmt: skip
    done = warpgroup_mma_wait(0, deps=sums + operands)
    acc = done[0]
    if BLOCKS == 2:
        both = gl.join(done[0], done[1]).permute(2, 0, 1).reshape([2 * ROWS, TOKENS])
        acc = gl.convert_layout(both, mma_layout(T), assert_trivial=True)
    return to_size(acc, scale_ptr, n0, N, K, T)


@gluon.jit
def _multiply_some(  # type: ignore[no-untyped-def]
    scale_ptr, zero_ptr, words_smem, x_smem, sums, operands, columns, part_of_unit, stage, t, first, last, n0, N, K,
    tiles, COUNT: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """Tiles t .. t + COUNT - 1. sums: of each block of rows; operands: of the two groups that may still be read;
    columns: of tile t and those after it that are loaded; stage: of tile t."""
    BLOCKS: gl.constexpr = len(sums)
    GROUPS: gl.constexpr = 2 * BLOCKS
    wait_passed_on(stage, T)
    words = load_words(words_smem.index(stage), T)
    for i in gl.static_range(COUNT):
        behind = stage - 1
        if behind < 0:
            behind = T.stages - 1
        following = stage + 1
        if following == T.stages:
            following = 0
        for g in gl.static_range(GROUPS):
            w = part_of_tile(words, columns, g // BLOCKS, g % BLOCKS, BLOCKS, T)
            if g == GROUPS - 1 and i + 1 < COUNT:
                wait_passed_on(following, T)
                words = load_words(words_smem.index(following), T)
            # all but the last group are done. Words pass through: what is made of them must not be made earlier, or it
            # might take registers that a group still reads
            passed = warpgroup_mma_wait(1, deps=sums + (words, operands[0]))
            words = passed[BLOCKS]
            if g == 1:  # all but group 0 of this tile are done: the stage of the last may be filled
                arrive_empty(behind, filled_again(t + i, first, last, T), T)
            x = x_smem.index(2 * stage + g // BLOCKS).permute([1, 0])
            acc = warpgroup_mma(w, x, passed[g % BLOCKS], is_async=True)
            sums = (acc,)
            if BLOCKS == 2:
                sums = (acc, passed[1]) if g % BLOCKS == 0 else (passed[0], acc)
            operands = (operands[1], w)
            if g == 0:
                columns = columns + load_columns(
                    scale_ptr, zero_ptr, part_of_unit, t + i + tiles_ahead(T), n0, N, K, tiles, T
                )
        columns = behind_first(columns, T)
        stage = following
    return sums, operands, columns, stage
