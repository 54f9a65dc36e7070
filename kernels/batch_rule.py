"""Tiles for up to 128 tokens, which are one tile of tokens: what differs is how rows of W and K fill the machine.

Kinds of programs:

    wide      128 rows by 8 warps, one to each multiprocessor, K split over clusters of two or four
    rounds    the same, persistent, where tiles are more than multiprocessors
    sliced    64 rows by two slices of 4 warps, one to each multiprocessor, K split over clusters of two or four
    small     64 rows by 4 warps, two to four to each multiprocessor, K split over clusters of up to eight
    tall      128 rows by 4 warps, two to each multiprocessor

Up to 64 tokens words are waited for, not MMAs, and most words are on their way where all programs run at once and leave
the fewest places empty. How many places there are is for registers to say: with room for one program more than each
multiprocessor is meant to have, some get it, and all others wait for those. Where several kinds are as full the rest
is what was the fastest at 40 shapes.

From 65 tokens on a model of what a stage of each costs decides (`microseconds`), where any 8 tokens are a width: fit to
367 times at 110 pairs of a shape and an M on an H100, 5 % from them, 8 % of small ones (NOTES.md); of 8 bits to those
of 10 shapes by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from compress.kernels.streamed_sums import Shares, shares
from compress.kernels.tile_rule import time_of_full
from compress.kernels.tile_shape import TiledConfig
from compress.kernels.w4a16_producer import places, registers_for

MOST_TOKENS = 128
_MODELLED = 64  # more tokens than these
# clusters of so many programs that run at once, with one to four programs on each of 132 multiprocessors: what the
# driver says of an H100, or what was seen to run as one wave
_CLUSTERS = {1: (132, 264, 396, 528), 2: (66, 132, 198, 264), 4: (30, 62, 92, 112), 8: (15, 30, 45, 60)}
_LEAST_STAGES = 3  # tiles of K for each slice of a cluster, below which K is not split
_LEAST_TILES = 4  # the same of small programs
# up to 64 tokens: what a fuller machine gains, as a power; how much longer the same work takes small programs, those of
# few stages, and with up to 16 tokens those of two places and of more, which ask for words further ahead
_GAIN, _SMALL_ONES, _FEW_STAGES, _FEW_PLACES, _MANY_PLACES = 0.85, 1.03, 1.15, 1.08, 0.97


@dataclass(frozen=True)
class _Kind:
    """Nanoseconds of a stage a token, besides, and a token less than 112; microseconds of a launch, and of a token's
    sums for each doubling of a cluster."""

    token: float
    stage: float
    narrow: float
    launch: float
    sums: float


_WIDE, _SLICED, _SMALL = "wide", "sliced", "small"
_KINDS = {
    4: {
        _WIDE: _Kind(4.8, 167.0, 1.43, 2.2, 0.0072),
        _SLICED: _Kind(0.0, 820.0, 0.0, 2.0, 0.0097),  # of 128 tokens, whatever M is
        _SMALL: _Kind(1.1, 453.0, 0.0, 1.0, 0.006),
    },
    8: {_WIDE: _Kind(5.2, 290.0, 0.0, 2.2, 0.0072), _SMALL: _Kind(2.2, 350.0, 0.0, 1.0, 0.006)},
}
# of the multiprocessors; from there to all of them those of 4 bits, of which two fit, are not dealt out evenly
_MOST_SMALL = {4: 0.75, 8: 1.0}
# microseconds: of persistent programs, and of tiles shared out by all, at first and for each round before, two at most
_PERSISTENT, _SHARED, _SHARED_ROUND = 0.7, 3.4, 2.4


def _wide(width: int, split: int, stages: int = 4) -> TiledConfig:
    return TiledConfig(width, 128, split, 8, stages, split, producer=True, unroll=2)


def _sliced(m: int, split: int, tiles: int) -> TiledConfig:
    """Of a power of two of tokens, as slices want."""
    unroll = next((u for u in (4, 2) if m <= 64 and -(-tiles // 2) % (split * u) == 0), 1)
    stages = 4 if m <= 64 else 3
    return TiledConfig(power_of_tokens(m), 64, split, 8, stages, split, producer=True, unroll=unroll, slices=2)


def _small(width: int, split: int, stages: int = 3) -> TiledConfig:
    return TiledConfig(width, 64, split, 4, stages, split, producer=True)


def power_of_tokens(m: int) -> int:
    """The power of two, 16 at least, that holds M tokens."""
    return max(16, 1 << (m - 1).bit_length())


def tokens_of_tile(m: int) -> int:
    """Of a tile of 16 rows a warp: up to 32 a power of two, above any multiple of 8."""
    return power_of_tokens(m) if m <= 32 else -(-m // 8) * 8


def _fits(split: int, programs: int, n_sms: int, places: int = 1) -> bool:
    """Whether so many programs, in clusters of split, run at once on so many places of each multiprocessor."""
    return programs // split * 132 <= _CLUSTERS[split][places - 1] * n_sms


def microseconds(config: TiledConfig, n: int, k_tiles: int, n_sms: int, bits: int = 4) -> float:
    """What a launch of one tile of tokens is expected to take."""
    tiles = -(-n // config.block_n)
    kind = _KINDS[bits][_SLICED if config.slices > 1 else _WIDE if config.block_n == 128 else _SMALL]
    stage = (kind.token * config.block_m + kind.stage + kind.narrow * max(0, 112 - config.block_m)) / 1e3
    if not config.persistent:
        stages = -(-k_tiles // (config.split_k * config.slices)) * time_of_full(tiles * config.split_k / n_sms)
        return stages * stage + kind.launch + kind.sums * config.block_m * (config.split_k.bit_length() - 1)
    found = Shares(tiles, k_tiles)
    if config.streams:
        found = shares(tiles, k_tiles, n_sms, config.unroll, config.cluster > 1)
    rounds, of_a_round = divmod(found.whole, n_sms)
    shared = tiles - found.whole
    if shared and found.in_pairs:
        last, sums = found.part * time_of_full(2 * shared / n_sms), kind.sums * config.block_m
    elif shared:
        last, sums = float(found.part), _SHARED + _SHARED_ROUND * min(rounds, 2)
    else:
        last, sums = k_tiles * time_of_full(of_a_round / n_sms) * (of_a_round > 0), 0.0
    return (rounds * k_tiles + last) * stage + kind.launch + _PERSISTENT + sums


def _candidates(m: int, n: int, tiles: int, n_sms: int, bits: int) -> Iterator[TiledConfig]:
    width, rows = tokens_of_tile(m), -(-n // 128)
    for split in (1, 2, 4):
        if _fits(split, rows * split, n_sms):
            yield _wide(width, split)
        if bits == 4 and split < 4 and _fits(split, -(-n // 64) * split, n_sms):
            yield _sliced(m, split, tiles)
        if -(-n // 64) * split <= _MOST_SMALL[bits] * n_sms:
            yield _small(width, split)
    if rows > n_sms / 2 and (bits == 4 or width <= 112):  # wider ones of 8 bits have three stages
        for split, cluster in ((1, 1), (2, 2), (2, 1)):
            yield replace(_wide(width, split), cluster=cluster, persistent=True)


@lru_cache(maxsize=4096)
def batch_tokens(m: int, n: int, tiles: int, n_sms: int, shared_bytes: int, bits: int = 4) -> TiledConfig | None:
    """The configuration for so many tokens, 128 at most, and tiles of K; None where other rules are as good: those of a
    K that is short, or of programs of which two or three fit a multiprocessor."""
    if m <= _MODELLED:
        return _of_few(m, n, tiles, n_sms, shared_bytes, bits)
    found = []
    for config in _candidates(m, n, tiles, n_sms, bits):
        runs = config.within(tiles, bits)
        same = (runs.persistent, runs.split_k, runs.adders) == (config.persistent, config.split_k, config.adders)
        whole = tiles >= _LEAST_STAGES * config.split_k * config.slices
        if same and whole and runs.program_bytes(bits) <= shared_bytes:
            found.append((microseconds(runs, n, tiles, n_sms, bits), runs))
    return min(found, key=lambda item: item[0], default=(0.0, None))[1]


@dataclass(frozen=True)
class _Dealt:
    """Programs that all run at once, on so many places of each multiprocessor: the part of these that they fill, how
    much longer the same work takes them, and their configurations, best first."""

    filled: float
    places: int
    dearer: float
    configs: tuple[TiledConfig, ...]


def _of_few(m: int, n: int, tiles: int, n_sms: int, shared_bytes: int, bits: int) -> TiledConfig | None:
    """Up to 64 tokens: what leaves the fewest places empty."""
    found: list[tuple[float, TiledConfig]] = []
    for split in (1, 2, 4, 8):
        for dealt in (
            *_one_each(m, n, tiles, n_sms, split),
            *_small_ones(m, n, tiles, n_sms, split),
            *(_tall_ones(m, n, tiles, n_sms, split) if bits == 4 else ()),
        ):
            for config in dealt.configs:  # the first that there is room for
                runs = config.within(tiles, bits)
                room = runs.program_bytes(bits) <= shared_bytes
                at_once = places(runs, n_sms, shared_bytes, bits)
                if room and at_once >= dealt.places * n_sms and runs.adders == config.split_k:
                    found.append((dealt.filled**_GAIN / dealt.dearer, runs))
                    break
    if found:
        return max(found, key=lambda item: item[0])[1]
    rows = -(-n // 128) / n_sms
    if m > 16 or rows <= 2 or bits == 8:
        return None
    # more programs than there are places, however small
    rounds = TiledConfig(16, 128, 1, 4, 3, producer=True, unroll=4, persistent=True)
    return rounds.within(tiles) if rows <= 3 else TiledConfig(16, 128, 1, 4, 3)


def _one_each(m: int, n: int, tiles: int, n_sms: int, split: int) -> Iterator[_Dealt]:
    """Two slices; or as many wide ones, each with half of K and twice the rows, which may have any 8 tokens."""
    programs, as_wide = -(-n // 64) * split, -(-n // 128) * 2 * split
    if split > 4 or tiles < 2 * _LEAST_STAGES * split or not _fits(split, programs, n_sms):
        return
    exact = 32 < m <= 48 and split < 4 and tiles % (4 * split) == 0 and _fits(2 * split, as_wide, n_sms)
    config = _wide(tokens_of_tile(m), 2 * split) if exact else _sliced(m, split, tiles)
    yield _Dealt(programs / n_sms, 1, 1.0, (config,))


def _small_ones(m: int, n: int, tiles: int, n_sms: int, split: int) -> Iterator[_Dealt]:
    programs = -(-n // 64) * split
    if programs <= n_sms or tiles < _LEAST_TILES * split:
        return
    for each in (2, 3, 4):
        fewer_do = split == 1 and programs <= (each - 1) * n_sms
        if fewer_do or not _fits(split, programs, n_sms, each):
            continue
        if m <= 16 and (each == 2 or split < 8):
            dearer = _FEW_PLACES if each == 2 else _MANY_PLACES
        else:
            dearer = _FEW_STAGES if each > 2 and m > 48 else _SMALL_ONES
        config = replace(_small(tokens_of_tile(m), split, 4), registers=registers_for(each, 4))
        yield _Dealt(programs / (each * n_sms), each, dearer, (config, replace(config, stages=3)))


def _tall_ones(m: int, n: int, tiles: int, n_sms: int, split: int) -> Iterator[_Dealt]:
    programs = -(-n // 128) * split
    if n_sms < programs and tiles >= _LEAST_TILES * split and _fits(split, programs, n_sms, 2):
        stages, registers = 4 if m <= 32 else 3, registers_for(2, 4)
        config = TiledConfig(power_of_tokens(m), 128, split, 4, stages, split, producer=True, registers=registers)
        yield _Dealt(programs / (2 * n_sms), 2, 1.0 if m > 16 else _SMALL_ONES, (config,))
