"""Plots of the frontier: KL against size, KL against decode latency."""

from __future__ import annotations

from compress.frontier import Frontier, RunPoint, lower_envelope
from compress.html.axes import Figure, axis, layout, plot_text
from compress.labels import Box, place_labels
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
    ys = [p.kl for p in points]
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
        ("this run", [p is this for p in points], "var(--accent)"),
        ("on the frontier", [p is not this and p.on_frontier for p in points], "var(--ink)"),
        ("dominated", [p is not this and not p.on_frontier for p in points], "var(--faint)"),
    ]
    for name, members, colour in groups:
        chosen = [i for i, member in enumerate(members) if member]
        if not chosen:
            continue
        solid = points[chosen[0]].on_frontier
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "name": f"{name} (dominated)" if name == "this run" and not solid else name,
                "x": [xs[i] for i in chosen],
                "y": [ys[i] for i in chosen],
                "error_y": {
                    "type": "data",
                    "array": [2 * points[i].kl_stderr for i in chosen],
                    "thickness": 1.2,
                    "width": 0,
                    "color": colour,
                },
                "marker": {
                    "size": 11,
                    "color": colour if solid else "var(--card)",
                    "line": {"color": colour, "width": 2},
                },
                "text": [plot_text(points[i].label) if anchors[i] else "" for i in chosen],
                "textposition": [anchors[i] or "top center" for i in chosen],
                "textfont": {"color": colour if name != "dominated" else "var(--muted)", "size": 12},
                "hovertext": [_hover(points[i]) for i in chosen],
                "hoverinfo": "text",
                "cliponaxis": False,
            }
        )
    yaxis = axis("KL (nats a token)", range=_padded(ys, [2 * p.kl_stderr for p in points]))
    return {"data": traces, "layout": layout(axis(title, range=_padded(xs)), yaxis)}


def _padded(values: list[float], margins: list[float] | None = None) -> list[float]:
    """An axis range with room for markers and labels."""
    margins = margins or [0.0] * len(values)
    low = min(v - m for v, m in zip(values, margins, strict=True))
    high = max(v + m for v, m in zip(values, margins, strict=True))
    pad = 0.14 * (high - low) or 0.1 * abs(high) or 1.0
    return [low - pad, high + pad]


def _label_anchors(points: list[RunPoint], xs: list[float], ys: list[float], this: RunPoint | None) -> list[str | None]:
    """Where each label goes, judged on a plot of 440 x 300 pixels; None leaves a crowded plot's label to hover."""
    (x0, x1), (y0, y1) = _padded(xs), _padded(ys, [2 * p.kl_stderr for p in points])
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
