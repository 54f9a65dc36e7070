"""What Triton and ptxas make of the weight kernels, compiled on the CPU for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.errors import EnvironmentProblem
from compress.kernels import codegen, common

# ptxas 12.9 of a kernel
SERIALIZED = """ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to \
non wgmma instructions defining accumulator registers of a wgmma between start and end of the pipeline stage in the \
function '_producer_kernel'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_producer_kernel' for 'sm_90a'
ptxas info    : Function properties for _producer_kernel
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 5 barriers, 8 bytes cumulative stack size
"""
NO_REGISTERS = "insufficient register resources for the function "  # C7512
CLEAN = SERIALIZED[SERIALIZED.index("ptxas info    : 0 bytes") :].replace(
    "4 bytes spill stores", "0 bytes spill stores"
)


def run(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: in this one kernels are Triton's interpreter's. Its caches are empty."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(directory / "triton"), "XDG_CACHE_HOME": str(directory), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "compress.kernels.codegen", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize(
    ("gpu", "kernels", "schemes"),
    [("A100", "w4a16,w8a8", "w4g128,w8a8"), ("H100", "w4a16,wna16", "w4g32-asym,w3g128")],
)
def test_portable_kernels_compile_for_gpus_that_are_not_here(
    tmp_path: Path, gpu: str, kernels: str, schemes: str
) -> None:
    """Oracle: ptxas: each kernel assembles, nothing serialized, spilled or overwritten (`machine_code`), with
    tensor-core instructions in those that multiply, all but the one that adds up splits."""
    arguments = ["--gpu", gpu, "--kernels", kernels, "--schemes", schemes, "--shapes", "4096x4096", "--tokens", "64"]
    done = run(*arguments, "--out", str(tmp_path / "out"), "--processes", "1", directory=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "codegen.json").read_text())
    products = [row for row in record["kernels"] if row["function"] == f"_{row['kernel']}_kernel"]
    assert {row["kernel"] for row in products} == set(kernels.split(",")) and record["gpu"] == gpu
    assert all(row["mma"] for row in products)
    assert all(not row["serialized"] and not row["spills"] and row["registers"] <= 255 for row in record["kernels"])
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "kernels": len(record["kernels"]), "serialized": 0, "overwritten": 0, "failed": 0
    }  # fmt: skip


@pytest.mark.gpu("hopper")
@pytest.mark.parametrize("scheme", ["w4g128", "w4g128-asym", "w8g128", "w8-channel"])
def test_no_mma_of_the_hopper_kernels_is_serialized(tmp_path: Path, scheme: str) -> None:
    """Oracle: ptxas, of what rules and tables take; where there is the Triton they are written in, for which a machine
    with such a GPU stands."""
    done = run("--schemes", scheme, "--dtype", "float16,bfloat16", "--tokens", "1,16,64,256,1024", directory=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_every_configuration_shows_its_kernels(tmp_path: Path) -> None:
    """Oracle: two configurations that differ in a run-time argument of the product alone, and in a constant of the sum:
    each has rows of both, the product's with equal figures; another GPU in the same process has its own."""
    command = """
from compress.kernels import codegen, w4a16
tasks = [("A100", "w4g128", "w4a16", w4a16.Config(16, 64, s, 4, 3), 16, "float16", 1024) for s in (2, 4)]
first, second = map(codegen.compile_one, tasks)
other = codegen.compile_one(("H100", *tasks[0][1:]))
assert len(first) == len(second) == 2 and first[0] == second[0], (first, second)
assert len(other) == 2 and other[0] != first[0], other
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "A100", "--kernels", "w4a16", "--shapes", "4096x1001", "--schemes", "w4g128"], "takes no 4096x1001"),
        (["--gpu", "A100", "--schemes", "w4g96", "--shapes", "96x4096"], "takes no 96x4096 in w4g96"),
    ],
)
def test_shapes_that_no_kernel_takes(tmp_path: Path, arguments: list[str], message: str) -> None:
    """Oracle: exit code 2 and one line, before anything is compiled."""
    done = run(*arguments, directory=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_reports_of_ptxas() -> None:
    """Oracle: two reports of ptxas, one of a kernel whose MMAs it serialized and that spills."""
    assert codegen.read_report(SERIALIZED, "f", 1024, 8) == codegen.Code(
        "f", 168, 4, 1024, 8,
        "non wgmma instructions defining accumulator registers of a wgmma between start and end of the pipeline stage",
    )  # fmt: skip
    short = SERIALIZED.replace(SERIALIZED[SERIALIZED.index("non wgmma") : SERIALIZED.index("'_prod")], NO_REGISTERS)
    assert codegen.read_report(short, "f", 1024, 8).serialized == "insufficient register resources"
    assert codegen.read_report(CLEAN, "f", 1024, 8) == codegen.Code("f", 168, 0, 1024, 8, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "marlin"], "known are w4a16,"),
        (["--gpu", "TPU"], "invalid choice: 'TPU'"),
        (["--tokens", "many"], "numbers"),
        (["--shapes", "4096"], "N x K, with commas, like 4096x14336"),
        (["--schemes", "int4"], "they read w4g128"),
        (["--dtype", "float32"], "float32: known are float16, bfloat16"),
        (["--kernels", "w8a8", "--schemes", "w4g128"], "none of --kernels w8a8 computes any of --schemes w4g128"),
        (["--kernels", "w4a16_tiled", "--gpu", "A100"], "compute capability 8.0 is not 9.0"),
    ],
)
def test_what_cannot_be_compiled(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    """Oracle: argparse's exit code 2, and the value and the rule."""
    assert message in " ".join(refused(codegen.parse, arguments).split())


def test_an_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the error, which names the variable to unset."""
    monkeypatch.setattr(common, "INTERPRETED", True)
    with pytest.raises(EnvironmentProblem, match="TRITON_INTERPRET=1"), codegen.compiling_for(codegen.MACHINES["H100"]):
        pass


def test_a_cpu_stands_for_a_gpu_only_while_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: multiprocessors and shared memory of the machine named, and those of before behind it, after an error
    too; kernels cannot run on a CPU before and after."""
    import torch

    monkeypatch.setattr(common, "INTERPRETED", False)
    common.device_problem.cache_clear()
    cpu = torch.device("cpu")
    before = common.n_sms(cpu), common.shared_bytes(cpu), common.device_problem(cpu)
    with pytest.raises(ZeroDivisionError), common.cpu_as(codegen.MACHINES["A100"]):
        assert (common.n_sms(cpu), common.shared_bytes(cpu), common.device_problem(cpu)) == (108, 166912, None)
        raise ZeroDivisionError
    assert (common.n_sms(cpu), common.shared_bytes(cpu), common.device_problem(cpu)) == before
    assert "not a CUDA GPU" in str(before[2])
    common.device_problem.cache_clear()
