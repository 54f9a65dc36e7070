"""A table of finished runs side by side: `python -m compress.eval.compare outputs/reference`.

Arguments are run.json files or directories searched for them. Runs are grouped by what makes them comparable (model
and evaluation data, both by hash); each group is printed as a Markdown table with standard errors, and KL as a ratio
to round-to-nearest with as many bits in the same group. The last line is one JSON object with the same figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from compress.errors import CompressError, ConfigError
from compress.record import RECORD_NAME, read_record

_HEADER = (
    "| run | scheme | KL | KL / RTN | ppl | top-1 | weights | bits | decode p50, batch 1 | speedup | quantize |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


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


def rows(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of one group, one row a run, JSON-ready."""
    rtn = {
        _bits(r): r["quality"]["kl"] for r in group if (r["transform"], r["rounding"]) == ("none", "rtn")
    }  # plain round-to-nearest is what every method has to beat
    out = []
    for record in group:
        quality = record["quality"]
        decode = next(
            (r for r in (record["speed"] or {}).get("rows", []) if r["phase"] == "decode" and r["batch"] == 1), None
        )
        base = rtn.get(_bits(record))
        out.append(
            {
                "name": record["name"],
                "scheme": record["scheme"],
                "kl": quality["kl"],
                "kl_stderr": quality["kl_stderr"],
                "kl_ratio_to_rtn": quality["kl"] / base if base else None,
                "ppl": quality["ppl"],
                "ppl_reference": quality["ppl_reference"],
                "top1": quality["top1"],
                "weight_bytes": record["size"]["weight_bytes"],
                "bits_per_weight": record["size"]["quantized_bits_per_weight"],
                "decode_p50_ms": decode["p50_ms"] if decode else None,
                "speedup": decode["speedup"] if decode else None,
                "quantize_s": record["timings"].get("quantize"),
            }
        )
    return out


def _bits(record: dict[str, Any]) -> str:
    return str(record["scheme"]).split(" ", 1)[0]


def markdown(group: list[dict[str, Any]]) -> str:
    """One group as a Markdown table under a line that says what was measured."""
    first = group[0]
    quality = first["quality"]
    lines = [
        f"{first['model']}, {quality['n_tokens']:,} tokens of {quality['dataset']}, perplexity "
        f"{quality['ppl_reference']:.2f} unquantized; {first['environment']['device_name']}, "
        f"{first['environment'].get('compute_dtype', '')} compute, torch {first['environment'].get('torch', '?')}",
        "",
        _HEADER,
    ]
    for r in rows(group):
        cells = [
            r["name"],
            r["scheme"],
            f"{r['kl']:.4f} ± {r['kl_stderr']:.4f}",
            _number(r["kl_ratio_to_rtn"], ".2f"),
            f"{r['ppl']:.2f}",
            f"{r['top1']:.3f}",
            f"{r['weight_bytes'] / 1e6:.2f} MB",
            _number(r["bits_per_weight"], ".3f"),
            _number(r["decode_p50_ms"], ".3g", " ms"),
            _number(r["speedup"], ".2f", "x"),
            _number(r["quantize_s"], ".1f", " s"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else format(value, form) + unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="run.json files, or directories that hold them")
    options = parser.parse_args()
    try:
        groups = comparable_groups(find_records(options.paths))
    except CompressError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    for group in groups:
        print(markdown(group), end="\n\n")
    print(json.dumps([rows(group) for group in groups], allow_nan=False))


if __name__ == "__main__":
    main()
