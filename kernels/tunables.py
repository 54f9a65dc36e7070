"""What `tune` and `dispatch`'s search try: each kernel's configurations worth timing, how it is packed and launched.

A kernel takes part by its `Tunable` in TUNABLES; `usable` says which of them a scheme and a GPU choose from.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from compress.arguments import names
from compress.kernels import w4a16, w4a16_decode, w4a16_tiled, w8a8, wna16, wna16_layout
from compress.kernels.batch_rule import power_of_tokens
from compress.kernels.bench import MAX_ERROR
from compress.kernels.choose import hopper_takes
from compress.kernels.common import HOPPER_BYTES, n_sms, shared_bytes
from compress.kernels.contenders import zero_of
from compress.kernels.contenders_wna16 import MAX_ERROR_W8A8
from compress.kernels.problem import GROUP, W4G128, Problem, Scheme, schemes
from compress.kernels.w4a16_producer import places

_ANY_K = 1 << 20
_DTYPES = ("float16", "bfloat16")  # of activations and scales


@dataclass(frozen=True)
class Tunable:
    """A kernel and the configurations worth trying.

    grid(m): configurations that compile to different kernels. expand(m, n, k, config): those that differ in run-time
    arguments only. default(m, weight): the kernel's own rule, None where it does not take the shape. fits(weight,
    config): False where shared memory or registers are known not to suffice. bits, int8: of the schemes it computes.
    hopper: for Hopper alone; False: for all others; None: for every GPU.
    """

    name: str
    config: type
    bits: tuple[int, ...]
    grid: Callable[[int], Iterator[Any]]
    expand: Callable[[int, int, int, Any], list[Any]]
    default: Callable[[int, Any], Any]
    pack: Callable[[Problem, torch.dtype], Any]
    launch: Callable[[torch.Tensor, Any, Any], torch.Tensor]
    fits: Callable[[Any, Any], bool] = lambda weight, config: True
    n_multiple: int = 1
    k_multiple: int = 1
    hopper: bool | None = None
    int8: bool = False
    max_error: float = MAX_ERROR

    def takes(self, n: int, k: int) -> bool:
        return n % self.n_multiple == 0 and k % self.k_multiple == 0

    def computes(self, scheme: Scheme) -> bool:
        fits = not self.hopper or hopper_takes(8, _ANY_K, scheme.group or _ANY_K, scheme.bits)
        return scheme.bits in self.bits and scheme.int8 == self.int8 and fits


def _w4a16_grid(m: int) -> Iterator[w4a16.Config]:
    """Configurations worth timing at M = m, split_k excluded (it is a run-time argument of a compiled kernel)."""
    if m <= 64:
        block_m = power_of_tokens(m)
        for (block_n, warps), stages in itertools.product(((64, 4), (128, 4), (128, 8)), (2, 3, 4)):
            yield w4a16.Config(block_m, block_n, 1, warps, stages)
        yield w4a16.Config(block_m, 64, 1, 4, 4, use_asm=False)
        return
    tiles = ((32, 128, 8), (64, 64, 4), (64, 128, 8), (64, 256, 8), (128, 64, 4), (128, 128, 8))
    for (block_m, block_n, warps), stages in itertools.product(tiles, (2, 3, 4)):
        yield w4a16.Config(block_m, block_n, 1, warps, stages)
    yield w4a16.Config(128, 128, 1, 8, 3, use_asm=False)


def _w4a16_splits(m: int, n: int, k: int, config: w4a16.Config) -> list[w4a16.Config]:
    """split_k values worth timing: up to 8 programs a multiprocessor of a large GPU, two tiles of K each at least."""
    programs = -(-n // config.block_n) * -(-m // config.block_m)
    counts = [s for s in (1, 2, 4, 8, 16) if s == 1 or (s * programs <= 8 * 132 and 2 * s <= k // GROUP and m <= 256)]
    return [replace(config, split_k=s) for s in counts]


W4A16 = Tunable(
    name="w4a16",
    config=w4a16.Config,
    bits=(4,),
    grid=_w4a16_grid,
    expand=_w4a16_splits,
    default=lambda m, weight: w4a16.choose_config(m, weight.n, weight.k, n_sms(weight.words.device)),
    pack=lambda p, dtype: w4a16.pack_kernel_layout(p.codes, p.scale.to(dtype), zero_of(p)),
    launch=lambda x, weight, config: w4a16.launch(x, weight, config=config),
    hopper=False,
)


# (block_m, block_n, warps, stages, words, registers) by block_m: what won or came close somewhere on an H100
_DECODE_TILES = {
    8: (
        (8, 16, 8, 1, 4, 128), (8, 16, 8, 2, 1, 80), (8, 16, 8, 2, 1, 128), (8, 16, 8, 2, 2, 128),
        (8, 16, 8, 3, 1, 128), (8, 16, 8, 3, 1, 168), (8, 16, 4, 1, 2, 64), (8, 16, 4, 2, 1, 80),
        (8, 16, 4, 2, 1, 96), (8, 16, 4, 2, 1, 128),
        (8, 16, 4, 2, 2, 104), (8, 16, 4, 4, 1, 136), (8, 16, 4, 4, 1, 168), (8, 16, 4, 4, 2, 128),
        (8, 16, 4, 4, 4, 168), (8, 32, 4, 1, 1, 96), (8, 32, 4, 1, 2, 80),
        (8, 32, 4, 1, 2, 96), (8, 32, 4, 2, 1, 128), (8, 32, 8, 2, 1, 168),
    ),
    16: (
        (16, 16, 8, 2, 1, 128), (16, 16, 8, 3, 1, 255), (16, 16, 4, 3, 1, 255), (16, 16, 4, 4, 1, 255),
        (16, 32, 4, 1, 1, 128), (16, 32, 4, 2, 1, 168), (16, 32, 4, 3, 1, 255),
    ),
}  # fmt: skip


def _decode_grid(m: int) -> Iterator[w4a16_decode.DecodeConfig]:
    if m > 16:
        return
    for block_m, block_n, warps, stages, words, registers in _DECODE_TILES[8 if m <= 8 else 16]:
        yield w4a16_decode.DecodeConfig(block_m, block_n, warps, stages, words, registers)


DECODE = replace(
    W4A16,
    name="w4a16_decode",
    config=w4a16_decode.DecodeConfig,
    grid=_decode_grid,
    expand=lambda m, n, k, config: [config],
    default=lambda m, weight: (
        w4a16_decode.choose_config(m, weight.n, weight.k, n_sms(weight.words.device)) if m <= 16 else None
    ),
    n_multiple=8,
    k_multiple=128,
    hopper=True,
)


# (block_n, warps, stages) by block_m: what won or came close somewhere on an H100
_TILES = {
    16: ((64, 4, 4), (64, 4, 6), (128, 4, 2), (128, 4, 3), (128, 4, 4), (128, 4, 6), (256, 8, 4)),
    32: ((64, 4, 3), (64, 4, 4), (64, 4, 6), (128, 4, 3), (128, 4, 4), (128, 4, 6), (128, 8, 3)),
    64: ((64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 4, 6), (128, 4, 3), (128, 4, 4), (128, 8, 3)),
    128: ((64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3), (128, 8, 4), (256, 8, 3)),
    256: ((64, 4, 3), (128, 8, 3)),
}


# the same for 8 bits, whose words take twice the room
_BYTE_TILES = {
    16: ((64, 4, 3), (64, 4, 4), (64, 4, 6), (128, 4, 2), (128, 4, 3), (128, 4, 4), (128, 4, 6)),
    32: ((64, 4, 3), (64, 4, 4), (64, 4, 6), (128, 4, 3), (128, 4, 4), (128, 8, 3)),
    64: ((64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 4, 3), (128, 8, 3)),
    128: ((64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3), (128, 8, 4)),
    256: ((64, 4, 2), (128, 8, 2)),
}


_UNROLLS = (2, 4, 14)  # stages in a straight line; 14 of a K of 14336


def _tiled_grid(m: int, tiles: dict[int, Any], least: int) -> Iterator[w4a16_tiled.TiledConfig]:
    for block_m in (power_of_tokens(m),) if m <= 64 else (128, 256):
        for block_n, warps, stages in tiles[block_m] if m >= least else ():
            yield w4a16_tiled.TiledConfig(block_m, block_n, 1, warps, stages)
        for stages in ((3, 4) if block_m <= 64 else (2, 3)) if m >= least and block_m <= 128 else ():
            yield w4a16_tiled.TiledConfig(block_m, 64, 1, 8, stages, slices=2)


def _tiled_splits(
    m: int, n: int, k: int, config: w4a16_tiled.TiledConfig, bits: int = 4
) -> list[w4a16_tiled.TiledConfig]:
    """All of it is compiled in: split_k and cluster decide how sums leave."""
    splits = [s for s in (2, 4, 8) if 4 * s <= k // GROUP and (s <= 4 or m <= 128)]
    shared = [(1, 1), *((s, c) for s in splits for c in (1, 2, 4, 8) if c <= s)]
    found = [replace(config, split_k=s, cluster=c, producer=p) for p in (False, True) for s, c in shared]
    if m >= 256:  # where copies of x are what tiles wait for
        found += [replace(c, sharers=2) for c in found if c.producer and c.split_k <= 2]
    found += [replace(c, unroll=u) for c in found if c.adders == c.split_k for u in _UNROLLS]
    rounds = ((1, 1), (2, 1), (2, 2))  # alone, shared out by all, by clusters of two
    found += [replace(c, persistent=True) for c in found if (c.split_k, c.cluster) in rounds]
    return [c for c in found if c == c.as_it_runs().within(-(-k // GROUP), bits)]


def _tiled_rule(m: int, weight: Any) -> w4a16_tiled.TiledConfig:
    device = weight.words.device
    fields = weight.fields if weight.bits == 4 else 1
    return w4a16_tiled.choose_config(m, weight.n, weight.k, n_sms(device), shared_bytes(device), weight.bits, fields)


def _tiled_fits(weight: Any, config: w4a16_tiled.TiledConfig) -> bool:
    return config.program_bytes(weight.bits) <= shared_bytes(weight.words.device)


TILED = replace(
    DECODE, name="w4a16_tiled", config=w4a16_tiled.TiledConfig, grid=lambda m: _tiled_grid(m, _TILES, 9),
    expand=_tiled_splits, default=lambda m, weight: _tiled_rule(m, weight) if m > 8 else None, k_multiple=8,
    fits=_tiled_fits,
)  # fmt: skip


def _wna16_fits(weight: wna16_layout.PackedWeight, config: wna16.Config) -> bool:
    """Stages within a block's shared memory, and registers for the accumulators (`wna16.choose_config`)."""
    stage_bytes = 2 * (weight.tile * config.block_m + weight.words.shape[2] * config.block_n)
    within = config.num_stages * stage_bytes <= shared_bytes(weight.words.device)
    return within and (weight.tile <= 128 or config.block_m <= 64)


