"""Tables of a `bench` record: on the terminal and as Markdown. Pure functions of the record, which is what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.atomic import write_atomically, write_json

Cells = dict[str, dict[int, dict[str, Any]]]  # contender -> M -> cell


def cell_bytes(m: int, n: int, k: int, bits: float) -> float:
    """What a call must move at least: the weight at `bits` each, x and y in 16 bits."""
    return n * k * bits / 8 + 2 * m * (n + k)


def roofline_us(
    m: int, n: int, k: int, ceilings: dict[str, Any], bits: float = 4 + 16 / 128, int8: bool = False
) -> float:
    """Least microseconds of y = x W^T at `bits` a weight; int8 arithmetic is taken as twice as fast as float16's."""
    rate = ceilings["fp16_TFLOP_per_s"] * (2 if int8 else 1)
    return max(cell_bytes(m, n, k, bits) / ceilings["copy_TB_per_s"], 2 * m * n * k / rate) / 1e6


def _roofline_row(n: int, k: int, ms: list[int], cells: list[dict[str, Any]], machine: dict[str, Any]) -> list[str]:
    """The roofline of the narrowest weight among the cells of a shape."""
    bits = min(c["bits"] for c in cells if (c["n"], c["k"]) == (n, k))
    int8 = any("w8a8" in c["what"] for c in cells)
    return [f"{roofline_us(m, n, k, machine, bits, int8):.1f}" for m in ms]


def by_contender(cells: list[dict[str, Any]], n: int, k: int) -> Cells:
    found: Cells = {}
    for cell in cells:
        if (cell["n"], cell["k"]) == (n, k):
            found.setdefault(cell["what"], {})[cell["m"]] = cell
    return found


def ratios(rows: Cells, m: int) -> dict[str, tuple[float, str]]:
    """How many times as fast as the baseline and as the fastest peer "ours" is at M, with their names."""
    timed = [(row[m]["us"], name, row[m]["kind"]) for name, row in rows.items() if row[m]["us"] is not None]
    ours = min((us for us, _, kind in timed if kind == "ours"), default=None)
    if ours is None:
        return {}
    named = {
        "x faster than cuBLAS": [(us, name) for us, name, kind in timed if kind == "dense"],
        "x faster than the fastest peer": [(us, name) for us, name, kind in timed if kind == "peer"],
    }
    return {label: (min(found)[0] / ours, min(found)[1]) for label, found in named.items() if found}


def baseline(rows: Cells) -> str:
    """The contender that every other one is compared with: the first dense one."""
    return next(name for name, row in rows.items() if next(iter(row.values()))["kind"] == "dense")


def _figure(cell: dict[str, Any], base: dict[str, Any]) -> str:
    """Microseconds, and how many times as fast as the baseline that is."""
    if cell["us"] is None:
        return "raised" if cell["problem"] else "wrong"
    return f"{cell['us']:.1f}" + (f" {base['us'] / cell['us']:.2f}x" if base["us"] is not None else "")


def text_table(n: int, k: int, ms: list[int], cells: list[dict[str, Any]], machine: dict[str, Any], scheme: str) -> str:
    """Microseconds, ratios to the baseline and relative errors, for a terminal."""

    def line(name: str, texts: list[str]) -> str:
        return f"{name:>32} |" + "".join(f"{text:>22}" for text in texts)

    def figure(cell: dict[str, Any]) -> str:
        text = _figure(cell, rows[base][cell["m"]])
        return text + (f" ({cell['error']:.0e})" if cell["error"] is not None else "")

    rows = by_contender(cells, n, k)
    base = baseline(rows)
    about = f"N={n} K={k}, {scheme}: microseconds, times as fast as {base} (relative error)"
    lines = ["", about, line("M", [str(m) for m in ms])]
    if "copy_TB_per_s" in machine:
        lines.append(line("roofline", _roofline_row(n, k, ms, cells, machine)))
    lines += [line(name, [figure(row[m]) for m in ms]) for name, row in rows.items()]
    lines += [line(label, texts) for label, texts in _ratio_rows(rows, ms, lambda ratio, _: f"{ratio:.2f}").items()]
    return "\n".join(lines)


def _ratio_rows(rows: Cells, ms: list[int], show: Callable[[float, str], str]) -> dict[str, list[str]]:
    found = [ratios(rows, m) for m in ms]
    labels = dict.fromkeys(label for at_m in found for label in at_m)
    return {label: [show(*at_m[label]) if label in at_m else "-" for at_m in found] for label in labels}


def markdown(record: dict[str, Any], ms: list[int], command: str) -> str:
    """One table for all shapes, and above it what a reader needs to reproduce it."""
    machine, peers = record["machine"], record["peers"]
    about = [f"{machine['device']}, torch {machine['torch']}"]
    if "copy_TB_per_s" in machine:
        about.append(
            f"triton {machine['triton']}; in the same run: copy {machine['copy_TB_per_s']:.2f} TB/s, 8192^3 float16 "
            f"matmul {machine['fp16_TFLOP_per_s']:.0f} TFLOP/s, empty graph node {machine['empty_node_us']:.2f} us"
        )
    about += [f"{name} {version}" for name, version in peers.items()]
    if moved := record["baseline_drift"]:
        about.append(
            f"cuBLAS timed again after each shape: {moved['median']:.1%} away (median), {moved['worst']:.1%} worst"
        )
    base = next(cell["what"] for cell in record["cells"] if cell["kind"] == "dense")
    what = f"{record['scheme']}, {record['dtype']}: microseconds a call, and how many times as fast as {base}."
    lines = [f"    {command}", "", "; ".join(about) + ". " + what, ""]
    lines += ["| N x K | M | " + " | ".join(map(str, ms)) + " |", "|---" * (len(ms) + 2) + "|"]
    for n, k in dict.fromkeys((c["n"], c["k"]) for c in record["cells"]):
        lines += _markdown_rows(record, n, k, ms)
    lines += [f"\n{what}: {problem}" for what, problem in record["problems"].items()]
    return "\n".join(lines) + "\n"


def _markdown_rows(record: dict[str, Any], n: int, k: int, ms: list[int]) -> list[str]:
    rows, machine = by_contender(record["cells"], n, k), record["machine"]
    base, table = rows[baseline(rows)], dict[str, list[str]]()
    if "copy_TB_per_s" in machine:
        table["roofline"] = _roofline_row(n, k, ms, record["cells"], machine)
    for name, row in rows.items():
        own = row[ms[0]]["kind"] == "ours"
        table[f"**{name}**" if own else name.strip()] = [_figure(row[m], base[m]) for m in ms]
    table |= _ratio_rows(rows, ms, lambda ratio, name: f"{ratio:.2f} ({name.split()[0]})")
    heads = [f"{n} x {k}", *[""] * (len(table) - 1)]
    return [
        f"| {head} | {name} | " + " | ".join(texts) + " |"
        for head, (name, texts) in zip(heads, table.items(), strict=True)
    ]


def write(stem: Path, record: dict[str, Any], ms: list[int], command: str) -> list[Path]:
    """<stem>.json, the record, and <stem>.md, its table."""
    raw, table = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".md")
    write_json(raw, json.loads(json.dumps(record)))
    write_atomically(table, lambda path: path.write_text(markdown(record, ms, command), encoding="utf-8"))
    return [raw, table]
