"""python -m compress.kernels.tune: time the W4A16 kernel over a grid of configurations, to fill `w4a16.choose_config`.

Metric: microseconds a call as in `compress.kernels.bench`; a configuration whose relative error against float64 passes
0.01 is reported as wrong. Kernels are compiled first, by several processes that share Triton's cache, because compiling
takes far longer than timing and runs one kernel at a time in one process. Prints the best five of each cell and what
`choose_config` takes there; --out DIR keeps everything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from compress.errors import EnvironmentProblem
from compress.kernels import timing, w4a16
from compress.kernels.bench import GROUP, MAX_ERROR, Problem, describe_machine, roofline_us
from compress.kernels.reference import relative_error


def grid(m: int) -> Iterator[w4a16.Config]:
    """Configurations worth timing at M = m, split_k excluded (it is a run-time argument of a compiled kernel)."""
    if m <= 64:
        block_m = max(16, 1 << (m - 1).bit_length())
        for (block_n, warps), stages in itertools.product(((64, 4), (128, 4), (128, 8)), (2, 3, 4)):
            yield w4a16.Config(block_m, block_n, 1, warps, stages)
        yield w4a16.Config(block_m, 64, 1, 4, 4, use_asm=False)
        return
    tiles = ((32, 128, 8), (64, 64, 4), (64, 128, 8), (64, 256, 8), (128, 64, 4), (128, 128, 8))
    for (block_m, block_n, warps), stages in itertools.product(tiles, (2, 3, 4)):
        yield w4a16.Config(block_m, block_n, 1, warps, stages)
    yield w4a16.Config(128, 128, 1, 8, 3, use_asm=False)


def splits(m: int, n: int, k: int, config: w4a16.Config) -> list[int]:
    """split_k values worth timing: up to 8 programs a multiprocessor of a large GPU, two tiles of K each at least."""
    programs = -(-n // config.block_n) * -(-m // config.block_m)
    return [s for s in (1, 2, 4, 8, 16) if s == 1 or (s * programs <= 8 * 132 and 2 * s <= k // GROUP and m <= 256)]


def _compile(task: tuple[w4a16.Config, int, str]) -> str | None:
    """Compile one kernel into Triton's disk cache by running it on a small problem with the same specialization."""
    config, m, dtype = task
    codes = torch.zeros(512, 1024, dtype=torch.uint8, device="cuda")
    scale = torch.ones(512, 8, dtype=getattr(torch, dtype), device="cuda")
    x = torch.ones(m, 1024, dtype=scale.dtype, device="cuda")
    try:
        for split in (1, 2):
            w4a16.launch(x, w4a16.pack_kernel_layout(codes, scale, None), config=_with_split(config, split))
        torch.cuda.synchronize()
    except Exception as problem:  # an invalid configuration is a result of the search: reported, not hidden
        return f"{type(problem).__name__}: {str(problem)[:200]}"
    return None


def _with_split(config: w4a16.Config, split: int) -> w4a16.Config:
    return w4a16.Config(**{**vars(config), "split_k": split})


def compile_all(ms: list[int], dtype: str, processes: int) -> tuple[dict[int, list[w4a16.Config]], list[str]]:
    """Configurations of each M that compile and launch, and why the others do not."""
    tasks = [(config, m, dtype) for m in ms for config in grid(m)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        problems = pool.map(_compile, tasks, chunksize=1)
    usable: dict[int, list[w4a16.Config]] = {m: [] for m in ms}
    failed = []
    for (config, m, _), problem in zip(tasks, problems, strict=True):
        if problem is None:
            usable[m].append(config)
        else:
            failed.append(f"M={m} {config}: {problem}")
    return usable, failed


def tune_shape(n: int, k: int, usable: dict[int, list[w4a16.Config]], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Every usable configuration and split at [n, k], fastest first for each M."""
    problem = Problem(n, k, "cuda")
    weight = w4a16.pack_kernel_layout(problem.codes, problem.scale.to(dtype), None)
    copies = [
        w4a16.KernelWeight(words, scale, None, n, k, weight.group_size)
        for words, scale in timing.rotating_copies((weight.words, weight.scale))
    ]
    results = []
    for m, configs in usable.items():
        x64 = problem.x(m)
        reference = x64 @ problem.dense.t()
        x = x64.to(dtype)
        cells = []
        for config in configs:
            for split in splits(m, n, k, config):
                full = _with_split(config, split)

                def call(w: w4a16.KernelWeight, x: torch.Tensor = x, full: w4a16.Config = full) -> torch.Tensor:
                    return w4a16.launch(x, w, config=full)

                error = relative_error(call(copies[-1]), reference)
                right = error < MAX_ERROR
                us = timing.time_gpu(call, copies, graph_ms=1.5, replays=5) if right else None
                cells.append({"n": n, "k": k, "m": m, **vars(full), "error": error if right else None, "us": us})
        results += sorted(cells, key=lambda c: c["us"] or float("inf"))
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,14336x4096,4096x14336,28672x4096")
    parser.add_argument("--ms", default="1,16,64,256,1024")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise EnvironmentProblem("tuning needs a CUDA GPU; python -m compress.kernels.bench also runs on a CPU")
    torch.set_grad_enabled(False)
    ms = [int(m) for m in args.ms.split(",")]
    began = time.time()
    usable, failed = compile_all(ms, args.dtype, args.processes)
    print(f"compiled {sum(map(len, usable.values()))} kernels in {time.time() - began:.0f} s; unusable: {failed}")
    machine = describe_machine("cuda")
    print(json.dumps(machine))
    cells: list[dict[str, Any]] = []
    for pair in args.shapes.split(","):
        n, k = (int(v) for v in pair.split("x"))
        found = tune_shape(n, k, usable, getattr(torch, args.dtype))
        cells += found
        for m in ms:
            chosen = w4a16.choose_config(m, n, k, machine["multiprocessors"])
            here = [c for c in found if c["m"] == m]
            wrong = sum(c["us"] is None for c in here)
            print(f"N={n} K={k} M={m}: roof {roofline_us(m, n, k, machine):.1f} us, {len(here)} tried, {wrong} wrong")
            for c in here[:4] + [c for c in here[4:] if all(c[f] == v for f, v in vars(chosen).items())]:
                mark = " <- chosen" if all(c[f] == v for f, v in vars(chosen).items()) else ""
                print("   {us:8.1f}  bm{block_m} bn{block_n} split{split_k} w{num_warps} s{num_stages} "
                      "asm{use_asm:d} err {error:.1e}".format(**c) + mark)  # fmt: skip
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(
                {"metric": "us_per_call", "machine": machine, "unusable": failed, "cells": cells}, indent=1
            )
            (args.out / "tune_w4a16.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
