"""The regression gate: this run's quality and size against a committed baseline.

A metric regressed when it is worse than the baseline by more than the recipe's limit *and* by more than two
standard errors of the difference. The limits are relative to the baseline's value: KL, perplexity and
weight bytes may rise by `max_kl_rise`, `max_ppl_rise`, `max_size_rise`; top-1 agreement may fall by
`max_top1_drop`. Tasks use `max_top1_drop` where higher is better and `max_ppl_rise` where lower is.

Both runs were measured against the same unquantized model on the same tokens, so what varies for perplexity
and tasks is the paired difference to that model, and its standard error is the one used: the standard error of
perplexity itself is mostly the spread of the text and would hide any real loss. A task that reports no standard
error is judged by the limit alone.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.atomic import write_json
from compress.config import GateConfig
from compress.errors import ArtifactError, ConfigError, GateFailure
from compress.record import Record, read_json

BASELINE_SCHEMA = 1

_IDENTITY = ("model", "name", "scheme", "transform", "rounding", "source_sha256", "dataset_sha256", "n_tokens")


@dataclass(frozen=True)
class GateRow:
    """One metric of this run beside the baseline's. `worse_by` is positive when the run is worse."""

    metric: str
    value: float
    baseline: float
    worse_by: float
    limit: float
    noise: float

    @property
    def regressed(self) -> bool:
        return self.worse_by > self.limit and self.worse_by > self.noise


@dataclass(frozen=True)
class GateResult:
    """Every metric compared, and the names of those that only one side has."""

    baseline_path: str
    rows: tuple[GateRow, ...]
    not_compared: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not any(row.regressed for row in self.rows)

    def require(self) -> None:
        """Raise GateFailure, its message the whole table, when a metric regressed."""
        if not self.passed:
            raise GateFailure(self.table())

    def table(self) -> str:
        """Plain-text table: value, baseline, by how much worse, the limit, and two standard errors."""
        header = ("metric", "value", "baseline", "worse by", "limit", "2 s.e.", "")
        lines: list[tuple[str, ...]] = [header]
        for row in self.rows:
            numbers = [f"{v:.6g}" for v in (row.value, row.baseline, row.worse_by, row.limit, row.noise)]
            lines.append((row.metric, *numbers, "REGRESSED" if row.regressed else "ok"))
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [f"gate {'passed' if self.passed else 'FAILED'} against {self.baseline_path}"]
        for line in lines:
            cells = [line[0].ljust(widths[0])] + [line[i].rjust(widths[i]) for i in range(1, 6)] + [line[6]]
            text.append("  ".join(cells).rstrip())
        text += [f"not compared (only one side has it): {name}" for name in self.not_compared]
        return "\n".join(text)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "baseline": self.baseline_path,
            "rows": [asdict(row) | {"regressed": row.regressed} for row in self.rows],
            "not_compared": list(self.not_compared),
        }


def compare_with_baseline(record: Record, baseline_path: str | Path, config: GateConfig) -> GateResult:
    """Every metric of the run beside the committed baseline, whether it passes or not.

    Raises:
        ConfigError: no baseline there, not readable, of another recipe, model or evaluation, or the run has
            no quality to compare.
    """
    current = baseline_from_record(record)
    baseline = read_baseline(Path(baseline_path))
    for key in _IDENTITY:
        if baseline[key] != current[key]:
            raise ConfigError(
                f"baseline {baseline_path} has {key}={baseline[key]!r} but this run has {current[key]!r}; "
                "compare like with like, or replace the baseline with gate.update=true"
            )
    ours, theirs = current["metrics"], baseline["metrics"]
    shared = [name for name in ours if name in theirs]
    rows = tuple(_compare(name, ours[name], theirs[name], config) for name in shared)
    return GateResult(str(baseline_path), rows, tuple(sorted(set(ours) ^ set(theirs))))


def check_gate(record: Record, baseline_path: str | Path, config: GateConfig) -> GateResult:
    """`compare_with_baseline`, failing on a regression.

    Raises:
        GateFailure: at least one metric regressed; the message is the whole table.
        ConfigError: as `compare_with_baseline`.
    """
    result = compare_with_baseline(record, baseline_path, config)
    result.require()
    return result


