"""The quality x latency x size frontier of every finished run of one model.

A run is comparable when it started from the same source weights and was evaluated on the same tokens. Three
objectives are minimised: KL to the unquantized model (nats a token), weight bytes, and the median decode
latency at batch 1. Run a dominates run b when a is no worse in every objective that both have and better in
at least one. Latencies of two runs are compared only when they were taken under the same conditions (device,
CPU threads, prompt and decode lengths); otherwise the pair is compared on quality and size, and the table
says so. Standard errors do not enter dominance; they are shown, and a dominator whose KL is
within two standard errors is marked.

With some latencies missing, dominance is not transitive, so a run may be dominated only by a run that is
itself dominated. It has no cycles: two runs tied on KL and size differ by latency alone, and otherwise KL and
size improve strictly along a chain.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError
from compress.record import RECORD_NAME, Record, read_record


@dataclass(frozen=True)
class Latency:
    """Median decode latency at batch 1, with the conditions under which it was taken."""

    p50_ms: float
    device_name: str
    threads: int | None
    prompt_tokens: int
    decode_tokens: int

    @property
    def conditions(self) -> tuple[str, int | None, int, int]:
        return self.device_name, self.threads, self.prompt_tokens, self.decode_tokens


@dataclass(frozen=True)
class RunPoint:
    """One run on the frontier plot. `label` is unique; `dominated_by` holds labels of other points."""

    label: str
    name: str
    scheme: str
    run_dir: str
    fingerprint: str
    kl: float
    kl_stderr: float
    ppl: float
    ppl_stderr: float
    weight_bytes: float
    bits_per_weight: float
    latency: Latency | None
    dominated_by: tuple[str, ...] = ()

    @property
    def on_frontier(self) -> bool:
        return not self.dominated_by


@dataclass(frozen=True)
class SkippedRun:
    """A run that is not among the points, and why."""

    name: str
    path: str
    reason: str


@dataclass(frozen=True)
class Frontier:
    """Every run found: compared (`points`), of another model or evaluation (`incomparable`), or unreadable."""

    points: tuple[RunPoint, ...]
    incomparable: tuple[SkippedRun, ...] = ()
    unreadable: tuple[SkippedRun, ...] = ()

    def point_of(self, record: Record) -> RunPoint | None:
        """The point of this run, or None when it could not be compared."""
        key = os.path.realpath(record["run_dir"])
        return next((p for p in self.points if os.path.realpath(p.run_dir) == key), None)

    def point(self, label: str) -> RunPoint:
        return next(p for p in self.points if p.label == label)

    def warnings(self) -> list[str]:
        return [f"run {run.name} left out of the frontier: {run.reason}" for run in self.unreadable]


def latency_of(record: Record) -> Latency | None:
    """The decode row at batch 1, or None when speed was not measured there."""
    if record["speed"] is None:
        return None
    environment = record["environment"]
    threads = environment.get("threads") if environment["device"].startswith("cpu") else None
    for row in record["speed"]["rows"]:
        if row["phase"] == "decode" and row["batch"] == 1:
            return Latency(
                row["p50_ms"], environment["device_name"], threads, row["prompt_tokens"], row["decode_tokens"]
            )
    return None


def comparable_latency(a: RunPoint, b: RunPoint) -> bool:
    """Both latencies exist and were taken under the same conditions."""
    return a.latency is not None and b.latency is not None and a.latency.conditions == b.latency.conditions


def dominates(a: RunPoint, b: RunPoint) -> bool:
    """a is no worse than b in every shared objective and better in at least one."""
    pairs = [(a.kl, b.kl), (a.weight_bytes, b.weight_bytes)]
    if comparable_latency(a, b):
        assert a.latency is not None and b.latency is not None
        pairs.append((a.latency.p50_ms, b.latency.p50_ms))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def mark_dominated(points: Sequence[RunPoint]) -> tuple[RunPoint, ...]:
    """The points in order, each with the labels of all points that dominate it."""
    return tuple(replace(p, dominated_by=tuple(q.label for q in points if dominates(q, p))) for p in points)


def kl_within_noise(a: RunPoint, b: RunPoint) -> bool:
    """The two KLs differ by no more than two standard errors, taken as independent."""
    return abs(a.kl - b.kl) <= 2 * math.hypot(a.kl_stderr, b.kl_stderr)


def lower_envelope(xy: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of a plane that no other point beats in both coordinates, by rising x."""
    envelope: list[tuple[float, float]] = []
    for x, y in sorted(set(xy)):
        if not envelope or y < envelope[-1][1]:
            envelope.append((x, y))
    return envelope


