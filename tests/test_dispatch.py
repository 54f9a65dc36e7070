"""The dispatch tables of the W4A16 kernels: look-up, files, and the bounded search, without a GPU."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.errors import ConfigError, EnvironmentProblem
from compress.kernels import dispatch, problem, table_file, timing, tunables, tune, w4a16, w8a8, wna16
from compress.kernels.dispatch import Choice, Entry, Key, lookup, m_bucket, nearest
from compress.kernels.problem import Problem, Scheme

CONFIG = {"block_m": 16, "block_n": 64, "split_k": 1, "num_warps": 4, "num_stages": 3, "use_asm": True}


def key(n=4096, k=4096, m=16, gpu="H100", triton="9.9", dtype="float16", scheme="w4g128 sym"):
    return Key(gpu, triton, dtype, scheme, n, k, m)


def entry(us=1.0, kernel="w4a16", **rules):
    return Entry(Choice(kernel, CONFIG | {"split_k": int(us)}), us, **rules)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This machine's table in a directory of the test, and nothing kept from other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(dispatch.SEARCH_VARIABLE, raising=False)
    dispatch._searched.clear()
    dispatch.forget()
    yield table_file.user_directory()
    dispatch._searched.clear()
    dispatch.forget()


def ship(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entries: dict[Key, Entry]) -> None:
    """Make `entries`, of one GPU and Triton version, the shipped table."""
    directory = tmp_path / "shipped"
    first = next(iter(entries))
    table_file.write(directory / table_file.file_name(first.gpu, first.triton), first.gpu, first.triton, entries, {})
    monkeypatch.setattr(table_file, "SHIPPED", directory)
    dispatch.forget()


# -- keys -------------------------------------------------------------------------------------------------


def test_buckets_are_the_next_power_of_two() -> None:
    """Oracle: the smallest power of two not below m, found by counting; 4096 from there on."""
    for m in [*range(1, 300), 511, 512, 513, 4095, 4096, 4097, 100_000]:
        assert m_bucket(m) == next(2**i for i in range(13) if 2**i >= min(m, 4096)), m
    assert m_bucket(0) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "H100 MIG 1g.10gb"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
    ],
)
def test_gpu_names(name: str, expected: str) -> None:
    """Oracle: names as the driver gives them; a variant with other clocks or multiprocessors keeps its own name."""
    assert dispatch.normalise_gpu(name) == expected


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128, 512])
def test_schemes_are_read_back(group: int, symmetric: bool) -> None:
    """Oracle: `parse_scheme` inverts `scheme_label`; a group as long as the row is the row, whatever its length."""
    for bits, int8 in ((4, False), (8, False), (8, True)):
        label = dispatch.scheme_label(bits, group, symmetric, 512, int8)
        assert dispatch.parse_scheme(label, 512) == (bits, group, symmetric, int8)
        assert ("channel" in label) == (group == 512) and label.startswith("w8a8") == int8
    with pytest.raises(ConfigError, match="w4g128 sym"):
        dispatch.parse_scheme("int4", 512)


# -- look-up ----------------------------------------------------------------------------------------------


def test_the_exact_entry_comes_first_then_the_next_larger_bucket() -> None:
    """Oracle: entries told apart by their time; a bucket is answered from above, never from below, where a kernel for
    few rows need not take many."""
    table = {key(m=1): entry(1), key(m=16): entry(2), key(m=64): entry(3)}
    asked = {1: 1, 2: None, 4: 2, 8: 2, 16: 2, 32: 3, 64: 3, 128: None}
    for m, expected in asked.items():
        found = nearest(key(m=m), table)
        assert (found and int(found[1].us)) == expected, m


def test_a_missing_shape_takes_the_closest_within_a_factor_of_two() -> None:
    """Oracle: distances in octaves, worked out by hand."""
    table = {key(n=4096): entry(1), key(n=8192): entry(2), key(n=4096, k=8192): entry(3)}
    asked = {(4096, 4224): 1, (5120, 4096): 1, (6144, 4096): 2, (16384, 4096): 2, (4096, 16384): 3, (16512, 4096): None}
    asked[2048, 2048] = 1
    asked[1920, 4096] = None
    for (n, k), expected in asked.items():
        found = nearest(key(n=n, k=k), table)
        assert (found and int(found[1].us)) == expected, (n, k)


def test_a_neighbour_is_taken_only_if_its_kernel_takes_the_shape() -> None:
    """Oracle: the multiples that the entry names."""
    table = {key(n=4096): entry(1, n_multiple=256, k_multiple=128), key(n=8192): entry(2)}
    assert nearest(key(n=4352), table)[1].us == 1
    assert nearest(key(n=4480), table)[1].us == 2  # 17.5 times 256
    assert nearest(key(n=4352, k=4096 + 64), table)[1].us == 2


def test_dtype_and_groups_yield_to_shape_and_nothing_else_yields() -> None:
    """Oracle: the other 16-bit dtype serves where its own is missing, and so do other groups and zero points; another
    GPU, Triton or number of bits never does."""
    table = {key(dtype="float16"): entry(1), key(dtype="bfloat16", n=8192): entry(2)}
    assert nearest(key(dtype="bfloat16"), table)[1].us == 1
    assert nearest(key(dtype="bfloat16", n=8192), table)[1].us == 2
    for other in ({"gpu": "A100"}, {"triton": "9.8"}, {"scheme": "w8g128 sym"}, {"scheme": "w4a8 channel sym"}):
        assert nearest(key(**other), table) is None, other
    table[key(scheme="w4g64 asym", n=8192)] = entry(3)
    for scheme in ("w4g128 asym", "w4g64 sym", "w4 channel asym"):
        assert nearest(key(scheme=scheme), table)[1].us == 1
    assert nearest(key(scheme="w4g64 asym", n=8192), table)[1].us == 3
    assert nearest(key(scheme="w4g64 asym", dtype="bfloat16", n=8192 + 64), table)[1].us == 3  # scheme before dtype


def test_h200_reads_the_table_of_h100_where_it_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: the same chip; its own entry, once there, comes first. No other GPU does so."""
    ship(monkeypatch, tmp_path, {key(): entry(1)})
    assert lookup(key(gpu="H200")) == lookup(key()) == entry(1).choice
    assert lookup(key(gpu="H100 PCIe")) is None and lookup(key(gpu="cpu")) is None
    table_file.remember({key(gpu="H200"): entry(2)}, {})
    dispatch.forget()
    assert lookup(key(gpu="H200")) == entry(2).choice and lookup(key()) == entry(1).choice


