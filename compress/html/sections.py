"""HTML of each section of the report. Every string of the record passes through `escape`."""

from __future__ import annotations

import shlex
from html import escape
from pathlib import Path
from typing import Any

from compress.frontier import Frontier
from compress.gate import GateResult
from compress.html.axes import Figure
from compress.html.elements import bullets, chart_card, definitions, html_table, number_cell, table_cell, table_row
from compress.record import Record, generated_text, reproduce_command
from compress.units import format_bytes, format_count, format_ms, format_seconds, format_share, format_stderr
from compress.verdict import fallbacks, task_verdict, verdict

_VERDICT_CLASS = {"worse": "bad", "better": "good", "within noise": "dim", "no stderr": "warn"}


def header(record: Record) -> str:
    environment = record["environment"]
    facts = [
        f"{record['scheme']}, {record['transform']} + {record['rounding']}",
        environment["device_name"],
        record["finished"],
        f"compress {record['compress_version']}",
    ]
    spans = " ".join(f"<span>{escape(fact)}</span>" for fact in facts)
    title = f'{escape(record["name"])} <span class="dim">of</span> {escape(record["model"])}'
    return f'<h1>{title}</h1><p class="lead">{spans}</p>'


def tiles(record: Record, gate: GateResult | None) -> str:
    """The few figures that decide whether to read on."""
    size, quality, speed = record["size"], record["quality"], record["speed"]
    sizes = f"{format_bytes(size['reference_weight_bytes'])} → {format_bytes(size['weight_bytes'])}"
    shown = [(f"{size['ratio']:.2f}×", "smaller weights", f"{sizes}, {size['bits_per_weight']:.2f} bits a weight", "")]
    if quality is not None:
        shown += [
            (f"{quality['kl']:.4f}", "KL to the original", f"± {quality['kl_stderr']:.2g} nats a token", ""),
            (
                f"{quality['ppl']:.2f}",
                "perplexity",
                f"{quality['ppl_reference']:.2f} unquantized",
                "",
            ),
            (format_share(quality["top1"]), "top-1 agreement", f"± {100 * quality['top1_stderr']:.2f} %", ""),
        ]
    decode = [r for r in speed["rows"] if r["phase"] == "decode" and r["batch"] == 1] if speed else []
    if decode:
        row = decode[0]
        detail = f"p50 {format_ms(row['reference_p50_ms'])} → {format_ms(row['p50_ms'])}"
        shown.append((f"{row['speedup']:.2f}×", "decode speed, batch 1", detail, "bad" if row["speedup"] < 1 else ""))
    verified = ("yes", "verified", "reloaded in a fresh process", "good")
    if not record["verified"]:
        verified = ("no", "verified", "do not ship this artifact", "bad")
    shown.append(verified)
    if gate is not None:
        detail = f"against {Path(gate.baseline_path).name}"
        shown.append(("passed", "gate", detail, "good") if gate.passed else ("failed", "gate", detail, "bad"))
    cards = "".join(
        f'<div class="card tile"><b class="{css}">{escape(value)}</b><span>{escape(name)}</span>'
        f"<small>{escape(detail)}</small></div>"
        for value, name, detail, css in shown
    )
    return f'<div class="tiles">{cards}</div>'


def notices(record: Record, frontier: Frontier, gate: GateResult | None) -> str:
    """Everything that did not go as asked, before anything else is read."""
    parts = []
    if gate is not None and not gate.passed:
        parts.append(
            f'<div class="notice bad"><b>The regression gate failed</b><pre>{escape(gate.table())}</pre></div>'
        )
    slower = [row for row in record["speed"]["rows"] if row["speedup"] < 1] if record["speed"] else []
    warnings = list(record["warnings"]) + frontier.warnings()
    warnings += [
        f"{row['phase']} at batch {row['batch']} is slower than the unquantized model ({row['speedup']:.2f}×)"
        for row in slower
    ]
    if record["quality"] is None:
        warnings.append("quality was not measured (eval.enabled=false)")
    if record["speed"] is None:
        warnings.append("speed was not measured (bench.enabled=false)")
    if warnings:
        parts.append(f'<div class="notice"><b>Warnings</b>{bullets(warnings)}</div>')
    if fallbacks(record):
        parts.append(f'<div class="notice"><b>Fallbacks</b>{bullets(fallbacks(record))}</div>')
    return f'<div class="notices">{"".join(parts)}</div>' if parts else ""


