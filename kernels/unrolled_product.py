"""The loop of `w4a16_producer` over several tiles of K in a straight line.

    tile t      | group 0 | group 1 | ... | last group          |
    meanwhile   |         |         |     | words of tile t + 1 | its group 0 dequantized
    tile t + 1                                                  | group 0 | group 1 | ...

In `tile_product` a tile begins with a wait for its words, and its first operand is made of them while nothing but the
last group of the tile before is left to multiply: ptxas serializes the MMAs of a loop that carries registers of an
operand from one iteration to the next, or past another loop (C7513), and a wait for an mbarrier is a loop. So here the
waiting is done by a warp that has nothing else to do (`relay`), which then arrives at a named barrier of the hardware,
and waiting for that is one instruction. UNROLL tiles are then one block of code, all but the first of which begin
early. A program's share of K is some of these blocks, whole, and not none (`TiledConfig.within`): loops that may not
run are what C7515 is about.

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
    gl.assume(first < last)
    if blocks_of(T) == 2:
        acc = _in_four_groups(
            scale_ptr, zero_ptr, words_smem, x_smem, columns, part_of_unit, first, last, n0, N, K, tiles, T
        )
    else:
        acc = _in_two_groups(
            scale_ptr, zero_ptr, words_smem, x_smem, columns, part_of_unit, first, last, n0, N, K, tiles, T
        )
    return to_size(acc, scale_ptr, n0, N, K, T)


@gluon.jit
def _stages_around(stage, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """The stages of the tile before and of the tile behind."""
    behind = stage - 1
    if behind < 0:
        behind = T.stages - 1
    following = stage + 1
    if following == T.stages:
        following = 0
    return behind, following


@gluon.jit
def _in_two_groups(  # type: ignore[no-untyped-def]
    scale_ptr, zero_ptr, words_smem, x_smem, columns, part_of_unit, first, last, n0, N, K, tiles, T: gl.constexpr
):  # fmt: skip
    """`tile_product`'s, all rows at once: an operand is made behind the wait for the group that read the last one."""
    UNROLL: gl.constexpr = T.unroll
    ROWS: gl.constexpr = T.block_n
    TOKENS: gl.constexpr = T.block_m
    acc = warpgroup_mma_init(gl.zeros((ROWS, TOKENS), gl.float32, mma_layout(T)))
    low = gl.zeros((ROWS, 64), T.dtype, operand_layout(T))
    high = low
    stage = 0
    for t in range(first, last, UNROLL):
        wait_passed_on(stage, T)
        words = load_words(words_smem.index(stage), T)
        for i in gl.static_range(UNROLL):
            behind, following = _stages_around(stage, T)
            acc, low = warpgroup_mma_wait(1, deps=(acc, low))
            low = part_of_tile(words, columns, 0, 0, 1, T)
            acc = warpgroup_mma(low, x_smem.index(2 * stage).permute([1, 0]), acc, is_async=True)
            columns = columns + load_columns(
                scale_ptr, zero_ptr, part_of_unit, t + i + tiles_ahead(T), n0, N, K, tiles, T
            )
            acc, high = warpgroup_mma_wait(1, deps=(acc, high))  # and the stage of the last tile may be filled again
            arrive_empty(behind, filled_again(t + i, first, last, T), T)
            high = part_of_tile(words, columns, 1, 0, 1, T)
            if i + 1 < UNROLL:
                wait_passed_on(following, T)
                words = load_words(words_smem.index(following), T)
            acc = warpgroup_mma(high, x_smem.index(2 * stage + 1).permute([1, 0]), acc, is_async=True)
            columns = behind_first(columns, T)
            stage = following
    acc, low, high = warpgroup_mma_wait(0, deps=(acc, low, high))
    return acc


@gluon.jit
def _in_four_groups(  # type: ignore[no-untyped-def]
    scale_ptr, zero_ptr, words_smem, x_smem, columns, part_of_unit, first, last, n0, N, K, tiles, T: gl.constexpr
):  # fmt: skip
    """`tile_product`'s, the rows in two blocks: an operand is made of words that have gone through the last wait."""
    UNROLL: gl.constexpr = T.unroll
    ROWS: gl.constexpr = T.block_n // 2
    TOKENS: gl.constexpr = T.block_m
    acc = gl.zeros((ROWS, TOKENS), gl.float32, mma_layout(T))
    second = warpgroup_mma_init(acc)
    last_but_one = gl.zeros((ROWS, 64), T.dtype, operand_layout(T))
    before = last_but_one
    stage = 0
    for t in range(first, last, UNROLL):
        wait_passed_on(stage, T)
        words = load_words(words_smem.index(stage), T)
        for i in gl.static_range(UNROLL):
            behind, following = _stages_around(stage, T)
            for g in gl.static_range(4):
                w = part_of_tile(words, columns, g // 2, g % 2, 2, T)
                if g == 3 and i + 1 < UNROLL:
                    wait_passed_on(following, T)
                    words = load_words(words_smem.index(following), T)
                x = x_smem.index(2 * stage + g // 2).permute([1, 0])
                acc, second, words, last_but_one = warpgroup_mma_wait(1, deps=(acc, second, words, last_but_one))
                if g == 1:  # all but group 0 of this tile are done: the stage of the last may be filled
                    arrive_empty(behind, filled_again(t + i, first, last, T), T)
                if g % 2 == 0:
                    acc = warpgroup_mma(w, x, acc, is_async=True)
                else:
                    second = warpgroup_mma(w, x, second, is_async=True)
                last_but_one = before
                before = w
                if g == 0:
                    columns = columns + load_columns(
                        scale_ptr, zero_ptr, part_of_unit, t + i + tiles_ahead(T), n0, N, K, tiles, T
                    )
            columns = behind_first(columns, T)
            stage = following
    acc, second, last_but_one, before = warpgroup_mma_wait(0, deps=(acc, second, last_but_one, before))
    both = gl.join(acc, second).permute(2, 0, 1).reshape([2 * ROWS, TOKENS])
    return gl.convert_layout(both, mma_layout(T), assert_trivial=True)
