"""What a person reads after a run: the terminal summary, `report.json`, `report.html`, `frontier.png`.

Every figure comes from the run's record (`run.json`); nothing is measured or estimated here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from compress.atomic import write_atomically, write_json
from compress.frontier import Frontier, frontier_json
from compress.gate import GateResult
from compress.record import Record
from compress.units import format_bytes, format_count, format_ms, format_seconds, format_share, format_stderr
from compress.verdict import fallbacks, task_verdict, verdict, worst_layers

REPORT_JSON, REPORT_HTML, FRONTIER_PNG = "report.json", "report.html", "frontier.png"


def recipe_line(record: Record) -> str:
    """`awq4: w4g128 sym, awq + rtn`."""
    return f"{record['name']}: {record['scheme']}, {record['transform']} + {record['rounding']}"


def summary_json(record: Record, gate: GateResult | None = None) -> dict[str, Any]:
    """The last line of standard output, for machines."""
    quality = record["quality"]
    if quality is not None:
        kept = (
            "kl kl_stderr ppl ppl_stderr ppl_reference nll_rise nll_rise_stderr top1 top1_stderr n_tokens "
            "dataset dataset_sha256"
        )
        quality = {key: quality[key] for key in kept.split()} | {
            "tasks": {
                f"{task['task']}/{task['metric']}": {
                    key: task[key] for key in ("value", "stderr", "difference", "difference_stderr", "n")
                }
                for task in quality["tasks"]
            }
        }
    speed = record["speed"]
    if speed is not None:
        kept = "phase batch prompt_tokens decode_tokens p50_ms reference_p50_ms tokens_per_s speedup"
        speed = {
            "device_name": record["environment"]["device_name"],
            "rows": [{key: row[key] for key in kept.split()} for row in speed["rows"]],
        }
    summary = {
        "run_dir": record["run_dir"],
        "artifact": record["artifact"],
        "model": record["model"],
        "recipe": record["name"],
        "quality": quality,
        "size": record["size"],
        "speed": speed,
        "verified": record["verified"],
        "warnings": len(record["warnings"]),
        "fallbacks": len(fallbacks(record)),
    }
    if gate is not None:
        summary["gate"] = gate.to_json()
    return summary


def write_report(run_dir: str | Path, record: Record, frontier: Frontier, gate: GateResult | None = None) -> None:
    """Writes `report.json`, `report.html` and `frontier.png` into the run directory, each atomically.

    Raises:
        EnvironmentProblem: the directory cannot be written.
    """
    from compress.html import render_report  # plotly and matplotlib load only when a report is written
    from compress.plots import frontier_png

    folder = Path(run_dir)
    data = record | {"frontier": frontier_json(frontier), "gate": gate.to_json() if gate is not None else None}
    write_json(folder / REPORT_JSON, data)
    _write_bytes(folder / REPORT_HTML, render_report(record, frontier, gate).encode("utf-8"))
    _write_bytes(folder / FRONTIER_PNG, frontier_png(record, frontier))


def _write_bytes(path: Path, content: bytes) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomically(path, write)


def print_summary(record: Record, frontier: Frontier, console: Console, gate: GateResult | None = None) -> None:
    """The run as a person wants it in a terminal: what, how good, how fast, what to worry about, where."""
    parts: list[Any] = [_headline(record)]
    if record["quality"] is not None and record["quality"]["tasks"]:
        parts.append(_task_table(record))
    if record["speed"] is not None:
        parts.append(_speed_table(record, wide=console.width >= 110))
    if worst_layers(record):
        parts.append(_layer_table(record))
    if frontier.points:
        parts.append(_frontier_table(record, frontier))
    title = Text(f"{record['model']} · {recipe_line(record)}", style="bold")
    console.print(Panel(Group(*parts), title=title, title_align="left", border_style="dim"))
    if gate is not None:
        console.print(Text(gate.table(), style="" if gate.passed else "red"))
    for skipped in frontier.incomparable:
        console.print(Text(f"not on this frontier: {skipped.name}: {skipped.reason}", style="dim"))
    for line in record["warnings"] + [f"fallback in {line}" for line in fallbacks(record)] + frontier.warnings():
        console.print(Text(f"warning: {line}", style="yellow"))
    _print_places(record, console)


def _headline(record: Record) -> Table:
    """Size, quality and verification as a two-column grid."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    size, quality = record["size"], record["quality"]
    sizes = f"{format_bytes(size['reference_weight_bytes'])} -> {format_bytes(size['weight_bytes'])}"
    grid.add_row("weights", Text(f"{sizes}  ({size['ratio']:.2f}x, {size['bits_per_weight']:.2f} bits a weight)"))
    if allocation := record.get("allocation"):
        wanted = ", ".join(f"{name}={value:g}" for name, value in allocation["budget"].items())
        predicted = f"predicted KL {allocation['predicted_kl']:.3g}, {allocation['sensitivity']}"
        grid.add_row("budget", Text(f"{wanted}: {allocation['bits']:.4g} bits a quantized weight, {predicted}"))
    if quality is None:
        grid.add_row("quality", Text("not measured (eval.enabled=false)", style="yellow"))
    else:
        tokens = f"{quality['n_tokens']:,} tokens of {quality['dataset']}"
        grid.add_row("KL", Text(f"{format_stderr(quality['kl'], quality['kl_stderr'])} nats a token over {tokens}"))
        reference = format_stderr(quality["ppl_reference"], quality["ppl_reference_stderr"])
        grid.add_row(
            "perplexity", Text(f"{format_stderr(quality['ppl'], quality['ppl_stderr'])}  (unquantized {reference})")
        )
        rise = format_stderr(quality["nll_rise"], quality["nll_rise_stderr"], plus=True)
        grid.add_row("NLL rise", Text(f"{rise} nats a token, paired"))
        grid.add_row("top-1", Text(f"{format_stderr(quality['top1'], quality['top1_stderr'])} agreement"))
    if record["speed"] is None:
        grid.add_row("speed", Text("not measured (bench.enabled=false)", style="yellow"))
    grid.add_row("verified", Text("yes") if record["verified"] else Text("no", style="bold red"))
    total = sum(record["timings"].values())
    stages = ", ".join(f"{name} {format_seconds(spent)}" for name, spent in record["timings"].items())
    grid.add_row("time", Text(f"{format_seconds(total)}  ({stages})" if stages else "not recorded"))
    return grid