def test_explain_says_where_an_answer_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: the three kinds of answer."""
    ship(monkeypatch, tmp_path, {key(): entry(7)})
    assert dispatch.explain(key()) == "measured: 7.0 us"
    assert dispatch.explain(key(n=5120, m=8)) == "measured at 4096x4096, M=16, float16 on H100: 7.0 us"
    assert dispatch.explain(key(gpu="B200")) == "no table: the kernel's own rule"


def test_choose_keeps_answers_until_a_table_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the number of look-ups; an answer that a table gives later is seen after `forget`."""
    asked = []
    device = torch.device("cpu")
    real = dispatch.lookup
    monkeypatch.setattr(dispatch, "lookup", lambda k: (asked.append(k), real(k))[1])
    for m in (5, 6, 8, 5):
        assert dispatch.choose(device, torch.float16, 4, 128, True, 4096, 4096, m) is None
    assert asked == [Key("cpu", dispatch.triton_version(), "float16", "w4g128 sym", 4096, 4096, 8)]
    table_file.remember({asked[0]: entry(3)}, {})
    dispatch.forget()
    assert dispatch.choose(device, torch.float16, 4, 128, True, 4096, 4096, 7) == entry(3).choice


def test_a_choice_of_another_kernel_or_version_is_no_configuration() -> None:
    """Oracle: the dataclass built by hand; None, not an error, for fields that this version does not have."""
    assert dispatch.as_config(Choice("w4a16", CONFIG), "w4a16", w4a16.Config) == w4a16.Config(**CONFIG)
    assert dispatch.as_config(Choice("decode", CONFIG), "w4a16", w4a16.Config) is None
    assert dispatch.as_config(Choice("w4a16", CONFIG | {"clusters": 2}), "w4a16", w4a16.Config) is None
    assert dispatch.as_config(Choice("w4a16", {"block_m": 16}), "w4a16", w4a16.Config) is None
    assert dispatch.as_config(None, "w4a16", w4a16.Config) is None


# -- files ------------------------------------------------------------------------------------------------


