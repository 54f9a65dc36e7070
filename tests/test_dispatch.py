"""The dispatch tables of the W4A16 kernels: look-up and files, without a GPU."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from table_entries import CONFIG, entry, key, own_tables, ship

from compress.errors import ConfigError, EnvironmentProblem
from compress.kernels import dispatch, table_file, tunables, w4a16, w8a8, wna16
from compress.kernels.dispatch import Choice, Entry, Key, lookup, m_bucket, nearest
from compress.kernels.problem import Scheme
from compress.kernels.tile_shape import TiledConfig


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with own_tables(tmp_path, monkeypatch) as directory:
        yield directory


# -- keys -------------------------------------------------------------------------------------------------


def test_buckets_are_the_next_power_of_two_or_half_way_there() -> None:
    """Oracle: the smallest not below m of the powers of two, and of those half-way from 64 on, found by counting; 4096
    from there on."""
    buckets = sorted({2**i for i in range(13)} | {96, 192, 384, 768, 1536, 3072})
    for m in [*range(1, 400), 511, 512, 513, 768, 769, 3072, 3073, 4095, 4096, 4097, 100_000]:
        assert m_bucket(m) == next(b for b in buckets if b >= min(m, 4096)), m
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


def test_kernels_that_fill_the_machine_answer_for_the_very_key() -> None:
    """Oracle: the docstring: no entry of another shape, scheme or bucket; another dtype's and its own; and another
    kernel's."""
    for kernel, others in (("w4a16_decode", False), ("w4a16_tiled", False), ("w8a16_tiled", False), ("w8a8", True)):
        table = {key(m=m): Entry(Choice(kernel, {}), 1.0) for m in (64, 128, 1024)}
        for m in (64, 128, 1024):
            for other in ({"n": 4352}, {"scheme": "w4g32 sym"}):
                assert bool(nearest(key(**other, m=m), table)) == others
            assert nearest(key(m=m), table) and nearest(key(dtype="bfloat16", m=m), table)
        for m in (32, 96, 768):
            assert bool(nearest(key(m=m), table)) == others


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
    """Oracle: the dataclass built by hand; None, not an error, for fields that this version does not have, or for want
    of one that has no default."""
    assert dispatch.as_config(Choice("w4a16", CONFIG), "w4a16", w4a16.Config) == w4a16.Config(**CONFIG)
    assert dispatch.as_config(Choice("decode", CONFIG), "w4a16", w4a16.Config) is None
    assert dispatch.as_config(Choice("w4a16", CONFIG | {"clusters": 2}), "w4a16", w4a16.Config) is None
    assert dispatch.as_config(Choice("w4a16", {"block_m": 16}), "w4a16", w4a16.Config) is None
    assert dispatch.as_config(None, "w4a16", w4a16.Config) is None
    older = {"block_m": 64, "block_n": 64, "split_k": 4, "warps": 4, "stages": 3, "cluster": 4, "producer": True}
    found = dispatch.as_config(Choice("w4a16_tiled", older), "w4a16_tiled", TiledConfig)
    assert found == TiledConfig(64, 64, 4, 4, 3, 4, True)  # fields that came later are as before


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
