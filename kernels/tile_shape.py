"""What a tiled kernel is compiled for, as one constant of its code, and what follows from that: where things lie in
shared memory. Layouts of registers: `tile_layouts`.

    shared memory of a program, from its begin (`global_smem`)

    | words [STAGES, ROWS BITS / 8, 64] int16 | x [2 SLICES STAGES, BLOCK_M, 64] | mail, y | given, ready, empty |
    0                                         x_offset                           stages_bytes    barrier_offset

A stage is a tile of K, or SLICES of them. The sums of a program are [ROWS, BLOCK_M], ROWS = SLICES BLOCK_N: those of
each slice over all BLOCK_N rows of W, one slice below the other, each in warps of its own. Mail: of a cluster
(`cluster_sums`). y, or sums of slices, of some tokens at a time: of a persistent program, whose stages already take the
next tile; any other sends them through the stages.

Functions of a Tile are Triton's, not methods: Triton looks into those, and not into methods, when it asks whether code
on its disk is still that of the source.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from compress.kernels.gluon_parts import fields_of, parts_of

GROUP_N = 8
_HANDED_BYTES = 256  # of a program at most, which Triton hands to its partitions through shared memory
_LEAST_LEAVING = 16  # tokens of y at once
_LEAVING_TOGETHER: gl.constexpr = gl.constexpr(32)  # tokens of small parts
_MAX_PASSED_ON = 8  # named barriers of `stage_barriers`
# bytes on Hopper, which lets a program have 227 KiB: a unit is for mbarriers and another for what Triton hands over
_FOR_STAGES_AND_Y: gl.constexpr = gl.constexpr(225 * 1024)
_UNIT: gl.constexpr = gl.constexpr(1024)  # bytes that parts of shared memory are multiples of, for swizzled copies
# columns more in a row of sums: the 8 rows of W and 4 pairs of tokens that a warp writes are in 32 banks
_PAD: gl.constexpr = gl.constexpr(4)
_WITH_COMMON_ROWS: gl.constexpr = gl.constexpr(192)  # rows of W


@dataclass(frozen=True)
class TiledConfig:
    """Tile sizes of one launch. block_m: tokens, a power of two from 16 on or, of one slice and 16 rows of W a warp,
    any multiple of 8 from 32 to 256 (`part_mma`); block_n: rows of W, a power of two, or 192 (`common_rows`), of 64
    tokens and more, 8 warps, and programs that share nothing. split_k programs, 1, 2, 4 or 8, share the K of
    each tile that does not fill a wave of the machine; cluster: so many of them, side by side, add up through shared
    memory, where sums fit the stages (`cluster_sums`). producer: copies by a warp of their own (`w4a16_producer`).
    sharers, 1 or 2: programs of so many tiles, neighbours in N, are one cluster and get x by one copy
    (`stage_barriers`), where there is a producer, no sum of a program alone goes to the workspace, and block_m is a
    power of two. unroll: stages in a straight line (`tile_product`), where there is a producer and each share of K is
    some of them (`within`). slices: equal parts of the warps, each with every such tile of K for itself (slice-K),
    whose sums the program adds up; 16 rows of W a warp. registers: a thread at launch, where there is a producer; 0:
    by `w4a16_producer.producers_by_registers`. persistent: one program to each place on the machine, which computes
    tile after tile: copies for the next go on while one leaves. Where there is a producer, and room for y. Tiles that
    do not fill a round of all programs are then shared out among them with split_k > 1 (`streamed_sums`), or by
    clusters of two if cluster is more than 1 and it pays (`streamed_sums.shares`), and are computed by some with
    split_k = 1."""

    block_m: int
    block_n: int
    split_k: int
    warps: int
    stages: int
    cluster: int = 1
    producer: bool = False
    sharers: int = 1
    unroll: int = 1
    slices: int = 1
    registers: int = 0
    persistent: bool = False

    @property
    def streams(self) -> bool:
        """Whether tiles that do not fill a round of persistent programs are shared out among all of them."""
        return self.persistent and self.split_k > 1

    @property
    def adders(self) -> int:
        """Programs of a cluster that add up one tile."""
        return _adders(self)

    @property
    def ctas(self) -> int:
        """Programs of a cluster."""
        return self.adders * self.shares_x

    @property
    def shares_x(self) -> int:
        """`sharers`, or 1 where there is none to share x with."""
        sums = self.adders > 1 or self.split_k == 1
        one_copy = self.block_m & (self.block_m - 1) == 0
        return self.sharers if self.producer and sums and self.slices == 1 and one_copy and not self.persistent else 1

    def within(self, tiles: int, bits: int = 4) -> TiledConfig:
        """The same for a K of so many tiles: not unrolled where programs' shares would not be whole multiples, nor in
        clusters where halves would not be, nor persistent where K does not fill the stages, or words of so many bits
        leave no room for y."""
        return self if self.unroll == 1 and not self.persistent else _within(self, tiles, bits)

    def as_it_runs(self) -> TiledConfig:
        """The same without what has no effect: clusters whose sums do not fit, x shared or tiles unrolled without a
        producer, and unrolled ones where named barriers do not last for each warpgroup and stage; persistent ones
        without room for y; what 192 rows are not computed with."""
        alone = replace(self, split_k=1, cluster=1, sharers=1, slices=1, warps=8)
        if self.box_rows() < self.block_n and alone != self:
            return alone.as_it_runs()
        unroll = self.unroll if self.producer and 1 <= self.stages * (self.warps // 4) <= _MAX_PASSED_ON else 1
        registers = self.registers if self.producer else 0
        fits = self.producer and self.leaving_tokens() >= _LEAST_LEAVING
        found = replace(self, persistent=self.persistent and fits)
        if found.streams:
            found = replace(found, split_k=2)
        return replace(found, cluster=found.adders, sharers=found.shares_x, unroll=max(1, unroll), registers=registers)

    def box_rows(self) -> int:
        """Rows of W that one copy takes."""
        return 64 if self.block_n == _WITH_COMMON_ROWS.value else self.block_n

    def leaving_tokens(self, bits: int = 4) -> int:
        """Tokens of y that leave at once."""
        return _leaving_tokens(self, bits)

    def tokens_copied(self) -> tuple[int, int]:
        """Tokens of the two kinds of copies of x."""
        return _tokens_copied(self)

    def memory_bytes(self, bits: int = 4) -> int:
        """Shared memory of stages, mail or y, and mbarriers."""
        return _memory_bytes(self, bits)

    def program_bytes(self, bits: int = 4) -> int:
        """Shared memory of all that a program has."""
        return self.memory_bytes(bits) + _HANDED_BYTES


@dataclass(frozen=True)
class Tile:
    """The constants of a tiled kernel. adders programs of a cluster add up one tile, of SPLIT that share its K; sharers
    share x; unroll, slices, persistent, streams: see `TiledConfig`. group: inputs of a scale. even_n: N is a multiple
    of block_n. pdl: programmatic dependent launch; before_tail, is_tail: of two launches whose second computes the
    rest, the first and the second."""

    block_m: int
    block_n: int
    stages: int
    warps: int
    split: int
    adders: int
    sharers: int = 1
    unroll: int = 1
    slices: int = 1
    persistent: bool = False
    streams: bool = False
    bits: int = 4
    dtype: Any = gl.float16
    group: int = 128
    has_zero: bool = False
    has_bias: bool = False
    even_n: bool = True
    pdl: bool = True
    before_tail: bool = False
    is_tail: bool = False

    @classmethod
    def of(cls, config: TiledConfig, **others: Any) -> Tile:
        return cls(
            config.block_m, config.block_n, config.stages, config.warps, 1 if config.persistent else config.split_k,
            config.adders, config.shares_x, config.unroll, config.slices, config.persistent, config.streams, **others,
        )  # fmt: skip


# -- how large --------------------------------------------------------------------------------------------


@gluon.constexpr_function
def ctas_of(t):  # type: ignore[no-untyped-def]
    """Programs of a cluster."""
    return t.adders * t.sharers


@gluon.constexpr_function
def common_rows(t):  # type: ignore[no-untyped-def]
    """Rows of W that both warpgroups multiply, besides 64 of their own, each with half of the tokens: 192 rows would
    be three warpgroups', and warps are a power of two."""
    return 64 if t.block_n == _WITH_COMMON_ROWS.value else 0


