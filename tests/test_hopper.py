"""The W4A16 kernels for Hopper: their rules, layouts and the choice between them anywhere, the kernels on such a GPU.

Gluon has no interpreter, so what the kernels compute is tested on a GPU alone. There, outputs and workspaces are
poisoned first, `relative_error` is inf for NaN, and launches follow each other inside CUDA graphs, where programmatic
dependent launch really overlaps them: a kernel that does not wait for its x shows.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from poisoning import poison_empty

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when the kernels are decorated, at import

from test_kernels import BOUND, problem  # noqa: E402

from compress.kernels import choose, common, dispatch, tile_parts, tunables, w4a16, w4a16_decode, w4a16_tiled  # noqa: E402
from compress.kernels.choose import hopper_takes  # noqa: E402
from compress.kernels.dispatch import Choice  # noqa: E402
from compress.kernels.problem import Scheme  # noqa: E402
from compress.kernels.reference import dequantize_weight, relative_error, w4a16_linear  # noqa: E402
from compress.kernels.tile_parts import TiledConfig  # noqa: E402
from compress.kernels.w4a16_decode import DecodeConfig  # noqa: E402

H100_SHARED = 232448  # bytes a block may use: 227 KiB
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# -- rules ------------------------------------------------------------------------------------------------

NS = (8, 512, 4096, 4104, 6144, 12288, 12296, 28672, 57344)
KS = (128, 1024, 4096, 8192, 14336)


@pytest.mark.parametrize("m", range(1, 17))
def test_decode_rule_covers_m_and_fills_the_machine(m: int) -> None:
    """Oracles: the grid that `tune` times, so that the rule takes nothing untried; the stages of words against shared
    memory; tiles wider than the narrowest only where they still give 132 multiprocessors a program each."""
    for n, k in itertools.product(NS, KS):
        config = w4a16_decode.choose_config(m, n, k)
        assert {config, w4a16_decode.between_others(config)} <= set(tunables._decode_grid(m)) and m <= config.block_m
        assert config.stages * config.words * config.warps * config.block_n * 64 < H100_SHARED
        assert config.block_n == (16 if m <= 8 else 32) or -(-n // config.block_n) >= 132


@pytest.mark.parametrize("m", [1, 9, 16, 17, 32, 33, 64, 100, 128, 129, 256, 257, 1000, 4096])
def test_tiled_rule_splits_what_would_stay_idle(m: int) -> None:
    """Oracles: the grid that `tune` times; the tiles left over by whole waves, counted by division: they are split,
    into 4 tiles of K or more, no further than one wave takes."""
    for n, k in itertools.product(NS, (*KS, 1000)):
        config = w4a16_tiled.choose_config(m, n, k, 132, H100_SHARED)
        assert m <= 8 or replace(config, split_k=1, cluster=1, producer=False) in set(tunables._tiled_grid(m))
        assert config.ctas == config.cluster  # sums fit the stages
        assert config.block_m >= min(m, 128)
        at_once = w4a16_tiled.slots(config, 132, H100_SHARED)
        left = -(-n // config.block_n) * -(-m // config.block_m) % at_once
        if config.split_k > 1:
            assert 0 < left * config.split_k <= at_once and config.split_k * 4 <= -(-k // 128)
            assert config.split_k in (2, 4, 8)
        else:
            assert left == 0 or left * 2 > at_once or -(-k // 128) < 8


@pytest.mark.parametrize(
    ("config", "ctas", "expected"),
    [
        (TiledConfig(64, 64, 4, 4, 3), 1, 3 * 20),  # KiB: words 64 x 64 bytes and x 64 x 256 a stage
        (TiledConfig(64, 64, 4, 4, 3, 4), 4, 3 * 20 + 13),  # and mail 3 x 16 tokens x (64 + 4) sums: 12.75
        (TiledConfig(16, 128, 8, 4, 3, 8), 8, 3 * 12 + 8),  # 7 x 2 x (128 + 4) sums and 8 bytes: 7.2
        (TiledConfig(256, 128, 2, 8, 3, 2), 2, 3 * 72),
        (TiledConfig(256, 128, 2, 8, 2, 2), 1, 2 * 72),  # 3 x 128 x 132 sums are more than two stages
        (TiledConfig(64, 64, 1, 4, 3, 4), 1, 3 * 20),  # nothing is split
    ],
    ids=str,
)
def test_memory_of_a_program(config: TiledConfig, ctas: int, expected: int) -> None:
    """Oracle: stages, and mail rounded up to a KiB, by hand."""
    assert (config.ctas, config.memory_bytes) == (ctas, expected * 1024)


def test_tiled_rule_at_known_shapes() -> None:
    """Oracle: waves and places counted by hand for 132 multiprocessors of 227 KiB. 4096 x 4096 at M = 32: 64 tiles make
    256 programs when split in four; registers and shared memory (55 KiB) have room for 528, so they may be clusters. At
    M = 64 73 KiB leave room for 396. At M = 256 64 tiles are split in two. N = 132 * 128 at M = 257 has 264 tiles: two
    whole waves of 132. 28672 x 4096 at M = 64: 224 tiles leave 40 of 264 places idle, which no split fills."""

    def rule(m: int, n: int) -> TiledConfig:
        return w4a16_tiled.choose_config(m, n, 4096, 132, H100_SHARED)

    assert rule(32, 4096) == TiledConfig(32, 64, 4, 4, 4, cluster=4, producer=True)
    assert rule(64, 4096) == TiledConfig(64, 64, 4, 4, 3, cluster=4, producer=True)
    assert rule(256, 4096) == TiledConfig(128, 128, 2, 8, 3, cluster=2, producer=True)
    assert rule(257, 16896) == TiledConfig(256, 128, 1, 8, 3, producer=True)
    assert rule(64, 28672) == TiledConfig(64, 128, 1, 4, 3, producer=True)


@pytest.mark.parametrize(
    ("config", "shared", "expected"),
    [
        (TiledConfig(32, 64, 1, 4, 4), H100_SHARED, 264),  # 4 x (4 KiB + 8 KiB): shared memory for 4, registers for 2
        (TiledConfig(128, 64, 1, 4, 3), H100_SHARED, 264),  # 3 x (4 KiB + 32 KiB) = 108 KiB: twice into 227
        (TiledConfig(128, 128, 1, 4, 3), H100_SHARED, 132),  # 120 KiB: once
        (TiledConfig(16, 128, 1, 8, 2), H100_SHARED, 132),  # 8 warps: once, however little memory
        (TiledConfig(256, 128, 1, 8, 3), 1024, 132),  # never none
        (TiledConfig(64, 128, 4, 4, 4, 2), H100_SHARED, 264),  # 96 KiB: mail of two lies in there
        (TiledConfig(64, 128, 4, 4, 4, 4), H100_SHARED, 132),  # 96 KiB and mail of 3 x 16 tokens x 132 x 4 bytes: once
    ],
    ids=lambda v: "" if isinstance(v, int) else f"{v.block_m}x{v.block_n}x{v.warps}",
)
def test_slots(config: TiledConfig, shared: int, expected: int) -> None:
    """Oracle: 132 multiprocessors times the programs that fit, by hand from the bytes of a stage."""
    assert w4a16_tiled.slots(config, 132, shared) == expected


@pytest.mark.parametrize(
    ("n", "k", "group", "expected"),
    [
        (4096, 4096, 128, True), (72, 1000, 1000, True), (8, 8, 128, True), (4096, 4096, 32, True),
        (4096, 4096, 64, True), (4096, 1152, 384, True), (4096, 960, 96, False), (4096, 960, 160, False),
        (4096, 160, 160, True), (4096, 960, 192, False), (4100, 4096, 128, False), (4096, 1004, 1004, False),
    ],
)  # fmt: skip
def test_shapes_that_hopper_takes(n: int, k: int, group: int, expected: bool) -> None:
    """Oracle: by hand: N and K in 16 bytes of int16 words and of x; groups of 32, 64, whole tiles of 128, or a row."""
    assert hopper_takes(n, k, group) is expected


@pytest.mark.parametrize(("hopper", "expected"), [(False, ["w4a16"]), (True, ["w4a16_decode", "w4a16_tiled"])])
def test_kernels_to_tune(hopper: bool, expected: list[str]) -> None:
    """Oracle: by hand; widths but 4 bits have one kernel for every GPU."""
    assert tunables.usable(hopper) == expected
    for label, kernel in (("w8g128", "wna16"), ("w3-channel", "wna16"), ("w2g64-asym", "wna16"), ("w8a8", "w8a8")):
        assert tunables.usable(hopper, Scheme.parse(label)) == [kernel]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning")
def test_hopper_kernels_want_hopper_and_their_triton(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: wgmma exists on compute capability 9 and no other; Gluon's names are those of one Triton. Nothing is
    said of other GPUs, and of another Triton on a Hopper one once."""
    assert choose.hopper_problem((9, 0), "3.6") is None
    assert all(choose.hopper_problem((major, 0), "3.6") for major in (7, 8, 10))
    assert "3.9 is not 3.6" in str(choose.hopper_problem((9, 0), "3.9"))
    gpus = [((9, 0), "3.6", True, 0), ((8, 0), "3.6", False, 0), ((10, 0), "3.9", False, 0), ((9, 0), "3.9", False, 1)]
    for number, (capability, version, runs, said) in enumerate(gpus, 70):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(dispatch, "triton_version", lambda found=version: found)
        caplog.clear()
        for _ in range(2):
            assert choose.hopper_kernels(torch.device("cuda", number)) is runs
        assert len(caplog.records) == said
    assert "Triton 3.6" in caplog.text and "portable" in caplog.text
    assert not choose.hopper_kernels(torch.device("cpu"))
    # no graph break where layers ask while they are compiled, which cannot log
    ask = torch.compile(lambda x: x + choose.hopper_kernels(torch.device("cuda", 73)), backend="eager", fullgraph=True)
    assert ask(torch.zeros(1)).item() == 0