def _table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", header_style="dim")
    return table


def _task_table(record: Record) -> Table:
    table = _table("\nTasks", "task", "unquantized", "compressed", "difference", "n", "verdict")
    styles = {"worse": "red", "better": "green", "within noise": "dim", "no stderr": "yellow"}
    for task in record["quality"]["tasks"]:
        judged = task_verdict(task)
        table.add_row(
            Text(f"{task['task']} {task['metric']}"),
            format_stderr(task["reference"], task["reference_stderr"]),
            format_stderr(task["value"], task["stderr"]),
            format_stderr(task["difference"], task["difference_stderr"], plus=True),
            f"{task['n']:,}",
            Text(judged, style=styles[judged]),
        )
    return table


def _speed_table(record: Record, wide: bool) -> Table:
    """Percentiles and roofline only where there is room; the report has them all."""
    device = record["environment"]["device_name"]
    title = Text(f"\nSpeed on {device}, against the unquantized model in the same process", style="bold")
    more = ("p95", "p99", "of roofline") if wide else ()
    table = _table("", "phase", "batch", "original p50", "p50", "speedup", "tokens/s", *more)
    table.title = title
    for row in record["speed"]["rows"]:
        style = "red" if row["speedup"] < 1 else ""
        extra = (format_ms(row["p95_ms"]), format_ms(row["p99_ms"]), format_share(row["roofline_fraction"]))
        table.add_row(
            row["phase"],
            str(row["batch"]),
            format_ms(row["reference_p50_ms"]),
            format_ms(row["p50_ms"]),
            Text(f"{row['speedup']:.2f}x", style=style),
            format_count(row["tokens_per_s"]),
            *(extra if wide else ()),
        )
    return table


def _layer_table(record: Record) -> Table:
    measured = sum(1 for layer in record["layers"] if layer["error"] is not None)
    table = _table(f"\nWorst of {measured} quantized layers", "layer", "relative error", "round-to-nearest", "scheme")
    for layer in worst_layers(record):
        rtn = f"{layer['error_rtn']:#.3g}" if layer["error_rtn"] is not None else "–"
        table.add_row(Text(layer["name"]), f"{layer['error']:#.3g}", rtn, Text(str(layer.get("scheme") or "–")))
    return table


def _frontier_table(record: Record, frontier: Frontier) -> Table:
    table = _table("\nFrontier (KL x size x decode latency)", "run", "KL", "ppl", "weights", "decode p50", "")
    table.columns[-1].justify = "left"
    this = frontier.point_of(record)
    for point in frontier.points:
        table.add_row(
            Text(point.label, style="bold" if point is this else ""),
            format_stderr(point.kl, point.kl_stderr),
            f"{point.ppl:.4g}",
            format_bytes(point.weight_bytes),
            format_ms(point.latency.p50_ms if point.latency else None),
            Text(verdict(frontier, point), style="" if point.on_frontier else "dim"),
        )
    return table


def _print_places(record: Record, console: Console) -> None:
    """Where things are, one path a line and unwrapped, so that it can be copied."""
    places = [("run", record["run_dir"]), ("report", str(Path(record["run_dir"]) / REPORT_HTML))]
    if record["artifact"] is not None:
        places.insert(1, ("artifact", record["artifact"]))
    for name, path in places:
        console.print(Text(f"{name:>9}  {path}"), soft_wrap=True)