WNA16 = replace(
    W4A16,
    name="wna16",
    config=wna16.Config,
    bits=(8, 3, 2),
    grid=lambda m: (wna16.Config(**vars(config)) for config in _w4a16_grid(m)),
    default=lambda m, weight: wna16.choose_config(
        weight, m, n_sms(weight.words.device), shared_bytes(weight.words.device)
    ),
    pack=lambda p, dtype: wna16_layout.pack(p.codes, p.scale.to(dtype), zero_of(p), p.bits),
    launch=lambda x, weight, config: wna16.launch(x, weight, config=config),
    fits=_wna16_fits,
    hopper=None,
)

TILED_BYTES = replace(
    WNA16, name="w8a16_tiled", config=w4a16_tiled.TiledConfig, bits=(8,), grid=lambda m: _tiled_grid(m, _BYTE_TILES, 1),
    expand=partial(_tiled_splits, bits=8), default=_tiled_rule, n_multiple=8, k_multiple=8, fits=_tiled_fits,
    hopper=True,
)  # fmt: skip


def _w8a8_grid(m: int) -> Iterator[w8a8.Config]:
    """The tiles of `_w4a16_grid`; bytes instead of 16-bit operands leave room for more stages."""
    tiles = dict.fromkeys((c.block_m, c.block_n, c.num_warps) for c in _w4a16_grid(m))
    for (block_m, block_n, warps), stages in itertools.product(tiles, (2, 3, 4, 5)):
        yield w8a8.Config(block_m, block_n, 1, warps, stages)


