"""The W4A16 kernels for Hopper as far as they need no GPU: their rules, the choice between them, their layouts.

`test_hopper` has what they compute.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when the kernels are decorated, at import

from test_kernels import problem

from compress.kernels import (
    choose,
    common,
    dispatch,
    table_file,
    tile_shape,
    tunables,
    w4a16,
    w4a16_decode,
    w4a16_tiled,
)
from compress.kernels.choose import hopper_takes
from compress.kernels.dispatch import Choice
from compress.kernels.problem import Scheme
from compress.kernels.tile_shape import TiledConfig
from compress.kernels.w4a16_decode import DecodeConfig

H100_SHARED = 232448  # bytes a block may use: 227 KiB

# -- rules ------------------------------------------------------------------------------------------------

NS = (8, 512, 4096, 4104, 6144, 12288, 12296, 28672, 57344)
KS = (128, 1024, 2304, 4096, 8192, 11008, 14336)  # 2304, 11008: an odd number of stages of two tiles


@pytest.mark.parametrize("m", range(1, 17))
def test_decode_rule_covers_m_and_fills_the_machine(m: int) -> None:
    """Oracles: the grid that `tune` times, so that the rule takes nothing untried; the stages of words against shared
    memory; registers against a multiprocessor's; tiles wider than the narrowest only where they still give 132
    multiprocessors a program each."""
    for n, k in itertools.product(NS, KS):
        config = w4a16_decode.choose_config(m, n, k)
        between = w4a16_decode.config_between_others(n, k) if m <= w4a16_decode.RULE_MAX_TOKENS else config
        assert {config, between} <= set(tunables._decode_grid(m)) and m <= config.block_m
        for c in (config, between):
            assert c.stages * c.words * c.warps * c.block_n * 64 < H100_SHARED
            assert c.registers * 32 * c.warps <= 65536
        assert config.block_n == (16 if m <= 8 else 32) or -(-n // config.block_n) >= 132


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 9, 16, 17, 32, 33, 64, 100, 128, 129, 256, 257, 1000, 4096])
def test_tiled_rule_splits_what_would_stay_idle(m: int, bits: int) -> None:
    """Oracles: the grid that `tune` times; the tiles left over by whole waves, counted by division: they are split,
    into 4 tiles of K or more, no further than one wave takes."""
    for n, k in itertools.product(NS, (*KS, 1000)):
        config = w4a16_tiled.choose_config(m, n, k, 132, H100_SHARED, bits)
        tunable = tunables.TILED if bits == 4 else tunables.TILED_BYTES
        bare = replace(config, split_k=1, cluster=1, producer=False, unroll=1)
        assert (bits == 4 and m <= 8) or bare in set(tunable.grid(m))
        assert config == config.as_it_runs().within(-(-k // 128))
        assert config.memory_bytes(bits) + w4a16_tiled.HANDED_BYTES <= H100_SHARED
        assert config.adders == config.cluster  # sums fit the stages
        assert config.block_m >= min(m, 128)
        at_once = w4a16_tiled.slots(config, 132, H100_SHARED, bits)
        left = -(-n // config.block_n) * -(-m // config.block_m) % at_once
        if config.split_k > 1:
            assert 0 < left * config.split_k <= at_once and config.split_k * 4 <= -(-k // 128)
            assert config.split_k in (2, 4, 8)
        else:
            assert left == 0 or left * 2 > at_once or -(-k // 128) < 8


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
    ],
    ids=str,
)
def test_memory_of_a_program(config: TiledConfig, ctas: int, expected: int) -> None:
    """Oracle: stages, and mail with mbarriers rounded up to a KiB, by hand."""
    assert (config.ctas, config.memory_bytes()) == (ctas, expected * 1024)


def test_tiled_rule_at_known_shapes() -> None:
    """Oracle: waves and places counted by hand for 132 multiprocessors of 227 KiB. 4096 x 4096 at M = 32: 64 tiles make
    128 programs when split in two, one to each multiprocessor but four; two slices of its 32 tiles of K make 8 stages
    for each, four in a line; 112 tiles make 28, and 40 make 10, two in a line. 8192 rows fill 128 unsplit, 5120 have
    80. With 1024 inputs there is too little for each: 64 tiles are split in two, in clusters, of 396 places. At M = 256
    64 tiles are split in two. N = 132 * 128 at M = 257 has 264 tiles: two whole waves of 132. 28672 x 4096 at M = 64:
    224 tiles leave 40 of 264 places idle, which no split fills."""

    def rule(m: int, n: int, k: int = 4096) -> TiledConfig:
        return w4a16_tiled.choose_config(m, n, k, 132, H100_SHARED)

    each = TiledConfig(64, 64, 2, 8, 4, cluster=2, producer=True, unroll=4, slices=2)
    assert rule(64, 4096) == rule(64, 4096, 14336) == each and rule(32, 4096) == replace(each, block_m=32)
    assert rule(64, 4096, 5120) == replace(each, unroll=2)
    assert rule(64, 8192) == rule(64, 5120) == replace(each, split_k=1, cluster=1)
    assert rule(64, 4096, 1024) == TiledConfig(64, 64, 2, 4, 3, cluster=2, producer=True)
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
        (TiledConfig(64, 128, 4, 4, 4, 4), H100_SHARED, 264),  # 96 KiB: whole tiles have no mail
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
        (2**20, 2**16, 32, False), (2**20, 2**16, 64, True),
    ],
)  # fmt: skip
def test_shapes_that_hopper_takes(n: int, k: int, group: int, expected: bool) -> None:
    """Oracle: by hand: N and K in 16 bytes of int16 words and of x; groups of 32, 64, whole tiles of 128, or a row;
    fewer than 2^31 scales."""
    assert hopper_takes(n, k, group) is expected
    assert hopper_takes(n, k, group, 8) is (expected and group != 32) and not hopper_takes(n, k, group, 3)


@pytest.mark.parametrize(("hopper", "expected"), [(False, ["w4a16"]), (True, ["w4a16_decode", "w4a16_tiled"])])
def test_kernels_to_tune(hopper: bool, expected: list[str]) -> None:
    """Oracle: by hand; 3 and 2 bits, groups that the Hopper kernels do not take and int8 have one for every GPU."""
    assert tunables.usable(hopper) == expected
    for label, kernel in (("w8g32", "wna16"), ("w3-channel", "wna16"), ("w2g64-asym", "wna16"), ("w8a8", "w8a8")):
        assert tunables.usable(hopper, Scheme.parse(label)) == [kernel]
    for label in ("w8g128", "w8-channel", "w8g64-asym"):
        assert tunables.usable(hopper, Scheme.parse(label)) == (["w8a16_tiled"] if hopper else ["wna16"])


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
    ("n", "m", "taken"),
    [(4096, 64, True), (4224, 64, True), (4352, 64, False), (4992, 64, False), (5120, 64, True), (4096, 65, True)],
)
def test_slices_of_another_shape_are_taken_where_they_fill_the_machine(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, n: int, m: int, taken: bool
) -> None:
    """Oracle: by hand, of 132 multiprocessors: two shares of 64 tiles of rows are 128 programs and of 66 132; of 68 and
    78 136 and 156, less than three fifths of two waves, of 80 160, and 256 of two tiles of tokens."""
    gpu.answer = TiledConfig(64, 64, 2, 8, 4, 2, True, 1, 4, 2)
    monkeypatch.setitem(NAMES, gpu.answer, "w4a16_tiled")
    assert gpu.configuration(m, n) == (gpu.answer if taken else rule(w4a16_tiled, m, n, 4096))


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
    layout = tile_shape.words_layout(tile_shape.Tile(64, rows, 3, warps, 1, 1))
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
    layout = tile_shape.words_layout(tile_shape.Tile(64, rows, 3, warps, 1, 1, bits=8))
    holders = placement(layout)
    assert layout.shape == [rows, 64] and set(holders) == elements(layout.shape)
    for (row, word), (register, lane, warp) in holders.items():
        assert (warp, lane) == (row // 16 % warps, row % 8 * 4 + word % 8 // 2)
        assert register == row // (16 * warps) * 32 + word // 8 * 4 + row % 16 // 8 * 2 + word % 2


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
        (TiledConfig(256, 64, 2, 4, 3, 1, True, 1, 1, 1, 0, True), 32, 4, False),  # a share of a tile is no whole one
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
    assert len(found) > 100
    for key, config in found:
        tiles = key.k // 128
        assert config == config.as_it_runs().within(tiles)
        bits, group, symmetric, int8 = dispatch.parse_scheme(key.scheme, key.k)
        scheme = Scheme(bits, group if group < key.k else None, symmetric, int8)
        (_, k), _ = tunables.specimens(config, scheme, key.k if scheme.group is None else 1024, 132)
        assert config.within(k // 128) == config


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
