"""The search for kernel configurations: `tune`, and the bounded search on a miss, without a GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from table_entries import CONFIG, entry, key, own_tables

from compress.errors import ConfigError
from compress.kernels import dispatch, problem, search, table_file, timing, tunables, tune, w4a16, w8a8, wna16
from compress.kernels.dispatch import Choice, Entry, Key
from compress.kernels.problem import Problem, Scheme


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with own_tables(tmp_path, monkeypatch) as directory:
        yield directory


class Clock:
    """A clock that a measurement moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def timed(clock: Clock, table: dict[str, tuple[float, float | None]], seen: list[str]):
    """A measurement that takes the table's seconds and returns its microseconds."""

    def measure(kernel: str, config: str) -> float | None:
        seen.append(config)
        seconds, us = table[config]
        clock.now += seconds
        return us

    return measure


def test_search_stops_before_the_budget_would_be_passed() -> None:
    """Oracle: seconds added by hand: after a (3 s), b (1 s) and c (4 s) 8 are gone, and one more of 4 would make 12."""
    clock, seen = Clock(), []
    table = {"a": (3.0, 9.0), "b": (1.0, 5.0), "c": (4.0, 7.0), "d": (0.1, 1.0)}
    best = search.best_within([("x", c) for c in table], timed(clock, table, seen), 10.0, clock)
    assert best == ("x", "b", 5.0) and seen == ["a", "b", "c"] and clock.now == 108.0


def test_search_tries_the_first_whatever_it_takes_and_skips_what_is_wrong() -> None:
    """Oracle: one candidate that takes a minute, of a budget of a second; then a list in which others are wrong."""
    clock, seen = Clock(), []
    assert search.best_within([("x", "a"), ("x", "b")], timed(clock, {"a": (60.0, 9.0)}, seen), 1.0, clock) == (
        "x",
        "a",
        9.0,
    )
    table = {"a": (0.0, None), "b": (0.0, 4.0), "c": (0.0, None)}
    assert search.best_within([("x", c) for c in table], timed(clock, table, seen), 1.0, clock) == ("x", "b", 4.0)
    assert search.best_within([("x", "a")], timed(clock, table, seen), 1.0, clock) is None
    assert search.best_within([], timed(clock, table, seen), 1.0, clock) is None


def on_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules and limits of shared memory as on an H100, whatever the device."""
    monkeypatch.setattr(tunables, "n_sms", lambda device: 132)
    monkeypatch.setattr(tunables, "shared_bytes", lambda device: 232448)


@pytest.mark.parametrize("m", [1, 16, 64, 256, 4096])
@pytest.mark.parametrize(
    ("kernel", "label"),
    [("w4a16", "w4g128"), ("wna16", "w8g128"), ("wna16", "w3-channel"), ("wna16", "w2g64-asym"), ("w8a8", "w8a8")],
)
def test_candidates_begin_with_the_rule_and_leave_nothing_out(
    monkeypatch: pytest.MonkeyPatch, kernel: str, label: str, m: int
) -> None:
    """Oracle: the grid itself as a set, without what does not fit; the second candidate differs from the rule least."""
    on_h100(monkeypatch)
    tunable, p = tunables.TUNABLES[kernel], Scheme.parse(label).problem(64, 512, "cpu")
    weight = tunable.pack(p, torch.float16)
    found = search.candidates(tunable, m, 64, 512, weight)
    fitting = [config for config in tunable.grid(m) if tunable.fits(weight, config)]
    every = {c for config in fitting for c in tunable.expand(m, 64, 512, config)}
    rule = tunable.default(m, weight)
    assert found[0] == rule and set(found) == every | {rule} and len(found) == len(set(found)) > 5
    changed = [sum(v != getattr(rule, f) for f, v in vars(c).items()) for c in found[1:]]
    assert changed == sorted(changed) and changed[0] >= 1


def test_what_cannot_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: bytes of a stage by hand, against the 227 KiB of an H100's block. W8A8: 128 inputs of 128 rows of x and
    256 of W are 48 KiB, four times. 2 bits: 256 inputs of 64 rows of x and 64 bytes of 256 rows of W are 48 KiB too;
    128 rows of x beside 256 inputs are left out whatever they take."""
    on_h100(monkeypatch)
    two = tunables.WNA16.pack(Scheme.parse("w2g128").problem(16, 256, "cpu"), torch.float16)
    eight = tunables.W8A8.pack(Scheme.parse("w8a8").problem(16, 256, "cpu"), torch.float16)
    assert tunables.W8A8.fits(eight, w8a8.Config(128, 256, 1, 8, 4))
    assert not tunables.W8A8.fits(eight, w8a8.Config(128, 256, 1, 8, 5))
    assert tunables.WNA16.fits(two, wna16.Config(64, 256, 1, 8, 4))
    assert not tunables.WNA16.fits(two, wna16.Config(64, 256, 1, 8, 5))
    assert not tunables.WNA16.fits(two, wna16.Config(128, 64, 1, 4, 1))


