"""Lint, formatting and types. Oracles: ruff and mypy with the settings in pyproject.toml."""

from __future__ import annotations

import re
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
    """Oracle: mypy, over the whole package and a module with one mistake in each of two imports, finds these two and
    nothing else: it cannot pass by overlooking kernels or eval."""
    wrong = ["from compress.eval.roofline import no_such_name", "from compress.kernels.choose import nor_this"]
    (wheel_shaped_tree / "probe.py").write_text("\n".join(wrong) + "\n")
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", *options, "-p", "compress", "-m", "probe"]
    done = subprocess.run(command, cwd=wheel_shaped_tree, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert [line.split(":")[:2] for line in found] == [["probe.py", "1"], ["probe.py", "2"]], done.stdout + done.stderr
    assert all("has no attribute" in line for line in found), done.stdout


def test_readme_maps_every_module() -> None:
    """Oracle: the folders themselves: README's tables name each module of the package, and none that is not there."""
    tables = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Architecture\n")[1].split("\n## ")[0]
    named = {
        name for row in tables.splitlines() if row[:1] == "|" for name in re.findall(r"[\w/*]+\.py", row.split("|")[1])
    }
    paths = [p for folder in ("compress", "kernels", "eval") for p in (ROOT / folder).glob("[!_]*.py")]
    patterns = [name.rpartition("/")[2] for name in named]
    assert [p.name for p in paths if not any(p.match(pattern) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not any(p.match(pattern) for p in paths)] == []


def test_suite_cannot_reach_the_network() -> None:
    """Oracle: an address of the block reserved for documentation (RFC 5737) and a host name are refused by the guard
    in conftest.py, not by the network; a local socket pair still connects."""
    with socket.socket() as outward, pytest.raises(RuntimeError, match="must not touch the network"):
        outward.connect(("192.0.2.1", 80))
    with pytest.raises(RuntimeError, match="must not touch the network"):
        socket.create_connection(("example.org", 80), timeout=1)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        server.accept()[0].close()