W8A8 = replace(
    WNA16,
    name="w8a8",
    config=w8a8.Config,
    bits=(8,),
    grid=_w8a8_grid,
    default=lambda m, weight: w8a8.choose_config(
        m, weight.n, weight.k, n_sms(weight.codes.device), shared_bytes(weight.codes.device)
    ),
    pack=lambda p, dtype: w8a8.pack(p.codes, p.scale.to(dtype), zero_of(p)),
    launch=lambda x, weight, config: w8a8.launch(x, weight, config=config),
    fits=lambda weight, config: (
        config.num_stages * w8a8.TILE_K * (config.block_m + config.block_n) <= shared_bytes(weight.codes.device)
    ),
    int8=True,
    max_error=MAX_ERROR_W8A8,
)


TUNABLES = {t.name: t for t in (W4A16, DECODE, TILED, WNA16, TILED_BYTES, W8A8)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which kernels, schemes and dtypes a command is about."""
    parser.add_argument(
        "--kernels", type=names(TUNABLES), default=[],
        help=f"comma list of {', '.join(TUNABLES)} (default: those that the GPU would use)",
    )  # fmt: skip
    parser.add_argument(
        "--schemes", type=schemes, default="w4g128", help="comma list, e.g. w4g128,w4g32-asym,w8g128,w3g128,w8a8"
    )
    parser.add_argument(
        "--dtype", dest="dtypes", type=names(_DTYPES), default="float16", help="float16, bfloat16 or both, with a comma"
    )


def in_words(config: Mapping[str, Any]) -> str:
    """A configuration's fields and values."""
    return " ".join(f"{name} {int(value)}" for name, value in config.items())


def specimens(config: Any, scheme: Scheme, k: int, n_sms: int, m: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Small weights [N, K] whose launches with M = m take every kernel of a configuration that larger ones do: of less
    than a wave of programs, and of more, whose rest some kernels treat in a way of their own; or of three quarters of a
    round, which all programs share out, and of three eighths, which clusters do; of whole tiles of N, and of tiles of
    192 rows not. K is whole lines of stages, or another kernel would run; in the larger weights where those are no more
    than 4096. A group of a whole row keeps K, which is a constant of the code then."""
    less, rows = min(k, 1024), (4 * config.block_n, 2 * config.block_n * n_sms + 512)
    tiled = isinstance(config, w4a16_tiled.TiledConfig)
    if scheme.group is None:
        less = k
    elif tiled:
        line = GROUP * config.slices * config.split_k * config.unroll
        k, whole = math.lcm(k, line), math.lcm(less, line)
        less = whole if whole <= 4096 else less
    if tiled and config.streams:
        at_once, tiles_of_m = places(config, n_sms, HOPPER_BYTES, scheme.bits), -(-m // config.block_m)
        k, rows = less, tuple(config.block_n * -(-eighths * at_once // (8 * tiles_of_m)) for eighths in (6, 3))
    return (rows[0], k), (rows[1], less)


def usable(hopper: bool, scheme: Scheme = W4G128) -> list[str]:
    """Names of the kernels that are chosen from for a scheme; hopper: on a GPU where the Hopper kernels run, and where
    one of them computes a scheme no other does."""
    names = [name for name, t in TUNABLES.items() if t.computes(scheme) and t.hopper in (None, hopper)]
    special = [name for name in names if TUNABLES[name].hopper]
    return special or names
