"""Plots of the frontier: KL against size, KL against decode latency."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compress.frontier import Frontier, RunPoint, lower_envelope
from compress.html.axes import Figure, axis, layout, plot_text
from compress.labels import Box, kl_ticks, place_labels
from compress.plots import latency_points
from compress.record import Record
from compress.units import byte_unit, format_bytes, format_ms, format_stderr

_MAX_LABELS = 14


def frontier_by_size(record: Record, frontier: Frontier) -> Figure | None:
    if not frontier.points:
        return None
    scale, unit = byte_unit(max(p.weight_bytes for p in frontier.points))
    xs = [p.weight_bytes / scale for p in frontier.points]
    return _frontier(record, frontier, list(frontier.points), xs, f"weights ({unit})")


def frontier_by_latency(record: Record, frontier: Frontier) -> Figure | None:
    points = latency_points(record, frontier)
    if not points:
        return None
    xs = [p.latency.p50_ms for p in points if p.latency is not None]
    return _frontier(record, frontier, points, xs, "decode p50 at batch 1 (ms)")


def _frontier(record: Record, frontier: Frontier, points: list[RunPoint], xs: list[float], title: str) -> Figure:
    this = frontier.point_of(record)
    ys = [math.sqrt(p.kl) for p in points]
    envelope = lower_envelope(list(zip(xs, ys, strict=True)))
    traces: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [x for x, _ in envelope],
            "y": [y for _, y in envelope],
            "line": {"shape": "hv", "dash": "dot", "width": 1, "color": "var(--faint)"},
            "hoverinfo": "skip",
            "showlegend": False,
        }
    ]
    anchors = _label_anchors(points, xs, ys, this)
    groups = [
        # drawn in this order, so that this run's marker lies on top
        ("dominated", [p is not this and not p.on_frontier for p in points], "var(--faint)"),
        ("on the frontier", [p is not this and p.on_frontier for p in points], "var(--ink)"),
        ("this run", [p is this for p in points], "var(--accent)"),
    ]
    for name, members, colour in groups:
        chosen = [i for i, member in enumerate(members) if member]
        if not chosen:
            continue
        marked = [_Marked(points[i], xs[i], anchors[i]) for i in chosen]
        traces.append(_markers(name, marked, colour))
    ticks = kl_ticks(max(p.kl for p in points))
    yaxis = axis(
        "KL (nats a token, square-root scale)",
        range=_kl_range(points),
        tickvals=[math.sqrt(tick) for tick in ticks],
        ticktext=[f"{tick:g}" for tick in ticks],
    )
    return {"data": traces, "layout": layout(axis(title, range=_padded(xs)), yaxis)}


@dataclass(frozen=True)
class _Marked:
    """A point, where it lies, and where its label goes; no anchor, no label."""

    point: RunPoint
    x: float
    anchor: str | None

    @property
    def y(self) -> float:
        return math.sqrt(self.point.kl)


def _markers(name: str, marked: list[_Marked], colour: str) -> Figure:
    """One legend entry: filled markers for points on the frontier, rings for dominated ones."""
    solid = marked[0].point.on_frontier
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": f"{name} (dominated)" if name == "this run" and not solid else name,
        "x": [m.x for m in marked],
        "y": [m.y for m in marked],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [_whiskers(m.point)[1] - m.y for m in marked],
            "arrayminus": [m.y - _whiskers(m.point)[0] for m in marked],
            "thickness": 1.2,
            "width": 0,
            "color": colour,
        },
        "marker": {
            "size": 11,
            "color": colour if solid else "var(--card)",
            "line": {"color": colour, "width": 2},
        },
        "text": [plot_text(m.point.label) if m.anchor else "" for m in marked],
        "textposition": [m.anchor or "top center" for m in marked],
        "textfont": {"color": colour if name != "dominated" else "var(--muted)", "size": 12},
        "hovertext": [_hover(m.point) for m in marked],
        "hoverinfo": "text",
        "cliponaxis": False,
    }


def _whiskers(point: RunPoint) -> tuple[float, float]:
    """KL minus and plus two standard errors, on the square-root axis."""
    return math.sqrt(max(0.0, point.kl - 2 * point.kl_stderr)), math.sqrt(max(0.0, point.kl + 2 * point.kl_stderr))


def _kl_range(points: list[RunPoint]) -> list[float]:
    """From just below zero, so that the unquantized model's marker is whole, to above the highest label."""
    high = max(_whiskers(p)[1] for p in points) or 1.0
    return [-0.07 * high, 1.16 * high]


def _padded(values: list[float]) -> list[float]:
    """An axis range with room for markers and labels."""
    low, high = min(values), max(values)
    pad = 0.14 * (high - low) or 0.1 * abs(high) or 1.0
    return [low - pad, high + pad]


def _label_anchors(points: list[RunPoint], xs: list[float], ys: list[float], this: RunPoint | None) -> list[str | None]:
    """Where each label goes, judged on a plot of 440 x 300 pixels; None leaves a crowded plot's label to hover."""
    (x0, x1), (y0, y1) = _padded(xs), _kl_range(points)
    labelled = [i for i, p in enumerate(points) if len(points) <= _MAX_LABELS or p is this or p.on_frontier]
    pixels = [((xs[i] - x0) / (x1 - x0) * 440, (ys[i] - y0) / (y1 - y0) * 300) for i in labelled]
    sizes = [(7.0 * len(points[i].label), 15.0) for i in labelled]
    anchors: list[str | None] = [None] * len(points)
    for i, place in zip(labelled, place_labels(pixels, sizes, Box(0, 0, 440, 300)), strict=True):
        anchors[i] = place.anchor
    return anchors


def _hover(point: RunPoint) -> str:
    latency = "not measured"
    if point.latency is not None:
        latency = f"{format_ms(point.latency.p50_ms)} on {plot_text(point.latency.device_name)}"
    lines = [
        f"<b>{plot_text(point.label)}</b>  {plot_text(point.scheme)}",
        f"KL {format_stderr(point.kl, point.kl_stderr)} nats a token",
        f"perplexity {format_stderr(point.ppl, point.ppl_stderr)}",
        f"{format_bytes(point.weight_bytes)}, {point.bits_per_weight:.2f} bits a weight",
        f"decode p50 {latency}",
    ]
    if point.dominated_by:
        lines.append(f"dominated by {plot_text(', '.join(point.dominated_by))}")
    return "<br>".join(lines)