def frontier_section(record: Record, frontier: Frontier, figures: dict[str, Figure]) -> str:
    charts = chart_card("frontier-size", "KL against size", figures) + chart_card(
        "frontier-latency", "KL against decode latency", figures
    )
    this = frontier.point_of(record)
    rows = []
    devices = {p.latency.device_name for p in frontier.points if p.latency}
    for p in frontier.points:
        latency = format_ms(p.latency.p50_ms) if p.latency else "not measured"
        if p.latency and len(devices) > 1:
            latency += f" on {p.latency.device_name}"
        cells = [
            table_cell(p.scheme, "keep"),
            table_cell(format_stderr(p.kl, p.kl_stderr), "num", p.kl),
            table_cell(format_stderr(p.ppl, p.ppl_stderr), "num", p.ppl),
            table_cell(format_bytes(p.weight_bytes), "num", p.weight_bytes),
            table_cell(f"{p.bits_per_weight:.2f}", "num", p.bits_per_weight),
            table_cell(latency, "num", p.latency.p50_ms if p.latency else None),
            table_cell(verdict(frontier, p), "wide" if p.on_frontier else "wide dim"),
        ]
        rows.append(table_row(p.label, cells, "this" if p is this else ""))
    columns = ("run", "scheme", "#KL", "#perplexity", "#weights", "#bits", "#decode p50", "verdict")
    table = html_table(columns, rows, "sortable") if rows else "<p>No run could be compared.</p>"
    apart = ""
    if frontier.incomparable:
        lines = [f"{run.name}: {run.reason}" for run in frontier.incomparable]
        apart = f"<details><summary>Not comparable with this run: {len(lines)}</summary>{bullets(lines)}</details>"
    return (
        "<h2>Frontier</h2><p class='note'>Every finished run of this model on this evaluation. Lower is better on each "
        "axis; whiskers are ± 2 standard errors. A run is dominated when another is no worse in KL, weight bytes and "
        "decode latency and better in one; latencies count only when taken under the same conditions. The dotted line "
        f"is the best KL at each size or latency alone.</p><div class='grid'>{charts}</div>{table}{apart}"
    )


def quality_section(record: Record) -> str:
    quality = record["quality"]
    if quality is None:
        return ""
    rows = [
        table_row(
            "KL to the original (nats a token)",
            [number_cell("0"), number_cell(format_stderr(quality["kl"], quality["kl_stderr"]))],
        ),
        table_row(
            "perplexity",
            [
                number_cell(format_stderr(quality["ppl_reference"], quality["ppl_reference_stderr"])),
                number_cell(format_stderr(quality["ppl"], quality["ppl_stderr"])),
            ],
        ),
        table_row(
            "NLL rise, paired (nats a token)",
            [number_cell("0"), number_cell(format_stderr(quality["nll_rise"], quality["nll_rise_stderr"], plus=True))],
        ),
        table_row(
            "top-1 agreement", [number_cell("1"), number_cell(format_stderr(quality["top1"], quality["top1_stderr"]))]
        ),
    ]
    measured = f"{quality['n_tokens']:,} tokens in {quality['n_sequences']:,} sequences of {quality['dataset']}"
    text = (
        f"<h2>Quality</h2><p class='note'>Measured on {escape(measured)}, on the artifact reloaded from disk, against "
        "the unquantized model.</p>" + html_table(("", "#unquantized", "#compressed"), rows)
    )
    if quality["tasks"]:
        text += html_table(
            ("task", "metric", "#unquantized", "#compressed", "#difference", "#n", "verdict"),
            [_task_row(task) for task in quality["tasks"]],
        )
        text += "<p class='note'>A difference counts when it exceeds two standard errors of the paired difference.</p>"
    return text


