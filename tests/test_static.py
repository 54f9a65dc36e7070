"""Lint, formatting and types. Oracles: ruff and mypy with the settings in pyproject.toml."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["compress", "kernels", "eval", "tests"]


def check(*command: str, cwd: Path = ROOT) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_ruff_finds_nothing() -> None:
    """Oracle: `ruff check` exits 0 on all Python of the checkout."""
    check("ruff", "check", *SOURCES)


def test_formatting() -> None:
    """Oracle: `ruff format --check` would change nothing."""
    check("ruff", "format", "--check", *SOURCES)


@pytest.fixture
def wheel_shaped_tree(tmp_path: Path) -> Path:
    """The package as a wheel lays it out, in links: mypy does not follow the `__path__` that a checkout extends."""
    package = tmp_path / "compress"
    package.mkdir()
    for child in (ROOT / "compress").iterdir():
        (package / child.name).symlink_to(child)
    for name in ("kernels", "eval", "recipes"):
        (package / name).symlink_to(ROOT / name)
    return tmp_path


def test_types(wheel_shaped_tree: Path) -> None:
    """Oracle: mypy accepts the whole package, kernels and eval included."""
    cache = ROOT / ".mypy_cache"
    config = ROOT / "pyproject.toml"
    command = ["mypy", "--config-file", str(config), "--cache-dir", str(cache), "-p", "compress"]
    check(*command, cwd=wheel_shaped_tree)


def test_type_check_sees_kernels_and_eval(wheel_shaped_tree: Path) -> None:
    """Oracle: mypy's own list of what it read holds a module of compress.eval, so the test above cannot pass by
    overlooking a folder."""
    (wheel_shaped_tree / "probe.py").write_text("from compress.eval.roofline import no_such_name\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "probe.py"],
        cwd=wheel_shaped_tree,
        capture_output=True,
        text=True,
    )
    assert 'has no attribute "no_such_name"' in done.stdout, done.stdout + done.stderr


def test_suite_cannot_reach_the_network() -> None:
    """Oracle: an address of the block reserved for documentation (RFC 5737) and a host name are refused by the guard
    in conftest.py, not by the network; a local socket pair still connects."""
    with socket.socket() as outward, pytest.raises(RuntimeError, match="must not touch the network"):
        outward.connect(("192.0.2.1", 80))
    with pytest.raises(RuntimeError, match="must not touch the network"):
        socket.create_connection(("example.org", 80), timeout=1)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        server.accept()[0].close()
