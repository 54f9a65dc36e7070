"""python -m compress.kernels.tune: time W4A16 kernels over their configurations and write tables for `dispatch`.

Metric: microseconds a call as in `compress.kernels.bench`; a configuration whose relative error against float64 passes
0.01 is reported as wrong. Kernels are compiled first, by several processes that share Triton's cache, because compiling
takes far longer than timing and runs one kernel at a time in one process. Prints the best of each cell and what the
kernel's own rule takes there; --out DIR keeps everything, --table DIR adds the best of each cell to the table of this
GPU and Triton version there (`kernels/tables` is what is shipped).

`search` is the same for one key within a budget of seconds, for machines without a table (COMPRESS_KERNEL_SEARCH=1).
A kernel takes part by its `Tunable` in TUNABLES.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compress.errors import ConfigError, EnvironmentProblem
from compress.kernels import dispatch, table_file, timing, w4a16, w4a16_decode, w4a16_tiled
from compress.kernels.bench import MAX_ERROR, describe_machine, one_line
from compress.kernels.bench_report import roofline_us
from compress.kernels.choose import capability
from compress.kernels.common import n_sms, shared_bytes
from compress.kernels.dispatch import Choice, Entry, Key
from compress.kernels.problem import GROUP, Problem
from compress.kernels.reference import relative_error

log = logging.getLogger(__name__)

SEARCH_BUDGET_S = 10.0


@dataclass(frozen=True)
class Tunable:
    """A kernel and the configurations worth trying.

    grid(m): configurations that compile to different kernels. expand(m, n, k, config): those that differ in run-time
    arguments only. default(m, n, k): the kernel's own rule, None where it does not take the shape.
    """

    name: str
    config: type
    grid: Callable[[int], Iterator[Any]]
    expand: Callable[[int, int, int, Any], list[Any]]
    default: Callable[[int, int, int], Any]
    pack: Callable[[Problem, torch.dtype], Any]
    launch: Callable[[torch.Tensor, Any, Any], torch.Tensor]
    n_multiple: int = 1
    k_multiple: int = 1
    hopper: bool = False

    def takes(self, n: int, k: int) -> bool:
        return n % self.n_multiple == 0 and k % self.k_multiple == 0


def _w4a16_grid(m: int) -> Iterator[w4a16.Config]:
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


def _w4a16_splits(m: int, n: int, k: int, config: w4a16.Config) -> list[w4a16.Config]:
    """split_k values worth timing: up to 8 programs a multiprocessor of a large GPU, two tiles of K each at least."""
    programs = -(-n // config.block_n) * -(-m // config.block_m)
    counts = [s for s in (1, 2, 4, 8, 16) if s == 1 or (s * programs <= 8 * 132 and 2 * s <= k // GROUP and m <= 256)]
    return [replace(config, split_k=s) for s in counts]


def _w4a16_default(m: int, n: int, k: int) -> w4a16.Config:
    return w4a16.choose_config(
        m, n, k, torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    )


def _w4a16_pack(p: Problem, dtype: torch.dtype) -> w4a16.KernelWeight:
    return w4a16.pack_kernel_layout(p.codes, p.scale.to(dtype), None if p.symmetric else p.zero)


W4A16 = Tunable(
    name="w4a16",
    config=w4a16.Config,
    grid=_w4a16_grid,
    expand=_w4a16_splits,
    default=_w4a16_default,
    pack=_w4a16_pack,
    launch=lambda x, weight, config: w4a16.launch(x, weight, config=config),
)


def _decode_grid(m: int) -> Iterator[w4a16_decode.DecodeConfig]:
    if m > 16:
        return
    block_m = 8 if m <= 8 else 16
    for (block_n, warps), stages in itertools.product(
        ((16, 8), (16, 4), (32, 8), (32, 4), (64, 4), (128, 4)), (2, 3, 4)
    ):
        if block_n * block_m * stages <= (2048 if m <= 8 else 1024):
            yield w4a16_decode.DecodeConfig(block_m, block_n, warps, stages)


DECODE = replace(
    W4A16,
    name="w4a16_decode",
    config=w4a16_decode.DecodeConfig,
    grid=_decode_grid,
    expand=lambda m, n, k, config: [config],
    default=lambda m, n, k: w4a16_decode.choose_config(m, n, k) if m <= 16 else None,
    n_multiple=8,
    k_multiple=128,
    hopper=True,
)


# (block_n, warps, stages) by block_m: what won or came close somewhere on an H100
_TILES = {
    16: ((64, 4, 3), (64, 4, 6), (128, 4, 3), (128, 4, 6), (128, 8, 3)),
    32: ((64, 4, 4), (64, 4, 6), (128, 4, 3), (128, 4, 6), (128, 8, 3)),
    64: ((64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 4, 4), (128, 8, 3)),
    128: ((64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3), (256, 8, 3)),
    256: ((64, 4, 3), (128, 8, 3)),
}


def _tiled_grid(m: int) -> Iterator[w4a16_tiled.TiledConfig]:
    for block_m in (max(16, 1 << (m - 1).bit_length()),) if m <= 64 else (128, 256):
        for block_n, warps, stages in _TILES[block_m] if m > 8 else ():
            yield w4a16_tiled.TiledConfig(block_m, block_n, 1, warps, stages)


def _tiled_splits(m: int, n: int, k: int, config: w4a16_tiled.TiledConfig) -> list[w4a16_tiled.TiledConfig]:
    """split_k is compiled in (it decides how sums leave), but a smaller one always runs where a larger one does."""
    return [replace(config, split_k=s) for s in (1, 2, 4, 8) if 4 * s <= k // GROUP and (s <= 4 or m <= 128)]


def _tiled_default(m: int, n: int, k: int) -> w4a16_tiled.TiledConfig | None:
    device = torch.device("cuda", torch.cuda.current_device())
    return w4a16_tiled.choose_config(m, n, k, n_sms(device), shared_bytes(device)) if m > 8 else None


TILED = replace(
    DECODE, name="w4a16_tiled", config=w4a16_tiled.TiledConfig, grid=_tiled_grid, expand=_tiled_splits,
    default=_tiled_default, k_multiple=8,
)  # fmt: skip


TUNABLES = {t.name: t for t in (W4A16, DECODE, TILED)}


def usable(device_capability: tuple[int, int]) -> list[str]:
    """Names of the kernels that `w4a16` would choose from on a GPU of this capability."""
    return [name for name, t in TUNABLES.items() if t.hopper == (device_capability[0] == 9)]


# -- the bounded search -----------------------------------------------------------------------------------


def candidates(tunable: Tunable, m: int, n: int, k: int) -> list[Any]:
    """The kernel's own rule first, then the others, the fewer fields they change the earlier."""
    default = tunable.default(m, n, k)
    every = [full for config in tunable.grid(m) for full in tunable.expand(m, n, k, config)]
    if default is None:
        return every
    changed = sorted(every, key=lambda c: sum(v != getattr(default, f) for f, v in vars(c).items()))
    return [default, *(c for c in changed if c != default)]