@pytest.mark.parametrize("label", ["w4g128", "w8g128", "w3g32-asym", "w2-channel", "w8a8", "w8a8-asym"])
def test_every_candidate_computes_the_product(monkeypatch: pytest.MonkeyPatch, label: str) -> None:
    """Oracle: the float64 product, in Triton's interpreter on a CPU; of each kernel the rule and the two candidates
    that are the most unlike it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scheme = Scheme.parse(label)
    p = scheme.problem(64, 512, device)
    x = p.x(9)
    monkeypatch.setattr(timing, "rotating_copies", lambda weight: [weight])
    (name,) = tunables.usable(False, scheme)
    weights = search.Weights(p, torch.float16, [tunables.TUNABLES[name]])
    pairs = weights.candidates(9)
    for tunable, config in (pairs[0], pairs[-2], pairs[-1]):
        y = tunable.launch(x.half(), weights.copies(tunable)[0], config)
        assert search.relative_error(y, p.reference(x)) < tunable.max_error, config


class Graphs:
    """Timing without a GPU: `times(config, long graph?)` in microseconds; `rounds` notes who took turns."""

    def __init__(self, times) -> None:
        self.times, self.launched, self.rounds = times, [], []

    def capture(self, call, copies, graph_ms=timing.GRAPH_MS):
        output = call(copies[-1])
        return timing.Captured((self.launched[-1], graph_ms), 1, output)

    def take_turns(self, captured, replays=timing.REPLAYS):
        self.rounds.append([c.graph[0].split_k for c in captured])
        return [[self.times(c.graph[0], c.graph[1] >= search._FINAL_MS)] * 3 for c in captured]

    def launch(self, x, weight, config):
        self.launched.append(config)
        return x @ weight[0].t() * (2 if config.split_k == 8 else 1)


def without_gpu(monkeypatch: pytest.MonkeyPatch, us: dict[int, float], final_us: dict[int, float]) -> Graphs:
    """A kernel that is a dense product, with configurations told apart by split_k; 8 is fast and wrong."""
    graphs = Graphs(lambda config, final: (final_us if final else us)[config.split_k])
    base = w4a16.Config(16, 32, 1, 4, 2)
    tunable = replace(
        tunables.W4A16,
        grid=lambda m: iter([base]),
        expand=lambda m, n, k, c: [replace(c, split_k=s) for s in us],
        default=lambda m, weight: base,
        pack=lambda p, dtype: (p.dense(dtype),),
        launch=graphs.launch,
    )
    monkeypatch.setitem(tunables.TUNABLES, "w4a16", tunable)
    monkeypatch.setattr(timing, "rotating_copies", lambda weight: [weight])
    monkeypatch.setattr(timing, "capture", graphs.capture)
    monkeypatch.setattr(timing, "take_turns", graphs.take_turns)
    return graphs


SHORT = {1: 5.0, 2: 3.0, 4: 4.0, 8: 1.0, 16: 6.0, 32: 7.0}


def test_the_fastest_of_short_graphs_take_turns_and_those_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: times by hand: 2 is the fastest of the short graphs and 4 of the long ones; 32 is not among the four
    that are timed again, and 8 is wrong."""
    final = {1: 5.5, 2: 4.5, 4: 4.1, 16: 6.1}
    graphs = without_gpu(monkeypatch, SHORT, final)
    p = Problem(32, 256, "cpu", 64)
    weights = search.Weights(p, torch.float32, [tunables.TUNABLES["w4a16"]])
    cells = search.tune_cell(weights, p.x(3), p.reference(p.x(3)))
    assert graphs.rounds[-1] == [2, 4, 1, 16]
    timed = [(4, 4.1, True), (2, 4.5, True), (1, 5.5, True), (16, 6.1, True), (32, 7.0, False), (8, None, False)]
    assert [(c["config"]["split_k"], c["us"], c["final"]) for c in cells] == timed
    assert [c["config"]["split_k"] for c in cells if c["rule"]] == [1] and cells[-1]["problem"] == "wrong"


