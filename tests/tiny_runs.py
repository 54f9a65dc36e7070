"""Runs small enough to be whole: the tiny model on a few hundred tokens of made-up text, and the command line."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress.config import BenchConfig, CalibrationConfig, EvalConfig, RunConfig
from compress.config_quant import GranularityName, QuantConfig, Rounding, SchemeConfig, Transform

ROOT = Path(__file__).resolve().parent.parent
_WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "quick", "slow", "red", "house", "tree", "and", "then"]


def write_text(path: Path, seed: int = 0, words: int = 600) -> Path:
    """A file of `words` random words, about four characters each."""
    draw = random.Random(seed)
    path.write_text(" ".join(draw.choice(_WORDS) for _ in range(words)), encoding="utf-8")
    return path


def scheme(bits: int = 4, granularity: str = "group", symmetric: bool = True) -> SchemeConfig:
    return SchemeConfig(bits, GranularityName(granularity), group_size=32, symmetric=symmetric)


def tiny_config(model: Path, folder: Path, **changes: Any) -> RunConfig:
    """A whole run of the tiny model: AWQ then GPTQ, 4 x 32 calibration tokens, KL on 4 x 32, no benchmark or tasks."""
    settings: dict[str, Any] = {
        "name": "tiny",
        "model": str(model),
        "device": "cpu",
        "output_dir": str(folder / "outputs"),
        "quant": QuantConfig(Transform.awq, Rounding.gptq, scheme()),
        "calibration": CalibrationConfig(
            path=str(write_text(folder / "calibration.txt", 1)), n_sequences=4, sequence_length=32
        ),
        "eval": EvalConfig(
            path=str(write_text(folder / "heldout.txt", 2)), n_sequences=4, sequence_length=32, tasks=[]
        ),
        "bench": BenchConfig(enabled=False),
    }
    return RunConfig(**settings | changes)


def overrides(config: RunConfig) -> list[str]:
    """The command line of a `tiny_config` with recipe=awq_gptq4."""
    return [
        "recipe=awq_gptq4",
        f"model={config.model}",
        f"output_dir={config.output_dir}",
        "device=cpu",
        "quant.scheme.group_size=32",
        f"calibration.path={config.calibration.path}",
        "calibration.n_sequences=4",
        "calibration.sequence_length=32",
        f"eval.path={config.eval.path}",
        "eval.n_sequences=4",
        "eval.sequence_length=32",
        "eval.tasks=[]",
        "bench.enabled=false",
    ]


def command_line(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m compress` in a fresh process, from the checkout."""
    command = [sys.executable, "-m", "compress", *arguments]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def main_in_process(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`python -m compress` in this process; returns its exit code. The callers' capsys has its output."""
    import logging

    from compress import cli

    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    handlers, level = logging.getLogger("compress").handlers, logging.getLogger("compress").level
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        logging.getLogger("compress").handlers = handlers
        logging.getLogger("compress").setLevel(level)
    return 0


def verify_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fresh process for verification, where a test is about something else: same code, same figures."""
    from compress import verify

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            verify._main(command[3:])
        return subprocess.CompletedProcess(command, 0, output.getvalue(), "")

    monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=run))


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder` by relative name."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def stages(run_dir: Path) -> list[str]:
    """Names of the stages that state.json says are finished."""
    state = run_dir / "state.json"
    return sorted(json.loads(state.read_text())["stages"]) if state.is_file() else []