def best_within(
    tried: Iterable[tuple[str, Any]],
    measure: Callable[[str, Any], float | None],
    budget_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[str, Any, float] | None:
    """The fastest of (kernel, configuration) pairs, tried in order while the budget lasts.

    The first is always tried; none after it is begun that would pass the budget if it took as long as the longest yet.
    measure: microseconds, or None for a wrong result or a configuration that cannot run.
    """
    began, longest, best = clock(), 0.0, None
    for i, (kernel, config) in enumerate(tried):
        at = clock()
        if i and at - began + longest > budget_s:
            break
        us = measure(kernel, config)
        longest = max(longest, clock() - at)
        if us is not None and (best is None or us < best[2]):
            best = (kernel, config, us)
    return best


def search(key: Key, device: torch.device, budget_s: float = SEARCH_BUDGET_S) -> Choice | None:
    """Time configurations for `key` on this GPU for about `budget_s` and keep the fastest in this machine's table.

    Takes memory for weights of that shape, 256 MB or two copies, while it lasts. None if nothing ran right.
    """
    bits, group, symmetric = dispatch.parse_scheme(key.scheme, key.k)
    if bits != 4:
        raise ConfigError(f"scheme {key.scheme}: only 4-bit kernels can be searched")
    log.info("searching a kernel configuration for %s, about %.0f s", key, budget_s)
    dtype = getattr(torch, key.dtype)
    with torch.cuda.device(device):
        p = Problem(key.n, key.k, "cuda", group, symmetric)
        x32 = p.x(key.m)
        reference, x = p.reference(x32), x32.to(dtype)
        packed: dict[str, list[Any]] = {}

        def measure(kernel: str, config: Any) -> float | None:
            tunable = TUNABLES[kernel]
            if kernel not in packed:
                packed[kernel] = timing.rotating_copies(tunable.pack(p, dtype))
            return _cell(tunable, packed[kernel], config, x, reference)["us"]

        tunables = [TUNABLES[name] for name in usable(capability(device)) if TUNABLES[name].takes(key.n, key.k)]
        every = [[(t.name, c) for c in candidates(t, key.m, key.n, key.k)] for t in tunables]
        in_turn = [pair for pairs in itertools.zip_longest(*every) for pair in pairs if pair is not None]
        found = best_within(in_turn, measure, budget_s)
    if found is None:
        log.warning("no kernel configuration ran right for %s; the kernel's own rule stays", key)
        return None
    entry = _entry(*found)
    table_file.remember({key: entry}, {"made_by": "search", "gpu": torch.cuda.get_device_name(device)})
    dispatch.forget()
    return entry.choice


def _entry(kernel: str, config: Any, us: float) -> Entry:
    tunable = TUNABLES[kernel]
    return Entry(Choice(kernel, vars(config)), us, tunable.n_multiple, tunable.k_multiple)


def _cell(tunable: Tunable, copies: list[Any], config: Any, x: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    """{"us", "error", "problem"} of one configuration; us is None if it is wrong or cannot run."""

    def call(weight: Any) -> torch.Tensor:
        return tunable.launch(x, weight, config)

    try:
        error = relative_error(call(copies[-1]), reference)
        if not error < MAX_ERROR:
            return {"us": None, "error": None, "problem": "wrong"}
        return {"us": timing.time_gpu(call, copies, graph_ms=1.5, replays=5), "error": error, "problem": None}
    except Exception as problem:  # an invalid configuration is a result of the search: reported, not hidden
        return {"us": None, "error": None, "problem": one_line(problem)}


# -- the full grid ----------------------------------------------------------------------------------------


def _compile(task: tuple[str, Any, int, str]) -> None:
    """Compile one kernel into Triton's disk cache by running it on a small problem with the same specialization."""
    kernel, config, m, dtype_name = task
    tunable, dtype, p = TUNABLES[kernel], getattr(torch, dtype_name), Problem(512, 4096, "cuda")
    weight, x = tunable.pack(p, dtype), p.x(m).to(dtype)
    for full in tunable.expand(m, p.n, p.k, config):
        try:
            tunable.launch(x, weight, full)
            torch.cuda.synchronize()
        except Exception as problem:  # `tune_shape` meets it again, and there it is recorded
            log.info("%s %s: %s", kernel, full, one_line(problem))


def tune_shape(n: int, k: int, ms: list[int], tunables: list[Tunable], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Every configuration at [n, k], fastest first for each M."""
    p = Problem(n, k, "cuda")
    results = []
    for tunable in (t for t in tunables if t.takes(n, k)):
        copies = timing.rotating_copies(tunable.pack(p, dtype))
        for m in ms:
            x32 = p.x(m)
            reference, x = p.reference(x32), x32.to(dtype)
            for config in candidates(tunable, m, n, k):
                place = {"n": n, "k": k, "m": m, "kernel": tunable.name, "config": vars(config)}
                results.append(place | _cell(tunable, copies, config, x, reference))
    return sorted(results, key=lambda c: (c["m"], c["us"] or float("inf")))


def entries_of(cells: list[dict[str, Any]], gpu: str, triton: str, dtype: str) -> dict[Key, Entry]:
    """The fastest right configuration of each cell whose M is a bucket, as a table."""
    found: dict[Key, Entry] = {}
    for cell in cells:
        scheme = dispatch.scheme_label(4, GROUP, True, cell["k"])
        key = Key(gpu, triton, dtype, scheme, cell["n"], cell["k"], cell["m"])
        if cell["us"] is not None and dispatch.m_bucket(key.m) == key.m:
            tunable = TUNABLES[cell["kernel"]]
            entry = Entry(Choice(tunable.name, cell["config"]), cell["us"], tunable.n_multiple, tunable.k_multiple)
            if key not in found or entry.us < found[key].us:
                found[key] = entry
    return found


def add_to_table(directory: Path, found: dict[Key, Entry], about: dict[str, Any]) -> Path:
    """Merge entries of one GPU and Triton version into its file in `directory`; new ones replace old ones."""
    first = next(iter(found))
    path = directory / table_file.file_name(first.gpu, first.triton)
    table_file.write(path, first.gpu, first.triton, table_file.read(path, first.gpu, first.triton) | found, about)
    return path


def _print_cell(n: int, k: int, m: int, here: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    failed = [c for c in here if c["us"] is None]
    print(f"N={n} K={k} M={m}: roof {roofline_us(m, n, k, machine):.1f} us, {len(here)} tried, {len(failed)} not right")
    rules = {t.name: t.default(m, n, k) for t in TUNABLES.values() if t.takes(n, k)}
    for i, c in enumerate(c for c in here if c["us"] is not None):
        rule = rules[c["kernel"]]
        own = rule is not None and c["config"] == vars(rule)
        if i < 4 or own:
            what = " ".join(f"{name} {int(value)}" for name, value in c["config"].items())
            print(f"   {c['us']:8.1f}  {c['kernel']}: {what} err {c['error']:.1e}" + (" <- rule" if own else ""))
    for c in failed[:2]:
        print(f"   {c['kernel']} {c['config']}: {c['problem']}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,6144x4096,28672x4096,4096x14336,57344x8192")
    parser.add_argument("--ms", default="1,4,8,16,32,64,128,256,512,1024,4096")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument(
        "--kernels", help=f"comma list of {', '.join(TUNABLES)} (default: those that this GPU would use)"
    )
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, help="directory for tune_<dtype>.json, every figure")
    parser.add_argument("--table", type=Path, help="directory of tables to add the best of each cell to")
    args = parser.parse_args(argv)
    args.ms = [int(m) for m in args.ms.split(",")]
    args.shapes = [(int(n), int(k)) for n, k in (pair.split("x") for pair in args.shapes.split(","))]
    args.kernels = args.kernels.split(",") if args.kernels else []
    if unknown := [name for name in args.kernels if name not in TUNABLES]:
        parser.error(f"--kernels {','.join(unknown)}: known are {', '.join(TUNABLES)}")
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not torch.cuda.is_available():
        raise EnvironmentProblem("tuning needs a CUDA GPU; python -m compress.kernels.bench also runs on a CPU")
    args.kernels = args.kernels or usable(torch.cuda.get_device_capability())
    began = time.time()
    tasks = [
        (name, config, m, args.dtype) for name in args.kernels for m in args.ms for config in TUNABLES[name].grid(m)
    ]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        pool.map(_compile, tasks, chunksize=1)
    print(f"compiled {len(tasks)} kernels in {time.time() - began:.0f} s")
    machine = describe_machine("cuda")
    print(json.dumps(machine))
    tunables, dtype = [TUNABLES[name] for name in args.kernels], getattr(torch, args.dtype)
    cells: list[dict[str, Any]] = []
    for n, k in args.shapes:
        found = tune_shape(n, k, args.ms, tunables, dtype)
        cells += found
        for m in args.ms:
            _print_cell(n, k, m, [c for c in found if c["m"] == m], machine)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"metric": "us_per_call", "machine": machine, "cells": cells}, indent=1)
            (args.out / f"tune_{args.dtype}.json").write_text(text + "\n")
    if args.table:
        gpu = dispatch.normalise_gpu(machine["device"])
        entries = entries_of(cells, gpu, dispatch.triton_version(), args.dtype)
        if not entries:
            raise EnvironmentProblem("no configuration ran right, so there is no table to write; see the figures above")
        print(f"written: {add_to_table(args.table, entries, {'made_by': 'tune', 'machine': machine})}")


if __name__ == "__main__":
    main()
