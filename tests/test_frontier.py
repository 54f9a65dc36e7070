"""Pareto frontier: dominance against brute force, and which runs are compared at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_records import make_record

from compress.frontier import (
    Frontier,
    Latency,
    RunPoint,
    dominates,
    latency_of,
    load_runs,
    lower_envelope,
    mark_dominated,
)
from compress.labels import Box, kl_ticks, place_labels

# few distinct values, so that ties and duplicates are common
VALUES = st.sampled_from([0.0, 1.0, 2.0, 3.0])
LATENCIES = st.none() | st.builds(
    lambda ms, device: Latency(ms, device, None, 128, 32), VALUES, st.sampled_from(["GPU A", "GPU B"])
)


def point(label: str, kl: float, weight_bytes: float, latency: Latency | None) -> RunPoint:
    return RunPoint(label, label, "w4g128 sym", f"/runs/{label}", "f", kl, 0.1, 40.0, 0.5, weight_bytes, 4.1, latency)


@st.composite
def point_sets(draw: st.DrawFn) -> list[RunPoint]:
    objectives = draw(st.lists(st.tuples(VALUES, VALUES, LATENCIES), max_size=9))
    return [point(f"r{i}", *values) for i, values in enumerate(objectives)]


def brute_force_dominates(a: RunPoint, b: RunPoint) -> bool:
    """The definition, objective by objective."""
    better = worse = False
    objectives = [(a.kl, b.kl), (a.weight_bytes, b.weight_bytes)]
    if a.latency is not None and b.latency is not None and a.latency.device_name == b.latency.device_name:
        objectives += [(a.latency.p50_ms, b.latency.p50_ms)]
    for x, y in objectives:
        better, worse = better or x < y, worse or x > y
    return better and not worse


@given(point_sets())
@settings(max_examples=300, deadline=None)
def test_marks_agree_with_brute_force(points: list[RunPoint]) -> None:
    """Oracle: the definition of dominance applied to all pairs."""
    marked = mark_dominated(points)
    assert [p.label for p in marked] == [p.label for p in points]
    for p in marked:
        assert p.dominated_by == tuple(q.label for q in points if brute_force_dominates(q, p))


@given(point_sets())
@settings(max_examples=300, deadline=None)
def test_dominance_has_no_cycles(points: list[RunPoint]) -> None:
    """Oracle: repeatedly taking undominated points away empties the set, so the frontier of any set of runs is not
    empty even when latencies are missing."""
    left = list(points)
    while left:
        marked = mark_dominated(left)
        survivors = [p for p, m in zip(left, marked, strict=True) if not m.on_frontier]
        assert len(survivors) < len(left)
        left = survivors


@given(point_sets())
@settings(max_examples=100, deadline=None)
def test_with_all_latencies_comparable_frontier_points_explain_everything(points: list[RunPoint]) -> None:
    """Oracle: transitivity of dominance on complete data; each dominated point has a dominator on the frontier."""
    complete = [p for p in points if p.latency is not None and p.latency.device_name == "GPU A"]
    marked = {p.label: p for p in mark_dominated(complete)}
    for p in marked.values():
        assert p.on_frontier or any(marked[label].on_frontier for label in p.dominated_by)


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_lower_envelope(xy: list[tuple[float, float]]) -> None:
    """Oracle: the set of points that no other point beats, by brute force."""
    beaten = {a for a in xy for b in xy if b != a and b[0] <= a[0] and b[1] <= a[1]}
    assert lower_envelope(xy) == sorted(set(xy) - beaten)


@pytest.mark.parametrize(
    "changed",
    [
        {"device_name": "GPU B"},
        {"threads": 8},
        {"prompt_tokens": 512},
        {"decode_tokens": 64},
    ],
)
def test_latency_counts_only_under_equal_conditions(changed: dict[str, Any]) -> None:
    """Oracle: by hand. b is faster and larger than a; under other conditions its speed does not save it."""
    base = {"p50_ms": 5.0, "device_name": "GPU A", "threads": 2, "prompt_tokens": 128, "decode_tokens": 32}
    a = point("a", 1.0, 10.0, Latency(**base))
    same = point("b", 1.0, 11.0, Latency(**base | {"p50_ms": 1.0}))
    other = point("b", 1.0, 11.0, Latency(**base | {"p50_ms": 1.0} | changed))
    assert not dominates(a, same)
    assert dominates(a, other)


Save = Callable[..., dict[str, Any]]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a record into its own run directory under tmp_path/outputs."""

    def write(name: str, folder: str | None = None, **changes: Any) -> dict[str, Any]:
        run_dir = tmp_path / "outputs" / "reference" / (folder or name)
        run_dir.mkdir(parents=True)
        record = make_record(name, run_dir=str(run_dir), **changes)
        (run_dir / "run.json").write_text(json.dumps(record))
        return record

    return write