def test_every_shipped_table_is_whole_and_names_kernels_that_exist() -> None:
    """Oracle: the reader; each entry answers its own key and makes a configuration of a kernel in TUNABLES."""
    paths = sorted(table_file.SHIPPED.glob("*.json"))
    assert paths
    for path in paths:
        head = json.loads(path.read_text())
        assert path.name == table_file.file_name(head["gpu"], head["triton"])
        entries = table_file.read(path, head["gpu"], head["triton"])
        assert len(entries) == len(head["entries"]) > 0
        for k, e in entries.items():
            config = dispatch.as_config(e.choice, e.choice.kernel, tunables.TUNABLES[e.choice.kernel].config)
            assert config is not None and lookup(k) == e.choice, k


def test_files_are_read_back_as_written(tmp_path: Path) -> None:
    """Oracle: the entries themselves; the directory of a machine is a place of its own for each package version."""
    entries = {key(): entry(1, n_multiple=64), key(m=1, dtype="bfloat16"): entry(2, kernel="decode", k_multiple=256)}
    path = tmp_path / "t.json"
    table_file.write(path, "H100", "9.9", entries, {"made_by": "a test"})
    assert table_file.read(path, "H100", "9.9") == entries
    assert table_file.read(tmp_path / "absent.json", "H100", "9.9") == {}


@pytest.mark.parametrize("xdg", ["", "relative/path"])
def test_cache_directory_without_a_usable_xdg_variable(monkeypatch: pytest.MonkeyPatch, xdg: str) -> None:
    """Oracle: the XDG base directory specification: ~/.cache, and relative paths are ignored."""
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert table_file.user_directory().is_relative_to(Path.home() / ".cache" / "compress-llm")


def test_own_entries_come_before_shipped_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: the entry found here for the same key; the shipped one answers its other keys."""
    ship(monkeypatch, tmp_path, {key(m=1): entry(1), key(m=16): entry(2)})
    table_file.remember({key(m=16): entry(3)}, {})
    dispatch.forget()
    assert lookup(key(m=1)) == entry(1).choice and lookup(key(m=16)) == entry(3).choice


GOOD_ITEM = {"dtype": "float16", "scheme": "w4g128 sym", "n": 4096, "k": 4096, "m": 16, "kernel": "w4a16",
             "config": CONFIG, "us": 1.0}  # fmt: skip
GOOD = {"format": table_file.FORMAT, "gpu": "H100", "triton": "9.9", "about": {}, "entries": [GOOD_ITEM],
        "kernels": {"w4a16": {"n_multiple": 1, "k_multiple": 1}}}  # fmt: skip
DAMAGE = {
    "truncated": json.dumps(GOOD)[:-20],
    "not UTF-8": b"\xff\xfe\x00",
    "a list": "[]",
    "a number": "7",
    "an older format": json.dumps(GOOD | {"format": 1}),  # whose clusters are true and false
    "another GPU": json.dumps(GOOD | {"gpu": "A100"}),
    "no entries": json.dumps({k: v for k, v in GOOD.items() if k != "entries"}),
    "an entry without config": json.dumps(GOOD | {"entries": [{k: v for k, v in GOOD_ITEM.items() if k != "config"}]}),
    "a text for a tile": json.dumps(GOOD | {"entries": [GOOD_ITEM | {"config": {"block_m": "16"}}]}),
    "M between buckets": json.dumps(GOOD | {"entries": [GOOD_ITEM | {"m": 17}]}),
    "N of nothing": json.dumps(GOOD | {"entries": [GOOD_ITEM | {"n": 0}]}),
    "an unknown kernel": json.dumps(GOOD | {"entries": [GOOD_ITEM | {"kernel": "other"}]}),
}


def test_the_undamaged_table_of_the_next_test_is_read() -> None:
    """Oracle: one entry; otherwise every damage below would be found for the wrong reason."""
    assert len(table_file.parse(GOOD, "H100", "9.9")) == 1


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_own_table_is_named_ignored_and_replaced(
    damage: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the shipped entry still answers, the warning names the file, and the next find leaves a good file."""
    ship(monkeypatch, tmp_path, {key(): entry(1)})
    path = own_cache / table_file.file_name("H100", "9.9")
    path.parent.mkdir(parents=True)
    content = DAMAGE[damage]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.WARNING):
        assert lookup(key()) == entry(1).choice
    assert str(path) in caplog.text and "the next search writes it anew" in caplog.text
    assert table_file.remember({key(m=1): entry(2)}, {}) == path
    assert list(table_file.read(path, "H100", "9.9")) == [key(m=1)]


