"""Tiles for more than 128 tokens (`batch_rule` has those for fewer), from a model of what they cost.

So many tokens are bound by power: what counts is how many of a tile's tokens M fills, and whether its tiles fill the
machine. So every width that M can be cut into, in steps of 8 tokens, is asked how long it would take in tiles of 128
rows, alone, halved in clusters or in rounds, and of 192 rows (`tile_shape.common_rows`), alone or in rounds:

    stage     of 128 inputs: so long for each token, dequantizing, and more of narrow tiles, which wait for it
    tiles     one after the other in so many rounds; of fewer than all multiprocessors each is faster
    sums      of what two or all programs share out (`streamed_sums`), longer the wider the tile

Its numbers are a fit to 409 times at 88 pairs of a shape and an M from 96 to 1024 on an H100 (NOTES.md), 4 % from them,
and for 192 rows to 125 at 61 pairs, 4 %. What it takes of 128 rows was 0.3 % slower than the fastest of those timed on
average, and 5 % at most. Of 8 bits they are a fit to 688 times at 80 pairs, 5 %, and what it takes is 1.3 % slower than
the fastest; 192 rows of 8 bits, of which registers allow 160 tokens, were the fastest at one pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from compress.kernels.streamed_sums import Shares, shares
from compress.kernels.tile_shape import TiledConfig

STEP = 8  # tokens
NARROWEST, WIDEST = 64, 256  # tokens
WIDEST_SHARED = 216  # tokens, up to which sums that are shared out leave all registers that they are in


@dataclass(frozen=True)
class _Height:
    """Tiles of so many rows of W: how wide they may be, as registers allow with one scale of a row and a tile of K,
    two, or more; up to which width four stages leave room for y; nanoseconds of a stage a token, besides, and a token
    less than `_WIDE_ENOUGH`; microseconds of a round more, and of persistent programs."""

    widest: tuple[int, int, int]
    four_stages: int
    token: float
    stage: float
    narrow: float
    round: float
    persistent: float


_HEIGHTS = {
    4: {
        128: _Height((WIDEST, WIDEST, WIDEST), 160, 5.9, 44.0, 2.2, 1.3, 0.0),
        192: _Height((200, 176, 104), 112, 8.4, 147.0, 3.6, 1.8, 1.0),
    },
    8: {128: _Height((232, 232, 232), 136, 5.8, 119.0, 1.7, 1.1, 0.9)},
}
_WIDE_ENOUGH = 112
# microseconds
_LAUNCH, _HALVED_TOKEN, _SHARED, _SHARED_TOKEN = 0.5, 0.015, 3.4, 0.022
_NOT_A_MULTIPLE_OF = (16, 32)  # tokens: a width that few M ask for is compiled for a few
_ODD_WIDTH = 1.004
_LITTLE_ROOM, _LITTLE_ROOM_WIDTH = 248, 1.015  # tokens from which on stages leave y little room


def _widths(m: int) -> list[int]:
    """Tokens of a tile: the narrowest for each number of tiles that M may be cut into."""
    widths = range(NARROWEST, WIDEST + 1, STEP)
    return [width for width in widths if -(-m // (width - STEP)) > -(-m // width)]


def _of_width(width: int, fields: int = 1, bits: int = 4) -> Iterator[TiledConfig]:
    """Of a tile for each program, halved in clusters of two, in rounds: the last shared out in pairs or by all, or
    by some."""
    for rows, height in _HEIGHTS[bits].items():
        each = TiledConfig(width, rows, 1, 8, 4 if width <= height.four_stages else 3, producer=True, unroll=2)
        rounds = replace(each, persistent=True)
        if width <= height.widest[min(fields, 3) - 1]:
            yield each
            yield rounds
        if width <= WIDEST_SHARED and rows == 128:
            yield replace(each, split_k=2, cluster=2)
            yield replace(rounds, split_k=2, cluster=2)
            yield replace(rounds, split_k=2)


def time_of_full(busy: float) -> float:
    """Time of a stage where that part of the multiprocessors has one, of that where all have: fewer clock higher."""
    return min(1.0, max(0.765, 0.77 + 0.44 * (busy - 0.45)))


def microseconds(config: TiledConfig, m: int, n: int, k_tiles: int, n_sms: int, bits: int = 4) -> float | None:
    """What a launch is expected to take; None if a program each is meant and there are more tiles than that."""
    tiles, width = -(-n // config.block_n) * -(-m // config.block_m), config.block_m
    height = _HEIGHTS[bits][config.block_n]
    programs, rounds, sums = tiles * config.split_k, 1, 0.0
    if config.persistent:
        found = Shares(tiles, k_tiles)
        if config.streams:
            found = shares(tiles, k_tiles, n_sms, config.unroll, config.cluster > 1)
        programs, rounds = tiles, -(-found.whole // n_sms)
        stages = rounds * k_tiles
        if found.whole < tiles:
            programs, rounds, stages = n_sms, rounds + 1, stages + found.part
            sums = _HALVED_TOKEN * width if found.in_pairs else _SHARED + _SHARED_TOKEN * width
    elif programs > n_sms:
        return None
    else:
        stages, sums = -(-k_tiles // config.split_k), _HALVED_TOKEN * width * (config.split_k - 1)
    stage = height.token * width + height.stage + height.narrow * max(0, _WIDE_ENOUGH - width)
    others = _LAUNCH + height.round * (rounds - 1) + height.persistent * config.persistent + sums
    return stages * stage * time_of_full(programs / n_sms) / 1e3 + others


@lru_cache(maxsize=4096)
def many_tokens(
    m: int, n: int, k_tiles: int, n_sms: int, shared_bytes: int, fields: int = 1, bits: int = 4
) -> TiledConfig | None:  # fmt: skip
    """The configuration that is expected to be the fastest for a weight of 4 or 8 bits and so many tiles of K, with so
    many scales and zeros of a row in each; None where K is too short for any."""
    found: list[tuple[float, TiledConfig]] = []
    for width in _widths(m):
        dearer = _ODD_WIDTH ** sum(width % of > 0 for of in _NOT_A_MULTIPLE_OF)
        dearer *= _LITTLE_ROOM_WIDTH if width >= _LITTLE_ROOM else 1.0
        for config in _of_width(width, fields, bits):
            runs = config.within(k_tiles, bits)  # of some K not unrolled or in pairs, and of a short one not persistent
            us = microseconds(runs, m, n, k_tiles, n_sms, bits)
            if us is not None and runs.persistent == config.persistent and runs.program_bytes(bits) <= shared_bytes:
                found.append((us * dearer, runs))
    return min(found, key=lambda item: item[0], default=(0.0, None))[1]