@gluon.constexpr_function
def common_tokens(t):  # type: ignore[no-untyped-def]
    """Tokens that a warpgroup multiplies common rows with: the first or the last so many, which may overlap."""
    return -(-t.block_m // 16) * 8


@gluon.constexpr_function
def box_rows(t):  # type: ignore[no-untyped-def]
    """Rows of W that one copy takes."""
    return 64 if common_rows(t) else t.block_n


@gluon.constexpr_function
def out_rows(t):  # type: ignore[no-untyped-def]
    """Rows of W that sums [rows, tokens] leave of at once: all, or the own or the common ones of both warpgroups."""
    return t.block_n - common_rows(t)


@gluon.constexpr_function
def rows_of(t):  # type: ignore[no-untyped-def]
    """Rows of the MMAs' sums: of W, once for each slice, common ones for each warpgroup."""
    return t.slices * (t.block_n + common_rows(t))


@gluon.constexpr_function
def blocks_of(t):  # type: ignore[no-untyped-def]
    """Blocks of 16 rows of a warp."""
    return rows_of(t) // (16 * t.warps)


@gluon.constexpr_function
def part_tokens(t):  # type: ignore[no-untyped-def]
    """Tokens of a part: tensors have powers of two, so where BLOCK_M is none, sums are several tensors of so many. With
    common rows they leave with those of half of the tokens, so that they are no more."""
    return min(t.block_m & -t.block_m, _LEAVING_TOGETHER.value if common_rows(t) else t.block_m)


@gluon.constexpr_function
def common_part(t):  # type: ignore[no-untyped-def]
    """Tokens of a part of a warpgroup's sums of common rows."""
    return min(common_tokens(t) & -common_tokens(t), _LEAVING_TOGETHER.value)


@gluon.constexpr_function
def n_parts(t):  # type: ignore[no-untyped-def]
    """Parts of a tile's tokens."""
    return t.block_m // part_tokens(t)


@gluon.constexpr_function
def first_copied(t):  # type: ignore[no-untyped-def]
    """Tokens of x in a copy, of the first of two where there are parts: Triton's copies are powers of two."""
    return t.block_m if n_parts(t) == 1 else 1 << ((t.block_m - 1).bit_length() - 1)


@gluon.constexpr_function
def piece_tokens(t):  # type: ignore[no-untyped-def]
    """Tokens that x is copied in where M does not fill a tile: few, because missing ones are filled with zeros at some
    nine cycles a row, and so many that copies are not."""
    return 8 if 16 < t.block_m <= 64 else 16


@gluon.constexpr_function
def last_copied(t):  # type: ignore[no-untyped-def]
    """Tokens of the second copy of x, which ends with the tile; without parts those of a piece."""
    left = t.block_m - first_copied(t)
    return 1 << (left - 1).bit_length() if left else piece_tokens(t)


@gluon.constexpr_function
def stage_bytes(t):  # type: ignore[no-untyped-def]
    """Words and x of a stage."""
    return rows_of(t) * 16 * t.bits + t.slices * t.block_m * 256


@gluon.constexpr_function
def stages_bytes(t):  # type: ignore[no-untyped-def]
    return t.stages * stage_bytes(t)


@gluon.constexpr_function
def x_offset(t):  # type: ignore[no-untyped-def]
    """Of x, behind the words of all stages."""
    return t.stages * rows_of(t) * 16 * t.bits


@gluon.constexpr_function
def row_bytes(t):  # type: ignore[no-untyped-def]
    """Sums of a token [ROWS + _PAD]: a multiple of 16."""
    return 4 * (rows_of(t) + _PAD.value)


@gluon.constexpr_function
def share_bytes(t):  # type: ignore[no-untyped-def]
    """Sums of the tokens that a program of a cluster owns."""
    return t.block_m // t.adders * row_bytes(t)


@gluon.constexpr_function
def mail_offset(t):  # type: ignore[no-untyped-def]
    """Behind the stages; of two programs within them, behind a program's own sums."""
    return stages_bytes(t) if t.adders > 2 else t.adders * share_bytes(t)


@gluon.constexpr_function
def mail_barrier_offset(t):  # type: ignore[no-untyped-def]
    """Behind the mail of the others."""
    return mail_offset(t) + (t.adders - 1) * share_bytes(t)


@gluon.constexpr_function
def token_bytes(t):  # type: ignore[no-untyped-def]
    """Of what a token leaves through: a row of y, or of sums [ROWS + _PAD], which slices add up."""
    return 2 * out_rows(t) if t.slices == 1 else row_bytes(t)


@gluon.constexpr_function
def tokens_at_once(t):  # type: ignore[no-untyped-def]
    """Tokens of y that one copy takes: all, or of a persistent program what there is room for behind the stages; where
    there are parts, of one or some."""
    tokens = max(part_tokens(t), min(t.block_m, _LEAVING_TOGETHER.value))
    while t.persistent and tokens > 1 and stages_bytes(t) + token_bytes(t) * tokens > _FOR_STAGES_AND_Y.value:
        tokens //= 2
    return tokens


@gluon.constexpr_function
def out_copies(t):  # type: ignore[no-untyped-def]
    """How many times `tokens_at_once` leave, and of these, of all rows but the common ones."""
    own = -(-t.block_m // tokens_at_once(t))
    return own + (-(-common_tokens(t) // tokens_at_once(t)) if common_rows(t) else 0), own


@gluon.constexpr_function
def copies_at_once(t):  # type: ignore[no-untyped-def]
    """Of `tokens_at_once`, that there is room for."""
    tokens = tokens_at_once(t)
    room = (_FOR_STAGES_AND_Y.value - stages_bytes(t)) // (token_bytes(t) * tokens) if t.persistent else t.block_m
    return max(1, min(out_copies(t)[0], room))


@gluon.constexpr_function
def out_offset(t):  # type: ignore[no-untyped-def]
    """Of what y leaves through."""
    return stages_bytes(t) if t.persistent else x_offset(t)


@gluon.constexpr_function
def memory_units(t):  # type: ignore[no-untyped-def]
    """Kilobytes of all."""
    behind = (t.adders - 1) * share_bytes(t) + 8 if t.adders > 2 else 0
    if t.persistent:
        behind = token_bytes(t) * tokens_at_once(t) * copies_at_once(t)
    return stages_bytes(t) // _UNIT.value + -(-(behind + 16 * t.stages + 8 * t.streams) // _UNIT.value)


@gluon.constexpr_function
def barrier_offset(t):  # type: ignore[no-untyped-def]
    """Of the mbarriers of `stage_barriers`: they are the end of the last unit, behind that of `given`."""
    return memory_units(t) * _UNIT.value - 16 * t.stages


@cache  # all of these: a launch asks for them, and what kernels share is slow to call
def _adders(config: TiledConfig) -> int:
    """Where sums fit the stages of 4 bits, so that they do with more."""
    adders = min(config.cluster, config.split_k)
    if config.persistent:  # mail of more than two is where y leaves through, and so are sums of slices
        adders = min(adders, 2 if config.slices == 1 else 1)
    tile = Tile(
        config.block_m, config.block_n, config.stages, config.warps, config.split_k, adders, slices=config.slices
    )
    own = adders * int(share_bytes(tile)) if adders > 2 else int(mail_barrier_offset(tile)) + 8
    return adders if own <= int(stages_bytes(tile)) else 1


@cache
def _leaving_tokens(config: TiledConfig, bits: int) -> int:
    return int(tokens_at_once(Tile.of(config, bits=bits)))


@cache
def _tokens_copied(config: TiledConfig) -> tuple[int, int]:
    tile = Tile.of(config)
    return int(first_copied(tile)), int(last_copied(tile))


@cache
def _within(config: TiledConfig, tiles: int, bits: int) -> TiledConfig:
    runs = config.as_it_runs()
    stages = -(-tiles // runs.slices)
    if stages < config.stages or config.leaving_tokens(bits) < _LEAST_LEAVING:
        runs = replace(config, persistent=False).as_it_runs()
    if runs.persistent and stages % (runs.adders * runs.unroll):
        runs = replace(runs, cluster=1)
    shares = 1 if runs.persistent else runs.split_k
    return runs if stages % (shares * runs.unroll) == 0 else replace(runs, unroll=1)


@cache
def _memory_bytes(config: TiledConfig, bits: int) -> int:
    return int(memory_units(Tile.of(config, bits=bits))) * _UNIT.value


# -- what it is dequantized with --------------------------------------------------------------------------


@gluon.constexpr_function
def in_units(t):  # type: ignore[no-untyped-def]
    """Whether weights are dequantized by `scaled_slice` or `scaled_byte`."""
    return not t.has_zero and t.dtype == gl.float16


@gluon.constexpr_function
def fields_per_tile(t):  # type: ignore[no-untyped-def]
    """Scales and zeros of a row and a tile of K."""
    return fields_of(t.group, t.has_zero)


@gluon.constexpr_function
def tiles_ahead(t):  # type: ignore[no-untyped-def]
    """How many tiles before they are used scales are loaded: they come from memory and are few; further ahead than a
    load takes, as far as registers allow."""
    return 2 if parts_of(t.group) <= 2 else 1
