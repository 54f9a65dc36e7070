"""The kernel benchmark: wrong results, stale graphs and absent peers show, and tables say what was measured.

GPU timing itself needs a GPU; here a graph is a stand-in that calls again when it is replayed.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when the kernels are decorated, at import

from compress.errors import ConfigError, EnvironmentProblem  # noqa: E402
from compress.kernels import (  # noqa: E402
    bench,
    bench_plot,
    bench_report,
    choose,
    contenders,
    peer_adapter,
    peers,
    problem,
    timing,
    w4a16,
)
from compress.kernels.choose import Backend  # noqa: E402
from compress.kernels.contenders import Contender  # noqa: E402
from compress.kernels.problem import Problem, Scheme, guarded  # noqa: E402
from compress.kernels.reference import relative_error, w4a16_linear  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if HAS_GPU else "cpu"

# -- the problem ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_reference_and_dense_weight_in_blocks_equal_the_twin(monkeypatch: pytest.MonkeyPatch, symmetric: bool) -> None:
    """Oracle: `w4a16_linear` in float64 over the whole matrix; blocks of 3 rows leave a last one of 1."""
    monkeypatch.setattr(problem, "_BLOCK_ELEMENTS", 3 * 256)
    p = Problem(10, 256, "cpu", 64, symmetric)
    assert p._row_blocks() == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)]
    x = p.x(5)
    torch.testing.assert_close(p.reference(x), w4a16_linear(x, p.codes, p.scale, p.zero), rtol=1e-12, atol=1e-12)
    identity = torch.eye(256)
    dense = w4a16_linear(identity, p.codes, p.scale, p.zero).t()
    assert torch.equal(p.dense(torch.float64), dense) and torch.equal(p.dense(torch.float16), dense.half())
    assert bool((p.zero == 8).all()) == symmetric


def test_activations_are_exact_in_both_dtypes_and_fresh_by_draw() -> None:
    """Oracle: a round trip through each dtype changes nothing; another draw is another matrix, the same one is not."""
    p = Problem(16, 128, "cpu")
    x = p.x(7)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(x.to(dtype).float(), x) and torch.equal(p.scale.to(dtype).float(), p.scale)
    assert torch.equal(p.x(7), x) and not torch.equal(p.x(7, draw=1), x)


def test_activations_lie_between_rows_of_nan() -> None:
    """Oracle: the storage around the tensor."""
    x = torch.randn(3, 128)
    inner = guarded(x, torch.float16)
    assert inner.is_contiguous() and torch.equal(inner, x.half())
    rows = inner.as_strided((problem.GUARD_ROWS * 2 + 3, 128), (128, 1), 0)
    assert torch.isnan(rows[: problem.GUARD_ROWS]).all() and torch.isnan(rows[problem.GUARD_ROWS + 3 :]).all()


SCHEMES = ["w4g128", "w4g32", "w4g64-asym", "w4-channel", "w4-channel-asym", "w8g128", "w8g32-asym", "w3g64",
           "w2-channel-asym", "w8a8", "w8a8-asym"]  # fmt: skip


@pytest.mark.parametrize("label", SCHEMES)
def test_schemes_are_read_back(label: str) -> None:
    """Oracle: `label` inverts `parse`; the problem's own numbers."""
    scheme = Scheme.parse(label)
    assert scheme.label == label
    p = scheme.problem(8, 256, "cpu")
    assert p.codes.max() == 2 ** int(label[1]) - 1 and p.scale.shape == (8, 256 // p.group)
    assert p.group == (256 if "channel" in label or "a8" in label else int(label.partition("g")[2].split("-")[0]))
    assert p.symmetric == ("asym" not in label) == bool((p.zero == 2 ** (p.bits - 1)).all())


@pytest.mark.parametrize("label", ["w4", "w5g128", "w4a8", "w4g0", "w4g48", "4g128", "w8a8g32", "w4g128 asym"])
def test_other_texts_are_no_schemes(label: str) -> None:
    """Oracle: a ConfigError that quotes the text."""
    with pytest.raises(ConfigError, match=label):
        Scheme.parse(label)


# -- timing -----------------------------------------------------------------------------------------------


def test_graphs_take_turns_in_alternating_order_and_slow_ones_stop_early() -> None:
    """Oracle: the order written down by a stand-in for the replay. 200 ms a replay: five samples are enough."""
    order = []
    ms = {"a": 1.0, "b": 2.0, "slow": 200.0}

    def replay(captured: timing.Captured) -> float:
        order.append(captured.graph)
        return ms[captured.graph]

    graphs = [timing.Captured(name, calls, torch.empty(0)) for name, calls in (("a", 10), ("b", 1), ("slow", 2))]
    a, b, slow = timing.take_turns(graphs, 15, replay)
    assert a == [100.0] * 15 and b == [2000.0] * 15 and slow == [100_000.0] * 5
    assert order[:9] == ["slow", "b", "a", "a", "b", "slow", "slow", "b", "a"]
    assert order.count("slow") == 5 + 2 and order[-2:] == ["b", "a"]


def test_summary_of_samples() -> None:
    """Oracle: nearest-rank percentiles of 1..100, and of a single sample."""
    found = timing.summary([float(v) for v in range(100, 0, -1)])
    assert found == {"us": 50.5, "us_p50": 50.5, "us_p95": 95.0, "us_min": 1.0, "samples": 100}
    assert timing.summary([4.0, 3.0, 9.0], fastest=True)["us"] == 3.0
    assert timing.summary([7.0])["us_p95"] == 7.0


def test_rotating_copies_are_distinct_and_larger_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: bytes and addresses; of a dataclass the tensors are copied and the rest is kept."""
    monkeypatch.setattr(timing, "ROTATE_BYTES", 10_000)
    p = Problem(16, 256, "cpu")
    weight = w4a16.pack_kernel_layout(p.codes, p.scale.half(), None)
    one = sum(t.numel() * t.element_size() for t in timing.tensors_of(weight))
    copies = timing.rotating_copies(weight)
    assert copies[0] is weight and len(copies) == math.ceil(10_000 / one)
    assert len({t.data_ptr() for c in copies for t in timing.tensors_of(c)}) == len(copies) * len(
        timing.tensors_of(weight)
    )
    assert all(torch.equal(a, b) for c in copies for a, b in zip(*map(timing.tensors_of, (c, weight)), strict=True))
    assert [type(c) for c in timing.rotating_copies((p.codes, p.scale))] == [tuple] * len(
        timing.rotating_copies((p.codes, p.scale))
    )


# -- what is measured, and what shows ---------------------------------------------------------------------


class Again:
    """A graph that is replayed by calling again; what it writes goes where the first call's output lies."""

    def __init__(self, call, weight) -> None:
        self.call, self.weight, self.output = call, weight, call(weight).clone()

    def replay(self) -> None:
        with torch.no_grad():
            self.output.copy_(self.call(self.weight))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(call, weights):
        graph = Again(call, weights[-1])
        return timing.Captured(graph, 1, graph.output)

    monkeypatch.setattr(timing, "capture", capture)
    monkeypatch.setattr(timing, "take_turns", lambda captured: [[2.0, 1.0, 3.0] for _ in captured])


def row(call, kind="peer", dtype=torch.float32, copies=1, p=None):
    return Contender.of(dtype, [p.dense(dtype)] * copies, call, kind, 16)


def test_right_results_have_percentiles_and_errors(graphs: None) -> None:
    """Oracle: a dense product; the samples of the stand-in."""
    p = Problem(32, 128, "cpu")
    cell = bench.measure_m(p, 4, {"F.linear": row(lambda w, x: x @ w.t(), p=p)}, 0.01, True)["F.linear"]
    assert (cell["us"], cell["us_p50"], cell["us_p95"], cell["us_min"], cell["samples"]) == (2.0, 2.0, 3.0, 1.0, 3)
    assert 0 < cell["error"] < 1e-6 and cell["problem"] is None


def test_wrong_and_stale_results_have_no_time(graphs: None) -> None:
    """Oracle: calls that are wrong by construction: scaled, one output left out, NaN, reading a row beyond x, and one
    that returns its first answer again. Only the last is right at the first call."""
    p = Problem(32, 128, "cpu")
    kept: list[torch.Tensor] = []

    def stale(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        kept.append(x @ w.t())
        return kept[0]

    def beyond(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rows = x.as_strided((x.shape[0] + 1, x.shape[1]), x.stride(), x.storage_offset())
        return ((rows @ w.t()).sum(0, keepdim=True) - rows[-1:] @ w.t()).expand(x.shape[0], -1)

    rows = {
        "scaled": row(lambda w, x: (x @ w.t()) * 1.02, p=p),
        "partly": row(lambda w, x: (x @ w.t()) * (torch.arange(32) > 0), p=p),
        "nan": row(lambda w, x: (x @ w.t()).index_fill(1, torch.tensor([3]), math.nan), p=p),
        "beyond": row(beyond, p=p),
        "stale": row(stale, p=p),
    }
    cells = bench.measure_m(p, 1, rows, 0.01, True)
    assert {name: cell["us"] for name, cell in cells.items()} == dict.fromkeys(rows)
    assert all(cell["problem"] is None for cell in cells.values())
    assert cells["nan"]["error"] is None and cells["beyond"]["error"] is None
    assert cells["stale"]["error"] > 0.5 and 0.01 < cells["scaled"]["error"] < 0.03


def test_a_wrong_last_copy_shows() -> None:
    """Oracle: two copies of the weight, the last of them another matrix."""
    p = Problem(32, 128, "cpu")
    contender = row(lambda w, x: x @ w.t(), copies=2, p=p)
    contender.weights[1] = -contender.weights[1]
    assert bench.measure_m(p, 2, {"a": contender}, 0.01, False)["a"]["us"] is None


def test_a_peer_that_raises_is_named_and_our_own_error_ends_the_run(graphs: None) -> None:
    """Oracle: the text of the exception in one line, beside a contender that goes on; the same exception from a
    contender of this project propagates."""

    def fails(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such\n  kernel")

    p = Problem(32, 128, "cpu")
    rows = {"peer": row(fails, p=p), "right": row(lambda w, x: x @ w.t(), p=p)}
    cells = bench.measure_m(p, 1, rows, 0.01, True)
    assert cells["peer"]["problem"] == "RuntimeError: no such kernel" and cells["peer"]["us"] is None
    assert cells["peer"]["error"] is None
    assert cells["right"]["us"] == 2.0
    with pytest.raises(RuntimeError, match="no such"):
        bench.measure_m(p, 1, {"ours": row(fails, "ours", p=p)}, 0.01, True)


def test_a_peer_that_breaks_the_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: an error that says whose it was and what to do, when the device does not answer any more."""

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(EnvironmentProblem, match=r"gemlite float16 left the GPU unusable.*--peers"):
        bench.require_gpu("gemlite float16", ValueError("x"))


def test_the_fastest_right_variant_counts(graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: three variants with given times, the fastest of them wrong."""
    times = [[9.0], [4.0]]
    monkeypatch.setattr(timing, "take_turns", lambda captured: times)
    p = Problem(32, 128, "cpu")
    variants = [("a", lambda w, x: x @ w.t()), ("wrong", lambda w, x: x @ w.t() * 2), ("b", lambda w, x: x @ w.t())]
    contender = Contender(torch.float32, [p.dense(torch.float32)], lambda m: variants, "peer", 4)
    cell = bench.measure_m(p, 2, {"peer": contender}, 0.01, True)["peer"]
    assert (cell["us"], cell["variant"]) == (4.0, "b")


def test_absent_and_broken_peers_are_listed_and_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: one line each; the record's `problems` says the same."""

    def broken() -> None:
        raise RuntimeError("Found no NVIDIA driver")

    monkeypatch.setattr(peers, "versions", lambda: {"gemlite": peers.NOT_INSTALLED, "humming-kernels": "0.1.19"})
    monkeypatch.setattr(peers, "PEERS", {"gemlite": broken, "humming-kernels": broken})
    found: dict[str, str] = {}
    assert bench.build_peers(["gemlite", "humming-kernels"], found) == {}
    assert found == {"gemlite": "not installed", "humming-kernels": "RuntimeError: Found no NVIDIA driver"}
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["gemlite: not installed", "humming-kernels: RuntimeError: Found no NVIDIA driver"]


def test_versions_of_peers_come_from_their_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: metadata that has one of the two."""

    def version(name: str) -> str:
        if name != "gemlite":
            raise peers.metadata.PackageNotFoundError(name)
        return "0.6.0"

    monkeypatch.setattr(peers, "metadata", SimpleNamespace(
        version=version, PackageNotFoundError=peers.metadata.PackageNotFoundError))  # fmt: skip
    assert peers.versions() == {"gemlite": "0.6.0", "humming-kernels": "not installed"}


# -- what the peers are given -----------------------------------------------------------------------------


def test_codes_packed_along_k_are_read_back() -> None:
    """Oracle: bits 4 (k mod 8) and up of word k / 8, the sign bit included."""
    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    words = peers.pack_along_k(codes)
    back = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], dim=2).view(5, 64)
    assert words.dtype is torch.int32 and torch.equal(back.to(torch.uint8), codes)


def test_a_shape_without_shipped_configurations_takes_the_closest() -> None:
    """Oracle: three entries told apart by a number; what is there already, or of another group, is left alone."""
    known = {
        "(64, 4096, 4096, 128, 8, 104)": {"id": 1},
        "(16, 4096, 4096, 128, 8, 104)": {"id": 2},
        "(64, 28672, 4096, 128, 8, 104)": {"id": 3},
        "(64, 57344, 8192, 64, 8, 104)": {"id": 4},
    }
    before = {name: dict(config) for name, config in known.items()}
    peers.fill_configs(known, "GEMM_SPLITK", 57344, 8192, 128, [16, 64, 4096])
    peers.fill_configs(known, "GEMM_SPLITK", 4096, 4096, 128, [4, 64])
    added = {name: config["id"] for name, config in known.items() if name not in before}
    assert added == {
        "(16, 57344, 8192, 128, 8, 104)": 3,
        "(64, 57344, 8192, 128, 8, 104)": 3,
        "(4, 4096, 4096, 128, 8, 104)": 2,
    }
    assert {name: known[name] for name in before} == before
    assert peers.kernels_at(4096) == ["GEMM"] and peers.kernels_at(1)[0] == "GEMV_REVSPLITK"


# -- this project's path, and the adapter -----------------------------------------------------------------


def test_ours_is_what_auto_runs_on_both_sides_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the float64 twin, and bit by bit the path that `choose_backend` names: fused up to the limit, the dense
    product of the dequantized weight above. N = 44 is none that Hopper's own kernels take, which have no limit."""
    from compress.kernels import dequant

    monkeypatch.setitem(choose.TRITON_MAX_TOKENS, 4, 4)
    p = Problem(44, 256, DEVICE)
    weight = w4a16.pack_kernel_layout(p.codes, p.scale.half(), None)
    for m, backend in ((4, Backend.TRITON), (5, Backend.DEQUANT)):
        x = p.x(m).half()
        y = contenders.auto_linear(x, weight)
        assert contenders.auto_path(x, p.n, p.group) is backend
        path = w4a16.matmul(x, weight) if m == 4 else x @ dequant.dense(weight, x.dtype).t()
        assert torch.equal(y, path) and relative_error(y, p.reference(x)) < 5e-4


def harness_problem(n: int, k: int) -> SimpleNamespace:
    """What a harness hands to `prepare`: codes, scales in both dtypes, and a maker of copies."""
    p = Problem(n, k, DEVICE)
    return SimpleNamespace(
        n=n, k=k, g=128, q=p.codes, s=p.scale.half(), sb=p.scale.bfloat16(), reference=p.reference, x=p.x,
        copies=lambda tensors: [tuple(tensors), tuple(t.clone() for t in tensors)],
    )  # fmt: skip


@pytest.mark.parametrize("index", [0, 1])
def test_adapter_computes_every_m(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """Oracle: the float64 product, from each copy, below and above the limit of the fused kernel."""
    monkeypatch.setitem(choose.TRITON_MAX_TOKENS, 4, 4)
    made = peer_adapter.PEERS[index]()
    made.setup()
    P = harness_problem(44, 256)
    copies = made.prepare(P)
    assert len(copies) == 2 and all(isinstance(t, torch.Tensor) for w in copies for t in w)
    for m in (1, 4, 9):
        x = P.x(m)
        for w in copies:
            y = made.run(w, x.to(made.dtype))
            assert made.ok(m) and y.dtype is made.dtype and y.shape == (m, 44)
            assert relative_error(y, P.reference(x)) < 5e-3


def test_adapter_reads_the_copy_it_is_given() -> None:
    """Oracle: a copy of doubled scales gives twice the result."""
    made = peer_adapter.Ours()
    made.setup()
    P = harness_problem(16, 128)
    first, other = made.prepare(P)
    x = P.x(2).half()
    doubled = tuple(t * 2 if t.is_floating_point() else t for t in other)
    assert torch.equal(made.run(doubled, x), made.run(first, x) * 2)


def test_adapter_loads_from_its_file_with_only_this_package_on_the_path(tmp_path: Path) -> None:
    """Oracle: a fresh interpreter in another directory that loads the file as a harness does, and what it prints."""
    code = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("adapter", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
class Peer:
    def variants(self, m):
        return [("", self.run)]
for c in module.PEERS:
    made = type(c.__name__, (c, Peer), {})()
    made.setup()
    print(made.name, made.dtype, made.ok(4096), len(made.variants(1)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "kernels" / "peer_adapter.py")],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "compress fp16 torch.float16 True 1",
        "compress bf16 torch.bfloat16 True 1",
    ], done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("label", SCHEMES)
def test_contenders_of_every_scheme_compute_the_problem(graphs: None, label: str, dtype: torch.dtype) -> None:
    """Oracle: the float64 product, through the checks of `measure_m`: first call, last copy, the graph on fresh x.
    cuBLAS in float16 comes first; on a CPU the kernels run in Triton's interpreter."""
    scheme, name = Scheme.parse(label), str(dtype).removeprefix("torch.")
    p = scheme.problem(32, 256, DEVICE)
    args = Namespace(device="cuda", dtype=dtype, paths=True, ms=[3])
    rows = bench.contenders_of(p, scheme, args, {}, {})
    rows.pop("tinygemm bfloat16", None)  # GPUs alone have it
    for contender in rows.values():
        del contender.weights[2:]
    cells = bench.measure_m(p, 3, rows, 0.01, True)
    assert next(iter(cells)) == "cuBLAS float16" and f"cuBLAS {name}" in cells
    ours = f"ours {name}" if scheme.bits == 4 else f"ours {'w8a8' if scheme.int8 else f'w{scheme.bits}a16'} {name}"
    assert (f"int8 cuBLAS {name}" in cells) == (label == "w8a8")
    assert ("  fused kernel " + name in cells) == (not scheme.int8) and ours in cells
    for what, cell in cells.items():
        bound = 0.03 if scheme.int8 and "cuBLAS f" not in what and "cuBLAS b" not in what else 0.01
        assert cell["us"] == 2.0 and 0 < cell["error"] < bound, (what, cell)
    bits = contenders.quantized_bits(p)
    assert rows[ours].weight_bits == bits
    assert bits == scheme.bits + (16 + (0 if scheme.symmetric else scheme.bits)) / p.group


# -- reports ----------------------------------------------------------------------------------------------

MACHINE = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "triton": "3.6.0", "copy_TB_per_s": 3.0,
           "fp16_TFLOP_per_s": 750.0, "empty_node_us": 1.1}  # fmt: skip


def record_of(times: dict[str, list[float | None]], kinds: dict[str, str]) -> dict:
    """A record of 4096x4096 at M = 1 and 4096."""
    cells = [
        {"n": 4096, "k": 4096, "m": m, "what": what, "kind": kinds[what], "bits": 16 if what[0] == "c" else 4.125,
         "variant": "", "error": 2e-4, "us": us, "problem": None if us else "ValueError: no"}
        for what, pair in times.items() for m, us in zip((1, 4096), pair, strict=True)
    ]  # fmt: skip
    return {"metric": "us_per_call", "scheme": "w4g128", "dtype": "float16", "machine": MACHINE, "cells": cells,
            "peers": {"gemlite": "not installed"}, "problems": {"gemlite": "not installed"},
            "baseline_drift": {"median": 0.004, "worst": 0.021}}  # fmt: skip


TIMES = {"cuBLAS float16": [15.0, 200.0], "tinygemm bfloat16": [6.0, 4500.0], "humming-kernels float16": [9.0, None],
         "ours float16": [5.0, 250.0], "  dequant + cuBLAS float16": [24.0, 210.0]}  # fmt: skip
KINDS = dict(zip(TIMES, ("dense", "peer", "peer", "ours", "path"), strict=True))


def test_ratios_are_to_the_baseline_and_to_the_fastest_peer_of_the_cell() -> None:
    """Oracle: divisions by hand; a peer without a time is no peer of that cell, and our own paths are none at all."""
    rows = bench_report.by_contender(record_of(TIMES, KINDS)["cells"], 4096, 4096)
    assert bench_report.ratios(rows, 1) == {
        "x faster than cuBLAS": (3.0, "cuBLAS float16"),
        "x faster than the fastest peer": (1.2, "tinygemm bfloat16"),
    }
    assert bench_report.ratios(rows, 4096) == {
        "x faster than cuBLAS": (0.8, "cuBLAS float16"),
        "x faster than the fastest peer": (18.0, "tinygemm bfloat16"),
    }


def test_markdown_holds_the_command_the_machine_and_every_cell() -> None:
    """Oracle: lines written out here."""
    lines = bench_report.markdown(record_of(TIMES, KINDS), [1, 4096], "python -m compress.kernels.bench").splitlines()
    assert lines[0] == "    python -m compress.kernels.bench"
    about = lines[2]
    for part in ("H100 80GB HBM3, torch 2.11.0", "triton 3.6.0", "copy 3.00 TB/s", "matmul 750 TFLOP/s", "2.1% worst"):
        assert part in about
    assert "| 4096 x 4096 | roofline | 2.9 | 183.3 |" in lines
    assert "w4g128, float16: microseconds a call, and how many times as fast as cuBLAS float16." in about
    assert "|  | cuBLAS float16 | 15.0 1.00x | 200.0 1.00x |" in lines
    assert "|  | humming-kernels float16 | 9.0 1.67x | raised |" in lines
    assert "|  | **ours float16** | 5.0 3.00x | 250.0 0.80x |" in lines
    assert "|  | x faster than the fastest peer | 1.20 (tinygemm) | 18.00 (tinygemm) |" in lines
    assert lines[-1] == "gemlite: not installed"


def test_roofline_points_and_roof() -> None:
    """Oracle: figures by hand: 4096^2 weights of 4.125 bits and two vectors of 4096 are 8.67 MB; 33.6 Mflop in 5 us."""
    record = record_of(TIMES, KINDS)
    (point,) = [p for p in bench_plot.points(record) if p.what == "ours float16" and "M=1:" in p.label]
    moved = 4096 * 4096 * 4.125 / 8 + 2 * (4096 + 4096)
    assert point.intensity == pytest.approx(2 * 4096**2 / moved)
    assert point.rate == pytest.approx(6.71, abs=0.01) and point.bandwidth == pytest.approx(1.733, abs=0.001)
    assert len(bench_plot.points(record)) == 9  # ten cells, one without a time
    assert bench_plot.roof(record, 1.0, 1000.0) == ([1.0, 250.0, 1000.0], [3.0, 750.0, 750.0])
    assert bench_plot.roof(record, 1.0, 10.0) == ([1.0, 10.0], [3.0, 30.0])
    assert bench_report.roofline_us(1, 4096, 4096, MACHINE) == pytest.approx(moved / 3.0e6)


@pytest.mark.parametrize("suffix", bench_plot.SUFFIXES)
def test_roofline_files(suffix: str, tmp_path: Path) -> None:
    """Oracle: the file's first bytes, and the names of contenders in what is text."""
    path = tmp_path / f"roofline{suffix}"
    bench_plot.write(path, record_of(TIMES, KINDS))
    data = path.read_bytes()
    assert {".html": b"<html", ".png": b"\x89PNG", ".svg": b"<?xml"}[suffix] in data[:100]
    if suffix == ".html":
        assert b"ours float16" in data and b"4096x4096, M=4096: 250.0 us" in data


def test_drift_is_that_of_the_baseline() -> None:
    """Oracle: 2 % up and 1 % down by hand; None without a second timing."""
    cells = [{"us": 100.0, "us_again": 102.0}, {"us": 100.0, "us_again": 99.0}, {"us": 100.0}]
    found = bench.drift(cells)
    assert found == {"median": pytest.approx(0.015), "worst": pytest.approx(0.02)}
    assert bench.drift([{"us": 1.0}]) is None


def test_a_run_on_the_cpu_prints_a_table_and_one_json_line_and_keeps_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the last line of stdout is the record in the file; every cell has a time, an error and percentiles."""
    bench.main(["--device", "cpu", "--shapes", "32x128", "--ms", "1,3", "--budget-s", "0.001", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert record == json.loads((tmp_path / "bench_kernels_cpu_bfloat16.json").read_text())
    assert any("N=32 K=128, w4g128: microseconds, times as fast as F.linear float32 (" in line for line in lines)
    assert record["metric"] == "us_per_call" and {c["m"] for c in record["cells"]} == {1, 3}
    for cell in record["cells"]:
        assert 0 < cell["us"] == cell["us_min"] <= cell["us_p50"] <= cell["us_p95"] and 0 < cell["error"] < 0.01
    assert "| 32 x 128 | F.linear float32 |" in (tmp_path / "bench_kernels_cpu_bfloat16.md").read_text()


def test_each_scheme_has_its_table_and_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the schemes asked for, one JSON line and two files each; rooflines would be told apart likewise."""
    schemes = ["w4g128", "w4g32-asym", "w3-channel"]
    arguments = ["--device", "cpu", "--shapes", "32x128", "--ms", "2", "--budget-s", "0.001", "--out", str(tmp_path)]
    bench.main([*arguments, "--schemes", ",".join(schemes)])
    lines = capsys.readouterr().out.splitlines()
    records = [json.loads(line) for line in lines if line.startswith('{"metric"')]
    assert [r["scheme"] for r in records] == schemes
    assert [(r["bits"], r["group"], r["symmetric"]) for r in records] == [
        (4, 128, True), (4, 32, False), (3, "channel", True)]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"bench_kernels_cpu_bfloat16{suffix}.{kind}"
        for suffix in ("", "_w4g32-asym", "_w3-channel") for kind in ("json", "md")
    )  # fmt: skip
    assert all(c["us"] and c["error"] < 0.01 for r in records for c in r["cells"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "64x100"], "K must be a multiple of 128"),
        (["--shapes", "64x128", "--schemes", "w4g32,w8g256"], "and of the group of w8g256"),
        (["--schemes", "w4"], "they read w4g128"),
        (["--schemes", "w4g48"], "multiple of 32"),
        (["--device", "cpu", "--schemes", "w8a8"], "w8a8 needs a GPU"),
        (["--device", "cuda", "--peers", "marlin"], "known are gemlite, humming-kernels"),
        (["--device", "cpu", "--roofline", "a.png"], "needs the ceilings of a GPU"),
        (["--device", "cuda", "--roofline", "a.pdf"], "must be one of .html, .png, .svg"),
    ],
)
def test_arguments_that_cannot_be_run(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    """Oracle: argparse's exit code 2, before anything runs, and what to give instead."""
    assert message in refused(bench.parse, arguments)


@pytest.mark.gpu
def test_graph_timing_of_a_known_kernel() -> None:
    """Oracle: a copy of 256 MB neither beats 5 TB/s nor takes a millisecond on a data-centre GPU; whole rounds."""
    source = torch.zeros(2**26, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    us = timing.time_gpu(lambda pair: torch.bitwise_not(pair[0], out=pair[1]), [(source, target)])
    assert 2 * source.numel() * 4 / 5e6 < us < 1e3
    weights = timing.rotating_copies((torch.zeros(2**22, dtype=torch.int32, device="cuda"),))
    captured = timing.capture(lambda w: w[0] + 1, weights)
    assert captured.calls % len(weights) == 0 and torch.equal(captured.output, torch.ones_like(captured.output))


@pytest.mark.gpu
def test_bench_on_the_gpu_times_every_path(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: every contender of this project and of torch is right and takes longer than a launch."""
    for dtype, schemes in (("float16", "w4g128"), ("bfloat16", "w4g64-asym,w8g128,w3g128,w2g128,w8a8")):
        bench.main(["--device", "cuda", "--shapes", "1024x1024", "--ms", "1,64,1024", "--peers", "none", "--paths",
                    "--dtype", dtype, "--schemes", schemes])  # fmt: skip
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('{"metric"')]
        assert len(lines) == len(schemes.split(","))
        for record in map(json.loads, lines):
            four = record["scheme"].startswith("w4")
            assert {c["kind"] for c in record["cells"]} >= ({"dense", "peer", "ours", "path"} if four else {"ours"})
            assert all(c["us"] > 0.5 and c["error"] < 0.03 for c in record["cells"] if c["kind"] != "peer")
            drift = record["baseline_drift"]
            assert 0 <= drift["median"] <= drift["worst"] < math.inf
