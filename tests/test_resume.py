"""Kill and run again: whatever the moment, the same bytes come out, and nothing finished is done twice.

Runs are killed with SIGKILL from inside, at a chosen point, in processes forked from a server that has imported
torch once; one run is the real command line, killed from outside.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import ROOT, command_line, hashes, overrides, stages, tiny_config, verify_in_process

from compress.config import RunConfig
from compress.config_quant import AwqConfig, ObserverName
from compress.pipeline import run_pipeline

forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["compress.pipeline", "transformers.models.llama.modeling_llama", "tiny_runs"])


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after(target: str, call: int = 1) -> Callable[[pytest.MonkeyPatch], None]:
    """Kill the process when `target` has returned for the `call`-th time."""

    def install(patch: pytest.MonkeyPatch) -> None:
        from pkgutil import resolve_name

        module, _, name = target.rpartition(".")
        owner = resolve_name(module)
        real, calls = getattr(owner, name), [0]

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            calls[0] += 1
            if calls[0] == call:
                _die()
            return result

        patch.setattr(owner, name, wrapped)

    return install


def _after_stage(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Kill the process when a stage is finished and recorded."""

    def install(patch: pytest.MonkeyPatch) -> None:
        from compress.state import RunState

        real = RunState.run

        def run(self: RunState, stage: str, *args: Any, **kwargs: Any) -> Any:
            outcome = real(self, stage, *args, **kwargs)
            if stage == name:
                _die()
            return outcome

        patch.setattr(RunState, "run", run)

    return install


# point -> (where to die, stages recorded by then), in the order in which one run passes them
POINTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], list[str]]] = {
    "block 0 saved": (_after("compress.blocks.save_block"), []),
    "block 1 half written": (_after("compress.checkpoint.save_file"), []),
    "artifact half written": (_after("compress.artifact.save_file"), []),
    "old artifact moved aside": (_after("compress.artifact.os.replace", 2), []),
    "artifact in place": (_after("compress.artifact.replace_directory"), []),
    "quantize": (_after_stage("quantize"), ["quantize"]),
    "verify": (_after_stage("verify"), ["quantize", "verify"]),
    "eval": (_after_stage("eval"), ["eval", "quantize", "verify"]),
}


def _run(config: RunConfig, point: str) -> None:
    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        verify_in_process(patch)
        if point in POINTS:
            POINTS[point][0](patch)
        run_pipeline(config)


def _in_child(config: RunConfig, point: str = "") -> int | None:
    child = forked.Process(target=_run, args=(config, point))
    child.start()
    child.join()
    return child.exitcode


@pytest.fixture
def config(tiny_model_dir: Path, tmp_path: Path) -> RunConfig:
    return tiny_config(tiny_model_dir, tmp_path, run_dir=str(tmp_path / "killed"))


@pytest.fixture(scope="module")
def undisturbed(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of what a run that nobody kills leaves, artifact and expected logits."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert _in_child(tiny_config(tiny_model_dir, folder, run_dir=str(folder / "whole"))) == 0
    return _products(folder / "whole")


def _products(run_dir: Path) -> dict[str, str]:
    """Without the model card, which names the command that made it."""
    files = {n: h for n, h in hashes(run_dir).items() if n.startswith(("artifact/", "verify."))}
    files.pop("artifact/README.md", None)
    return files


@pytest.mark.parametrize("point", POINTS)
def test_killed_once_anywhere(point: str, config: RunConfig, undisturbed: dict[str, str]) -> None:
    """Oracle: sha256 of every file of a run that was not killed."""
    assert _in_child(config, point) == -signal.SIGKILL
    run_dir = Path(config.run_dir or "")
    assert stages(run_dir) == POINTS[point][1]
    assert _in_child(config) == 0
    assert _products(run_dir) == undisturbed
    assert not list(run_dir.rglob("*.tmp")) and not (run_dir / "checkpoints").exists()


def test_killed_again_and_again(config: RunConfig, undisturbed: dict[str, str]) -> None:
    """Oracle: as above, with one run directory killed at every point in turn; each start goes on, so that a point
    is reached although everything before it was killed as well. The last start does no stage again."""
    run_dir = Path(config.run_dir or "")
    for point in POINTS:
        if point != "block 1 half written":  # block 0 is not written again
            assert _in_child(config, point) == -signal.SIGKILL, point
            assert stages(run_dir) == POINTS[point][1], point
    before = (run_dir / "state.json").read_bytes()
    assert _in_child(config) == 0
    assert (run_dir / "state.json").read_bytes() == before
    assert _products(run_dir) == undisturbed


def test_finished_block_is_not_quantized_again(config: RunConfig) -> None:
    """Oracle: modification time of the first block's checkpoint, through a second run that is killed later."""
    assert _in_child(config, "block 0 saved") == -signal.SIGKILL
    (block,) = Path(config.run_dir or "").rglob("block_0000.safetensors")
    written = block.stat().st_mtime_ns
    assert _in_child(config, "artifact half written") == -signal.SIGKILL
    assert block.stat().st_mtime_ns == written and len(list(block.parent.glob("block_*.safetensors"))) == 2


def test_old_artifact_survives_until_the_new_one_is_whole(config: RunConfig, undisturbed: dict[str, str]) -> None:
    """Oracle: with force, a kill in the middle of writing leaves the first artifact as it was."""
    assert _in_child(config) == 0
    run_dir = Path(config.run_dir or "")
    assert _in_child(replace(config, force=True), "artifact half written") == -signal.SIGKILL
    assert _products(run_dir) == undisturbed


def test_command_line_killed_from_outside(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Oracle: sha256 of every file of an undisturbed run of the same settings, made without a command line. With the
    first process stopped, a second one into the same directory ends with exit code 2 and names the holder."""
    config = tiny_config(tiny_model_dir, tmp_path)
    arguments = [*overrides(config), "quant.awq.n_grid=60"]  # slow enough to be caught
    killed = f"run_dir={tmp_path / 'killed'}"
    command = [sys.executable, "-m", "compress", *arguments, killed]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed/checkpoints/*/block_0000.safetensors")):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)
    second = command_line(*arguments, killed)
    assert (second.returncode, second.stdout) == (2, "")
    assert f"is in use by process {first.pid}" in second.stderr and "Traceback" not in second.stderr
    first.kill()
    assert first.communicate()[0] == "" and first.returncode == -signal.SIGKILL
    assert stages(tmp_path / "killed") == []

    again = command_line(*arguments, killed)
    assert again.returncode == 0, again.stderr
    assert "resumed: 1 of 2 blocks" in again.stderr
    quant = replace(config.quant, awq=AwqConfig(n_grid=60))
    quant = replace(quant, scheme=replace(quant.scheme, observer=ObserverName.mse))  # as recipe=awq_gptq4 has it
    assert _in_child(replace(config, name="awq_gptq4", quant=quant, run_dir=str(tmp_path / "whole"))) == 0
    assert _products(tmp_path / "killed") == _products(tmp_path / "whole")