def _task_row(task: dict[str, Any]) -> str:
    judged = task_verdict(task)
    cells = [
        table_cell(f"{task['metric']} {'↑' if task['higher_is_better'] else '↓'}"),
        number_cell(format_stderr(task["reference"], task["reference_stderr"])),
        number_cell(format_stderr(task["value"], task["stderr"])),
        number_cell(format_stderr(task["difference"], task["difference_stderr"], plus=True)),
        number_cell(f"{task['n']:,}"),
        table_cell(judged, _VERDICT_CLASS[judged]),
    ]
    return table_row(task["task"], cells)


def speed_section(record: Record, figures: dict[str, Figure]) -> str:
    speed = record["speed"]
    if speed is None:
        return ""
    conditions = [str(speed.get("backend") or record["environment"]["device_name"])]
    if speed.get("mode"):
        conditions.append(str(speed["mode"]))
    if isinstance(speed.get("n_samples"), dict):
        conditions.append("samples: " + ", ".join(f"{phase} {n}" for phase, n in speed["n_samples"].items()))
    charts = chart_card("speed-prefill", "Prefill", figures, "chart low") + chart_card(
        "speed-decode", "Decode", figures, "chart low"
    )
    times = ("phase", "#batch", "#tokens", "#p50", "#p95", "#p99", "#tokens/s", "#speedup")
    work = ("phase", "#batch", "#bytes moved", "#flop/byte", "#of roofline", "#peak memory")
    return (
        f"<h2>Speed</h2><p class='note'>{escape('; '.join(conditions))}. Unquantized and compressed alternate in one "
        "process. Bars are medians, dashes p95, whiskers reach p99. Tokens are prompt + decoded; arrows read "
        f"unquantized → compressed.</p><div class='grid'>{charts}</div>"
        + html_table(times, [_time_row(r) for r in speed["rows"]])
        + chart_card("roofline", "Roofline", figures)
        + html_table(work, [_work_row(r) for r in speed["rows"]])
    )


def _time_row(r: dict[str, Any]) -> str:
    cells = [
        number_cell(str(r["batch"])),
        number_cell(f"{r['prompt_tokens']} + {r['decode_tokens']}"),
        *[
            number_cell(f"{format_ms(r[f'reference_{p}_ms'])} → {format_ms(r[f'{p}_ms'])}")
            for p in ("p50", "p95", "p99")
        ],
        number_cell(f"{format_count(r['reference_tokens_per_s'])} → {format_count(r['tokens_per_s'])}"),
        table_cell(f"{r['speedup']:.2f}×", "num bad" if r["speedup"] < 1 else "num"),
    ]
    return table_row(r["phase"], cells)


def _work_row(r: dict[str, Any]) -> str:
    cells = [
        number_cell(str(r["batch"])),
        number_cell(f"{format_bytes(r.get('reference_bytes_moved'))} → {format_bytes(r['bytes_moved'])}"),
        number_cell("–" if r["intensity"] is None else f"{r['intensity']:#.3g}"),
        number_cell(f"{format_share(r['reference_roofline_fraction'])} → {format_share(r['roofline_fraction'])}"),
        number_cell(f"{format_bytes(r['reference_peak_memory_bytes'])} → {format_bytes(r['peak_memory_bytes'])}"),
    ]
    return table_row(r["phase"], cells)


def _optional_number(value: float | None, form: str) -> str:
    return table_cell("–" if value is None else format(value, form), "num", -1.0 if value is None else value)