def update_baseline(record: Record, path: str | Path) -> None:
    """Writes this run as the baseline: sorted keys, no dates, no paths, so that a diff shows what changed.

    Raises:
        ConfigError: the run has no quality.
        EnvironmentProblem: the file cannot be written.
    """
    write_json(Path(path), baseline_from_record(record))


def baseline_from_record(record: Record) -> dict[str, Any]:
    """What a baseline file holds: identity of the run and {metric: {value, stderr, higher_is_better, ...}}.

    Raises:
        ConfigError: the run has no quality.
    """
    quality = record["quality"]
    if quality is None:
        raise ConfigError("the gate needs the quality of this run; set eval.enabled=true or drop gate.baseline")
    metrics: dict[str, dict[str, Any]] = {
        "kl": _metric(quality["kl"], quality["kl_stderr"]),
        # d ppl = ppl * d nll
        "ppl": _metric(quality["ppl"], quality["ppl"] * quality["nll_rise_stderr"]),
        "top1": _metric(quality["top1"], quality["top1_stderr"], higher_is_better=True),
        "weight_bytes": _metric(record["size"]["weight_bytes"], 0.0),
    }
    for task in quality["tasks"]:
        stderr = task["difference_stderr"] if task["difference_stderr"] is not None else task["stderr"]
        metrics[f"{task['task']}/{task['metric']}"] = _metric(
            task["value"], stderr if stderr is not None else 0.0, task["higher_is_better"]
        )
    identity = {key: record[key] for key in _IDENTITY if key in record}
    identity |= {"dataset_sha256": quality["dataset_sha256"], "n_tokens": quality["n_tokens"]}
    return {"schema": BASELINE_SCHEMA, "metrics": metrics} | identity


def _metric(value: float, stderr: float, higher_is_better: bool = False) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "higher_is_better": higher_is_better}


def _relative_limit(name: str, higher_is_better: bool, config: GateConfig) -> float:
    match name:
        case "kl":
            return config.max_kl_rise
        case "weight_bytes":
            return config.max_size_rise
        case _:
            return config.max_top1_drop if higher_is_better else config.max_ppl_rise


def _compare(name: str, ours: dict[str, Any], theirs: dict[str, Any], config: GateConfig) -> GateRow:
    sign = -1.0 if ours["higher_is_better"] else 1.0
    limit = _relative_limit(name, ours["higher_is_better"], config) * abs(theirs["value"])
    return GateRow(
        metric=name,
        value=ours["value"],
        baseline=theirs["value"],
        worse_by=sign * (ours["value"] - theirs["value"]) + 0.0,  # no "-0"
        limit=limit,
        noise=2 * math.hypot(ours["stderr"], theirs["stderr"]),
    )


def read_baseline(path: Path) -> dict[str, Any]:
    """The baseline with every key that a comparison reads.

    Raises:
        ConfigError: missing, not JSON, or not a baseline.
    """
    remedy = "write one with gate.update=true"
    if not path.exists():
        raise ConfigError(f"gate.baseline={path} does not exist; {remedy}")
    try:
        data = read_json(path)
    except ArtifactError as error:
        raise ConfigError(f"gate.baseline: {error}; restore the file or {remedy}") from error
    try:
        if data["schema"] != BASELINE_SCHEMA:
            raise ConfigError(f"gate.baseline={path} has schema {data['schema']}, not {BASELINE_SCHEMA}; {remedy}")
        for metric in data["metrics"].values():
            if not all(math.isfinite(metric[key]) for key in ("value", "stderr")):
                raise ValueError("a metric is not finite")
        missing = [key for key in (*_IDENTITY, "metrics") if key not in data]
        missing += [f"metrics.{key}" for key in ("kl", "ppl", "top1", "weight_bytes") if key not in data["metrics"]]
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise ConfigError(f"gate.baseline={path} is not a baseline ({error!r}); {remedy}") from error
    if missing:
        raise ConfigError(f"gate.baseline={path} lacks {', '.join(missing)}; {remedy}")
    return data  # type: ignore[no-any-return]
