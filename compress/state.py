"""What a run directory remembers: finished stages with their fingerprints, and who is working in it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.atomic import disk_errors, write_json
from compress.errors import ConfigError, RunLocked

log = logging.getLogger(__name__)

_NOT_CODE = (".pyc", ".md")


def fingerprint(value: Any) -> str:
    """sha256 of JSON values, the same for equal values in any order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def code_sha256(*names: str) -> str:
    """Hash of modules or folders of this package, tables and tasks in them included: results of other code are not this
    code's results."""
    package = Path(__file__).parent
    roots = [package, package.parent]  # kernels/ and eval/ lie inside an installed package, beside a checkout's
    digest = hashlib.sha256()
    for name in names:
        path = next((r / name for r in roots if (r / name).exists()), package / name)
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            if file.suffix not in _NOT_CODE:
                digest.update(file.relative_to(path.parent).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this process; the lock dies with it, however it dies.

    Raises:
        RunLocked: another process holds it.
        ConfigError: the directory holds something other than a run: nothing of the user's is overwritten.
        EnvironmentProblem: the directory cannot be made.
    """
    with disk_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / ".lock").is_file() and (found := next(run_dir.iterdir(), None)):
            raise ConfigError(
                f"run_dir={run_dir} holds {found.name} and is not an earlier run; give a new or empty directory"
            )
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
                self.stages = _checked(json.loads(self.path.read_text(encoding="utf-8"))["stages"])
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
                # a damaged state costs time, never truth
                log.warning("%s is damaged (%r); every stage is done again", self.path, error)

    def run(
        self, name: str, inputs: Any, work: Callable[[], Any], damage: Callable[[Any], str | None] = lambda _: None
    ) -> StageOutcome:
        """Do a stage unless it was finished with the same inputs.

        Args:
            inputs: JSON values that decide the result.
            work: returns the result as JSON values.
            damage: given a finished stage's result, says what is wrong with the files it left, None when nothing is.
                Then this stage and all others are done again: they may have used the damaged files.
        """
        mark = fingerprint(inputs)
        done = self.stages.get(name)
        if done and done["fingerprint"] == mark and not self.force:
            problem = damage(done["result"])
            if problem is None:
                return StageOutcome(done["result"], done["seconds"], reused=True)
            log.warning("%s: was finished, but %s; doing everything again", name, problem)
            self.stages.clear()
        started = time.perf_counter()
        result = json.loads(json.dumps(work(), allow_nan=False))  # a first run sees the types a resumed one reads
        seconds = time.perf_counter() - started
        self.stages[name] = {"fingerprint": mark, "result": result, "seconds": seconds}
        write_json(self.path, {"schema": 1, "stages": self.stages})
        return StageOutcome(result, seconds, reused=False)


def _checked(stages: Any) -> dict[str, dict[str, Any]]:
    """`stages` of a state.json, once every entry has what `RunState.run` reads; KeyError or TypeError if not."""
    for entry in stages.values():
        _ = entry["fingerprint"], entry["result"], float(entry["seconds"])
    return stages  # type: ignore[no-any-return]
