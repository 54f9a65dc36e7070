"""Progress of long steps on stderr: a bar with ETA on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOG_EVERY_S = 10.0


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yields report(done, total)."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Eta

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Eta())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(description, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    started = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= _LOG_EVERY_S:
            last = now
            left = (now - started) / max(done, 1) * (total - done)
            print(f"{description}: {done}/{total}, {now - started:.0f} s, about {left:.0f} s left", file=sys.stderr)

    yield report
