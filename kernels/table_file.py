"""Tables of `dispatch` as files: the shipped ones, and the one that this machine adds to.

One JSON file for a GPU and a Triton version, `H100_triton3.6.json`, one entry a line:

    {"format": 1, "gpu": "H100", "triton": "3.6", "about": {free text and numbers: machine, command},
     "kernels": {"w4a16": {"n_multiple": 1, "k_multiple": 1}},
     "entries": [
      {"dtype": "float16", "scheme": "w4g128 sym", "n": 4096, "k": 4096, "m": 1, "kernel": "w4a16",
       "config": {"block_m": 16, ...}, "us": 8.2},
      ...]}

Shipped: `kernels/tables/`. This machine's: $XDG_CACHE_HOME/compress-llm/<version>/kernels/ (~/.cache without it), whose
entries win. The version is this package's, because another one may have other kernels.
A damaged file of this machine is named in a warning and counts as empty; the next search replaces it. A damaged shipped
file is a broken installation and raises.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import compress
from compress.atomic import write_atomically
from compress.errors import EnvironmentProblem
from compress.kernels.dispatch import Choice, Entry, Key, Table, m_bucket

log = logging.getLogger(__name__)

FORMAT = 2  # counts up when a field of a configuration changes its meaning but not its name
SHIPPED = Path(__file__).parent / "tables"


class Damaged(ValueError):
    """A table that is not of this format."""


def file_name(gpu: str, triton: str) -> str:
    return f"{gpu.replace(' ', '-').replace('/', '-')}_triton{triton}.json"


def user_directory() -> Path:
    """XDG base directories: a relative $XDG_CACHE_HOME is to be ignored."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (base if base.is_absolute() else Path.home() / ".cache") / "compress-llm" / compress.__version__ / "kernels"


@lru_cache(maxsize=16)
def load(gpu: str, triton: str) -> Table:
    """Shipped entries overlaid with this machine's; empty where there is no file."""
    shipped = SHIPPED / file_name(gpu, triton)
    try:
        entries = read(shipped, gpu, triton)
    except Damaged as problem:
        raise EnvironmentProblem(f"{shipped} is damaged ({problem}); install the package again") from problem
    return MappingProxyType(entries | _read_own(user_directory() / file_name(gpu, triton), gpu, triton))


def _read_own(path: Path, gpu: str, triton: str) -> dict[Key, Entry]:
    try:
        return read(path, gpu, triton)
    except Damaged as problem:
        log.warning("ignoring kernel table %s: %s; the next search writes it anew, or delete it", path, problem)
        return {}
    except OSError as problem:
        log.warning("cannot read kernel table %s: %s; using the shipped table alone", path, problem)
        return {}


def read(path: Path, gpu: str, triton: str) -> dict[Key, Entry]:
    """The entries of a file, {} if there is none.

    Raises:
        Damaged: not JSON, another format, another GPU or Triton than asked for, or an entry that does not fit.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:  # of JSON and of UTF-8 alike
        raise Damaged(f"not JSON: {error}") from error
    return parse(value, gpu, triton)


def parse(value: Any, gpu: str, triton: str) -> dict[Key, Entry]:
    """See `read`."""
    try:
        head = (value["format"], value["gpu"], value["triton"])
        if head != (FORMAT, gpu, triton):
            raise Damaged(f"format, GPU and Triton are {head}, expected {(FORMAT, gpu, triton)}")
        rules = {name: (rule["n_multiple"], rule["k_multiple"]) for name, rule in value["kernels"].items()}
        return dict(_parse_entry(item, rules, gpu, triton) for item in value["entries"])
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error


def _parse_entry(item: Any, rules: dict[str, tuple[int, int]], gpu: str, triton: str) -> tuple[Key, Entry]:
    key = Key(gpu, triton, item["dtype"], item["scheme"], item["n"], item["k"], item["m"])
    config = item["config"]
    numbers = [key.n, key.k, key.m, *rules[item["kernel"]], *config.values()]
    if not all(isinstance(v, int) for v in numbers) or min(key.n, key.k) < 1 or key.m != m_bucket(key.m):
        raise Damaged(f"entry {item}: N, K, the bucket of M and the configuration must be whole numbers")
    return key, Entry(Choice(item["kernel"], MappingProxyType(config)), float(item["us"]), *rules[item["kernel"]])


def write(path: Path, gpu: str, triton: str, entries: Table, about: dict[str, Any]) -> None:
    """The inverse of `read`, atomically. `about` says how the entries came to be.

    Raises:
        EnvironmentProblem: the disk is full or not writable.
    """
    rules: dict[str, dict[str, int]] = {}
    lines = []
    for key, entry in sorted(entries.items()):
        rules[entry.choice.kernel] = {"n_multiple": entry.n_multiple, "k_multiple": entry.k_multiple}
        fields = {"dtype": key.dtype, "scheme": key.scheme, "n": key.n, "k": key.k, "m": key.m}
        chosen = {"kernel": entry.choice.kernel, "config": dict(entry.choice.config), "us": round(entry.us, 3)}
        lines.append("  " + json.dumps(fields | chosen, allow_nan=False))
    head = {"format": FORMAT, "gpu": gpu, "triton": triton, "about": about, "kernels": rules}
    text = json.dumps(head, indent=1, allow_nan=False)[:-2] + ',\n "entries": [\n' + ",\n".join(lines) + "\n ]\n}\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def remember(found: Table, about: dict[str, Any]) -> Path | None:
    """Add entries of one GPU and Triton version to this machine's file; None, with a warning, if it cannot be written.

    Processes that search at the same time take turns, so that none loses what another found.
    """
    first = next(iter(found))
    path = user_directory() / file_name(first.gpu, first.triton)
    try:
        with _turn(path):
            merged = _read_own(path, first.gpu, first.triton) | dict(found)
            write(path, first.gpu, first.triton, merged, about)
    except (OSError, EnvironmentProblem) as problem:
        log.warning("what the search found is not kept: %s; set XDG_CACHE_HOME to a writable directory", problem)
        return None
    return path


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