def test_a_cell_without_budget_tries_the_rule_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one configuration, the rule's, timed and final."""
    without_gpu(monkeypatch, SHORT, SHORT)
    p = Problem(32, 256, "cpu", 64)
    weights = search.Weights(p, torch.float32, [tunables.TUNABLES["w4a16"]])
    (cell,) = search.tune_cell(weights, p.x(3), p.reference(p.x(3)), budget_s=0.0)
    assert cell["rule"] and cell["final"] and cell["config"]["split_k"] == 1


def test_what_the_table_has_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a table asked for this very product that answers 16; the rule, 1, comes after it, each once."""
    without_gpu(monkeypatch, SHORT, SHORT)
    p = Problem(32, 256, "cpu", 64)
    weights = search.Weights(p, torch.float16, [tunables.TUNABLES["w4a16"]])
    (rule, *_) = weights.candidates(3)
    asked: list[Key] = []
    answer = Choice("w4a16", vars(replace(rule[1], split_k=16)))
    monkeypatch.setattr(dispatch, "lookup", lambda key: asked.append(key) or answer)
    found = [config.split_k for _, config in weights.candidates(3)]
    assert found[:2] == [16, 1] and sorted(found) == sorted(SHORT)
    assert asked == [Key("cpu", dispatch.triton_version(), "float16", "w4g64 sym", 32, 256, 4)]


def test_a_run_keeps_every_shape_it_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the files after each shape: with a second shape that raises, those of the first in both dtypes; the
    fastest finalists by hand; the share of a cell is the rest of the budget over the cells left."""
    without_gpu(monkeypatch, SHORT, {1: 5.5, 2: 4.5, 4: 4.1, 16: 6.1})
    shares: list[float] = []
    real = search.tune_cell

    def noted(weights, x, reference, budget_s):
        shares.append(budget_s)
        if weights.p.n == 64:
            raise RuntimeError("cut off")
        return real(weights, x, reference, budget_s)

    monkeypatch.setattr(tune, "tune_cell", noted)
    monkeypatch.setattr(problem.Scheme, "problem", lambda self, n, k, device: Problem(n, k, "cpu", self.group or k))
    files = ["--out", str(tmp_path / "out"), "--table", str(tmp_path / "tables")]
    shapes = ["--shapes", "32x256,64x256", "--tokens", "1,16", "--dtype", "float16,bfloat16"]
    args = tune.parse([*shapes, "--budget-s", "800", *files])
    machine = {"device": "NVIDIA Test 8GB", "copy_TB_per_s": 3.0, "fp16_TFLOP_per_s": 700.0}
    with pytest.raises(RuntimeError, match="cut off"):
        tune.time_all({"w4g128": [tunables.TUNABLES["w4a16"]]}, args, machine)
    path = tmp_path / "tables" / table_file.file_name("Test", dispatch.triton_version())
    entries = table_file.read(path, "Test", dispatch.triton_version())
    assert {(k.dtype, k.n, k.m, k.scheme) for k in entries} == {
        (dtype, 32, m, "w4g128 sym") for dtype in ("float16", "bfloat16") for m in (1, 16)}  # fmt: skip
    assert all(e.choice.config["split_k"] == 4 and e.us == 4.1 for e in entries.values())
    cells = json.loads((tmp_path / "out" / "tune_float16_bfloat16_w4g128.json").read_text())["cells"]
    assert len(cells) == 4 * len(SHORT)
    assert [round(share) for share in shares[:4]] == [100, 114, 133, 160]
    out = capsys.readouterr().out
    assert "N=32 K=256 M=16 w4g128 bfloat16: roof" in out and "6 tried, 1 not right" in out and "<- rule" in out


