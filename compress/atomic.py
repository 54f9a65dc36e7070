"""Files that are either whole or not there: write beside, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.errors import EnvironmentProblem


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a read-only directory into an error that says what to do."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: "the disk is full; free space and run the same command again, it resumes",
            errno.EDQUOT: "the quota is used up; free space and run the same command again, it resumes",
            errno.EROFS: "the file system is read-only; set output_dir=<a writable directory>",
            errno.EACCES: "permission denied; set output_dir=<a writable directory>",
            errno.EPERM: "not permitted; set output_dir=<a writable directory>",
        }
        if error.errno in remedies:
            raise EnvironmentProblem(f"cannot write {path}: {remedies[error.errno]}") from error
        raise


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Run write(temporary path), make it durable, and put it in place in one step.

    Raises:
        EnvironmentProblem: the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            with temporary.open("rb") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Sorted, indented JSON, atomically. NaN and Inf are refused: no JSON reader has to take them."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8") and None)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
