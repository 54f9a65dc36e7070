"""A table of runs side by side, finished ones or ones that this command makes.

    python -m compress.eval.compare outputs/reference                     run.json files below a directory
    python -m compress.eval.compare --recipes rtn4,awq4,gptq4,best4 --out comparison \\
        calibration.path=train.txt calibration.n_sequences=128 eval.path=test.txt eval.n_sequences=128 \\
        'eval.tasks=[]' bench.enabled=false                               runs them, and other tools beside them

Runs are grouped by what makes them comparable (model and evaluation data, both by hash); each group is printed as a
Markdown table with standard errors, and KL as a ratio to symmetric round-to-nearest with as many bits and the same
group size in the same group. With --recipes, round-to-nearest at every such scheme is run too, and so are the packages
of the extra `peers` that are installed, on the same model, calibration windows and evaluation tokens; one that is not
installed is listed as such, and one that fails is listed with its error. They pin conflicting versions: --peer-python
names an interpreter of an environment of its own. The last line is one JSON object with the same figures.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from compress.arguments import run_command
from compress.atomic import write_atomically, write_json
from compress.errors import CompressError, ConfigError
from compress.record import RECORD_NAME, read_record

Row = dict[str, Any]

# a column that no run has a figure for is left out
_COLUMNS: list[tuple[str, Callable[[Row], str | None]]] = [
    ("run", lambda r: r["name"]),
    ("scheme", lambda r: r["scheme"]),
    ("KL", lambda r: _with_error(r, "kl", 4)),
    ("KL / RTN", lambda r: _number(r["kl_ratio_to_rtn"], ".2f")),
    ("ppl", lambda r: _with_error(r, "ppl", 2)),
    ("top-1", lambda r: _with_error(r, "top1", 3)),
    ("weights", lambda r: f"{r['weight_bytes'] / 1e6:.2f} MB"),
    ("bits", lambda r: _number(r["bits_per_weight"], ".3f")),
    ("decode p50, batch 1", lambda r: _number(r["decode_p50_ms"], ".3g", " ms")),
    ("speedup", lambda r: _number(r["speedup"], ".2f", "x")),
    ("quantize", lambda r: _number(r["quantize_s"], ".1f", " s")),
]
# stages whose time goes into an artifact
_MAKING = ("generate", "allocate", "quantize")


def find_records(paths: list[str]) -> list[dict[str, Any]]:
    """Run records below the given files and directories.

    Raises:
        ConfigError: a path that is not there, or no record at all.
        ArtifactError: a file that is not a run record.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            files += sorted(path.rglob(RECORD_NAME))
        else:
            raise ConfigError(f"{path} is neither a file nor a directory")
    if not files:
        raise ConfigError(f"no {RECORD_NAME} below {', '.join(paths)}; finish a run first")
    return [read_record(f) for f in files]


