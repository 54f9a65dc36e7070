"""Plot specifications of the report, as the plain dicts that plotly.js draws.

Hover texts are given whole, so that no `%{...}` in a name is read as a template.
"""

from __future__ import annotations

import re
from typing import Any

from compress.frontier import Frontier
from compress.html.axes import Figure, axis, layout, plot_text
from compress.html.frontier_charts import frontier_by_latency, frontier_by_size
from compress.record import Record
from compress.units import format_count, format_ms, format_share


def figures(record: Record, frontier: Frontier) -> dict[str, Figure]:
    """Every plot that the record has data for, by the id of the element it is drawn in."""
    drawn: dict[str, Figure | None] = {
        "frontier-size": frontier_by_size(record, frontier),
        "frontier-latency": frontier_by_latency(record, frontier),
        "speed-prefill": _speed(record, "prefill"),
        "speed-decode": _speed(record, "decode"),
        "roofline": _roofline(record),
        "layers": _layers(record),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


# -- speed ------------------------------------------------------------------------------------------------


def _speed(record: Record, phase: str) -> Figure | None:
    rows = [row for row in record["speed"]["rows"] if row["phase"] == phase] if record["speed"] else []
    if not rows:
        return None
    traces: list[Figure] = []
    for name, prefix, shift, colour in (
        ("unquantized", "reference_", -0.2, "var(--faint)"),
        ("compressed", "", 0.2, "var(--accent)"),
    ):
        traces += _latency_bars(rows, name, prefix, shift, colour)
    ticks = {"tickvals": list(range(len(rows))), "ticktext": [f"batch {row['batch']}" for row in rows]}
    xaxis = axis("", showgrid=False, range=[-0.6, len(rows) - 0.4], **ticks)
    return {"data": traces, "layout": layout(xaxis, axis(f"{phase} latency (ms)", rangemode="tozero"), bargap=0)}


def _latency_bars(rows: list[dict[str, Any]], name: str, prefix: str, shift: float, colour: str) -> list[Figure]:
    """Median bars with whiskers to p99, and dashes at p95."""
    xs = [i + shift for i in range(len(rows))]
    p50, p95, p99 = ([row[f"{prefix}{p}_ms"] for row in rows] for p in ("p50", "p95", "p99"))
    hover = [
        f"<b>{name}</b>, {row['phase']}, batch {row['batch']}<br>p50 {format_ms(a)}<br>p95 {format_ms(b)}"
        f"<br>p99 {format_ms(c)}<br>{format_count(row[f'{prefix}tokens_per_s'])} tokens/s"
        for row, a, b, c in zip(rows, p50, p95, p99, strict=True)
    ]
    bars = {
        "type": "bar",
        "name": name,
        "x": xs,
        "y": p50,
        "width": 0.36,
        "marker": {"color": colour},
        "hovertext": hover,
        "hoverinfo": "text",
        "textposition": "none",
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, c - a) for a, c in zip(p50, p99, strict=True)],
            "arrayminus": [0] * len(rows),
            "thickness": 1.2,
            "width": 0,
            "color": "var(--muted)",
        },
    }
    dashes = {
        "type": "scatter",
        "mode": "markers",
        "x": xs,
        "y": p95,
        "marker": {"symbol": "line-ew", "size": 11, "line": {"width": 1.5, "color": "var(--muted)"}},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    return [bars, dashes]


def _roofline(record: Record) -> Figure | None:
    speed = record["speed"]
    if not speed or not speed["bandwidth_bytes_per_s"] or not speed["flops_per_s"]:
        return None
    rows = [row for row in speed["rows"] if row["intensity"] and row["roofline_fraction"]]
    if not rows:
        return None
    bandwidth, peak = speed["bandwidth_bytes_per_s"], speed["flops_per_s"]
    ridge = peak / bandwidth
    intensities = [row["intensity"] for row in rows]
    left, right = min(*intensities, ridge) / 3, max(*intensities, ridge) * 3
    achieved = [row["roofline_fraction"] * min(peak, row["intensity"] * bandwidth) for row in rows]
    labels = [f"{row['phase']} b{row['batch']}" for row in rows]
    roof = {
        "type": "scatter",
        "mode": "lines",
        "name": "roof: measured bandwidth and arithmetic peak",
        "x": [left, ridge, right],
        "y": [left * bandwidth / 1e9, peak / 1e9, peak / 1e9],
        "line": {"color": "var(--faint)", "width": 1.5},
        "hoverinfo": "skip",
    }
    hover = [
        f"<b>{plot_text(label)}</b><br>{format_share(row['roofline_fraction'])} of the roof<br>"
        f"{row['intensity']:.3g} flop/byte<br>{y / 1e9:,.3g} GFLOP/s"
        for label, row, y in zip(labels, rows, achieved, strict=True)
    ]
    points = {
        "type": "scatter",
        "mode": "markers+text",
        "name": "compressed",
        "x": intensities,
        "y": [y / 1e9 for y in achieved],
        "marker": {"size": 10, "color": "var(--accent)"},
        "text": [plot_text(label) for label in labels],
        "textposition": "bottom center",
        "textfont": {"color": "var(--ink)", "size": 11},
        "hovertext": hover,
        "hoverinfo": "text",
        "cliponaxis": False,
    }
    xaxis = axis("arithmetic intensity (flop/byte)", type="log", dtick=1)
    yaxis = axis("GFLOP/s", type="log", dtick=1)
    return {"data": [roof, *_reference_roofline(rows), points], "layout": layout(xaxis, yaxis)}


def _reference_roofline(rows: list[dict[str, Any]]) -> list[Figure]:
    """The unquantized model's points: the same operations, more bytes. Empty where its bytes are not recorded."""
    rows = [row for row in rows if row.get("reference_bytes_moved") and row["flops"]]
    if not rows:
        return []
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "unquantized",
            "x": [row["flops"] / row["reference_bytes_moved"] for row in rows],
            "y": [row["flops"] / row["reference_p50_ms"] / 1e6 for row in rows],
            "marker": {"size": 9, "color": "var(--card)", "line": {"color": "var(--faint)", "width": 2}},
            "hovertext": [
                f"<b>unquantized {plot_text(row['phase'])} b{row['batch']}</b><br>"
                f"{format_share(row['reference_roofline_fraction'])} of the roof"
                for row in rows
            ],
            "hoverinfo": "text",
        }
    ]