def layers_section(record: Record, figures: dict[str, Figure]) -> str:
    layers = record["layers"]
    if not layers:
        return ""
    with_awq = any(layer.get("awq") for layer in layers)
    with_learning = any(layer.get("learned") for layer in layers)
    rows = []
    for layer in layers:
        cells = [
            table_cell(str(layer.get("scheme") or "–"), "keep"),
            table_cell(layer["status"]),
            _optional_number(layer["error"], "#.3g"),
            _optional_number(layer["error_rtn"], "#.3g"),
        ]
        if with_awq:
            cells.append(_optional_number((layer.get("awq") or {}).get("loss_ratio"), ".3f"))
        if with_learning:
            learned = layer.get("learned") or {}
            cells += [_optional_number(learned.get(key), "#.3g") for key in ("error_before", "error_after")]
        cells += [
            _optional_number(layer.get("damping"), ".3g"),
            _optional_number(layer.get("n_tokens") or None, ","),
            table_cell(layer["fallback"] or "–", "warn" if layer["fallback"] else "dim"),
        ]
        rows.append(table_row(layer["name"], cells))
    columns = ["layer", "scheme", "status", "#relative error", "#round-to-nearest"]
    columns += ["#error over identity"] if with_awq else []
    columns += ["#block before", "#block learned"] if with_learning else []
    columns += ["#damping", "#tokens", "fallback"]
    formulas = {"outputs": "‖Ŵx − Wx‖² / ‖Wx‖² over the calibration tokens", "weights": "‖Ŵ − W‖² / ‖W‖²"}
    measured = {layer.get("error_of") for layer in layers if layer["error"] is not None}
    meaning = " or ".join(formula for of, formula in formulas.items() if of in measured)
    notes = "Relative error of each layer" + (f", {meaning}," if meaning else "") + " in the order of the model; "
    notes += "dashes are plain round-to-nearest on the same grid."
    if with_awq:
        notes += " Error over identity: the scale group's output error with AWQ's scales over that without."
    if with_learning:
        notes += (
            " Block before and learned: squared error of the whole block's output on calibration sequences that "
            "learned rounding did not see, over the square of what the block adds."
        )
    if record.get("tuned"):
        tuned = record["tuned"]
        notes += (
            " Tuned end to end, after these errors were taken: KL on held-out calibration text "
            f"{tuned['kl_before']:.4f} → {tuned['kl_after']:.4f} "
            f"in {tuned['steps']} of {tuned['steps_planned']} steps"
        )
        notes += f", {tuned['changed']:.1%} of the codes changed." if tuned.get("n_codes") else "."
    return (
        f"<h2>Layers</h2><p class='note'>{notes}</p>"
        + chart_card("layers", "Relative error by layer", figures)
        + html_table(tuple(columns), rows, "sortable", "scroll tall")
    )


def provenance_section(record: Record) -> str:
    """Environment, calibration, hashes, stage times, and the command that makes the run again."""
    calibration = record["calibration"]
    about = [
        ("run directory", record["run_dir"]),
        ("artifact", record["artifact"] or "none"),
        ("source weights", f"sha256 {record['source_sha256']}"),
        ("fingerprint", record["fingerprint"]),
    ]
    if record["quality"] is not None:
        about.append(
            ("evaluation data", f"{record['quality']['dataset']}, sha256 {record['quality']['dataset_sha256']}")
        )
    if calibration is not None:
        shape = f"{calibration['n_sequences']} × {calibration['sequence_length']} tokens{generated_text(calibration)}"
        about.append(("calibration", f"{calibration['source']}, {shape}, sha256 {calibration['sha256']}"))
    timings = [(name, format_seconds(spent)) for name, spent in record["timings"].items()]
    environment = [(str(k), str(v)) for k, v in record["environment"].items() if v is not None]
    return (
        "<h2>Provenance</h2><p class='note'>Run it again:</p>"
        f"<pre><code>{escape(shlex.join(reproduce_command(record)))}</code></pre>"
        f'<div class="card">{definitions(about)}</div>'
        f'<div class="grid"><div class="card"><h3>Environment</h3>{definitions(environment)}</div>'
        f'<div class="card"><h3>Time by stage</h3>{definitions(timings)}</div></div>'
    )