# -- the choice -------------------------------------------------------------------------------------------

DECODE = DecodeConfig(8, 32, 8, 3)  # none of these is what a rule takes
TILED = TiledConfig(64, 256, 2, 8, 2)
PORTABLE = w4a16.Config(16, 32, 2, 4, 2)
NAMES = {DECODE: "w4a16_decode", TILED: "w4a16_tiled", PORTABLE: "w4a16"}


class Gpu:
    """A GPU, one of Hopper's or another, whose table holds one configuration, or None, for every key."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hopper, self.answer, self.asked = True, None, 0
        monkeypatch.setattr(w4a16, "hopper_kernels", lambda device: self.hopper)
        monkeypatch.setattr(common, "n_sms", lambda device: 132)
        monkeypatch.setattr(common, "shared_bytes", lambda device: H100_SHARED)
        monkeypatch.setattr(w4a16.dispatch, "choose", self._choose)

    def _choose(self, *key: Any) -> Choice | None:
        self.asked += 1
        return None if self.answer is None else Choice(NAMES[self.answer], vars(self.answer))

    def configuration(
        self, m: int = 1, n: int = 4096, k: int = 4096, group: int = 128, x_at: int = 0, words_at: int = 0,
        device: str = "cuda",
    ) -> Any:  # fmt: skip
        place = torch.device(device, 0)
        x: Any = SimpleNamespace(
            shape=(m, k), device=place, is_cuda=device == "cuda", dtype=torch.float16, data_ptr=lambda: x_at
        )
        words: Any = SimpleNamespace(data_ptr=lambda: words_at)
        return w4a16.configuration(x, w4a16.KernelWeight(words, None, None, n, k, group))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def rule(kernel: Any, m: int, n: int, k: int) -> Any:
    machine = {w4a16_decode: (), w4a16_tiled: (132, H100_SHARED), w4a16: (132,)}[kernel]
    return kernel.choose_config(m, n, k, *machine)


@pytest.mark.parametrize(
    ("answer", "m", "k", "expected"),
    [
        (DECODE, 1, 4096, DECODE),
        (DECODE, 8, 4096, DECODE),
        (DECODE, 9, 4096, w4a16_tiled),  # the entry's tile holds 8 tokens
        (DECODE, 1, 1000, w4a16_tiled),  # no whole tiles of K
        (TILED, 1, 4096, TILED),
        (TILED, 4096, 4096, TILED),
        (TILED, 300, 1000, TILED),
        (None, 1, 4096, w4a16_decode),
        (None, 8, 4096, w4a16_decode),
        (None, 9, 4096, w4a16_tiled),
        (None, 1, 1000, w4a16_tiled),
        (PORTABLE, 1, 4096, w4a16_decode),  # a table of another version: no answer
        (PORTABLE, 300, 4096, w4a16_tiled),
    ],
)
@pytest.mark.parametrize("group", [32, 128, 384, 1 << 14])
def test_the_table_decides_within_what_its_kernel_can(
    gpu: Gpu, answer: Any, m: int, k: int, group: int, expected: Any
) -> None:
    """Oracle: the table's own configuration, or the rule of the kernel named here."""
    gpu.answer = answer
    found = gpu.configuration(m, 4096, k, group)
    assert found == (rule(expected, m, 4096, k) if hasattr(expected, "choose_config") else expected)
    assert gpu.asked == 1


