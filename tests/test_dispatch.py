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

import pytest
import torch

from compress.errors import ConfigError, EnvironmentProblem
from compress.kernels import dispatch, table_file, timing, tune, w4a16
from compress.kernels.dispatch import Choice, Entry, Key, lookup, m_bucket, nearest
from compress.kernels.problem import Problem

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
    label = dispatch.scheme_label(4, group, symmetric, 512)
    assert dispatch.parse_scheme(label, 512) == (4, group, symmetric)
    assert label.startswith("w4 channel") == (group == 512)
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


def test_dtype_yields_to_shape_and_nothing_else_yields() -> None:
    """Oracle: the other 16-bit dtype serves where its own is missing; another GPU, Triton or scheme never does."""
    table = {key(dtype="float16"): entry(1), key(dtype="bfloat16", n=8192): entry(2)}
    assert nearest(key(dtype="bfloat16"), table)[1].us == 1
    assert nearest(key(dtype="bfloat16", n=8192), table)[1].us == 2
    for other in ({"gpu": "A100"}, {"triton": "9.8"}, {"scheme": "w4g128 asym"}, {"scheme": "w4g64 sym"}):
        assert nearest(key(**other), table) is None, other


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
            config = dispatch.as_config(e.choice, e.choice.kernel, tune.TUNABLES[e.choice.kernel].config)
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
GOOD = {"format": 1, "gpu": "H100", "triton": "9.9", "about": {}, "entries": [GOOD_ITEM],
        "kernels": {"w4a16": {"n_multiple": 1, "k_multiple": 1}}}  # fmt: skip
DAMAGE = {
    "truncated": json.dumps(GOOD)[:-20],
    "not UTF-8": b"\xff\xfe\x00",
    "a list": "[]",
    "a number": "7",
    "another format": json.dumps(GOOD | {"format": 2}),
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


@pytest.mark.parametrize("m", [1, 16, 64, 256])
def test_candidates_begin_with_the_rule_and_leave_nothing_out(monkeypatch: pytest.MonkeyPatch, m: int) -> None:
    """Oracle: the grid itself as a set; the second candidate differs from the rule in one field."""
    tunable = replace(tune.W4A16, default=lambda m, n, k: w4a16.choose_config(m, n, k, 132))
    found = tune.candidates(tunable, m, 4096, 4096)
    every = {c for config in tunable.grid(m) for c in tunable.expand(m, 4096, 4096, config)}
    rule = tunable.default(m, 4096, 4096)
    assert found[0] == rule and set(found) == every | {rule} and len(found) == len(set(found))
    assert sum(v != getattr(rule, f) for f, v in vars(found[1]).items()) == 1


@pytest.fixture
def searchable(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[w4a16.Config]]:
    """A cuda:0 that is none, and a kernel that is a dense product on the CPU, with three configurations whose times are
    told by split_k; 8 is fast and wrong. Returns the list of those that were launched."""
    launched: list[w4a16.Config] = []
    base = w4a16.Config(16, 32, 1, 4, 2)
    us = {1: 5.0, 2: 3.0, 4: 4.0, 8: 1.0}

    def launch(x, weight, config):
        launched.append(config)
        return x @ weight[0].t() * (2 if config.split_k == 8 else 1)

    tunable = replace(
        tune.W4A16,
        grid=lambda m: iter([base]),
        expand=lambda m, n, k, c: [replace(c, split_k=s) for s in us],
        default=lambda m, n, k: base,
        pack=lambda p, dtype: (p.dense(dtype),),
        launch=launch,
    )
    monkeypatch.setattr(tune, "TUNABLES", {"w4a16": tunable})
    monkeypatch.setattr(tune, "capability", lambda device: (8, 0))
    monkeypatch.setattr(tune, "Problem", lambda n, k, device, group, symmetric: Problem(n, k, "cpu", group, symmetric))
    monkeypatch.setattr(timing, "rotating_copies", lambda weight: [weight])
    monkeypatch.setattr(timing, "time_gpu", lambda call, copies, **_: us[launched[-1].split_k])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test 8GB")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    dispatch._gpu.cache_clear()
    yield launched
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
    """Oracle: of one cell's configurations the fastest right one; M = 100 is no bucket and makes no entry."""
    cells = [
        {"n": 4096, "k": 4096, "m": m, "kernel": "w4a16", "config": CONFIG | {"split_k": split}, "us": us}
        for m, split, us in ((16, 1, 9.0), (16, 2, 7.0), (16, 4, None), (100, 1, 1.0))
    ]
    found = tune.entries_of(cells, "H100", "9.9", "float16")
    assert found == {key(): Entry(Choice("w4a16", CONFIG | {"split_k": 2}), 7.0)}


def test_tables_grow_and_new_figures_replace_old_ones(tmp_path: Path) -> None:
    """Oracle: two rounds of tuning, read back."""
    tune.add_to_table(tmp_path, {key(m=1): entry(1), key(m=16): entry(2)}, {})
    path = tune.add_to_table(tmp_path, {key(m=16): entry(3)}, {"made_by": "a test"})
    assert table_file.read(path, "H100", "9.9") == {key(m=1): entry(1), key(m=16): entry(3)}
    assert json.loads(path.read_text())["about"] == {"made_by": "a test"}
