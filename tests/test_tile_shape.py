"""`TiledConfig` and `Tile`: what a configuration runs as, its shared memory, and layouts of registers, none of which
needs a GPU. Layouts of the decode kernel are beside them.

`test_hopper` has what the kernels compute, `test_hopper_rules` which configuration a shape takes.
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton.experimental.gluon.language as gl

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when the kernels are decorated, at import

from test_hopper import CASES

from compress.kernels import dispatch, part_mma, table_file, tile_layouts, tile_shape, tunables, w4a16_decode
from compress.kernels.problem import Scheme
from compress.kernels.streamed_sums import Shares, shares
from compress.kernels.tile_shape import TiledConfig
from compress.kernels.w4a16_producer import places

# -- what a configuration runs as ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "ctas", "expected"),
    [
        (TiledConfig(64, 64, 4, 4, 3), 1, 3 * 20 + 1),  # KiB: words 64 x 64 bytes and x 64 x 256 a stage; mbarriers
        (TiledConfig(64, 64, 4, 4, 3, 4), 4, 3 * 20 + 13),  # and mail 3 x 16 tokens x (64 + 4) sums: 12.75
        (TiledConfig(16, 128, 8, 4, 3, 8), 8, 3 * 12 + 8),  # 7 x 2 x (128 + 4) sums and 8 bytes: 7.2
        (TiledConfig(256, 128, 2, 8, 3, 2), 2, 3 * 72 + 1),
        (TiledConfig(256, 128, 2, 8, 2, 2), 1, 2 * 72 + 1),  # 3 x 128 x 132 sums are more than two stages
        (TiledConfig(64, 64, 1, 4, 3, 4), 1, 3 * 20 + 1),  # nothing is split
        (TiledConfig(64, 64, 2, 8, 4, 2, True, 1, 4, 2), 2, 4 * 40 + 1),  # two slices a stage; mail is within
        (TiledConfig(256, 64, 1, 4, 3, 1, True, 1, 2, 1, 0, True), 1, 3 * 68 + 16 + 1),  # y of 128 tokens, of 256
        (TiledConfig(256, 128, 1, 8, 3, 1, True, 1, 1, 1, 0, True), 1, 3 * 72 + 8 + 1),  # and of 32
        (TiledConfig(64, 64, 1, 8, 4, 1, True, 1, 4, 2, 0, True), 1, 4 * 40 + 34),  # 64 x (2 x 64 + 4) sums: 33 KiB
        (TiledConfig(128, 64, 1, 8, 3, 1, True, 1, 1, 2, 0, True), 1, 3 * 72 + 9),  # 16 of 128 tokens: 8.25
        (TiledConfig(256, 128, 1, 8, 4, 1, True, 1, 1, 1, 0, True), 1, 4 * 72 + 1),  # no room, of 225 KiB, for any
        (TiledConfig(152, 128, 1, 8, 4, 1, True, 1, 2), 1, 4 * 46 + 1),  # words 8 KiB and x 152 x 256 a stage
        (TiledConfig(192, 128, 1, 8, 3, 1, True, 1, 2, 1, 0, True), 1, 3 * 56 + 3 * 16 + 1),  # y of 3 x 64 tokens
        (TiledConfig(200, 128, 2, 8, 3, 2, True, 1, 2, 1, 0, True), 2, 3 * 58 + 6 * 8 + 1),  # and of 6 x 32
        (TiledConfig(128, 192, 1, 8, 3, 1, True, 1, 2), 1, 3 * 48 + 1),  # words of 256 rows, 64 of them twice
        (TiledConfig(128, 192, 1, 8, 3, 1, True, 1, 2, 1, 0, True), 1, 3 * 48 + 6 * 8 + 1),  # y of 4 and 2 x 32 tokens
        (
            TiledConfig(192, 192, 1, 8, 3, 1, True, 1, 2, 1, 0, True),
            1,
            3 * 64 + 4 * 8 + 1,
        ),  # of 9 four
    ],
    ids=str,
)
def test_memory_of_a_program(config: TiledConfig, ctas: int, expected: int) -> None:
    """Oracle: stages, and mail with mbarriers rounded up to a KiB, by hand."""
    assert (config.ctas, config.memory_bytes()) == (ctas, expected * 1024)


@pytest.mark.parametrize("tokens", [*range(32, 257, 8), 16])
def test_parts_and_copies_of_a_tile(tokens: int) -> None:
    """Oracles: powers of two; parts make up the tile; two copies of x cover it without going beyond, each from a part's
    and an 8-row swizzle's begin; copies of y are of whole parts, or parts of one, and cover it. Without parts the
    second is of pieces: 8 tokens of 17 to 64, else 16, by the measurement in NOTES.md."""
    tile = tile_shape.Tile.of(TiledConfig(tokens, 128, 1, 8, 3, 1, True, 1, 2))
    part, parts = int(tile_shape.part_tokens(tile)), int(tile_shape.n_parts(tile))
    first, last = TiledConfig(tokens, 128, 1, 8, 3).tokens_copied()
    at_once = int(tile_shape.tokens_at_once(tile))
    assert part * parts == tokens and all(n & (n - 1) == 0 for n in (part, first, last, at_once))
    assert first <= tokens <= first + last and last <= first
    if parts == 1:
        assert (part, first, last) == (tokens, tokens, 8 if 16 < tokens <= 64 else 16)
    else:
        assert tokens < first + last < 2 * tokens or tokens == first + last
        assert (tokens - last) % part == 0 and (tokens - last) % 8 == 0
        assert at_once % part == 0 and at_once <= tokens <= at_once * int(tile_shape.copies_at_once(tile))


@pytest.mark.parametrize("tokens", range(64, 201, 8))
def test_common_rows_of_192(tokens: int) -> None:
    """Oracles: powers of two; a warpgroup multiplies a half of the tokens, rounded up to 8, from an 8-row swizzle's
    begin; what leaves is whole parts of both, and covers them; 192 of 256 rows of words are different ones."""
    config = TiledConfig(tokens, 192, 1, 8, 3, 1, True, 1, 2, 1, 0, True)
    tile = tile_shape.Tile.of(config)
    half, at_once = int(tile_shape.common_tokens(tile)), int(tile_shape.tokens_at_once(tile))
    part, common_part = int(tile_shape.part_tokens(tile)), int(tile_shape.common_part(tile))
    copies, own = tile_shape.out_copies(tile)
    assert tokens <= 2 * half < tokens + 16 and half % 8 == (tokens - half) % 8 == 0
    assert all(n & (n - 1) == 0 for n in (part, common_part, at_once)) and at_once == 32
    assert tokens % part == half % common_part == at_once % part == at_once % common_part == 0
    assert own * at_once >= tokens > (own - 1) * at_once
    assert (copies - own) * at_once >= half > (copies - own - 1) * at_once
    assert (int(tile_shape.rows_of(tile)), int(tile_shape.out_rows(tile)), config.box_rows()) == (256, 128, 64)
    first, last = config.tokens_copied()
    assert first + last >= tokens > max(first, last) and (tokens - last) % part == (tokens - last) % 8 == 0


def test_192_rows_are_shared_by_nobody() -> None:
    """Oracle: by hand."""
    config = TiledConfig(128, 192, 4, 16, 3, 2, True, 2, 2, 2, 0, True)
    assert config.as_it_runs() == TiledConfig(128, 192, 1, 8, 3, 1, True, 1, 2, 1, 0, True)
    assert config.within(2) == TiledConfig(128, 192, 1, 8, 3, 1, True, 1, 2)  # less than the stages
    assert config.within(33).unroll == 1


def _split(constraints: Any) -> list[str]:
    return str(constraints).split(",")


@pytest.mark.parametrize("tokens", [40, 96, 152, 160, 192, 240])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_instruction_of_any_number_of_tokens(tokens: int, dtype: str) -> None:
    """Oracle: the PTX ISA, of `wgmma` of 64 rows and 16 inputs: a thread has tokens / 2 sums and 4 registers of the
    left operand, which are different ones in each of four; sums are the same before and behind."""
    kind = gl.float16 if dtype == "fp16" else gl.bfloat16
    tile = tile_shape.Tile.of(TiledConfig(tokens, 128, 1, 8, 3, 1, True, 1, 2), dtype=kind)
    sums, part = tokens // 2, int(tile_shape.part_tokens(tile))
    asm, constraints = str(part_mma._multiply_asm(tile, tokens)), _split(part_mma._multiply_constraints(tokens, part))
    assert constraints == ["=f"] * sums + [str(i) for i in range(sums)] + ["r"] * (16 + part // 2)
    found = re.findall(rf"m64n{tokens}k16\.f32\.(b?f16)\.\1 {{(.*?)}}, {{(.*?)}}, d, p, 1, 1, 0;", asm)
    assert [name for name, _, _ in found] == [dtype.replace("fp", "f")] * 4
    assert all(re.findall(r"\d+", into) == [str(i) for i in range(sums)] for _, into, _ in found)
    left = [int(i) for _, _, operand in found for i in re.findall(r"\d+", operand)]
    assert left == list(range(2 * sums, 2 * sums + 16)) and f"add.u32 a, a, ${2 * sums + 16};" in asm
    waiting = _split(part_mma._wait_constraints(tokens, 2))
    assert waiting == ["=f"] * sums + ["=r"] * 32 + [str(i) for i in range(sums + 32)]


@pytest.mark.parametrize(
    ("config", "tiles", "unroll"),
    [
        (TiledConfig(64, 64, 4, 4, 3, 4, True, 1, 4), 32, 4),  # 4 shares of 8 tiles
        (TiledConfig(64, 64, 4, 4, 3, 4, True, 1, 4), 40, 1),  # of 10
        (TiledConfig(64, 64, 4, 4, 3, 4, True, 1, 2), 40, 2),
        (TiledConfig(64, 128, 8, 4, 3, 2, True, 1, 2), 112, 2),  # 8 shares of 14
        (TiledConfig(64, 128, 8, 4, 3, 2, True, 1, 4), 112, 1),
        (TiledConfig(64, 64, 4, 4, 3, 4, False, 1, 4), 32, 1),  # nobody relays
        (TiledConfig(64, 64, 2, 8, 4, 2, True, 1, 4, 2), 32, 4),  # 2 shares of 8 stages of two tiles
        (TiledConfig(64, 64, 2, 8, 4, 2, True, 1, 4, 2), 40, 1),  # of 10
        (TiledConfig(64, 64, 2, 8, 4, 2, True, 1, 4, 2), 33, 1),  # 17 stages
        (TiledConfig(16, 64, 1, 4, 8, 1, True, 1, 2), 32, 2),  # 8 named barriers
        (TiledConfig(16, 64, 1, 4, 9, 1, True, 1, 2), 32, 1),
        (TiledConfig(128, 128, 1, 8, 4, 1, True, 1, 2), 32, 2),  # one for each warpgroup and stage
        (TiledConfig(64, 128, 1, 8, 5, 1, True, 1, 2), 32, 1),
    ],
)
def test_what_is_unrolled(config: TiledConfig, tiles: int, unroll: int) -> None:
    """Oracle: by hand: every program's share of K is a multiple of `unroll` tiles, and the hardware has 16 named
    barriers, half of which are left to Triton."""
    assert config.within(tiles) == replace(config, unroll=unroll)
    lines = config.split_k * config.unroll
    assert all(config.within(t).unroll == 1 or -(-t // config.slices) % lines == 0 for t in range(1, 200))


@pytest.mark.parametrize(
    ("config", "tiles", "bits", "expected"),
    [
        (TiledConfig(256, 64, 1, 4, 3, 1, True, 1, 1, 1, 0, True), 3, 4, True),
        (TiledConfig(256, 64, 1, 4, 3, 1, True, 1, 1, 1, 0, True), 2, 4, False),  # three stages
        (TiledConfig(64, 64, 1, 8, 4, 1, True, 1, 1, 2, 0, True), 7, 4, True),  # four of two tiles, the last half empty
        (TiledConfig(64, 64, 1, 8, 4, 1, True, 1, 1, 2, 0, True), 6, 4, False),
        (TiledConfig(256, 64, 2, 4, 3, 1, True, 1, 1, 1, 0, True), 32, 4, True),  # the rest shared out
        (TiledConfig(256, 64, 1, 4, 3, 1, False, 1, 1, 1, 0, True), 32, 4, False),  # nobody else copies
        (
            TiledConfig(64, 128, 1, 4, 7, 1, True, 1, 1, 1, 0, True),
            32,
            4,
            True,
        ),  # 7 x (8 + 16) of 225 KiB, and 16 for y
        (TiledConfig(64, 128, 1, 4, 7, 1, True, 1, 1, 1, 0, True), 32, 8, False),  # 7 x (16 + 16) = 224
    ],
)
def test_what_is_persistent(config: TiledConfig, tiles: int, bits: int, expected: bool) -> None:
    """Oracle: by hand: tiles of K fill the stages, and stages leave room for 16 tokens of y."""
    assert config.within(tiles, bits) == replace(config, persistent=expected)


def test_shipped_tiles_run_as_they_are_named_and_compile_as_they_run() -> None:
    """Oracle: `as_it_runs` and `within` at the K of an entry, and the kernel that its specimens launch: the same lines
    of stages, persistent or not."""
    table = table_file.load("H100", "3.6")
    tiled = [(key, dispatch.as_config(entry.choice, "w4a16_tiled", TiledConfig)) for key, entry in table.items()]
    found = [(key, config) for key, config in tiled if config is not None]
    assert len(found) > 50
    for key, config in found:
        tiles = key.k // 128
        assert config == config.as_it_runs().within(tiles)
        bits, group, symmetric, int8 = dispatch.parse_scheme(key.scheme, key.k)
        scheme = Scheme(bits, group if group < key.k else None, symmetric, int8)
        (_, k), _ = tunables.specimens(config, scheme, key.k if scheme.group is None else 1024, 132, key.m)
        assert config.within(k // 128) == config


def test_what_is_shared_out_is_not_split_otherwise() -> None:
    """Oracle: by hand: split_k says whether, not among how many; clusters are of two, which halve a tile of 32 stages,
    but not one of 86, 11008 inputs, whose halves are not multiples of what is unrolled, nor slices, whose sums lie
    where y leaves."""
    config = TiledConfig(128, 128, 8, 8, 4, 4, True, 2, 2, 1, 0, True)
    runs = TiledConfig(128, 128, 2, 8, 4, 2, True, 1, 2, 1, 0, True)
    assert config.as_it_runs() == config.within(32) == runs and runs.streams
    assert config.within(86) == replace(runs, cluster=1)
    assert TiledConfig(64, 64, 2, 8, 4, 2, True, 1, 4, 2, 0, True).as_it_runs().cluster == 1
    assert not replace(runs, split_k=1).streams
    for cluster in (1, 2):
        tile = tile_shape.Tile.of(replace(runs, cluster=cluster))
        assert (tile.split, tile.adders, tile.persistent, tile.streams) == (1, cluster, True, True)


@pytest.mark.parametrize(
    ("tiles", "stages", "unroll", "expected"),
    [
        (192, 32, 2, Shares(132, 16, True)),  # 60 are left: 120 halves
        (198, 32, 2, Shares(132, 16, True)),
        (199, 32, 2, Shares(132, 18)),  # 67 for 66 clusters: 67 x 32 stages for 132 programs, 16.2, 9 lines of two
        (192, 34, 2, Shares(132, 16)),  # halves of 17 are no lines of two
        (160, 32, 2, Shares(132, 8)),  # 28 are left: 6.8 stages for each are less than halves
        (160, 16, 2, Shares(132, 8, True)),  # a short K: fewer add up
        (144, 32, 1, Shares(132, 4)),  # 2.9 would be too few
        (292, 32, 2, Shares(264, 16, True)),  # the same 28 after a second round
        (96, 32, 2, Shares(0, 24)),  # less than a round: 23.3
        (100, 32, 2, Shares(100, 32)),  # 24.2, 13 lines: nearly a tile
        (264, 32, 2, Shares(264, 32)),
    ],
)
def test_how_a_last_round_is_shared_out(tiles: int, stages: int, unroll: int, expected: Shares) -> None:
    """Oracle: by hand, of 132 programs."""
    assert shares(tiles, stages, 132, unroll, True) == expected
    alone = shares(tiles, stages, 132, unroll, False)
    assert alone == expected or (expected.in_pairs and not alone.in_pairs)


def test_cases_on_a_gpu_share_out_as_they_are_for() -> None:
    """Oracle: by hand, of an H100's places: each case of clusters computes halves somewhere, each other one parts that
    end within a tile, alone and behind whole rounds, and one has more givers to a tile than a warp has lanes."""
    found: dict[Any, set[str]] = {}
    for config, _, _, _, _, ns, ks, ms in (case for case in CASES if getattr(case[0], "streams", False)):
        for n, k, m in itertools.product(ns, ks, ms):
            runs, tiles = config.within(-(-k // 128)), -(-n // config.block_n) * -(-m // config.block_m)
            at_once, stages = places(runs, 132, 232448), -(-k // (128 * config.slices))
            how = shares(tiles, stages, at_once, runs.unroll, runs.cluster > 1)
            kind = "halves" if how.in_pairs else "within" if stages % how.part else "whole"
            behind = " behind rounds" if how.whole else ""
            givers = " of many" if stages > 33 * how.part else ""
            found.setdefault(config, set()).add(kind + behind + givers)
    assert all("halves" in " ".join(kinds) for config, kinds in found.items() if config.cluster > 1)
    alone = [kinds for config, kinds in found.items() if config.cluster == 1]
    assert len(alone) >= 5 and all("within" in " ".join(kinds) for kinds in alone)
    assert {"within", "within behind rounds", "halves", "halves behind rounds"} <= set.union(*found.values())
    assert any("of many" in kind for kind in set.union(*found.values()))


@pytest.mark.parametrize("unroll", [1, 2, 4])
@pytest.mark.parametrize("at_once", [7, 132, 264])
def test_every_stage_is_shared_out_once(at_once: int, unroll: int) -> None:
    """Oracle: counting: whole rounds leave less than one, the parts of the rest cover it with no more programs than run
    at once, whole lines of stages each, of two tiles at most."""
    for tiles, stages in itertools.product((1, 3, 60, 96, 131, 132, 133, 192, 264, 700), (4, 8, 28, 32, 112)):
        found = shares(tiles, stages, at_once, unroll, True)
        rest = tiles - found.whole
        assert 0 <= rest < at_once and found.part % unroll == 0 and found.part <= stages
        assert -(-rest * stages // found.part) <= at_once and (rest == 0 or found.whole % at_once == 0)


def test_x_is_shared_by_what_is_not_persistent_after_all() -> None:
    """Oracle: by hand: four stages of 72 KiB leave no room for y, so the program is not persistent and shares x; with
    three it is, and does not."""
    config = TiledConfig(256, 128, 1, 8, 4, 1, True, 2, 1, 1, 0, True)
    assert config.as_it_runs() == config.within(32) == replace(config, persistent=False) and config.within(32).ctas == 2
    config = replace(config, stages=3)
    assert config.as_it_runs() == config.within(32) == replace(config, sharers=1)


def test_a_configuration_is_named_as_it_runs() -> None:
    """Oracle: by hand: x is shared, and tiles are unrolled, with a producer only; the sums of 8 programs, 8 tokens of
    260 numbers each, are 66,560 bytes, and two stages hold 65,536."""
    assert TiledConfig(64, 64, 4, 4, 3, 4, False, 2, 4).as_it_runs() == TiledConfig(64, 64, 4, 4, 3, 4)
    assert TiledConfig(64, 64, 4, 4, 3, 4, True, 2, 4).as_it_runs() == TiledConfig(64, 64, 4, 4, 3, 4, True, 2, 4)
    assert TiledConfig(64, 64, 4, 4, 3, 4, True, 1, 0).as_it_runs().unroll == 1
    crowded = TiledConfig(64, 256, 8, 8, 2, 8, True)
    assert crowded.as_it_runs() == replace(crowded, cluster=1)


# -- layouts ----------------------------------------------------------------------------------------------


def placement(layout: Any) -> dict[tuple[int, ...], tuple[int, int, int]]:
    """Element -> (register, lane, warp) of a DistributedLinearLayout: the sum mod 2 of the bases at an index's ones."""

    def at(bases: list[list[int]], index: int) -> tuple[int, ...]:
        place = (0,) * len(layout.shape)
        for bit, base in enumerate(bases):
            if index >> bit & 1:
                place = tuple(a ^ b for a, b in zip(place, base, strict=True))
        return place

    sets = [layout.reg_bases, layout.lane_bases, layout.warp_bases]
    parts = [[at(bases, i) for i in range(1 << len(bases))] for bases in sets]
    holders = {}
    for (reg, a), (lane, b), (warp, c) in itertools.product(*(enumerate(part) for part in parts)):
        holders[tuple(i ^ j ^ k for i, j, k in zip(a, b, c, strict=True))] = (reg, lane, warp)
    assert len(holders) == len(parts[0]) * len(parts[1]) * len(parts[2]), "an element has two holders"
    return holders


