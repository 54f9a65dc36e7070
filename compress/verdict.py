"""Judgements on a run's record that its summary and its report share; pure functions of the record and the frontier."""

from __future__ import annotations

from typing import Any

from compress.frontier import Frontier, RunPoint, comparable_latency, kl_within_noise
from compress.record import Record

_WORST_LAYERS = 5


def is_significant(task: dict[str, Any]) -> bool | None:
    """The task's difference to the unquantized model exceeds two standard errors; None without a stderr."""
    if task["difference_stderr"] is None:
        return None
    return bool(abs(task["difference"]) > 2 * task["difference_stderr"])


def task_verdict(task: dict[str, Any]) -> str:
    """`worse`, `better`, `within noise`, or `no stderr`: the difference judged by two standard errors."""
    significant = is_significant(task)
    if significant is None:
        return "no stderr"
    if not significant:
        return "within noise"
    return "better" if (task["difference"] > 0) == task["higher_is_better"] else "worse"


def worst_layers(record: Record, count: int = _WORST_LAYERS) -> list[dict[str, Any]]:
    """Quantized layers by falling relative error."""
    measured = [layer for layer in record["layers"] if layer["error"] is not None]
    return sorted(measured, key=lambda layer: -layer["error"])[:count]


def fallbacks(record: Record) -> list[str]:
    """One line for each layer that was not treated as the recipe asked."""
    return [f"{layer['name']}: {layer['fallback']}" for layer in record["layers"] if layer["fallback"]]


def verdict(frontier: Frontier, point: RunPoint) -> str:
    """On the frontier, or who dominates the point, with the reservations a reader needs."""
    if point.on_frontier:
        return "on the frontier" if point.latency is not None else "on the frontier by KL and size alone"
    notes = []
    for label in point.dominated_by:
        other = frontier.point(label)
        reservations = []
        if kl_within_noise(other, point) and other.kl != point.kl:
            reservations.append("KL within 2 s.e.")
        if not comparable_latency(other, point):
            reservations.append("latency not compared")
        notes.append(f"{label} ({', '.join(reservations)})" if reservations else label)
    return f"dominated by {', '.join(notes)}"