def load(tmp_path: Path, record: dict[str, Any]) -> Frontier:
    return load_runs(tmp_path / "outputs", record["source_sha256"], record["quality"]["dataset_sha256"], record)


def test_loads_marks_and_finds_this_run(tmp_path: Path, save: Save) -> None:
    """Oracle: by hand. rtn4 is worse than gptq4 in everything; gptq8 is larger and better."""
    record = save("gptq4", kl=0.035, decode_ms=6.0)
    save("rtn4", kl=0.098, weight_mb=19.5, decode_ms=6.1)
    save("gptq8", kl=0.001, weight_mb=33.0, decode_ms=7.0)
    frontier = load(tmp_path, record)
    assert {p.label: p.dominated_by for p in frontier.points} == {"gptq4": (), "gptq8": (), "rtn4": ("gptq4",)}
    this = frontier.point_of(record)
    assert this is not None and this.label == "gptq4"
    assert not frontier.incomparable and not frontier.unreadable


def test_other_model_and_other_data_are_listed_apart(tmp_path: Path, save: Save) -> None:
    """Oracle: by hand; each reason names what differs."""
    record = save("gptq4")
    save("other-model", source_sha256="ee" * 32)
    save("other-data", quality=record["quality"] | {"dataset_sha256": "ff" * 32})
    save("no-eval", quality=None)
    frontier = load(tmp_path, record)
    assert [p.label for p in frontier.points] == ["gptq4"]
    reasons = {run.name: run.reason for run in frontier.incomparable}
    assert reasons.keys() == {"other-model", "other-data", "no-eval"}
    assert "source weights" in reasons["other-model"] and "eeeeeeeeeeee" in reasons["other-model"]
    assert "evaluation data" in reasons["other-data"] and "ffffffffffff" in reasons["other-data"]
    assert "not measured" in reasons["no-eval"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be an object"),
        ("\udcff", "not valid JSON"),
        ({"schema": 9}, "schema=9"),
        ({"quality": {}}, "quality.kl is missing"),
        ({"quality.kl": float("nan")}, "quality.kl=nan is not finite"),
        ({"size.weight_bytes": "many"}, "size.weight_bytes='many'"),
        ({"verified": 1}, "verified=1"),
    ],
)
def test_damaged_record_is_reported_by_name(tmp_path: Path, save: Save, content: Any, says: str) -> None:
    """Oracle: one damage at a time; the run is named with the reason, and the others keep their frontier. A NaN KL
    would compare false with everything and look undominated."""
    record = save("gptq4")
    damaged = save("broken")
    if isinstance(content, str):
        data = content.encode("utf-8", "surrogateescape")
    else:
        for key, value in content.items():
            target, (*path, last) = damaged, key.split(".")
            for part in path:
                target = target[part]
            target[last] = value
        data = json.dumps(damaged).encode()
    (Path(damaged["run_dir"]) / "run.json").write_bytes(data)
    frontier = load(tmp_path, record)
    assert [p.label for p in frontier.points] == ["gptq4"]
    (skipped,) = frontier.unreadable
    assert skipped.name == "broken" and says in skipped.reason
    assert any("broken" in warning for warning in frontier.warnings())


def test_unknown_keys_are_tolerated(tmp_path: Path, save: Save) -> None:
    """Oracle: a record with keys of a later version gives the same point."""
    record = save("gptq4")
    before = load(tmp_path, record).points
    newer = record | {"later": {"a": 1}, "quality": record["quality"] | {"later": 2}}
    (Path(record["run_dir"]) / "run.json").write_text(json.dumps(newer))
    assert load(tmp_path, record).points == before


