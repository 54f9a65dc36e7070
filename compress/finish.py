"""After the measurements: frontier, report, terminal summary, gate and publication."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from compress.atomic import write_atomically
from compress.card import model_card
from compress.config import RunConfig
from compress.frontier import load_runs
from compress.gate import compare_with_baseline, read_baseline, update_baseline
from compress.publish import check_destination, publish
from compress.report import print_summary, summary_json, write_report
from compress.state import locked

log = logging.getLogger(__name__)


def check_requests(config: RunConfig) -> None:
    """What a run asks of its end, checked before its beginning.

    Raises:
        ConfigError: a baseline that is missing or not one, a place to publish to that holds something else.
    """
    if config.gate.baseline and not config.gate.update:
        read_baseline(Path(config.gate.baseline))
    if config.publish.dest:
        check_destination(Path(config.publish.dest))


def finish_run(record: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Write the reports of a finished run, judge it, publish it; returns the object for the last line of stdout.

    Raises:
        GateFailure: quality or size regressed against the baseline; reports are written before.
        VerifyError, EnvironmentProblem, ConfigError: publication refused or impossible.
        RunLocked: another process took the run directory since.
    """
    with locked(Path(record["run_dir"])):
        return _finish(record, config)


def _finish(record: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    quality = record["quality"]
    frontier = load_runs(
        config.output_dir, record["source_sha256"], quality["dataset_sha256"] if quality else None, record
    )
    gate = None
    if config.gate.baseline and not config.gate.update:
        gate = compare_with_baseline(record, config.gate.baseline, config.gate)
    if record["artifact"]:
        card = model_card(record)
        write_atomically(Path(record["artifact"]) / "README.md", lambda p: p.write_text(card, encoding="utf-8"))
    write_report(record["run_dir"], record, frontier, gate)
    # rich takes 80 columns where there is no terminal; the tables read better in a log at their natural width
    print_summary(record, frontier, Console(width=None if sys.stdout.isatty() else 116), gate)
    if config.gate.update and config.gate.baseline:
        update_baseline(record, config.gate.baseline)
        log.info("gate: baseline written to %s", config.gate.baseline)
    if gate is not None:
        gate.require()
    if config.publish.dest or config.publish.repo_id:
        publish(record, config.publish)
    return summary_json(record, gate)
