"""After the measurements: frontier, report, terminal summary, gate and publication."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rich.console import Console

from compress.atomic import write_atomically
from compress.card import model_card
from compress.config import RunConfig
from compress.errors import GateFailure
from compress.frontier import load_runs
from compress.gate import compare_with_baseline, update_baseline
from compress.publish import publish
from compress.report import print_summary, summary_json, write_report

log = logging.getLogger(__name__)


def finish_run(record: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Write the reports of a finished run, judge it, publish it; returns the object for the last line of stdout.

    Raises:
        GateFailure: quality or size regressed against the baseline; reports are written before.
        VerifyError, EnvironmentProblem, ConfigError: publication refused or impossible.
    """
    quality = record["quality"]
    frontier = load_runs(
        config.output_dir, record["source_sha256"], quality["dataset_sha256"] if quality else None, record
    )
    gate = None
    if config.gate.baseline and not config.gate.update:
        gate = compare_with_baseline(record, config.gate.baseline, config.gate)
    if record["artifact"]:
        card = model_card(record)
        write_atomically(Path(record["artifact"]) / "README.md", lambda p: p.write_text(card, encoding="utf-8") and None)
    write_report(record["run_dir"], record, frontier, gate)
    print_summary(record, frontier, Console(), gate)
    if config.gate.update and config.gate.baseline:
        update_baseline(record, config.gate.baseline)
        log.info("gate: baseline written to %s", config.gate.baseline)
    if gate is not None and not gate.passed:
        raise GateFailure(gate.table())
    if config.publish.dest or config.publish.repo_id:
        publish(record, config.publish)
    return summary_json(record, gate)