def test_a_damaged_shipped_table_is_a_broken_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: an error that names the file and the remedy, not a slow kernel in silence."""
    monkeypatch.setattr(table_file, "SHIPPED", tmp_path)
    (tmp_path / table_file.file_name("H100", "9.9")).write_text("{")
    with pytest.raises(EnvironmentProblem, match=r"H100_triton9\.9\.json is damaged.*install the package again"):
        lookup(key())


def test_a_full_disk_leaves_the_old_table_and_no_debris(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the file's bytes before; a warning says that the find is not kept."""
    path = table_file.remember({key(): entry(1)}, {})
    assert path is not None
    before = path.read_bytes()

    def no_space(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with caplog.at_level(logging.WARNING):
        assert table_file.remember({key(m=1): entry(2)}, {}) is None
    assert path.read_bytes() == before and "not kept" in caplog.text
    assert sorted(p.suffix for p in own_cache.iterdir()) == [".json", ".lock"]


def test_finds_of_several_writers_are_all_kept(own_cache: Path) -> None:
    """Oracle: every key of eight writers that start together is in the file; without turns, later ones would write over
    what they had not read."""
    start = threading.Barrier(8)

    def write(i: int) -> None:
        start.wait()
        table_file.remember({key(n=128 * (i + 1)): entry(i + 1)}, {})

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    found = table_file.read(own_cache / table_file.file_name("H100", "9.9"), "H100", "9.9")
    assert {k.n for k in found} == {128 * (i + 1) for i in range(8)}


# -- the bounded search -----------------------------------------------------------------------------------


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
    best = tune.best_within([("x", c) for c in table], timed(clock, table, seen), 10.0, clock)
    assert best == ("x", "b", 5.0) and seen == ["a", "b", "c"] and clock.now == 108.0


def test_search_tries_the_first_whatever_it_takes_and_skips_what_is_wrong() -> None:
    """Oracle: one candidate that takes a minute, of a budget of a second; then a list in which others are wrong."""
    clock, seen = Clock(), []
    assert tune.best_within([("x", "a"), ("x", "b")], timed(clock, {"a": (60.0, 9.0)}, seen), 1.0, clock) == (
        "x",
        "a",
        9.0,
    )
    table = {"a": (0.0, None), "b": (0.0, 4.0), "c": (0.0, None)}
    assert tune.best_within([("x", c) for c in table], timed(clock, table, seen), 1.0, clock) == ("x", "b", 4.0)
    assert tune.best_within([("x", "a")], timed(clock, table, seen), 1.0, clock) is None
    assert tune.best_within([], timed(clock, table, seen), 1.0, clock) is None


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
    found = tune.candidates(tunable, m, 64, 512, weight)
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
    weights = tune.Weights(p, torch.float16, [tunables.TUNABLES[name]])
    pairs = weights.candidates(9)
    for tunable, config in (pairs[0], pairs[-2], pairs[-1]):
        y = tunable.launch(x.half(), weights.copies(tunable)[0], config)
        assert tune.relative_error(y, p.reference(x)) < tunable.max_error, config


class Graphs:
    """Timing without a GPU: `times(config, long graph?)` in microseconds; `rounds` notes who took turns."""

    def __init__(self, times) -> None:
        self.times, self.launched, self.rounds = times, [], []

    def capture(self, call, copies, graph_ms=timing.GRAPH_MS):
        output = call(copies[-1])
        return timing.Captured((self.launched[-1], graph_ms), 1, output)

    def take_turns(self, captured, replays=timing.REPLAYS):
        self.rounds.append([c.graph[0].split_k for c in captured])
        return [[self.times(c.graph[0], c.graph[1] >= tune._FINAL_MS)] * 3 for c in captured]

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
    weights = tune.Weights(p, torch.float32, [tunables.TUNABLES["w4a16"]])
    cells = tune.tune_cell(weights, p.x(3), p.reference(p.x(3)))
    assert graphs.rounds[-1] == [2, 4, 1, 16]
    timed = [(4, 4.1, True), (2, 4.5, True), (1, 5.5, True), (16, 6.1, True), (32, 7.0, False), (8, None, False)]
    assert [(c["config"]["split_k"], c["us"], c["final"]) for c in cells] == timed
    assert [c["config"]["split_k"] for c in cells if c["rule"]] == [1] and cells[-1]["problem"] == "wrong"


def test_a_cell_without_budget_tries_the_rule_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one configuration, the rule's, timed and final."""
    without_gpu(monkeypatch, SHORT, SHORT)
    p = Problem(32, 256, "cpu", 64)
    weights = tune.Weights(p, torch.float32, [tunables.TUNABLES["w4a16"]])
    (cell,) = tune.tune_cell(weights, p.x(3), p.reference(p.x(3)), budget_s=0.0)
    assert cell["rule"] and cell["final"] and cell["config"]["split_k"] == 1


def test_what_the_table_has_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a table asked for this very product that answers 16; the rule, 1, comes after it, each once."""
    without_gpu(monkeypatch, SHORT, SHORT)
    p = Problem(32, 256, "cpu", 64)
    weights = tune.Weights(p, torch.float16, [tunables.TUNABLES["w4a16"]])
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
    real = tune.tune_cell

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
    assert {t[5] for t in tasks} == {4096}
    assert {t[5] for t in tune.compile_tasks({"w4-channel": [decode]}, args)} == {256, 512}
    args = tune.parse(["--tokens", "1", "--dtype", "float16,bfloat16"])
    assert len(tune.compile_tasks({"w4g128": [decode], "w4g64": [decode]}, args)) == 4 * len(grid)


def test_known_configurations_are_those_of_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the shipped table itself: of another scheme nothing but the rule and what it holds for some shape."""
    on_h100(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(dispatch, "triton_version", lambda: "3.6")
    tune.known_configs.cache_clear()
    p = Scheme.parse("w4g64-asym").problem(4096, 512, "cpu")
    weight = tunables.TILED.pack(p, torch.float16)
    found = tune.candidates(tunables.TILED, 64, 4096, 14336, weight, known=True)
    table = table_file.load("H100", "3.6")
    held = [dict(e.choice.config) for e in table.values() if e.choice.kernel == "w4a16_tiled"]
    assert found[0] == tunables.TILED.default(64, weight) and all(vars(c) in held for c in found[1:])
    every = tune.candidates(tunables.TILED, 64, 4096, 14336, weight)
    assert {c for c in every if vars(c) in held} <= set(found) and 3 < len(found) < len(every) / 4
    tune.known_configs.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "marlin"], "known are w4a16, w4a16_decode"),
        (["--dtype", "float32"], "float16 and bfloat16"),
        (["--schemes", "int4"], "they read w4g128"),
        (["--shapes", "64x100"], "multiple of the group of w4g128"),
    ],
)
def test_arguments_that_cannot_be_tuned(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: argparse's exit code 2, and what to give instead."""
    with pytest.raises(SystemExit) as ended:
        tune.parse(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("label", "kernel", "config"),
    [
        ("w8g64", "wna16", wna16.Config(16, 128, 2, 8, 4)),
        ("w3-channel-asym", "wna16", wna16.Config(32, 64, 1, 4, 2)),
        ("w8a8", "w8a8", w8a8.Config(16, 128, 2, 8, 5)),
    ],
)
def test_other_kernels_read_their_tables(monkeypatch: pytest.MonkeyPatch, label: str, kernel: str, config: Any) -> None:
    """Oracle: the entry of that very key; the rule for another M, and always in the interpreter, which asks nothing.
    8-bit weights with 8-bit activations are another scheme than without."""
    scheme, module = Scheme.parse(label), {"wna16": wna16, "w8a8": w8a8}[kernel]
    p = scheme.problem(64, 512, "cpu")
    weight = tunables.TUNABLES[kernel].pack(p, torch.bfloat16)
    monkeypatch.setattr(dispatch, "_gpu", lambda device: "Test")
    name = dispatch.scheme_label(scheme.bits, p.group, scheme.symmetric, 512, scheme.int8)
    known = Key("Test", dispatch.triton_version(), "bfloat16", name, 64, 512, 16)
    table_file.remember({known: Entry(Choice(kernel, vars(config)), 1.0)}, {})
    dispatch.forget()

    def asked(m: int, is_cuda: bool = True) -> Any:
        x = SimpleNamespace(shape=(m, 512), dtype=torch.bfloat16, device=torch.device("cpu"), is_cuda=is_cuda)
        return module.configuration(x, weight)

    rule = asked(11, is_cuda=False)
    assert asked(11) == config != rule and asked(17) == asked(17, is_cuda=False)


@pytest.fixture
def searchable(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[w4a16.Config]]:
    """A cuda:0 that is none, and the kernel of `without_gpu`. Returns the list of what was launched."""
    us = {1: 5.0, 2: 3.0, 4: 4.0, 8: 1.0}
    graphs = without_gpu(monkeypatch, us, us)
    monkeypatch.setattr(tune, "hopper_kernels", lambda device: False)
    monkeypatch.setattr(tune, "Problem", lambda n, k, device, *rest: Problem(n, k, "cpu", *rest))
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
