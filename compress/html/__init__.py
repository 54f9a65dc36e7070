"""`report.html`: one file that works offline, with every plot and table of a run.

The page is built from three parts: `charts` (plot specifications as plain dicts), `sections` (HTML of each
section) and `page` (style sheet and the script that draws the plots). plotly.js is inlined. Every string of the
record is escaped; a content security policy admits only the two scripts written here, by their hashes, so a
name that slipped through would still not run, and the page cannot reach a network.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from typing import Any

from compress.frontier import Frontier
from compress.gate import GateResult
from compress.html import charts, sections
from compress.html.page import SCRIPT, STYLE
from compress.record import Record

__all__ = ["render_report"]


def render_report(record: Record, frontier: Frontier, gate: GateResult | None = None) -> str:
    """The whole page as one string, about 5 MB, nearly all of it plotly.js."""
    from plotly.offline import get_plotlyjs

    plotly_js = get_plotlyjs()
    figures = charts.figures(record, frontier)
    body = "\n".join(
        [
            sections.header(record),
            sections.tiles(record, gate),
            sections.notices(record, frontier, gate),
            sections.frontier_section(record, frontier, figures),
            sections.quality_section(record),
            sections.speed_section(record, figures),
            sections.layers_section(record, figures),
            sections.provenance_section(record),
        ]
    )
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'; "
        f"script-src {_hash_source(plotly_js)} {_hash_source(SCRIPT)}"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(record['name'])} · {escape(record['model'])}</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f'<script type="application/json" id="figures">{_script_json(figures)}</script>\n'
        f"<script>{plotly_js}</script>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _hash_source(script: str) -> str:
    """CSP source expression that admits exactly this inline script."""
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _script_json(data: Any) -> str:
    """JSON that cannot close the script element it is written in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
