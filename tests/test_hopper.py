"""What the W4A16 kernels for Hopper compute, on such a GPU: Gluon has no interpreter. `test_hopper_rules` has the rest.

Outputs and workspaces are poisoned first, `relative_error` is inf for NaN, and launches follow each other inside CUDA
graphs, where programmatic dependent launch really overlaps them: a kernel that does not wait for its x shows.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from poisoning import poison_empty

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when the kernels are decorated, at import

from test_kernels import BOUND, problem
from test_kernels_wide import problem as byte_problem

from compress.kernels import w4a16, wna16, wna16_layout
from compress.kernels.reference import dequantize_weight, relative_error, w4a16_linear
from compress.kernels.tile_shape import TiledConfig
from compress.kernels.w4a16_decode import DecodeConfig

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

SHARED_OUT = TiledConfig(128, 128, 2, 8, 4, 1, True, 1, 2, 1, 0, True)
HALVED = replace(SHARED_OUT, cluster=2)
WIDE_SHARED = replace(SHARED_OUT, block_m=192, stages=3)
# one compiled kernel each: configuration, dtype, group (None is a row), symmetric, bias; then N, K and M
DECODE_N, DECODE_K = (72, 264, 1000), (640, 2048, 16512)
CASES: list[tuple[Any, str, int | None, bool, bool, Any, Any, Any]] = [
    (DecodeConfig(8, 16, 8, 2), "fp16", 128, True, True, DECODE_N, DECODE_K, (1, 7)),
    (DecodeConfig(16, 32, 4, 2), "bf16", 32, False, False, DECODE_N, DECODE_K, (1, 13, 16)),
    (DecodeConfig(8, 64, 4, 2), "fp16", 64, False, True, DECODE_N, DECODE_K, (1, 7)),
    (DecodeConfig(16, 16, 4, 3), "bf16", 384, True, True, DECODE_N, (1152, 16512), (7, 16)),
    (DecodeConfig(8, 16, 4, 4), "fp16", None, False, False, DECODE_N, (2048,), (1, 7)),
    (DecodeConfig(8, 16, 4, 4, 2), "fp16", 128, True, False, DECODE_N, DECODE_K, (1, 7)),
    (DecodeConfig(8, 32, 8, 1, 4), "bf16", 64, False, True, DECODE_N, DECODE_K, (1, 7)),
    (DecodeConfig(16, 16, 8, 3, 2), "fp16", 32, False, False, DECODE_N, DECODE_K, (7, 16)),
    (TiledConfig(32, 64, 1, 4, 4), "fp16", 128, True, True, DECODE_N, DECODE_K, (1, 30, 100)),
    (TiledConfig(64, 128, 4, 4, 3, 4), "bf16", 32, False, False, DECODE_N, DECODE_K, (13, 100, 300)),
    (TiledConfig(128, 64, 2, 4, 3, 2), "fp16", 64, False, True, DECODE_N, DECODE_K, (30, 300)),
    (TiledConfig(128, 256, 1, 8, 3), "bf16", 384, True, False, DECODE_N, (1152, 16512), (100, 300)),
    (TiledConfig(16, 64, 2, 4, 6, 2), "fp16", None, False, True, DECODE_N, (1000,), (7, 16, 30)),
    (TiledConfig(128, 64, 8, 4, 4, 8), "bf16", 128, False, True, DECODE_N, DECODE_K, (300,)),
    (TiledConfig(64, 128, 4, 4, 3), "fp16", 128, False, True, DECODE_N, DECODE_K, (13, 100)),
    (TiledConfig(64, 128, 4, 4, 3, 1, True), "fp16", 128, False, True, DECODE_N, DECODE_K, (13, 100)),
    (TiledConfig(16, 128, 1, 4, 4, 1, True), "bf16", 32, False, False, DECODE_N, DECODE_K, (13, 30)),
    (TiledConfig(64, 256, 1, 8, 4, 1, True), "fp16", 64, True, True, DECODE_N, DECODE_K, (30, 100)),
    (TiledConfig(256, 128, 2, 8, 3, 1, True), "fp16", 128, True, False, DECODE_N, DECODE_K, (100, 300)),
    (TiledConfig(64, 64, 2, 4, 3, 1, True), "fp16", 128, True, True, (19200,), (1024, 2048), (64,)),
    (TiledConfig(16, 128, 8, 4, 3, 8, True), "bf16", 32, False, True, DECODE_N, DECODE_K, (13, 30)),
    (TiledConfig(64, 64, 4, 4, 2, 4, True), "fp16", 128, True, False, DECODE_N, DECODE_K, (30, 100)),
    (TiledConfig(256, 128, 2, 8, 3, 2, True), "fp16", 64, False, True, DECODE_N, DECODE_K, (100, 300)),
    (TiledConfig(64, 64, 2, 4, 3, 2, True), "fp16", 128, True, True, (19200,), (1024, 2048), (64,)),
    # tiles in a straight line: one block and several, one or two blocks of rows and warpgroups, shared x, whole waves;
    # at K = 640 not unrolled, for its 5 tiles do not divide so
    (TiledConfig(64, 128, 4, 4, 3, 2, True, 1, 4), "fp16", 128, True, True, DECODE_N, (640, 2048, 14336), (13, 100)),
    (TiledConfig(64, 64, 4, 4, 3, 4, True, 1, 2), "fp16", 64, False, False, DECODE_N, (640, 1024, 4096), (30, 100)),
    (TiledConfig(16, 128, 8, 4, 4, 8, True, 1, 2), "bf16", 32, False, True, DECODE_N, (2048, 14336), (13, 30)),
    (TiledConfig(256, 128, 1, 8, 3, 1, True, 2, 2), "fp16", 128, True, False, DECODE_N, (256, 2048, 16384), (100, 300)),
    (TiledConfig(64, 256, 1, 8, 4, 1, True, 1, 4), "bf16", 128, True, False, DECODE_N, (512, 8192), (64,)),
    (TiledConfig(64, 64, 2, 4, 2, 2, True, 1, 4), "fp16", 128, True, True, (19200,), (1024, 2048), (64,)),
    # slices of K in warps of their own: of a cluster, of clusters of a tile, alone, whole waves, in a straight line; 5
    # and 129 tiles leave a stage half empty
    (TiledConfig(64, 64, 2, 8, 3, 2, True, 1, 1, 2), "fp16", 128, True, True, DECODE_N, DECODE_K, (13, 100)),
    (TiledConfig(64, 64, 4, 8, 2, 2, True, 1, 1, 2, 80), "fp16", 64, False, True, DECODE_N, DECODE_K, (30, 100)),
    (TiledConfig(16, 64, 4, 8, 2, 4, True, 1, 1, 2, 80), "bf16", 32, False, False, DECODE_N, DECODE_K, (13, 30)),
    (TiledConfig(64, 64, 2, 8, 3, 1, False, 1, 1, 2), "bf16", 128, True, True, DECODE_N, DECODE_K, (13, 100)),
    (TiledConfig(32, 64, 1, 8, 3, 1, True, 1, 1, 2), "fp16", None, False, True, DECODE_N, (1000,), (7, 30)),
    (TiledConfig(64, 64, 2, 8, 4, 2, True, 1, 4, 2), "fp16", 128, True, False, DECODE_N, (2048, 14336), (64,)),
    (TiledConfig(64, 64, 2, 8, 3, 2, True, 1, 1, 2), "fp16", 128, True, True, (19200,), (1024, 2048), (64,)),
    # tile after tile by the same programs: 600 tiles of 1, 2 or 4 rounds, y in parts; and no more tiles than programs
    (TiledConfig(256, 64, 1, 4, 3, 1, True, 1, 2, 1, 0, True), "fp16", 128, True, True, (19200,), (512, 640), (300,)),
    (TiledConfig(256, 128, 1, 8, 3, 1, True, 1, 1, 1, 0, True), "fp16", 64, True, False, (72, 19200), (2048,), (300,)),
    (TiledConfig(128, 128, 1, 8, 4, 1, True, 1, 1, 1, 0, True), "bf16", 128, False, True, (19272,), (640,), (30, 300)),
    (TiledConfig(64, 64, 1, 4, 4, 1, True, 1, 4, 1, 0, True), "fp16", 128, True, True, (1000, 19200), (1024,), (150,)),
    # and what is left of the last round shared out among all: parts that end within a tile, of 4 and 8 stages, alone or
    # behind one and three rounds; more programs and 16 slices; fewer tiles than programs, 44 that give to one
    (SHARED_OUT, "fp16", 128, True, True, (19200,), (2304,), (100, 300)),
    (TiledConfig(256, 64, 2, 4, 3, 1, True, 1, 1, 1, 0, True), "bf16", 64, False, True, (10248,), (2176,), (300,)),
    (replace(SHARED_OUT, unroll=1), "fp16", 32, False, False, (72, 1000), (2176, 22528), (30, 150)),
    (TiledConfig(128, 64, 2, 8, 3, 1, True, 1, 1, 2, 0, True), "fp16", 128, True, True, (19200,), (4224,), (30,)),
    (TiledConfig(64, 128, 2, 4, 3, 1, True, 1, 4, 1, 0, True), "bf16", 128, True, False, (19200,), (5120,), (150,)),
    # by clusters of two, which a tile of 9 is not halved for; fewer tiles than programs, 97 of them, which is odd
    (
        HALVED,
        "fp16",
        128,
        True,
        True,
        (12416, 19200),
        (1024, 1152),
        (100, 300),
    ),
    (
        TiledConfig(64, 128, 2, 4, 3, 2, True, 1, 1, 1, 0, True),
        "bf16",
        64,
        False,
        False,
        (1000, 19272),
        (768,),
        (30, 150),
    ),
    (TiledConfig(256, 128, 2, 8, 3, 2, True, 1, 1, 1, 0, True), "fp16", None, False, True, (8200,), (1024,), (600,)),
    # slices besides: sums of all tokens at once, and in parts; K that does not fill the stages is not persistent
    (
        TiledConfig(64, 64, 1, 8, 4, 1, True, 1, 4, 2, 0, True),
        "fp16",
        128,
        True,
        True,
        (19200,),
        (640, 1024),
        (64, 150),
    ),
    (TiledConfig(128, 64, 1, 8, 3, 1, True, 1, 1, 2, 0, True), "bf16", 64, False, True, (19272,), (640,), (30, 300)),
    # tokens that are no power of two: fewer than a tile, a last tile that begins within another; alone, in rounds,
    # shared out by all and by pairs, in clusters of four, by another kernel
    (TiledConfig(96, 128, 1, 8, 4, 1, True, 1, 2), "fp16", 128, True, True, DECODE_N, (640, 1024), (90, 96, 150)),
    (TiledConfig(192, 128, 1, 8, 3, 1, True, 1, 2, 1, 0, True), "bf16", 64, False, True, (19272,), (1024,), (150, 600)),
    (
        TiledConfig(152, 128, 2, 8, 4, 1, True, 1, 2, 1, 0, True),
        "fp16",
        128,
        True,
        False,
        (19200,),
        (2560,),
        (160, 200),
    ),
    (TiledConfig(104, 128, 2, 8, 4, 1, True, 1, 1, 1, 0, True), "bf16", 32, False, True, (1000,), (22528,), (300,)),
    (
        TiledConfig(200, 128, 2, 8, 3, 2, True, 1, 2, 1, 0, True),
        "fp16",
        128,
        True,
        True,
        (12416, 19200),
        (1024,),
        (250,),
    ),
    (TiledConfig(160, 128, 4, 8, 3, 4, True), "bf16", 128, False, True, DECODE_N, DECODE_K, (100, 300)),
    (TiledConfig(192, 128, 2, 8, 3, 2, True, 1, 2), "fp16", None, True, False, DECODE_N, (1024,), (192, 300)),
    (TiledConfig(80, 64, 4, 4, 3, 1, True), "fp16", 128, False, True, DECODE_N, DECODE_K, (30, 300)),
    (TiledConfig(168, 64, 1, 4, 3, 1, True), "bf16", 64, True, True, DECODE_N, DECODE_K, (200,)),
    (TiledConfig(40, 128, 8, 8, 3, 8, True), "bf16", 128, True, True, DECODE_N, DECODE_K, (30, 100)),
    (TiledConfig(240, 128, 1, 8, 3, 1, False), "fp16", 32, False, True, DECODE_N, (640, 2048), (240, 300)),
    # what `batch_rule` takes: any 8 tokens in clusters of four, six stages, few tokens in rounds, slices in clusters of
    # four; M that leaves 1 to 15 tokens of a piece missing
    (TiledConfig(72, 128, 4, 8, 4, 4, True, 1, 2), "fp16", 128, True, True, DECODE_N, (640, 2048), (65, 72)),
    (TiledConfig(48, 128, 1, 8, 6, 1, True, 1, 2), "bf16", 128, False, True, DECODE_N, (1024, 2304), (33, 48)),
    (TiledConfig(40, 64, 1, 4, 4, 1, True), "fp16", 32, True, True, DECODE_N, DECODE_K, (17, 40)),
    (TiledConfig(16, 64, 1, 4, 4, 1, True, 1, 2, 1, 0, True), "fp16", 128, True, True, (40000,), (1024,), (9, 16)),
    (TiledConfig(16, 128, 1, 4, 3, 1, True, 1, 4, 1, 0, True), "bf16", 64, False, False, (54016,), (1024,), (13,)),
    (TiledConfig(32, 64, 4, 8, 4, 4, True, 1, 2, 2), "fp16", 128, True, True, DECODE_N, (2048,), (17, 20, 25, 32)),
    (TiledConfig(64, 64, 1, 8, 4, 1, True, 1, 4, 2), "bf16", 128, False, True, DECODE_N, (1024,), (49, 57)),
    # 192 rows, 64 of which are both warpgroups'
    (TiledConfig(128, 192, 1, 8, 3, 1, True, 1, 2, 1, 0, True), "fp16", 128, True, True, (19272,), (512, 1024), (300,)),
    (TiledConfig(152, 192, 1, 8, 3, 1, True, 1, 2), "fp16", None, False, True, DECODE_N, (1024,), (140, 300)),
    (TiledConfig(200, 192, 1, 8, 3, 1, True, 1, 1, 1, 0, True), "bf16", 64, True, False, (1000, 6144), (1152,), (600,)),
    (TiledConfig(88, 192, 1, 8, 4, 1, True, 1, 2), "bf16", 32, False, True, DECODE_N, (640, 1024), (80, 150)),
    (TiledConfig(64, 192, 1, 8, 4), "fp16", 64, True, True, DECODE_N, DECODE_K, (30, 100)),
    # clusters that share out a tile, and a kernel that adds up theirs
    (TiledConfig(64, 128, 8, 4, 4, 2, True), "fp16", 128, True, True, DECODE_N, DECODE_K, (13, 100)),
    (TiledConfig(16, 128, 8, 4, 3, 4), "bf16", 64, False, True, DECODE_N, DECODE_K, (13, 30)),
    (TiledConfig(64, 256, 8, 8, 4, 2, True), "fp16", 128, True, False, DECODE_N, DECODE_K, (30, 100)),
    # two programs get x by one copy, where tiles of N are even in number
    (TiledConfig(64, 64, 4, 4, 3, 4, True, 2), "fp16", 128, True, True, DECODE_N, DECODE_K, (13, 100)),
    (TiledConfig(64, 64, 4, 4, 3, 2, True, 2), "bf16", 64, False, True, DECODE_N, DECODE_K, (13, 100)),
    (TiledConfig(64, 128, 8, 4, 3, 4, True, 2), "fp16", 32, True, False, DECODE_N, DECODE_K, (30, 100)),
    (TiledConfig(64, 128, 1, 4, 3, 1, True, 2), "fp16", 128, True, True, DECODE_N, DECODE_K, (30, 100)),
    (TiledConfig(256, 128, 2, 8, 3, 2, True, 2), "bf16", 128, True, True, DECODE_N, DECODE_K, (100, 300)),
    (TiledConfig(16, 64, 4, 4, 4, 4, True, 2), "fp16", 128, False, True, DECODE_N, DECODE_K, (13, 30)),
    (TiledConfig(64, 64, 2, 4, 3, 2, True, 2), "fp16", 128, True, True, (19200,), (1024, 2048), (64,)),
    # 300 tiles: 264 are a whole wave, then a tail
    (TiledConfig(64, 64, 2, 4, 3, 2), "fp16", 128, True, True, (19200,), (1024, 2048), (64,)),
    (TiledConfig(64, 64, 4, 4, 3), "bf16", 128, True, False, (19200,), (2048,), (64,)),
]


def case_name(case: tuple[Any, ...]) -> str:
    config, dtype, group, symmetric, bias = case[:5]
    tiles = "x".join(str(v) for v in vars(config).values())
    kind = "decode" if isinstance(config, DecodeConfig) else "tiled"
    return f"{kind}-{tiles}-{dtype}-g{group or 'row'}-{'sym' if symmetric else 'asym'}{'-bias' if bias else ''}"


@pytest.mark.gpu("hopper")
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_kernels_equal_the_twin_at_ragged_shapes(monkeypatch: pytest.MonkeyPatch, case: tuple[Any, ...]) -> None:
    """Oracles: `reference.w4a16_linear` in float64, and the same bits three times. Tiles that N and M do not fill, K of
    5 tiles over up to 8 splits, 129 groups."""
    config, dtype, group, symmetric, use_bias, ns, ks, ms = case
    for n, k in itertools.product(ns, ks):
        every, codes, scale, zero, bias = problem(n, k, group, symmetric, max(ms), DTYPES[dtype])
        weight = w4a16.pack_kernel_layout(codes, scale, None if symmetric else zero)
        for m in ms:
            x, b = every[:m], bias if use_bias else None
            with monkeypatch.context() as patch:
                poison_empty(patch)
                ys = [w4a16.launch(x, weight, b, config) for _ in range(3)]
            assert relative_error(ys[0], w4a16_linear(x, codes, scale, zero, b)) < BOUND[DTYPES[dtype]], (m, n, k)
            assert torch.equal(ys[0], ys[1]) and torch.equal(ys[0], ys[2]), (m, n, k)


# the tiled kernels with weights of 8 bits; None: what a shape without a table takes
BYTE_CASES: list[tuple[Any, str, int | None, bool, bool, Any, Any, Any]] = [
    (TiledConfig(16, 128, 8, 4, 3, 8, True), "fp16", 128, True, True, DECODE_N, DECODE_K, (1, 13)),
    (TiledConfig(64, 64, 4, 4, 3, 4, True), "bf16", 64, False, False, DECODE_N, DECODE_K, (30, 100)),
    (TiledConfig(64, 128, 1, 4, 3), "fp16", None, False, True, DECODE_N, (1000,), (7, 100)),
    (TiledConfig(128, 128, 2, 8, 3, 2, True), "bf16", 384, True, True, DECODE_N, (1152, 16512), (100, 300)),
    (TiledConfig(256, 128, 1, 8, 2, 1, True, 2), "fp16", 128, True, True, DECODE_N, DECODE_K, (100, 300)),
    (TiledConfig(16, 64, 2, 8, 4, 2, True, 1, 1, 2), "bf16", 128, True, True, DECODE_N, DECODE_K, (1, 13)),
    (TiledConfig(128, 128, 1, 8, 3, 1, True, 1, 1, 1, 0, True), "fp16", 128, True, True, (19200,), (1024,), (300,)),
    (TiledConfig(160, 128, 2, 8, 3, 2, True, 1, 2, 1, 0, True), "fp16", 128, True, True, (19200,), (1024,), (200,)),
    (TiledConfig(96, 128, 4, 8, 4, 4, True, 1, 2), "fp16", 128, True, True, DECODE_N, (640, 2048), (90,)),
    (TiledConfig(16, 128, 2, 8, 4, 2, True, 1, 2, 1, 0, True), "bf16", 64, False, True, (19272,), (1024,), (13,)),
    (TiledConfig(32, 64, 4, 8, 4, 4, True, 1, 2, 2), "fp16", 128, True, True, DECODE_N, (2048,), (17, 25)),
    (None, "fp16", 64, False, True, DECODE_N, DECODE_K, (1, 16, 100, 300)),
]


@pytest.mark.gpu("hopper")
@pytest.mark.parametrize("case", BYTE_CASES, ids=lambda case: str(case[0]) + str(case[1:5]))
def test_bytes_equal_the_twin_at_ragged_shapes(monkeypatch: pytest.MonkeyPatch, case: tuple[Any, ...]) -> None:
    """Oracles: as above, for 8 bits."""
    config, dtype, group, symmetric, use_bias, ns, ks, ms = case
    for n, k in itertools.product(ns, ks):
        every, codes, scale, zero, bias = byte_problem(8, max(ms), n, k, group, symmetric, DTYPES[dtype])
        weight = wna16_layout.pack(codes, scale, None if symmetric else zero, 8)
        for m in ms:
            x, b = every[:m], bias if use_bias else None
            assert isinstance(config or wna16.configuration(x, weight), TiledConfig)
            with monkeypatch.context() as patch:
                poison_empty(patch)
                ys = [wna16.launch(x, weight, b, config) for _ in range(3)]
            assert relative_error(ys[0], w4a16_linear(x, codes, scale, zero, b)) < BOUND[DTYPES[dtype]], (m, n, k)
            assert torch.equal(ys[0], ys[1]) and torch.equal(ys[0], ys[2]), (m, n, k)


@pytest.mark.gpu("hopper")
@pytest.mark.parametrize("producer", [False, True])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_rows_of_very_different_scales_are_each_exact(dtype: str, producer: bool) -> None:
    """Oracle: the float64 twin, row by row, with scales from 1e-4 to 10 in one weight, and up to 16 times in a row."""
    x, codes, scale, zero, _ = problem(256, 1024, 128, True, 20, DTYPES[dtype])
    powers = torch.logspace(-4, 1, 256, dtype=torch.float64, device="cuda")[:, None]
    steps = 2.0 ** -torch.arange(8, device="cuda").remainder(5)
    scale = (scale / scale.amax(1, keepdim=True) * powers * steps).to(scale.dtype)
    y = w4a16.launch(x, w4a16.pack_kernel_layout(codes, scale, None), None, TiledConfig(32, 64, 2, 4, 4, 1, producer))
    expected = w4a16_linear(x, codes, scale, zero, None)
    worst = max(relative_error(y[:, i], expected[:, i]) for i in range(256))
    assert worst < 3 * BOUND[DTYPES[dtype]]  # of 20 values: some rows are less lucky than all together


@pytest.mark.gpu("hopper")
def test_a_misaligned_x_is_computed_all_the_same() -> None:
    """Oracle: float64 twin; x begins 2 bytes behind an aligned address."""
    x, codes, scale, zero, bias = problem(264, 640, 128, False, m=7)
    moved = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x)
    y = w4a16.launch(moved, w4a16.pack_kernel_layout(codes, scale, zero), bias)
    assert moved.data_ptr() % 16 and relative_error(y, w4a16_linear(x, codes, scale, zero, bias)) < BOUND[x.dtype]


SIDE = 2048
# what the H100's table takes at 2048 x 2048 for few tokens, and a cluster
DECODE_2048, TILED_2048 = DecodeConfig(8, 16, 4, 4), TiledConfig(32, 64, 4, 4, 4, 4)
SLICES_2048 = TiledConfig(64, 64, 2, 8, 4, 2, True, 1, 4, 2)
# at 1024 tokens 512 tiles for 264 or 132 programs
ROUNDS_2048 = TiledConfig(64, 64, 1, 4, 4, 1, True, 1, 4, 1, 0, True)
SLICES_IN_ROUNDS = TiledConfig(64, 64, 1, 8, 4, 1, True, 1, 4, 2, 0, True)


@pytest.fixture(scope="module")
def square() -> tuple[w4a16.KernelWeight, torch.Tensor]:
    """A weight [2048, 2048] that keeps the size of x from product to product, and itself in float64."""
    gen = torch.Generator().manual_seed(0)
    codes = torch.randint(1, 16, (SIDE, SIDE), dtype=torch.uint8, generator=gen)  # around 8, with variance 56 / 3
    scale = (0.8 + 0.4 * torch.rand(SIDE, SIDE // 128, generator=gen)).mul((SIDE * 56 / 3) ** -0.5).half()
    codes, scale = codes.cuda(), scale.cuda()
    zero = torch.full_like(scale, 8, dtype=torch.uint8)
    return w4a16.pack_kernel_layout(codes, scale, None), dequantize_weight(codes, scale, zero, torch.float64)


def activations(m: int, seed: int) -> torch.Tensor:
    return torch.randn(m, SIDE, generator=torch.Generator().manual_seed(seed)).half().cuda()


def capture(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


@pytest.mark.gpu("hopper")
@pytest.mark.parametrize("m", [1, 30])
def test_a_graph_replays_with_new_x(square: tuple[w4a16.KernelWeight, torch.Tensor], m: int) -> None:
    """Oracle: the eager operator bit for bit, which agrees with float64."""
    weight, dense = square
    x = activations(m, 0)
    w4a16.matmul(x, weight)  # compiles
    graph, y = capture(lambda: w4a16.matmul(x, weight))
    for seed in (1, 2, 3):
        x.copy_(activations(m, seed))
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, w4a16.matmul(x, weight)) and relative_error(y, x.double() @ dense.t()) < 5e-4


def memset_ones(t: torch.Tensor) -> None:
    """1.0 everywhere, as a memset: `fill_` is a kernel."""
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    pointer, count = ctypes.c_uint64(t.data_ptr()), ctypes.c_size_t(t.numel())
    assert ctypes.CDLL("libcuda.so.1").cuMemsetD16Async(pointer, ctypes.c_ushort(0x3C00), count, stream) == 0


@pytest.mark.gpu("hopper")
@pytest.mark.parametrize(
    ("config", "m"), [(DECODE_2048, 8), (TILED_2048, 4096), (SLICES_2048, 64), (ROUNDS_2048, 1024)]
)
def test_kernels_wait_for_copies_and_memsets(
    square: tuple[w4a16.KernelWeight, torch.Tensor], config: Any, m: int
) -> None:
    """Oracle: float64 twin. In one capture, a kernel directly after a copy from the host and one directly after a
    memset; both inputs are NaN when the replay starts."""
    weight, dense = square
    source = activations(m, 7).cpu().pin_memory()
    copied, filled = activations(m, 8), activations(m, 9)
    w4a16.launch(copied, weight, None, config)  # compiles

    def work() -> list[torch.Tensor]:
        copied.copy_(source, non_blocking=True)
        first = w4a16.launch(copied, weight, None, config)
        memset_ones(filled)
        return [first, w4a16.launch(filled, weight, None, config)]

    graph, ys = capture(work)
    for _ in range(10):
        for t in (copied, filled, *ys):
            t.fill_(float("nan"))
        graph.replay()
        expected = (source.cuda().double() @ dense.t(), torch.ones_like(filled).double() @ dense.t())
        assert all(relative_error(y, e) < 5e-4 for y, e in zip(ys, expected, strict=True))


@pytest.mark.gpu("hopper")
def test_torch_compile_takes_the_operator_whole(square: tuple[w4a16.KernelWeight, torch.Tensor]) -> None:
    """Oracle: the eager function, bit for bit: compiled kernels before, between and after."""
    weight, _ = square

    def function(x: torch.Tensor) -> torch.Tensor:
        return w4a16.matmul(w4a16.matmul(x * 2, weight) * 0.25, weight) + 1

    compiled = torch.compile(function, fullgraph=True)
    for seed in (1, 2):
        x = activations(8, seed)
        assert torch.equal(compiled(x), function(x))


def chain(x: torch.Tensor, weight: w4a16.KernelWeight, configs: list[Any], kept: list[Any] | None = None) -> Any:
    """Products one after the other, each x the previous y; `kept` collects all of them."""
    for config in configs:
        x = w4a16.launch(x, weight, None, config)
        if kept is not None:
            kept.append(x)
    return x


@pytest.mark.gpu("hopper")
@pytest.mark.parametrize(
    ("configs", "m"),
    [
        ([DECODE_2048], 8), ([TILED_2048], 8), ([DECODE_2048, TILED_2048], 8), ([SLICES_2048], 30),
        ([SLICES_2048, TILED_2048], 30), ([ROUNDS_2048], 1024), ([SLICES_IN_ROUNDS, ROUNDS_2048], 1024),
        # 132 of 160 tiles alone, where there are so many multiprocessors, and the others by four or two each
        ([SHARED_OUT], 1200), ([HALVED, SHARED_OUT], 1200), ([WIDE_SHARED], 1250), ([HALVED, WIDE_SHARED], 1250),
    ],
    ids=["decode", "tiled split", "in turns", "slices", "slices in turns", "rounds", "slices in rounds",
         "rounds, last shared", "these and halves in turns", "in two parts", "these and halves"],
)  # fmt: skip
def test_each_of_200_products_reads_the_whole_one_before(
    square: tuple[w4a16.KernelWeight, torch.Tensor], configs: list[Any], m: int
) -> None:
    """Oracles: each y against float64 from the y before it; a replay of all 200, poisoned first, against those bits,
    once with every y in memory of its own and once with the memory used again and again."""
    weight, dense = square
    x, sequence = activations(m, 5), list(itertools.islice(itertools.cycle(configs), 200))
    eager: list[torch.Tensor] = []
    chain(x, weight, sequence, eager)
    for before, after in itertools.pairwise([x, *eager]):
        assert relative_error(after, before.double() @ dense.t()) < 5e-4
    kept: list[torch.Tensor] = []
    graph, _ = capture(lambda: chain(x, weight, sequence, kept))
    reusing, last = capture(lambda: chain(x, weight, sequence))
    for _ in range(5):
        for y in (*kept, last):
            y.fill_(float("nan"))
        graph.replay()
        reusing.replay()
        assert all(torch.equal(y, e) for y, e in zip(kept, eager, strict=True)) and torch.equal(last, eager[-1])


@pytest.mark.gpu("hopper")
def test_two_streams_at_once(square: tuple[w4a16.KernelWeight, torch.Tensor]) -> None:
    """Oracle: the same chains one after the other on one stream, bit for bit."""
    weight, _ = square
    sequences = [[DECODE_2048, TILED_2048] * 50, [TILED_2048] * 100]
    xs = [activations(8, 1), activations(30, 2)]
    expected = [chain(x, weight, sequence) for x, sequence in zip(xs, sequences, strict=True)]
    graphs = [capture(lambda x=x, s=s: chain(x, weight, s)) for x, s in zip(xs, sequences, strict=True)]
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(5):
        for _, y in graphs:
            y.fill_(float("nan"))
        torch.cuda.synchronize()
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(y, e) for (_, y), e in zip(graphs, expected, strict=True))