def comparable_groups(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Records with quality figures, grouped by source model, evaluation data and device."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        if record["quality"] is not None:
            key = (record["source_sha256"], record["quality"]["dataset_sha256"], record["environment"]["device_name"])
            groups.setdefault(key, []).append(record)
    return [sorted(group, key=lambda r: r["quality"]["kl"]) for group in groups.values()]


def rows(group: list[dict[str, Any]], others: list[Row] | None = None) -> list[Row]:
    """Figures of one group, one row a run, JSON-ready, best first; `others` are rows of other tools to sort in."""
    rtn = rtn_baselines(group)
    out = [_row(record) for record in group] + [dict(row) for row in others or []]
    for row in out:
        base = rtn.get(_bits(row))
        row["kl_ratio_to_rtn"] = row["kl"] / base if base else None
    return sorted(out, key=lambda row: row["kl"])


def rtn_baselines(group: list[dict[str, Any]]) -> dict[str, float]:
    """KL of plain round-to-nearest, which every method has to beat, by bits and group size; the symmetric one where
    both kinds are there."""
    plain = [r for r in group if (r["transform"], r["rounding"]) == ("none", "rtn")]
    ordered = sorted(plain, key=lambda r: " sym" in r["scheme"])
    return {_bits(r): r["quality"]["kl"] for r in ordered}


def _row(record: dict[str, Any]) -> Row:
    quality, timings = record["quality"], record["timings"]
    decode = next(
        (r for r in (record["speed"] or {}).get("rows", []) if r["phase"] == "decode" and r["batch"] == 1), None
    )
    spent = [timings[stage] for stage in _MAKING if stage in timings]
    kept = ("kl", "kl_stderr", "ppl", "ppl_stderr", "ppl_reference", "top1", "top1_stderr")
    return {
        "name": record["name"],
        "scheme": record["scheme"],
        **{key: quality[key] for key in kept},
        "weight_bytes": record["size"]["weight_bytes"],
        "bits_per_weight": record["size"]["quantized_bits_per_weight"],
        "decode_p50_ms": decode["p50_ms"] if decode else None,
        "speedup": decode["speedup"] if decode else None,
        "quantize_s": sum(spent) if spent else None,
    }


def _bits(run: dict[str, Any]) -> str:
    """`w4g128` of a record or row."""
    return str(run["scheme"]).split(" ", 1)[0]


def markdown(group: list[dict[str, Any]], others: list[Row] | None = None) -> str:
    """One group as a Markdown table under a line that says what was measured."""
    first = group[0]
    quality = first["quality"]
    calibration = next((r["calibration"] for r in group if r["calibration"]), None)
    on = f", calibrated on {calibration['source']}" if calibration else ""
    lines = [
        f"{first['model']}{on}, {quality['n_tokens']:,} tokens of {quality['dataset']}, perplexity "
        f"{quality['ppl_reference']:.2f} unquantized; {first['environment']['device_name']}, "
        f"{first['environment'].get('compute_dtype', '')} compute, torch {first['environment'].get('torch', '?')}",
        "",
    ]
    return "\n".join([*lines, table(rows(group, others))])


def table(figures: list[Row]) -> str:
    """Rows of `rows` in Markdown."""
    columns = [(title, cells) for title, cell in _COLUMNS if any(cells := [cell(row) for row in figures])]
    lines = ["| " + " | ".join(title for title, _ in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cells[i] or "-" for _, cells in columns) + " |" for i in range(len(figures))]
    return "\n".join(lines)


def _with_error(row: Row, key: str, decimals: int) -> str:
    error = row.get(f"{key}_stderr")
    return f"{row[key]:.{decimals}f}" + (f" ± {error:.{decimals}f}" if error is not None else "")


def _number(value: float | None, form: str, unit: str = "") -> str | None:
    return None if value is None else format(value, form) + unit


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", help="run.json files or directories; with --recipes: settings key=value")
    parser.add_argument("--recipes", help="comma-separated recipes to run")
    parser.add_argument("--peers", default="all", help="with --recipes: other packages to run, all or none")
    parser.add_argument("--peer-schemes", default="4g128", help="comma-separated schemes they are run at")
    parser.add_argument("--peer-python", action="append", default=[], metavar="PACKAGE=PYTHON",
                        help="interpreter that has the package; may be repeated")  # fmt: skip
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound")
    parser.add_argument("--out", help="directory for runs, table and figures; default with --recipes: comparison")
    parser.add_argument("--markdown", help="file to write the table to")
    return parser


def _outcome(options: argparse.Namespace) -> Any:
    """Records and rows by the options: read, or run."""
    from compress.eval.peers import PEERS
    from compress.eval.side_by_side import Outcome, Request, run_side_by_side

    if options.recipes is None:
        if not options.inputs:
            raise ConfigError("nothing to compare; give run.json files or directories, or --recipes")
        return Outcome(find_records(options.inputs))
    for text in options.inputs:
        if "=" not in text:
            raise ConfigError(f"{text!r} is no setting; with --recipes give key=value, as in model=<directory>")
    for text in options.peer_python:
        if text.partition("=")[0] not in PEERS or not text.partition("=")[2]:
            raise ConfigError(f"--peer-python {text!r} is not <package>=<python>; packages are {', '.join(PEERS)}")
    named = {"all": list(PEERS), "none": []}
    packages = named.get(options.peers, options.peers.split(","))
    options.out = options.out or "comparison"
    pythons = dict(text.split("=", 1) for text in options.peer_python)
    recipes, schemes = options.recipes.split(","), options.peer_schemes.split(",")
    return run_side_by_side(
        Request(recipes, options.inputs, Path(options.out), packages, schemes, pythons, options.iterations)
    )


def main() -> None:
    options = _parser().parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    run_command(partial(_compare, options))


def _compare(options: argparse.Namespace) -> None:
    """
    Raises:
        CompressError: what a user can act on.
    """
    outcome = _outcome(options)
    groups = comparable_groups(outcome.records)
    tables = [rows(group, outcome.peers) for group in groups] or [rows([], outcome.peers)]
    parts = [markdown(group, outcome.peers) for group in groups] or [table(tables[0])]
    parts += [f"{name}: not installed (pip install 'compress-llm[peers]')" for name in outcome.not_installed]
    parts += [f"{name}: failed: {reason}" for name, reason in outcome.failed.items()]
    text = "\n\n".join(parts) + "\n"
    figures = {"tables": tables, "not_installed": outcome.not_installed, "failed": outcome.failed}
    for path in [options.markdown, options.out and Path(options.out) / "compare.md"]:
        if path:
            write_atomically(Path(path), lambda p: p.write_text(text, encoding="utf-8"))
    if options.out:
        write_json(Path(options.out) / "compare.json", figures)
    print(text)
    print(json.dumps(figures, allow_nan=False))
    if outcome.failed:
        sys.exit(CompressError.exit_code)


if __name__ == "__main__":
    main()
