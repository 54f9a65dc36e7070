"""The roofline of a `bench` record (Williams, Waterman, Patterson 2009): rate against arithmetic intensity, both axes
logarithmic, a point for each contender and cell under the roof min(peak, intensity * bandwidth), both as measured in
the same run. Below the ridge a point's distance from the roof is its share of the bandwidth, beyond it of the peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.atomic import write_atomically
from compress.kernels.bench_report import cell_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".html", ".png", ".svg")


@dataclass(frozen=True)
class Point:
    """intensity in flops a byte, rate in TFLOP/s; bandwidth in TB/s is what the same time means in bytes."""

    what: str
    label: str
    intensity: float
    rate: float
    bandwidth: float


def points(record: dict[str, Any]) -> list[Point]:
    """Every cell that has a time. Bytes are those the contender's own weight format must move."""
    found = []
    for c in record["cells"]:
        if c["us"] is not None:
            flops, moved = 2 * c["m"] * c["n"] * c["k"], cell_bytes(c["m"], c["n"], c["k"], c["bits"])
            label = f"{c['n']}x{c['k']}, M={c['m']}: {c['us']:.1f} us"
            found.append(Point(c["what"].strip(), label, flops / moved, flops / c["us"] / 1e6, moved / c["us"] / 1e6))
    return found


def roof(record: dict[str, Any], low: float, high: float) -> tuple[list[float], list[float]]:
    """The corners of the roof between two intensities: rising to the ridge, flat beyond it."""
    bandwidth, peak = record["machine"]["copy_TB_per_s"], record["machine"]["fp16_TFLOP_per_s"]
    ridge = peak / bandwidth
    xs = sorted({low, min(max(ridge, low), high), high})
    return xs, [min(peak, x * bandwidth) for x in xs]


def write(path: Path, record: dict[str, Any]) -> None:
    """A plot in the format of the suffix, one of SUFFIXES."""
    draw = _write_html if path.suffix == ".html" else _write_image
    write_atomically(path, lambda temporary: draw(temporary, record, path.suffix))


def _title(record: dict[str, Any]) -> str:
    machine = record["machine"]
    return (
        f"{machine['device']}: {machine['copy_TB_per_s']:.2f} TB/s copied, "
        f"{machine['fp16_TFLOP_per_s']:.0f} TFLOP/s in an 8192^3 matmul"
    )


_AXES = ("flops a byte moved", "TFLOP/s")


def _write_html(path: Path, record: dict[str, Any], suffix: str) -> None:
    import plotly.graph_objects as go

    drawn = points(record)
    xs, ys = roof(record, min(p.intensity for p in drawn), max(p.intensity for p in drawn))
    figure = go.Figure(go.Scatter(x=xs, y=ys, mode="lines", name="roof", line={"color": "#98a2b0"}))
    for what in dict.fromkeys(p.what for p in drawn):
        own = [p for p in drawn if p.what == what]
        hover = [f"<b>{what}</b><br>{p.label}<br>{p.rate:.1f} TFLOP/s, {p.bandwidth:.2f} TB/s" for p in own]
        figure.add_scatter(
            x=[p.intensity for p in own],
            y=[p.rate for p in own],
            mode="markers",
            name=what,
            text=hover,
            hoverinfo="text",
        )
    figure.update_xaxes(type="log", title=_AXES[0])
    figure.update_yaxes(type="log", title=_AXES[1])
    figure.update_layout(title=_title(record), template="simple_white")
    path.write_text(figure.to_html(include_plotlyjs=True), encoding="utf-8")


def _write_image(path: Path, record: dict[str, Any], suffix: str) -> None:
    figure = image(record)
    figure.savefig(path, format=suffix.removeprefix("."))


def image(record: dict[str, Any]) -> Figure:
    """The plot as a matplotlib figure of its own: no pyplot, so no global state."""
    from matplotlib.figure import Figure

    drawn = points(record)
    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    xs, ys = roof(record, min(p.intensity for p in drawn), max(p.intensity for p in drawn))
    axes.loglog(xs, ys, color="#98a2b0", label="roof")
    names = list(dict.fromkeys(p.what for p in drawn))
    for what, marker in zip(names, "osD^vPX*<>h" * (1 + len(names) // 11), strict=False):
        own = [p for p in drawn if p.what == what]
        axes.loglog([p.intensity for p in own], [p.rate for p in own], marker, markersize=5, alpha=0.8, label=what)
    axes.set(xlabel=_AXES[0], ylabel=_AXES[1], title=_title(record))
    axes.grid(which="both", color="#e6e9ee", linewidth=0.6)
    axes.legend(fontsize=8, frameon=False)
    return figure