@pytest.mark.gpu
def test_a_tuned_table_is_what_the_kernels_then_run(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    """Oracle: the configuration that each kernel takes from the table, one of the two that were timed for real."""
    one = {"wna16": wna16.Config(16, 64, 1, 4, 2), "w8a8": w8a8.Config(16, 64, 1, 4, 2)}
    for name, config in one.items():
        base = tunables.TUNABLES[name]
        few = replace(base, grid=lambda m, c=config: iter([c]), default=lambda m, weight: None,
                      expand=lambda m, n, k, c: [c, replace(c, split_k=2)])  # fmt: skip
        monkeypatch.setitem(tunables.TUNABLES, name, few)
    args = tune.parse(
        ["--shapes", "512x1024", "--tokens", "4", "--dtype", "float16,bfloat16", "--table", str(own_cache)]
    )
    machine = {"device": torch.cuda.get_device_name(), "copy_TB_per_s": 3.0, "fp16_TFLOP_per_s": 700.0}
    tune.time_all({"w8g128": [tunables.TUNABLES["wna16"]], "w8a8": [tunables.TUNABLES["w8a8"]]}, args, machine)
    dispatch.forget()
    for label, name, module in (("w8g128", "wna16", wna16), ("w8a8", "w8a8", w8a8)):
        for dtype in (torch.float16, torch.bfloat16):
            p = Scheme.parse(label).problem(512, 1024, "cuda")
            config = module.configuration(p.x(3).to(dtype), tunables.TUNABLES[name].pack(p, dtype))
            assert config in (one[name], replace(one[name], split_k=2))


def test_kernels_are_compiled_once_for_all_sizes() -> None:
    """Oracle: by hand: up to 8 tokens the decode kernel's tiles are one grid, compiled at the smallest M; a row of one
    group is compiled for each K; two dtypes and two schemes are twice as much."""
    decode = tunables.DECODE
    grid = list(decode.grid(1))
    args = tune.parse(["--shapes", "256x256,512x512", "--tokens", "8,1,4"])
    tasks = tune.compile_tasks({"w4g128": [decode]}, args)
    assert {t[1] for t in tasks} == set(grid) and len(tasks) == len(grid) and {t[2] for t in tasks} == {1}
    assert {t[5] for t in tasks} == {28672}
    assert {t[5] for t in tune.compile_tasks({"w4-channel": [decode]}, args)} == {256, 512}
    args = tune.parse(["--tokens", "1", "--dtype", "float16,bfloat16"])
    assert len(tune.compile_tasks({"w4g128": [decode], "w4g64": [decode]}, args)) == 4 * len(grid)


def test_known_configurations_are_those_of_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the shipped table itself: of another scheme nothing but the rule and what it holds for some shape."""
    on_h100(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(dispatch, "triton_version", lambda: "3.6")
    search.known_configs.cache_clear()
    p = Scheme.parse("w4g64-asym").problem(4096, 512, "cpu")
    weight = tunables.TILED.pack(p, torch.float16)
    found = search.candidates(tunables.TILED, 64, 4096, 14336, weight, known=True)
    table = table_file.load("H100", "3.6")
    held = [dict(e.choice.config) for e in table.values() if e.choice.kernel == "w4a16_tiled"]
    assert found[0] == tunables.TILED.default(64, weight) and all(vars(c) in held for c in found[1:])
    every = search.candidates(tunables.TILED, 64, 4096, 14336, weight)
    assert {c for c in every if vars(c) in held} <= set(found) and 3 < len(found) < len(every) / 4
    search.known_configs.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "marlin"], "known are w4a16, w4a16_decode"),
        (["--dtype", "float32"], "float32: known are float16, bfloat16"),
        (["--schemes", "int4"], "they read w4g128"),
        (["--shapes", "64x100"], "multiple of the group of w4g128"),
    ],
)
def test_arguments_that_cannot_be_tuned(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    """Oracle: argparse's exit code 2, and what to give instead."""
    assert message in refused(tune.parse, arguments)


@pytest.fixture
def searchable(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[w4a16.Config]]:
    """A cuda:0 that is none, and the kernel of `without_gpu`. Returns the list of what was launched."""
    us = {1: 5.0, 2: 3.0, 4: 4.0, 8: 1.0}
    graphs = without_gpu(monkeypatch, us, us)
    monkeypatch.setattr(search, "hopper_kernels", lambda device: False)
    monkeypatch.setattr(search, "Problem", lambda n, k, device, *rest: Problem(n, k, "cpu", *rest))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test 8GB")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    dispatch._gpu.cache_clear()
    yield graphs.launched
    dispatch._gpu.cache_clear()


def ask(m: int, symmetric: bool = False, n: int = 32, k: int = 256) -> Choice | None:
    return dispatch.choose(torch.device("cuda", 0), torch.float16, 4, 64, symmetric, n, k, m)


def test_a_miss_is_searched_once_when_asked_for_and_kept(
    searchable: list[w4a16.Config], monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    """Oracle: the configuration made the fastest of those that are right; without the variable nothing is searched; the
    second question, and that of a new process (`forget`), find it in the file."""
    assert ask(3) is None and not searchable
    monkeypatch.setenv(dispatch.SEARCH_VARIABLE, "1")
    found = ask(3)
    assert found is not None and dispatch.as_config(found, "w4a16", w4a16.Config) == w4a16.Config(16, 32, 2, 4, 2)
    assert {c.split_k for c in searchable} == {1, 2, 4, 8}
    searchable.clear()
    assert ask(4) == found and not searchable
    dispatch._searched.clear()
    dispatch.forget()
    assert ask(4) == found and not searchable
    (kept,) = table_file.read(own_cache / table_file.file_name("Test", dispatch.triton_version()), "Test",
                              dispatch.triton_version())  # fmt: skip
    assert kept == Key("Test", dispatch.triton_version(), "float16", "w4g64 asym", 32, 256, 4)


def test_nothing_is_searched_while_a_graph_is_captured(
    searchable: list[w4a16.Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the launches; the same question after the capture is searched, so the capture left no answer behind."""
    monkeypatch.setenv(dispatch.SEARCH_VARIABLE, "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ask(1) is None and not searchable
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert ask(1) is not None and searchable


def test_tuned_cells_become_entries_of_buckets() -> None:
    """Oracle: of one cell's finalists the fastest, whatever a short graph said of others; M = 100 is no bucket and
    makes no entry; dtype and scheme are the cell's own."""
    cell = {"scheme": "w4g128", "dtype": "float16", "n": 4096, "k": 4096, "kernel": "w4a16"}
    cells = [
        cell | {"m": m, "config": CONFIG | {"split_k": split}, "us": us, "final": final}
        for m, split, us, final in ((16, 1, 9.0, True), (16, 2, 7.0, True), (16, 8, 6.9, False), (16, 4, None, False),
                                    (100, 1, 1.0, True))
    ]  # fmt: skip
    other = cell | {
        "scheme": "w8a8",
        "dtype": "bfloat16",
        "kernel": "w8a8",
        "m": 1,
        "config": {},
        "us": 3.0,
        "final": True,
    }
    found = tune.entries_of([*cells, other], "H100", "9.9")
    assert found == {
        key(): Entry(Choice("w4a16", CONFIG | {"split_k": 2}), 7.0),
        key(m=1, dtype="bfloat16", scheme="w8a8 channel sym"): Entry(Choice("w8a8", {}), 3.0),
    }


def test_tables_grow_and_new_figures_replace_old_ones(tmp_path: Path) -> None:
    """Oracle: two rounds of tuning, read back."""
    tune.add_to_table(tmp_path, {key(m=1): entry(1), key(m=16): entry(2)}, {})
    path = tune.add_to_table(tmp_path, {key(m=16): entry(3)}, {"made_by": "a test"})
    assert table_file.read(path, "H100", "9.9") == {key(m=1): entry(1), key(m=16): entry(3)}
    assert json.loads(path.read_text())["about"] == {"made_by": "a test"}


NAMED = ["w4a16:16,64,2,4,2", "w4a16:16,64,1,4,3,0"]


def test_only_what_is_named_is_tried_beside_the_rule_and_all_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the fields by hand, a boolean among them; the rule of the stand-in kernel, which is tried for comparison;
    behind five short graphs all five, one more than a search's finalists, take turns."""
    args = tune.parse([part for text in NAMED for part in ("--only", text)])
    assert args.only == [
        ("w4a16", w4a16.Config(16, 64, 2, 4, 2)),
        ("w4a16", w4a16.Config(16, 64, 1, 4, 3, use_asm=False)),
    ]
    us = {split: float(split) for split in (1, 2, 3, 4, 5)}
    graphs = without_gpu(monkeypatch, us, us)
    p = Problem(32, 256, "cpu", 64)
    only = [("w4a16", w4a16.Config(16, 32, split, 4, 2)) for split in (5, 2, 3, 4)]
    weights = search.Weights(p, torch.float32, [tunables.TUNABLES["w4a16"]], only=only)
    x = p.x(3)
    cells = search.tune_cell(weights, x, p.reference(x))
    assert graphs.rounds[5:] == [[1, 2, 3, 4, 5]] and all(cell["final"] for cell in cells)
    assert [cell["config"]["split_k"] for cell in cells if cell["rule"]] == [1]
    tasks = tune.compile_tasks({"w4g128": [tunables.W4A16], "w8a8": [tunables.W8A8]}, args)
    assert [(task[0], task[1]) for task in tasks] == args.only


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "marlin:1"], "'marlin:1' names no kernel that is tuned; they are w4a16,"),
        (
            ["--only", "w4a16_decode:8,16,4,2,1,128,7"],
            "7 values; w4a16_decode takes numbers for block_m, block_n",
        ),
        (["--only", "w4a16_decode:8,x"], "'x'; w4a16_decode takes numbers for"),
        (["--only", "w4a16_decode:8"], "missing 3 required"),
        (["--only", NAMED[0], "--known"], "say one of them"),
        (
            ["--only", "w4a16_tiled:64,64,4,4,3,4,0,2,4"],
            "would run as w4a16_tiled:64,64,4,4,3,4,0,1,1,",
        ),
    ],
)
def test_what_is_named_must_be_a_configuration(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    """Oracle: argparse's exit code 2, and the value, the rule and the fields."""
    assert message in " ".join(refused(tune.parse, arguments).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", NAMED[0]], "--only w4a16: tuned here are w4a16_tiled; see --kernels"),
        (["--only", "w4a16_tiled:64,128,8,4,3,2,1,1,4", "--shapes", "4096x4096,4096x14336"],
         "unroll 4, persistent 0 does not run so at 4096x14336 (w4g128): each of 8 shares of its 112 tiles"),
        (["--only", "w4a16_tiled:64,64,4,4,3,4,1,1,2", "--shapes", "4096x4096,4096x14336"], None),
    ],
)  # fmt: skip
def test_what_is_named_is_timed_as_it_is_named(arguments: list[str], message: str | None) -> None:
    """Oracle: by hand: the kernels that are tuned; 8 shares of 112 tiles are 14 each, no multiple of 4."""
    args = tune.parse(arguments)
    if message is None:
        tune.check_named({"w4g128": [tunables.TILED]}, args)
    else:
        with pytest.raises(ConfigError, match=re.escape(message)):
            tune.check_named({"w4g128": [tunables.TILED]}, args)


