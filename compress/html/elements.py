"""Pieces of HTML that the sections are built from. Each escapes the text that it is given."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from compress.html.axes import Figure


def table_cell(text: str, css: str = "", value: float | None = None) -> str:
    """A table cell of escaped text; `value` is what sorting compares."""
    attributes = f' class="{css}"' if css else ""
    attributes += f' data-value="{value!r}"' if value is not None else ""
    return f"<td{attributes}>{escape(text)}</td>"


def html_table(columns: Sequence[str], rows: Sequence[str], css: str = "", wrap: str = "scroll") -> str:
    """A table in a scrolling frame; a column name that starts with `#` is numeric."""
    heads = "".join(
        f'<th scope="col" class="num">{escape(c[1:])}</th>'
        if c.startswith("#")
        else f'<th scope="col">{escape(c)}</th>'
        for c in columns
    )
    return (
        f'<div class="{wrap}" tabindex="0"><table class="{css}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def table_row(head: str, cells: Sequence[str], css: str = "") -> str:
    return f'<tr class="{css}"><th scope="row">{escape(head)}</th>{"".join(cells)}</tr>'


def chart_card(name: str, title: str, figures: dict[str, Figure], css: str = "chart") -> str:
    """The frame a plot is drawn in, or nothing when the record has no data for it."""
    if name not in figures:
        return ""
    label = escape(title)
    return (
        f'<div class="card"><h3>{label}</h3><div id="{name}" class="{css}" role="img" aria-label="{label}"></div></div>'
    )


def bullets(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def definitions(pairs: Sequence[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in pairs)}</dl>"


def number_cell(text: str) -> str:
    return table_cell(text, "num")
