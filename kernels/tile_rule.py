"""Tiles for more than 128 tokens (`dispatch.MANY_TOKENS`), from a model of what they cost.

So many tokens are bound by power: what counts is how many of a tile's tokens M fills, and whether its tiles fill the
machine. So every width that M can be cut into, in steps of 8 tokens, is asked how long it would take, alone, halved in
clusters or in rounds:

    stage     of 128 inputs: so long for each token, dequantizing, and more of narrow tiles, which wait for it
    tiles     one after the other in so many rounds; of fewer than all multiprocessors each is faster
    sums      of what two or all programs share out (`streamed_sums`), longer the wider the tile

Its numbers are a fit to 409 times at 88 pairs of a shape and an M from 96 to 1024 on an H100 (NOTES.md), 4 % from them.
What it takes was 0.3 % slower than the fastest of those timed on average, and 5 % at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from compress.kernels.streamed_sums import Shares, shares
from compress.kernels.tile_shape import TiledConfig

ROWS = 128  # of W in a tile
STEP = 8  # tokens
NARROWEST, WIDEST = 64, 240  # tokens
WIDEST_SHARED = 216  # tokens, up to which sums that are shared out leave all registers that they are in
FOUR_STAGES = 160  # tokens, up to which four stages leave room for y

# nanoseconds
_TOKEN, _STAGE, _NARROW, _WIDE_ENOUGH = 5.9, 44.0, 2.2, 112
# microseconds
_LAUNCH, _ROUND, _HALVED_TOKEN, _SHARED, _SHARED_TOKEN = 0.5, 1.3, 0.015, 3.4, 0.022
_NOT_A_MULTIPLE_OF = (16, 32)  # tokens: a width that few M ask for is compiled for a few
_ODD_WIDTH = 1.004


def _widths(m: int) -> list[int]:
    """Tokens of a tile: the narrowest for each number of tiles that M may be cut into."""
    widths = range(NARROWEST, WIDEST + 1, STEP)
    return [width for width in widths if -(-m // (width - STEP)) > -(-m // width)]


def _of_width(width: int) -> Iterator[TiledConfig]:
    """Of a tile for each program, halved in clusters of two, in rounds: the last shared out in pairs or by all, or
    by some."""
    each = TiledConfig(width, ROWS, 1, 8, 4 if width <= FOUR_STAGES else 3, producer=True, unroll=2)
    rounds = replace(each, persistent=True)
    yield each
    yield rounds
    if width <= WIDEST_SHARED:
        yield replace(each, split_k=2, cluster=2)
        yield replace(rounds, split_k=2, cluster=2)
        yield replace(rounds, split_k=2)


def _time_of_full(busy: float) -> float:
    """Time of a stage where that part of the multiprocessors has one, of that where all have: fewer clock higher."""
    return min(1.0, max(0.765, 0.77 + 0.44 * (busy - 0.45)))


def microseconds(config: TiledConfig, m: int, n: int, k_tiles: int, n_sms: int) -> float | None:
    """What a launch is expected to take; None if a program each is meant and there are more tiles than that."""
    tiles, width = -(-n // ROWS) * -(-m // config.block_m), config.block_m
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
    stage = _TOKEN * width + _STAGE + _NARROW * max(0, _WIDE_ENOUGH - width)
    return stages * stage * _time_of_full(programs / n_sms) / 1e3 + _LAUNCH + _ROUND * (rounds - 1) + sums


@lru_cache(maxsize=4096)
def many_tokens(m: int, n: int, k_tiles: int, n_sms: int, shared_bytes: int) -> TiledConfig | None:
    """The configuration that is expected to be the fastest for a weight of 4 bits and so many tiles of K; None where K
    is too short for any."""
    found: list[tuple[float, TiledConfig]] = []
    for width in _widths(m):
        odd = _ODD_WIDTH ** sum(width % of > 0 for of in _NOT_A_MULTIPLE_OF)
        for config in _of_width(width):
            runs = config.within(k_tiles)  # of some K not unrolled or in pairs, and of a short one not persistent
            us = microseconds(runs, m, n, k_tiles, n_sms)
            if us is not None and runs.persistent == config.persistent and runs.program_bytes() <= shared_bytes:
                found.append((us * odd, runs))
    return min(found, key=lambda item: item[0], default=(0.0, None))[1]