def test_current_run_outside_the_output_directory_takes_part(tmp_path: Path, save: Save) -> None:
    """Oracle: run_dir=<elsewhere> is on its own frontier, once; a run inside is not counted twice."""
    inside = save("gptq4")
    elsewhere = make_record("awq4", run_dir=str(tmp_path / "elsewhere"))
    assert sorted(p.label for p in load(tmp_path, elsewhere).points) == ["awq4", "gptq4"]
    assert [p.label for p in load(tmp_path, inside).points] == ["gptq4"]


def test_moved_outputs_keep_this_run_recognizable(tmp_path: Path, save: Save) -> None:
    """Oracle: points carry the directory in which their record lies, not the one it was written in."""
    record = save("gptq4")
    (tmp_path / "outputs").rename(tmp_path / "moved")
    (p,) = load_runs(tmp_path / "moved", record["source_sha256"], record["quality"]["dataset_sha256"]).points
    assert p.run_dir == str(tmp_path / "moved" / "reference" / "gptq4")


def test_same_recipe_twice_gets_two_labels(tmp_path: Path, save: Save) -> None:
    """Oracle: labels are unique, extended by the fingerprint and, where that repeats too, by the directory."""
    record = save("gptq4", "a", fingerprint="1111111111")
    save("gptq4", "b", fingerprint="2222222222")
    save("gptq4", "c", fingerprint="2222222222")
    labels = sorted(p.label for p in load(tmp_path, record).points)
    assert labels[0] == "gptq4-11111111"
    assert [label.rsplit("/", 1)[1] for label in labels[1:]] == ["b)", "c)"]


def test_no_outputs_and_no_evaluation(tmp_path: Path) -> None:
    """Oracle: a missing directory is an empty frontier; a run without evaluation is named with the reason."""
    assert load_runs(tmp_path / "none", "a", "b") == Frontier(())
    record = make_record(quality=None, run_dir=str(tmp_path / "r"))
    (skipped,) = load_runs(tmp_path / "none", record["source_sha256"], None, record).incomparable
    assert "eval.enabled=false" in skipped.reason


def test_latency_is_decode_at_batch_one() -> None:
    """Oracle: the record's own row; threads count on a CPU and not on a GPU, and no such row means no latency."""
    record = make_record(decode_ms=6.5)
    assert latency_of(record) == Latency(6.5, "AMD EPYC 9R14", 2, 128, 32)
    record["environment"] |= {"device": "cuda:0", "device_name": "H100"}
    assert latency_of(record) == Latency(6.5, "H100", None, 128, 32)
    record["speed"]["rows"] = [row for row in record["speed"]["rows"] if row["batch"] != 1]
    assert latency_of(record) is None
    assert latency_of(record | {"speed": None}) is None


@given(st.lists(st.tuples(st.floats(40, 360), st.floats(40, 260)), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_labels_stay_in_frame_and_off_each_other_when_there_is_room(centres: list[tuple[float, float]]) -> None:
    """Oracle: geometry. With distant rings to fall back on, a label that overlaps another is worse than some free
    candidate, and the search must find one; points are spread on a grid so that room exists."""
    frame = Box(0, 0, 2000, 1500)
    spread = [(200 + 200 * i + x / 10, 400 + y) for i, (x, y) in enumerate(centres)]
    places = place_labels(spread, [(60.0, 14.0)] * len(spread), frame, rings=(8.0, 24.0, 48.0))
    boxes = [place.box for place in places]
    assert all(box.outside(frame) < 1e-6 for box in boxes)
    assert all(a.overlap(b) == 0 for i, a in enumerate(boxes) for b in boxes[:i])


@given(st.floats(1e-6, 10))
@settings(max_examples=200, deadline=None)
def test_kl_ticks(highest: float) -> None:
    """Oracle: the promise: zero, ascending, not above the highest, and a tenth of the axis apart."""
    ticks = kl_ticks(highest)
    roots = [t**0.5 for t in ticks]
    assert ticks[0] == 0 and len(ticks) >= 3 and ticks[-1] <= highest
    assert all(b - a >= 0.1099 * highest**0.5 for a, b in pairwise(roots))
