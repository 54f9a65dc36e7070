"""python -m compress.kernels.codegen: what Triton and ptxas make of the weight kernels, on a machine without a GPU.

Launches configurations with operands on the CPU that stand for some on a GPU (`common.cpu_as`), compiles every kernel
that a launch would run, and shows what ptxas says of it:

    registers      a thread, at launch
    spills         bytes a thread writes to local memory because registers do not suffice
    shared         bytes a program
    mma            tensor-core instructions in the code
    serialized     ptxas put a wait behind every warpgroup MMA, and says why (C75xx)
    overwritten    instructions that write registers which a running MMA may still use (`machine_code`)

Serialized MMAs give right results, only later, overwritten registers wrong ones now and then, and nothing else tells:
so this is looked at before anything is timed. The status is 1 if there are any.

    python -m compress.kernels.codegen                                       # what rules and tables take
    python -m compress.kernels.codegen --all --schemes w8g128 --tokens 64,256 --out DIR      # what `tune` would try
    python -m compress.kernels.codegen --kernels w4a16 --gpu A100 --tokens 1

The kernels for Hopper need the Triton they are written in (`choose.GLUON_TRITON`).
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from compress.arguments import numbers, run_command, shapes
from compress.atomic import write_json
from compress.errors import ConfigError, EnvironmentProblem
from compress.kernels import common, dispatch, machine_code, table_file
from compress.kernels.choose import hopper_problem
from compress.kernels.common import Machine
from compress.kernels.problem import Scheme
from compress.kernels.search import allowed
from compress.kernels.tunables import TUNABLES, Tunable, add_arguments, in_words, specimens, usable

MACHINES = {"H100": Machine((9, 0), 132, common.HOPPER_BYTES), "A100": Machine((8, 0), 108, 166912)}


@dataclass(frozen=True)
class Code:
    """One compiled kernel; see the module docstring."""

    function: str
    registers: int
    spills: int
    shared: int
    mma: int
    serialized: str | None
    overwritten: list[str] = field(default_factory=list)


class _NoGpu:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        self.device = f"none of sm_{self.target.arch}"  # kernels are kept by device: apart from those of a real one

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: str) -> int:
        return 0


def check_compiles() -> None:
    """
    Raises:
        EnvironmentProblem: Triton's interpreter is on, which compiles nothing.
    """
    if common.INTERPRETED:
        raise EnvironmentProblem("TRITON_INTERPRET=1 is set, and an interpreter compiles nothing; unset it")


@contextmanager
def compiling_for(machine: Machine) -> Iterator[list[Code]]:
    """Launches with operands on the CPU compile for `machine` and run nothing. Yields a list that takes what ptxas says
    of each kernel that they would run, once; Triton's cache on disk is left out.

    Raises:
        EnvironmentProblem: see `check_compiles`.
    """
    check_compiles()
    found: list[Code] = []
    seen: set[str] = set()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        said = io.StringIO()
        with redirect_stdout(said):  # where Triton puts what ptxas says
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if said.getvalue():
            mma = len(_MMA.findall(kernel.asm["ptx"]))
            code = read_report(said.getvalue(), kernel.metadata.name, kernel.metadata.shared, mma)
            if "wgmma" in kernel.asm["ptx"]:  # the only ones that run on behind what follows them
                sass = machine_code.disassemble(kernel.asm["cubin"])
                code = replace(code, overwritten=machine_code.overwritten(machine_code.read(sass)))
            _codes[kernel.hash] = code
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            found.append(_codes[kernel.hash])

    driver, knobs = triton.runtime.driver, triton.knobs
    before = driver._active
    driver.set_active(_NoGpu(machine.capability))
    JITFunction.run = compile_only  # type: ignore[method-assign]
    try:
        with knobs.compilation.scope(), knobs.nvidia.scope(), common.cpu_as(machine):
            knobs.compilation.always_compile = True
            knobs.nvidia.dump_ptxas_log = True
            yield found
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
        driver._active = before


_codes: dict[str, Code] = {}  # by hash: Triton compiles a kernel once in a process
_MMA = re.compile(r"^\s+(?:@%p\d+ )?(?:wgmma\.mma_async|mma\.sync)", re.MULTILINE)


def read_report(said: str, function: str, shared: int, mma: int) -> Code:
    """What `ptxas -v` says of one kernel."""
    registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
    spills = sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))
    serial = re.search(r"wgmma\.mma_async instructions are serialized due to (.*?) (?:in|for) (?:the )?function", said)
    return Code(function, registers, spills, shared, mma, serial[1] if serial else None)


# -- what to compile --------------------------------------------------------------------------------------

Task = tuple[str, str, str, Any, int, str, int]  # GPU, scheme, kernel, configuration, M, dtype, K


class _AsIf:
    """A packed weight that says it is larger: as much as a kernel's rule asks for."""

    def __init__(self, weight: Any, n: int, k: int) -> None:
        self._weight, self.n, self.k = weight, n, k

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weight, name)


@cache
def _packed(scheme: Scheme, kernel: str, n: int, k: int, dtype: torch.dtype) -> Any:
    return TUNABLES[kernel].pack(scheme.problem(n, k, "cpu"), dtype)


def _depth(scheme: Scheme) -> int:
    """K of specimens: whole groups."""
    return math.lcm(1024, scheme.group or 1)


