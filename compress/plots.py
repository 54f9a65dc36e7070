"""`frontier.png`: KL against size and against decode latency, for places where HTML does not go."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.frontier import Frontier, RunPoint, latency_of, lower_envelope
from compress.labels import Box, kl_ticks, place_labels
from compress.record import Record
from compress.units import byte_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ACCENT, _INK, _FAINT, _GRID = "#2457d6", "#1d2733", "#98a2b0", "#e6e9ee"


def latency_points(record: Record, frontier: Frontier) -> list[RunPoint]:
    """The points whose decode latency was taken under the conditions of this run."""
    latency = latency_of(record)
    if latency is None:
        return []
    return [p for p in frontier.points if p.latency is not None and p.latency.conditions == latency.conditions]


def frontier_png(record: Record, frontier: Frontier) -> bytes:
    """PNG bytes of the two panels, 1600 x 720 pixels; a panel without points says why it is empty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # a Figure of its own: no pyplot, so no global backend and no figure left open in a caller's notebook
    figure = Figure(figsize=(10, 4.5), dpi=160, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    by_size, by_latency = figure.subplots(1, 2)
    this = frontier.point_of(record)
    scale, unit = byte_unit(max((p.weight_bytes for p in frontier.points), default=1.0))
    panels = [
        (by_size, frontier.points, [p.weight_bytes / scale for p in frontier.points], f"weights ({unit})"),
        (by_latency, latency_points(record, frontier), None, "decode p50 at batch 1 (ms)"),
    ]
    for axes, points, xs, title in panels:
        if xs is None:
            xs = [p.latency.p50_ms for p in points if p.latency is not None]
        _style(axes, title)
        if points:
            _scatter(axes, points, xs, this)
        else:
            axes.text(0.5, 0.5, "no comparable measurement", transform=axes.transAxes, ha="center", color=_FAINT)
            axes.set(xticks=[], yticks=[])
    by_size.set_ylabel("KL (nats a token, square-root scale)", color=_INK)
    figure.suptitle(_plain(f"{record['model']} on {record['environment']['device_name']}"), color=_INK, fontsize=11)
    figure.canvas.draw()  # fixes the layout; label sizes in pixels are known only afterwards
    for axes, points, xs, _ in panels:
        if points:
            xs = xs if xs is not None else [p.latency.p50_ms for p in points if p.latency is not None]
            _label(axes, points, xs, this)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _plain(text: str) -> str:
    """Without matplotlib reading `$...$` in a name as mathematics."""
    return text.replace("$", r"\$")


def _style(axes: Axes, title: str) -> None:
    axes.set_xlabel(title, color=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    axes.margins(x=0.16)


def _signed_sqrt(values: Any) -> Any:
    """Square root that goes on below zero, where the axis starts."""
    return np.sign(values) * np.sqrt(np.abs(values))


def _signed_square(values: Any) -> Any:
    return np.sign(values) * np.square(values)


def _scatter(axes: Axes, points: Sequence[RunPoint], xs: list[float], this: RunPoint | None) -> None:
    ys = [p.kl for p in points]
    envelope = lower_envelope(list(zip(xs, ys, strict=True)))
    axes.step(
        [x for x, _ in envelope], [y for _, y in envelope], where="post", color=_FAINT, linewidth=1, linestyle=":"
    )
    highest = max(p.kl + 2 * p.kl_stderr for p in points) or 1.0
    axes.set_yscale("function", functions=(_signed_sqrt, _signed_square))
    axes.set_ylim(_signed_square(-0.07 * highest**0.5), _signed_square(1.16 * highest**0.5))
    ticks = kl_ticks(max(p.kl for p in points))
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    for x, point in zip(xs, points, strict=True):
        colour = _ACCENT if point is this else _INK if point.on_frontier else _FAINT
        axes.errorbar(
            x,
            point.kl,
            yerr=[[min(point.kl, 2 * point.kl_stderr)], [2 * point.kl_stderr]],
            color=colour,
            linewidth=1,
            capsize=0,
            zorder=2,
        )
        face = colour if point.on_frontier else "white"
        axes.plot(x, point.kl, "o", markersize=7, markerfacecolor=face, markeredgecolor=colour, zorder=3)


def _label(axes: Axes, points: Sequence[RunPoint], xs: list[float], this: RunPoint | None) -> None:
    """Writes the labels beside their points, with a thin leader where one had to move away."""
    figure = axes.figure
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    texts = [
        axes.text(0, 0, _plain(p.label), fontsize=9, color=_ACCENT if p is this else _INK if p.on_frontier else _FAINT)
        for p in points
    ]
    extents = [text.get_window_extent(renderer) for text in texts]
    pixels = [tuple(axes.transData.transform((x, p.kl))) for x, p in zip(xs, points, strict=True)]
    window = axes.get_window_extent(renderer)
    placements = place_labels(
        pixels,
        [(e.width, e.height) for e in extents],
        Box(window.x0, window.y0, window.x1, window.y1),
        rings=(14.0, 28.0, 48.0, 72.0),
        radius=9.0,
    )
    to_data = axes.transData.inverted()
    for text, place, pixel in zip(texts, placements, pixels, strict=True):
        box = place.box
        text.set_position(tuple(to_data.transform((box.left, box.bottom))))
        text.set_verticalalignment("bottom")
        if place.ring:
            end = min(max(pixel[0], box.left), box.right), min(max(pixel[1], box.bottom), box.top)
            (x0, y0), (x1, y1) = to_data.transform(pixel), to_data.transform(end)
            axes.plot([x0, x1], [y0, y1], color=_FAINT, linewidth=0.6, zorder=1, scalex=False, scaley=False)