# -- layers -----------------------------------------------------------------------------------------------


def _layers(record: Record) -> Figure | None:
    layers = [layer for layer in record["layers"] if layer["error"] is not None]
    if not layers:
        return None
    blocks = [re.search(r"\.(\d+)\.", layer["name"]) for layer in layers]
    starts = {m.group(1): i for i, m in reversed(list(enumerate(blocks))) if m}
    hover = [
        f"<b>{plot_text(layer['name'])}</b><br>relative error {layer['error']:.4g}"
        + (f"<br>round-to-nearest {layer['error_rtn']:.4g}" if layer["error_rtn"] is not None else "")
        + (f"<br>fallback: {plot_text(layer['fallback'])}" if layer["fallback"] else "")
        for layer in layers
    ]
    bars = {
        "type": "bar",
        "name": "this run",
        "x": list(range(len(layers))),
        "y": [layer["error"] for layer in layers],
        "marker": {"color": ["var(--warn)" if layer["fallback"] else "var(--accent)" for layer in layers]},
        "hovertext": hover,
        "hoverinfo": "text",
        "textposition": "none",
    }
    traces: list[Figure] = [bars]
    if any(layer["error_rtn"] is not None for layer in layers):
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "round-to-nearest",
                "x": list(range(len(layers))),
                "y": [layer["error_rtn"] for layer in layers],
                "marker": {"symbol": "line-ew", "size": 9, "line": {"width": 2, "color": "var(--ink)"}},
                "hoverinfo": "skip",
            }
        )
    shown = sorted(starts, key=lambda block: starts[block])
    shown = shown[:: max(1, -(-len(shown) // 16))]
    ticks = {"tickvals": [starts[b] for b in shown], "ticktext": shown} if starts else {}
    xaxis = axis("decoder block" if starts else "layer", showgrid=False, tickangle=0, **ticks)
    return {"data": traces, "layout": layout(xaxis, axis("relative error", rangemode="tozero"), bargap=0.3)}