def elements(shape: list[int]) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(size) for size in shape)))


@pytest.mark.parametrize("warps", [1, 4, 8])
@pytest.mark.parametrize("rows", [16, 32, 128])
def test_a_decode_thread_holds_8_neighbouring_words_of_a_row(warps: int, rows: int) -> None:
    """Oracle: the docstring: lane 4 r + q has words 8 q .. 8 q + 7 of rows r and r + 8, of every 16 rows; each element
    has one holder. A row of the array is two of W, 32 words each."""
    layout = w4a16_decode._words_layout(warps, rows)
    holders = placement(layout)
    assert layout.shape == [warps, rows // 2, 64] and set(holders) == elements(layout.shape)
    for (tile, pair, column), (register, lane, warp) in holders.items():
        row, word = 2 * pair + column // 32, column % 32
        assert (warp, lane) == (tile, row % 8 * 4 + word // 8)
        assert register == row // 8 * 8 + word % 8


@pytest.mark.parametrize("warps", [1, 4, 8])
@pytest.mark.parametrize("tokens", [8, 16])
def test_a_decode_thread_holds_the_inputs_that_its_words_meet(warps: int, tokens: int) -> None:
    """Oracle: the docstring: lane 4 r + q has inputs 8 q .. 8 q + 7 of the four slices of tokens r and r + 8, as the
    lane's words are words 8 q .. 8 q + 7; each element has one holder."""
    layout = w4a16_decode._x_layout(warps, tokens)
    holders = placement(layout)
    assert layout.shape == [warps, 4, tokens, 16] and set(holders) == elements(layout.shape)  # pairs of inputs
    for (tile, part, token, pair), (register, lane, warp) in holders.items():
        assert (warp, lane) == (tile, token % 8 * 4 + pair // 4)
        assert register == token // 8 * 16 + part * 4 + pair % 4


@pytest.mark.parametrize(("rows", "warps"), [(64, 4), (128, 4), (128, 8), (256, 8)])
def test_a_tiled_thread_holds_words_as_wgmma_reads_them(rows: int, warps: int) -> None:
    """Oracle: PTX ISA, wgmma.m64nNk16: of 16 columns, lane 4 r + q of warp w holds 2 q, 2 q + 1 and those 8 further, of
    rows 16 w + r and 16 w + r + 8; here 32 words side by side, and 16 warps rows later the same again."""
    layout = tile_layouts.words_layout(tile_shape.Tile(64, rows, 3, warps, 1, 1))
    holders = placement(layout)
    assert layout.shape == [rows // 2, 64] and set(holders) == elements(layout.shape)
    for (pair, column), (register, lane, warp) in holders.items():
        row, word = 2 * pair + column // 32, column % 32
        assert warp == row // 16 % warps
        assert lane == row % 8 * 4 + word % 8 // 2
        assert register == row // (16 * warps) * 16 + word // 8 * 4 + row % 16 // 8 * 2 + word % 2


@pytest.mark.parametrize(("rows", "warps"), [(64, 4), (128, 4), (128, 8)])
def test_a_tiled_thread_holds_bytes_as_wgmma_reads_them(rows: int, warps: int) -> None:
    """Oracle: as above, of 64 words side by side."""
    layout = tile_layouts.words_layout(tile_shape.Tile(64, rows, 3, warps, 1, 1, bits=8))
    holders = placement(layout)
    assert layout.shape == [rows, 64] and set(holders) == elements(layout.shape)
    for (row, word), (register, lane, warp) in holders.items():
        assert (warp, lane) == (row // 16 % warps, row % 8 * 4 + word % 8 // 2)
        assert register == row // (16 * warps) * 32 + word // 8 * 4 + row % 16 // 8 * 2 + word % 2
