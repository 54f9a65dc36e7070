"""Entries of dispatch tables for tests, and a directory of the test for this machine's own table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from compress.kernels import dispatch, table_file
from compress.kernels.dispatch import Choice, Entry, Key

CONFIG = {"block_m": 16, "block_n": 64, "split_k": 1, "num_warps": 4, "num_stages": 3, "use_asm": True}


def key(n=4096, k=4096, m=16, gpu="H100", triton="9.9", dtype="float16", scheme="w4g128 sym"):
    return Key(gpu, triton, dtype, scheme, n, k, m)


def entry(us=1.0, kernel="w4a16", **rules):
    return Entry(Choice(kernel, CONFIG | {"split_k": int(us)}), us, **rules)


@contextmanager
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This machine's table in a directory of the test, and nothing kept from other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(dispatch.SEARCH_VARIABLE, raising=False)
    dispatch._searched.clear()
    dispatch.forget()
    yield table_file.user_directory()
    dispatch._searched.clear()
    dispatch.forget()


def ship(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entries: dict[Key, Entry]) -> None:
    """Make `entries`, of one GPU and Triton version, the shipped table."""
    directory = tmp_path / "shipped"
    first = next(iter(entries))
    table_file.write(directory / table_file.file_name(first.gpu, first.triton), first.gpu, first.triton, entries, {})
    monkeypatch.setattr(table_file, "SHIPPED", directory)
    dispatch.forget()
