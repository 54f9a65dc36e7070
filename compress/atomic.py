"""Files that are either whole or not there: write beside, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from compress.errors import EnvironmentProblem

# What to do about errors a user can cure; others are named by the system's own words.
_REMEDIES = {
    errno.ENOSPC: "the disk is full; free space and run the same command again, it resumes",
    errno.EDQUOT: "the quota is used up; free space and run the same command again, it resumes",
    errno.EFBIG: "the file would exceed the file system's or `ulimit -f`'s largest size; raise it and run again",
    errno.EROFS: "the file system is read-only; set output_dir=<a writable directory>",
    errno.EACCES: "permission denied; set output_dir=<a writable directory>",
    errno.EPERM: "not permitted; set output_dir=<a writable directory>",
    errno.ENOTDIR: "a part of this path is a file, not a directory; choose another path",
    errno.EEXIST: "a file is in the way of this directory; choose another path or move it away",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a read-only directory and their like into an error that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else _system_code(str(error))
        if code is None:
            raise
        raise EnvironmentProblem(f"cannot write {path}: {_REMEDIES.get(code, os.strerror(code))}") from error


def _system_code(words: str) -> int | None:
    """safetensors' writer reports the system's errors in words."""
    match = re.search(r"os error (\d+)", words)
    return int(match[1]) if match else None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
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
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