def point_from_record(record: Record) -> RunPoint:
    """A point that is not yet compared with others; the record must have a quality section."""
    quality, size = record["quality"], record["size"]
    return RunPoint(
        label=record["name"],
        name=record["name"],
        scheme=record["scheme"],
        run_dir=record["run_dir"],
        fingerprint=record["fingerprint"],
        kl=quality["kl"],
        kl_stderr=quality["kl_stderr"],
        ppl=quality["ppl"],
        ppl_stderr=quality["ppl_stderr"],
        weight_bytes=size["weight_bytes"],
        bits_per_weight=size["bits_per_weight"],
        latency=latency_of(record),
    )


def load_runs(
    output_dir: str | Path, source_sha256: str, dataset_sha256: str | None, current: Record | None = None
) -> Frontier:
    """Reads every `run.json` under `output_dir` and compares those of one model on one evaluation.

    Args:
        output_dir: searched to any depth; need not exist.
        source_sha256: hash of the unquantized weights that a comparable run started from.
        dataset_sha256: hash of the evaluation data of a comparable run; None when this run has no evaluation.
        current: the run that asks, added when its directory lies elsewhere.

    A record that cannot be read or used is listed in `unreadable`; it never raises, so that one
    damaged run does not take the others' report away.
    """
    candidates: list[Record] = []
    incomparable: list[SkippedRun] = []
    unreadable: list[SkippedRun] = []
    seen: set[str] = set()
    for path in sorted(Path(output_dir).rglob(RECORD_NAME)):
        run_dir = os.path.realpath(path.parent)
        seen.add(run_dir)
        try:
            record = read_record(path)
        except ArtifactError as error:
            unreadable.append(SkippedRun(path.parent.name, str(path), str(error)))
            continue
        candidates.append(record | {"run_dir": run_dir})  # where it lies now, should outputs have been moved
    if current is not None and os.path.realpath(current["run_dir"]) not in seen:
        candidates.append(current)
    comparable: list[Record] = []
    for record in candidates:
        reason = _why_incomparable(record, source_sha256, dataset_sha256)
        if reason is None:
            comparable.append(record)
        else:
            incomparable.append(SkippedRun(record["name"], record["run_dir"], reason))
    points = _unique_labels([point_from_record(record) for record in comparable])
    ordered = sorted(points, key=lambda p: (p.weight_bytes, p.kl, p.label))
    return Frontier(mark_dominated(ordered), tuple(incomparable), tuple(unreadable))


def _why_incomparable(record: Record, source_sha256: str, dataset_sha256: str | None) -> str | None:
    if record["source_sha256"] != source_sha256:
        return f"other source weights ({record['model']}, sha256 {record['source_sha256'][:12]})"
    if record["quality"] is None:
        return "quality was not measured (eval.enabled=false)"
    if dataset_sha256 is None:
        return "this run has no evaluation to compare with (eval.enabled=false)"
    if record["quality"]["dataset_sha256"] != dataset_sha256:
        found = record["quality"]["dataset_sha256"][:12]
        return f"other evaluation data ({record['quality']['dataset']}, sha256 {found})"
    return None


def _unique_labels(points: list[RunPoint]) -> list[RunPoint]:
    """Recipe names, extended by the fingerprint and then by the directory where they would repeat."""
    for extend in (
        lambda p: f"{p.name}-{p.fingerprint[:8]}",
        lambda p: f"{p.name}-{p.fingerprint[:8]} ({p.run_dir})",
    ):
        counts = Counter(p.label for p in points)
        points = [replace(p, label=extend(p)) if counts[p.label] > 1 else p for p in points]
    return points


def frontier_json(frontier: Frontier) -> dict[str, Any]:
    """The frontier as JSON-ready dicts."""

    def point(p: RunPoint) -> dict[str, Any]:
        return {
            "label": p.label,
            "name": p.name,
            "scheme": p.scheme,
            "run_dir": p.run_dir,
            "fingerprint": p.fingerprint,
            "kl": p.kl,
            "kl_stderr": p.kl_stderr,
            "ppl": p.ppl,
            "weight_bytes": p.weight_bytes,
            "bits_per_weight": p.bits_per_weight,
            "decode_p50_ms": p.latency.p50_ms if p.latency else None,
            "device_name": p.latency.device_name if p.latency else None,
            "on_frontier": p.on_frontier,
            "dominated_by": list(p.dominated_by),
        }

    def skipped(run: SkippedRun) -> dict[str, str]:
        return {"name": run.name, "path": run.path, "reason": run.reason}

    return {
        "points": [point(p) for p in frontier.points],
        "incomparable": [skipped(run) for run in frontier.incomparable],
        "unreadable": [skipped(run) for run in frontier.unreadable],
    }
