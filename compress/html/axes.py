"""What every plot of the report shares: label text, axes, layout.

Colours are CSS variables (`var(--accent)`): the page's script resolves them, and draws again when the reader's
system switches between light and dark.
"""

from __future__ import annotations

from html import escape
from typing import Any

Figure = dict[str, Any]

FONT = "system-ui, -apple-system, Segoe UI, sans-serif"


def plot_text(value: str) -> str:
    """A string of the record for a plotly label; plotly reads a subset of HTML in those."""
    return escape(value, quote=False)


def axis(title: str, **extra: Any) -> dict[str, Any]:
    return {
        "title": {"text": title, "standoff": 12},
        "gridcolor": "var(--grid)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "ticks": "",
        "automargin": True,
    } | extra


def layout(xaxis: dict[str, Any], yaxis: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {
        "xaxis": xaxis,
        "yaxis": yaxis,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12, "color": "var(--muted)"},
        "hoverlabel": {
            "bgcolor": "var(--card)",
            "bordercolor": "var(--line)",
            "align": "left",
            "font": {"family": FONT, "color": "var(--ink)", "size": 12},
        },
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
        "hovermode": "closest",
        "dragmode": "zoom",
    } | extra
