"""What a run directory remembers: finished stages with their fingerprints, and who is working in it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.atomic import disk_errors, write_json
from compress.errors import RunLocked


def fingerprint(value: Any) -> str:
    """sha256 of JSON values, the same for equal values in any order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def code_sha256(*names: str) -> str:
    """Hash of modules or folders of this package: results of other code are not this code's results."""
    package = Path(__file__).parent
    roots = [package, package.parent]  # kernels/ and eval/ lie inside an installed package, beside a checkout's
    digest = hashlib.sha256()
    for name in names:
        path = next((r / name for r in roots if (r / name).exists()), package / name)
        for file in [path] if path.is_file() else sorted(path.glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this process; the lock dies with it, however it dies.

    Raises:
        RunLocked: another process holds it.
        EnvironmentProblem: the directory cannot be made.
    """
    with disk_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip()
            raise RunLocked(
                f"{run_dir} is in use by process {holder or 'unknown'}; wait for it, stop it, or set run_dir=<another>"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@dataclass
class StageOutcome:
    """A stage's JSON result, its seconds when it really ran, and whether this run reused it."""

    result: Any
    seconds: float
    reused: bool


class RunState:
    """Finished stages of one run directory, kept in state.json."""

    def __init__(self, run_dir: Path, force: bool) -> None:
        self.path = run_dir / "state.json"
        self.force = force
        self.stages: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                self.stages = json.loads(self.path.read_text(encoding="utf-8"))["stages"]
            except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
                self.stages = {}  # a damaged state costs time, never truth: every stage is done again

    def run(self, name: str, inputs: Any, work: Callable[[], Any]) -> StageOutcome:
        """Do a stage unless it was finished with the same inputs; `work` returns JSON values."""
        mark = fingerprint(inputs)
        done = self.stages.get(name)
        if done and done["fingerprint"] == mark and not self.force:
            return StageOutcome(done["result"], done["seconds"], reused=True)
        started = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - started
        self.stages[name] = {"fingerprint": mark, "result": result, "seconds": seconds}
        write_json(self.path, {"schema": 1, "stages": self.stages})
        return StageOutcome(result, seconds, reused=False)

    def forget(self, name: str) -> None:
        """Make the next `run` of a stage do it again, whatever its fingerprint."""
        self.stages.pop(name, None)