def test_a_named_configuration_that_does_not_fit_is_shown_to_fail() -> None:
    """Oracle: its place among the candidates, where one of the grid would be left out."""
    large = tunables.TILED.config(256, 128, 1, 8, 6)
    weight = tunables.TILED.pack(Scheme.parse("w4g128").problem(64, 512, "cpu"), torch.float16)
    assert not tunables.TILED.fits(weight, large)
    assert large in search.candidates(tunables.TILED, 300, 64, 512, weight, only=[("w4a16_tiled", large)])


def test_as_many_processes_compile_as_memory_lasts_for() -> None:
    """Oracle: by hand: two programs of 128 rows for each of 132 multiprocessors and 512 rows more are 34,304 rows;
    with one scale a row they keep K = 8192, at 12 bytes a weight and 1 GB a process 4.37 GB. With groups K is 1024."""
    config = tunables.TILED.config(64, 128, 1, 4, 3)
    row = [("w4a16_tiled", config, 64, "float16", "w4-channel", 8192, False, False)]
    group = [("w4a16_tiled", config, 64, "float16", "w4g128", 8192, False, False)]
    assert tune.processes_that_fit(15, row, 70 * 10**9, 132) == 15
    assert tune.processes_that_fit(15, row, 40 * 10**9, 132) == 9
    assert tune.processes_that_fit(15, row, 10**9, 132) == 1
    assert tune.processes_that_fit(40, group, 40 * 10**9, 132) == 28