@pytest.mark.parametrize(
    "case",
    [{"n": 4100}, {"k": 1004, "group": 1024}, {"group": 96, "k": 960}, {"group": 160, "k": 960}, {"x_at": 8},
     {"words_at": 8}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("m", [1, 300])
def test_what_bulk_copies_cannot_read_goes_to_the_portable_kernel(gpu: Gpu, m: int, case: dict[str, int]) -> None:
    """Oracle: the portable rule, whatever the table holds; and the same case made whole, which is not portable."""
    gpu.answer = TILED
    n, k = case.get("n", 4096), case.get("k", 4096)
    assert gpu.configuration(m, **case) == rule(w4a16, m, n, k)
    assert gpu.configuration(m) == TILED


def test_other_gpus_run_the_portable_kernel_by_their_own_tables(gpu: Gpu) -> None:
    """Oracle: the table's configuration, the portable rule where it holds none; any shape will do."""
    gpu.hopper = False
    for m, n, k in ((1, 4096, 4096), (300, 4100, 1004)):
        for answer, expected in ((PORTABLE, PORTABLE), (None, rule(w4a16, m, n, k)), (DECODE, rule(w4a16, m, n, k))):
            gpu.answer = answer
            assert gpu.configuration(m, n, k, 1 << 14, x_at=2) == expected


def test_the_interpreter_reads_no_table(gpu: Gpu) -> None:
    """Oracle: the portable rule, and a table that nobody asked."""
    gpu.answer = TILED
    assert gpu.configuration(1, device="cpu") == rule(w4a16, 1, 4096, 4096) and gpu.asked == 0


@pytest.mark.parametrize(("config", "kernel"), [(DECODE, w4a16_decode), (TILED, w4a16_tiled)], ids=["decode", "tiled"])
def test_a_configuration_goes_to_its_kernel(monkeypatch: pytest.MonkeyPatch, config: Any, kernel: Any) -> None:
    """Oracle: the launch of that module is called, with what `launch` was given; with dependent launch unless said."""
    x, codes, scale, zero, bias = problem(16, 128, 64, False)
    weight = w4a16.pack_kernel_layout(codes, scale, zero)
    for other in (w4a16_decode, w4a16_tiled):
        monkeypatch.setattr(other, "launch", lambda *arguments, other=other: (other, *arguments))
    assert w4a16.launch(x, weight, bias, config) == (kernel, x, weight, bias, config, True)
    assert w4a16.launch(x, weight, bias, config, pdl=False) == (kernel, x, weight, bias, config, False)


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
    layout = tile_parts.words_layout(rows, warps, 1)
    holders = placement(layout)
    assert layout.shape == [rows // 2, 64] and set(holders) == elements(layout.shape)
    for (pair, column), (register, lane, warp) in holders.items():
        row, word = 2 * pair + column // 32, column % 32
        assert warp == row // 16 % warps
        assert lane == row % 8 * 4 + word % 8 // 2
        assert register == row // (16 * warps) * 16 + word // 8 * 4 + row % 16 // 8 * 2 + word % 2


# -- on a GPU ---------------------------------------------------------------------------------------------

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
    # clusters that share out a tile, and a kernel that adds up theirs
    (TiledConfig(64, 128, 8, 4, 4, 2, True), "fp16", 128, True, True, DECODE_N, DECODE_K, (13, 100)),
    (TiledConfig(16, 128, 8, 4, 3, 4), "bf16", 64, False, True, DECODE_N, DECODE_K, (13, 30)),
    (TiledConfig(64, 256, 8, 8, 4, 2, True), "fp16", 128, True, False, DECODE_N, DECODE_K, (30, 100)),
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
@pytest.mark.parametrize(("config", "m"), [(DECODE_2048, 8), (TILED_2048, 4096)], ids=["decode", "tiled"])
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
    "configs", [[DECODE_2048], [TILED_2048], [DECODE_2048, TILED_2048]], ids=["decode", "tiled split", "in turns"]
)
def test_each_of_200_products_reads_the_whole_one_before(
    square: tuple[w4a16.KernelWeight, torch.Tensor], configs: list[Any]
) -> None:
    """Oracles: each y against float64 from the y before it; a replay of all 200, poisoned first, against those bits,
    once with every y in memory of its own and once with the memory used again and again."""
    weight, dense = square
    x, sequence = activations(8, 5), list(itertools.islice(itertools.cycle(configs), 200))
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
