"""The W4A16 kernels for Hopper as far as they need no GPU: their rules and the choice between them.

`test_hopper` has what they compute, `test_tile_shape` what a configuration is.
"""

from __future__ import annotations

import itertools
import os
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
    tunables,
    w4a16,
    w4a16_decode,
    w4a16_tiled,
)
from compress.kernels.batch_rule import batch_tokens
from compress.kernels.choose import hopper_takes
from compress.kernels.dispatch import Choice
from compress.kernels.problem import Scheme
from compress.kernels.tile_rule import many_tokens
from compress.kernels.tile_shape import TiledConfig
from compress.kernels.w4a16_decode import DecodeConfig

H100_SHARED = 232448  # bytes a block may use: 227 KiB

# -- rules ------------------------------------------------------------------------------------------------

NS = (8, 512, 4096, 4104, 6144, 12288, 12296, 28672, 57344)
KS = (128, 1024, 2304, 4096, 8192, 11008, 14336)  # 2304, 11008: an odd number of stages of two tiles


@pytest.mark.parametrize("m", range(1, 17))
def test_decode_rule_covers_m_and_fills_the_machine(m: int) -> None:
    """Oracles: the grid that `tune` times, so that the rule takes nothing untried; the stages of words against shared
    memory; registers against a multiprocessor's; all programs at once on as few places as are enough, counted here,
    where 192 rows a multiprocessor are."""
    for n, k in itertools.product(NS, KS):
        config = w4a16_decode.choose_config(m, n, k, 132)
        between = w4a16_decode.config_between_others(n, k, 132) if m <= w4a16_decode.RULE_MAX_TOKENS else config
        assert {config, between} <= set(tunables._decode_grid(m)) and m <= config.block_m
        for c in (config, between):
            assert c.stages * c.words * c.warps * c.block_n * 64 < H100_SHARED
            assert c.registers * 32 * c.warps <= 65536
        if m <= 8 and k > 2048:
            places = 65536 // (32 * config.warps * config.registers)
            rows = {places * config.block_n for config in w4a16_decode._ONE_WAVE}
            enough = min((r for r in rows if n <= 132 * r), default=None)
            assert enough is None or places * config.block_n == enough


def test_decode_rule_at_known_shapes() -> None:
    """Oracle: places counted by hand for 132 multiprocessors of 65536 registers. 4096 rows are 256 programs of 16, two
    places each for 8 warps of 128 registers; 12288 are 768, six for 4 warps of 80; 28672 are 896 of 32, more than six
    each, so 1.7 waves of four rather than 1.4 of five; 57344 are 2.7 waves of five rather than 3.4 of four."""
    taken = {n: w4a16_decode.choose_config(1, n, 4096, 132) for n in (2048, 2560, 4096, 12288, 28672, 57344)}
    assert taken == {
        2048: DecodeConfig(8, 16, 8, 3, registers=168),
        2560: DecodeConfig(8, 16, 8, 2, words=2),
        4096: DecodeConfig(8, 16, 8, 2),
        12288: DecodeConfig(8, 16, 4, 2, registers=80),
        28672: DecodeConfig(8, 32, 4, 2),
        57344: DecodeConfig(8, 32, 4, 1, 2, 96),
    }
    # 16 tiles of K are a step of 4 warps and 4 stages
    assert w4a16_decode.choose_config(1, 4096, 2048, 132) == DecodeConfig(8, 16, 4, 4, registers=168)
    # a machine with fewer multiprocessors has fewer places
    assert w4a16_decode.choose_config(1, 2048, 4096, 114) == DecodeConfig(8, 16, 8, 2, words=2)
    # in a chain what was found there, as long as there are places for it
    assert w4a16_decode.config_between_others(4096, 14336, 132) == DecodeConfig(8, 32, 8, 2, registers=168)
    assert w4a16_decode.config_between_others(5120, 25600, 132) == w4a16_decode.choose_config(1, 5120, 25600, 132)


@pytest.mark.parametrize("m", [129, 256, 257, 1000, 4096])
def test_many_tokens_are_shared_out_among_all(m: int) -> None:
    """Oracles: `tile_rule`, and what it has nothing for; shared memory; by hand: no wider than registers of 8 bits."""
    for n, k, bits in itertools.product(NS, (*KS, 1000), (4, 8)):
        config, tiles = w4a16_tiled.choose_config(m, n, k, 132, H100_SHARED, bits), -(-k // 128)
        assert config == config.as_it_runs().within(tiles, bits) and config.program_bytes(bits) <= H100_SHARED
        found = many_tokens(m, n, tiles, 132, H100_SHARED, 1, bits)
        assert config == (found or TiledConfig(128, 128, 1, 8, 3, producer=True))
        assert not (config.persistent and config.cluster > 1) or tiles % (2 * config.unroll) == 0
        assert bits == 4 or (config.block_n == 128 and config.block_m <= 232)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 9, 16, 17, 32, 33, 64, 100, 128])
def test_where_no_rule_is_better_what_would_stay_idle_is_split(m: int, bits: int) -> None:
    """Oracles: the tiles left over by whole waves, counted by division: they are split, into 4 tiles of K or more, no
    further than one wave takes; shared memory; sums that fit the stages."""
    seen = 0
    for n, k in itertools.product((*NS, 34816, 51200), (*KS, 512, 1000)):
        tiles = -(-k // 128)
        config = w4a16_tiled.choose_config(m, n, k, 132, H100_SHARED, bits)
        if batch_tokens(m, n, tiles, 132, H100_SHARED, bits) is not None:
            continue
        seen += 1
        assert config == config.as_it_runs().within(tiles, bits) and config.program_bytes(bits) <= H100_SHARED
        assert config.adders == config.cluster and config.block_m >= m
        at_once = w4a16_tiled.slots(config, 132, H100_SHARED, bits)
        left = -(-n // config.block_n) % at_once
        if config.split_k > 1:
            assert 0 < left * config.split_k <= at_once and config.split_k * 4 <= tiles
            assert config.split_k in (2, 4, 8)
        else:
            assert left == 0 or left * 2 > at_once or tiles < 8
    assert seen > 0


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
    if kernel is w4a16_decode:
        return kernel.choose_config(m, n, k, 132)
    return kernel.choose_config(m, n, k, 132, *((H100_SHARED,) if kernel is w4a16_tiled else ()))


@pytest.mark.parametrize(
    ("answer", "m", "k", "expected"),
    [
        (DECODE, 1, 4096, DECODE),
        (DECODE, 8, 4096, DECODE),
        (DECODE, 9, 4096, w4a16_tiled),  # the entry's tile holds 8 tokens
        (DECODE, 1, 1000, w4a16_tiled),  # no whole tiles of K
        (TILED, 1, 4096, TILED),
        (TILED, 4096, 4096, TILED),
        (TILED, 304, 1000, TILED),  # 16 of 320 tokens more than there are
        (TILED, 300, 1000, w4a16_tiled),  # 20
        (TILED, 60, 1000, TILED),  # of few tokens any number more
        (TILED, 100, 1000, w4a16_tiled),
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
@pytest.mark.parametrize("m", [1, 310])
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