def tasks(args: argparse.Namespace) -> Iterator[Task]:
    """Each configuration of each kernel once, with an M it is for: of the whole grid, or of the rules and the tables.

    Raises:
        ConfigError: a shape that a kernel does not take.
    """
    for scheme, dtype in itertools.product(args.schemes, args.dtypes):
        for name in args.kernels or usable(not _hopper_problem(args.gpu), scheme):
            if not TUNABLES[name].computes(scheme):
                continue
            depths = {_depth(scheme)} if scheme.group else {k for _, k in args.shapes}
            for n, k in args.shapes:
                if not TUNABLES[name].takes(n, k) or k % (scheme.group or k):
                    raise ConfigError(f"{name} takes no {n}x{k} in {scheme.label}; name other --shapes, or --kernels")
            with common.cpu_as(MACHINES[args.gpu]):
                found = _configurations(TUNABLES[name], scheme, getattr(torch, dtype), args)
            for (config, m), k in itertools.product(found.items(), sorted(depths)):
                yield args.gpu, scheme.label, name, config, m, dtype, k


def _configurations(tunable: Tunable, scheme: Scheme, dtype: torch.dtype, args: argparse.Namespace) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for m, (n, k) in itertools.product(sorted(args.ms), args.shapes):
        weight = _AsIf(_packed(scheme, tunable.name, 64, _depth(scheme), dtype), n, k)
        configs = allowed(tunable, m, n, k, weight) if args.all else [tunable.default(m, weight)]
        for config in configs:
            if config is not None:
                found.setdefault(config, m)
    if not args.all:
        for key, entry in table_file.load(args.gpu, dispatch.triton_version()).items():
            bits, group, symmetric, int8 = dispatch.parse_scheme(key.scheme, key.k)
            config = dispatch.as_config(entry.choice, tunable.name, tunable.config)
            if config is not None and Scheme(bits, group if group < key.k else None, symmetric, int8) == scheme:
                found.setdefault(config, key.m)
    return found


def compile_one(task: Task) -> list[Code] | str:
    """Every kernel that launches of a configuration run (`specimens`), or why that cannot be."""
    gpu, label, name, config, m, dtype_name, k = task
    scheme, dtype, machine = Scheme.parse(label), getattr(torch, dtype_name), MACHINES[gpu]
    try:
        with compiling_for(machine) as found:
            for n, depth in specimens(config, scheme, k, machine.n_sms, m):
                x = torch.zeros(m, depth, dtype=dtype)
                TUNABLES[name].launch(x, _packed(scheme, name, n, depth, dtype), config)
    except Exception as problem:  # what does not compile is an answer, shown like the others
        return f"{type(problem).__name__}: {_last_line(problem)}"
    return found


def _last_line(problem: BaseException) -> str:
    while problem.__cause__ is not None:  # Triton's errors quote the source that calls the culprit
        problem = problem.__cause__
    return (str(problem).strip().splitlines() or [""])[-1][:200]


def _hopper_problem(gpu: str) -> str | None:
    return hopper_problem(MACHINES[gpu].capability, dispatch.triton_version())


# -- the command ------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=MACHINES, default="H100")
    add_arguments(parser)
    parser.add_argument(
        "--shapes", type=shapes, default="4096x4096,28672x4096,4096x14336,2560x9728", help="N x K for the rules"
    )
    parser.add_argument(
        "--tokens", dest="ms", type=numbers, default="1,12,16,40,64,96,128,150,256,300,600,1024",
        help="values of M for the rules",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="every configuration that tune would try at these M")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="directory for codegen.json")
    args = parser.parse_args(argv)
    wrong = _hopper_problem(args.gpu)
    if wrong and any(TUNABLES[name].hopper for name in args.kernels):
        parser.error(f"--kernels: those for Hopper do not compile here: {wrong}")
    if args.kernels and not any(TUNABLES[name].computes(scheme) for name in args.kernels for scheme in args.schemes):
        labels = ",".join(scheme.label for scheme in args.schemes)
        parser.error(f"none of --kernels {','.join(args.kernels)} computes any of --schemes {labels}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check_compiles()
    every = list(tasks(args))
    if not every:
        labels = ",".join(scheme.label for scheme in args.schemes)
        raise ConfigError(f"no kernel of {args.gpu} computes --schemes {labels}, so there is nothing to compile")
    print(f"{len(every)} configurations for an {args.gpu}, triton {triton.__version__}")
    print(f"{'registers':>9} {'spills':>6} {'shared':>7} {'mma':>4}  kernel, configuration")
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(max(1, min(args.processes, len(every)))) as pool:
        for task, codes in zip(every, pool.imap(compile_one, every), strict=True):
            rows += show(task, codes)
    serialized, overwritten = (sum(bool(row.get(what)) for row in rows) for what in ("serialized", "overwritten"))
    failed = sum("problem" in row for row in rows)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "codegen.json", {"gpu": args.gpu, "triton": triton.__version__, "kernels": rows})
    print(json.dumps({"kernels": len(rows), "serialized": serialized, "overwritten": overwritten, "failed": failed}))
    if serialized or overwritten or failed:
        sys.exit(
            f"{serialized} kernels have serialized MMAs, {overwritten} write registers of running ones, {failed} "
            "configurations do not compile"
        )


def show(task: Task, codes: list[Code] | str) -> list[dict[str, Any]]:
    """Prints the kernels of a configuration and returns them as records."""
    _, label, name, config, m, dtype, _ = task
    place = {"kernel": name, "scheme": label, "dtype": dtype, "m": m, "config": vars(config)}
    what = f"{label} {dtype} {in_words(vars(config))}"
    if isinstance(codes, str):
        print(f"{name} {what}: {codes}", flush=True)
        return [place | {"problem": codes}]
    for code in codes:
        print(f"{code.registers:9} {code.spills:6} {code.shared:7} {code.mma:4}  {code.function} {what}", flush=True)
        if code.serialized:
            print(f"{'':9} SERIALIZED: {code.serialized}", flush=True)
        for instruction in code.overwritten:
            print(f"{'':9} OVERWRITTEN: {instruction}", flush=True)
    return [place | asdict(code) for code in codes]


if __name__ == "__main__":
    run_command(main)
