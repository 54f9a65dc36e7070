"""python -m compress.kernels.tune: time kernels over their configurations and write tables for `dispatch`.

Metric: microseconds a call as in `compress.kernels.bench`; a configuration whose relative error against float64 passes
0.01 (0.03 with 8-bit activations) is reported as wrong. What takes long is bounded or shared out:

    compiling   first, every distinct kernel once, by several processes that share Triton's cache
    timing      each configuration of a cell by a short graph, then the fastest in turns (`search`)
    --budget-s  seconds of timing for the whole run; each cell gets an equal share of what is left, and tries what the
                tables have for it, then configurations in order of their distance from the kernel's own rule
    --known     only configurations that a table has for any shape, dtype or scheme: another dtype or scheme is tuned in
                a tenth of the time
    --only      only configurations named here, by their fields in order, beside what the tables and the rule take; all
                of them are finalists

Prints the best of each cell and what the rule takes there. After each shape --out DIR keeps everything, and --table DIR
adds the best of each cell to the table of this GPU and Triton version (`kernels/tables` is what is shipped), by dtype
and scheme: a run that is cut off keeps the shapes it finished.

    python -m compress.kernels.tune --dtype float16,bfloat16 --out DIR --table kernels/tables
    python -m compress.kernels.tune --schemes w8g128,w3g128,w2g128,w8a8 --shapes 4096x4096 --tokens 1,16 --budget-s 200
    python -m compress.kernels.tune --schemes w4g128-asym,w4g32,w4-channel --known --table kernels/tables
    python -m compress.kernels.tune --shapes 4096x4096 --tokens 64 --only w4a16_tiled:64,64,4,4,3,4,1,1,4 --out DIR

How a cell is searched: `search`, which also answers a single miss where COMPRESS_KERNEL_SEARCH=1 is set.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compress.arguments import in_order, numbers, run_command, shapes
from compress.atomic import write_json
from compress.errors import ConfigError, EnvironmentProblem
from compress.kernels import dispatch, table_file
from compress.kernels.bench import describe_machine, imports_left_out_of_collection, one_line
from compress.kernels.bench_report import roofline_us
from compress.kernels.choose import hopper_kernels
from compress.kernels.common import n_sms
from compress.kernels.contenders import quantized_bits
from compress.kernels.dispatch import Entry, Key
from compress.kernels.problem import Problem, Scheme
from compress.kernels.search import Weights, entry_of, known_configs, tune_cell
from compress.kernels.tile_shape import TiledConfig
from compress.kernels.tunables import TUNABLES, Tunable, add_arguments, in_words, specimens, usable

log = logging.getLogger(__name__)

_CONTEXT_BYTES = 10**9  # of a process on the GPU, whatever it computes

_DEPTH = 28672  # K of a specimen: whole lines of stages, of every split
# kernel, configuration, M, dtype, scheme, K, only what is known, only what is named
Task = tuple[str, Any, int, str, str, int, bool, bool]


def compile_tasks(kernels: dict[str, list[Tunable]], args: argparse.Namespace) -> list[Task]:
    """One task for each kernel to compile. Configurations recur at several M: the smallest allows the most splits.

    One group a row is a constant of the kernel, so those are compiled for each K.
    """
    tasks: dict[tuple[Any, ...], Task] = {}
    for label, tunables in kernels.items():
        depths = {_DEPTH} if Scheme.parse(label).group else {k for _, k in args.shapes}
        for tunable, dtype, k, m in itertools.product(tunables, args.dtypes, sorted(depths), sorted(args.ms)):
            named = [config for name, config in args.only if name == tunable.name]
            for config in named or ([] if args.only else tunable.grid(m)):
                task = (tunable.name, config, m, dtype, label, k, args.known, bool(named))
                tasks.setdefault((tunable.name, config, dtype, label, k), task)
    return list(tasks.values())


def processes_that_fit(wanted: int, tasks: list[Task], free_bytes: int, n_sms: int) -> int:
    """Processes that may compile at once: each makes and packs a problem on the GPU, some 6 bytes a weight at its peak
    (measured on a CPU, for 8, 4 and 3 bits) and as much again in freed blocks of an allocator."""
    weights = [n * k for c, s, depth, m in {(t[1], t[4], t[5], t[2]) for t in tasks}
               for n, k in specimens(c, Scheme.parse(s), depth, n_sms, m)]  # fmt: skip
    return max(1, min(wanted, free_bytes // (_CONTEXT_BYTES + 12 * max(weights, default=0))))


def _compile(task: Task) -> None:
    """Compile one kernel into Triton's disk cache by running it on small problems with the same specialization."""
    kernel, config, m, dtype_name, label, k, known, named = task
    tunable, dtype, scheme = TUNABLES[kernel], getattr(torch, dtype_name), Scheme.parse(label)
    sms = n_sms(torch.device("cuda"))
    shapes = specimens(config, scheme, k, sms, m)
    expanded = dict.fromkeys(full for n, _ in shapes for full in tunable.expand(m, n, k, config))
    by_shape: dict[tuple[int, int], list[Any]] = {}
    for full in [config] if named else expanded:
        if not known or full in known_configs(kernel):
            for shape in specimens(full, scheme, k, sms, m):
                by_shape.setdefault(shape, []).append(full)
    for (n, depth), fulls in by_shape.items():
        p = scheme.problem(n, depth, "cuda")
        weight, x = tunable.pack(p, dtype), p.x(m).to(dtype)
        for full in fulls:
            if not tunable.fits(weight, full):
                continue
            try:
                tunable.launch(x, weight, full)
                torch.cuda.synchronize()
            except Exception as problem:  # `tune_cell` meets it again, and there it is recorded
                log.info("%s %s: %s", kernel, full, one_line(problem))


def tune_shape(
    p: Problem,
    scheme: Scheme,
    tunables: list[Tunable],
    args: argparse.Namespace,
    share_s: Callable[[], float],
    show: Callable[[dict[str, Any], list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Cells of one weight in every dtype and at every M. share_s: seconds that the next cell may take."""
    results = []
    packed = {dtype: Weights(p, getattr(torch, dtype), tunables, args.known, args.only) for dtype in args.dtypes}
    for m in args.ms:
        x = p.x(m)
        reference = p.reference(x)
        for dtype, weights in packed.items():
            place = {"scheme": scheme.label, "dtype": dtype, "n": p.n, "k": p.k, "m": m}
            found = tune_cell(weights, x.to(weights.dtype), reference, share_s())
            show(place, found)
            results += [place | cell for cell in found]
    return results


def entries_of(cells: list[dict[str, Any]], gpu: str, triton: str) -> dict[Key, Entry]:
    """The fastest finalist of each cell whose M is a bucket, as a table."""
    found: dict[Key, Entry] = {}
    for cell in cells:
        scheme, n, k = Scheme.parse(cell["scheme"]), cell["n"], cell["k"]
        label = dispatch.scheme_label(scheme.bits, scheme.group or k, scheme.symmetric, k, scheme.int8)
        key = Key(gpu, triton, cell["dtype"], label, n, k, cell["m"])
        if cell["final"] and dispatch.m_bucket(key.m) == key.m:
            entry = entry_of(cell)
            if key not in found or entry.us < found[key].us:
                found[key] = entry
    return found


def add_to_table(directory: Path, found: dict[Key, Entry], about: dict[str, Any]) -> Path:
    """Merge entries of one GPU and Triton version into its file in `directory`; new ones replace old ones."""
    first = next(iter(found))
    path = directory / table_file.file_name(first.gpu, first.triton)
    table_file.write(path, first.gpu, first.triton, table_file.read(path, first.gpu, first.triton) | found, about)
    return path


def print_cell(place: dict[str, Any], here: list[dict[str, Any]], roof_us: float) -> None:
    """The finalists, and what each kernel's own rule takes."""
    failed = [c for c in here if c["us"] is None]
    where = "N={n} K={k} M={m} {scheme} {dtype}".format(**place)
    print(f"{where}: roof {roof_us:.1f} us, {len(here)} tried, {len(failed)} not right", flush=True)
    for c in here:
        if c["final"] or (c["rule"] and c["us"] is not None):
            what = in_words(c["config"])
            print(f"   {c['us']:8.1f}  {c['kernel']}: {what} err {c['error']:.1e}" + (" <- rule" * c["rule"]))
    for c in failed[:2]:
        print(f"   {c['kernel']} {c['config']}: {c['problem']}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shapes, default="4096x4096,6144x4096,28672x4096,4096x14336,57344x8192")
    parser.add_argument(
        "--tokens", "--ms", dest="ms", type=numbers, default="1,4,8,16,32,64,128,256,512,1024,4096", help="values of M"
    )
    add_arguments(parser)
    parser.add_argument("--budget-s", type=float, default=math.inf, help="seconds of timing, all cells together")
    parser.add_argument("--known", action="store_true", help="only configurations that a table has for something else")
    parser.add_argument(
        "--only", action="append", default=[], metavar="KERNEL:V,V,..", help="a configuration to try; may be repeated"
    )
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1), help="that compile")
    parser.add_argument("--out", type=Path, help="directory for tune_<dtypes>_<schemes>.json, every figure")
    parser.add_argument("--table", type=Path, help="directory of tables to add the best of each cell to")
    args = parser.parse_args(argv)
    try:
        args.only = [parse_only(text) for text in args.only]
    except ConfigError as problem:
        parser.error(f"--only: {problem}")
    if args.only and args.known:
        parser.error("--only names configurations and --known takes them from tables; say one of them")
    for scheme, (n, k) in itertools.product(args.schemes, args.shapes):
        if k % (scheme.group or k):
            parser.error(f"shape {n}x{k}: K must be a multiple of the group of {scheme.label}")
    return args


def parse_only(text: str) -> tuple[str, Any]:
    """w4a16_decode:8,16,4,2 -> that kernel's configuration of these fields, in order; later ones have defaults.

    Raises:
        ConfigError: another kernel, or fields that it does not have.
    """
    name, _, values = text.partition(":")
    if name not in TUNABLES:
        raise ConfigError(f"{text!r} names no kernel that is tuned; they are {', '.join(TUNABLES)}")
    kind = TUNABLES[name].config
    try:
        config = in_order(kind, values)
    except (TypeError, ValueError) as problem:
        raise ConfigError(
            f"{text!r}: {problem}; {name} takes numbers for {', '.join(kind.__annotations__)}"
        ) from problem
    if isinstance(config, TiledConfig) and config != config.as_it_runs():
        runs = ",".join(str(int(value)) for value in vars(config.as_it_runs()).values())
        raise ConfigError(f"{text!r} would run as {name}:{runs}, without what has no effect in it; say that")
    return name, config


def check_named(kernels: dict[str, list[Tunable]], args: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: a named configuration would not be timed, or not as it is named.
    """
    tuned = {tunable.name for tunables in kernels.values() for tunable in tunables}
    if unused := sorted({name for name, _ in args.only} - tuned):
        raise ConfigError(f"--only {', '.join(unused)}: tuned here are {', '.join(sorted(tuned))}; see --kernels")
    for (name, config), scheme, (n, k) in itertools.product(args.only, args.schemes, args.shapes):
        if isinstance(config, TiledConfig) and config.within(-(-k // 128), scheme.bits) != config:
            shares = config.split_k if not config.persistent else config.cluster
            raise ConfigError(
                f"--only {name} with unroll {config.unroll}, persistent {int(config.persistent)} does not run so at "
                f"{n}x{k} ({scheme.label}): each of {shares} shares of its "
                f"{-(-k // 128)} tiles of K, {config.slices} a stage, must be a multiple of unroll stages; "
                f"persistent programs need {config.stages} stages, and room for y"
            )


def kernels_for(scheme: Scheme, named: list[str]) -> list[Tunable]:
    """Those that were named and compute the scheme; without names those that this GPU chooses from."""
    names = named or usable(hopper_kernels(torch.device("cuda", torch.cuda.current_device())), scheme)
    return [TUNABLES[name] for name in names if TUNABLES[name].computes(scheme)]


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not torch.cuda.is_available():
        raise EnvironmentProblem("tuning needs a CUDA GPU; python -m compress.kernels.bench also runs on a CPU")
    kernels = {scheme.label: kernels_for(scheme, args.kernels) for scheme in args.schemes}
    check_named(kernels, args)
    began, tasks = time.monotonic(), compile_tasks(kernels, args)
    processes = processes_that_fit(args.processes, tasks, torch.cuda.mem_get_info()[0], n_sms(torch.device("cuda")))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(_compile, tasks, chunksize=1)
    print(f"compiled for {len(tasks)} configurations in {time.monotonic() - began:.0f} s", flush=True)
    machine = describe_machine("cuda")
    print(json.dumps(machine))
    with imports_left_out_of_collection():
        time_all(kernels, args, machine)


def time_all(kernels: dict[str, list[Tunable]], args: argparse.Namespace, machine: dict[str, Any]) -> None:
    """Every shape of every scheme; files are written after each."""
    cells: list[dict[str, Any]] = []
    began, done = time.monotonic(), 0
    every = len(kernels) * len(args.shapes) * len(args.ms) * len(args.dtypes)

    def share_s() -> float:
        nonlocal done
        done += 1
        return (args.budget_s - (time.monotonic() - began)) / (every - done + 1)

    for (label, tunables), (n, k) in itertools.product(kernels.items(), args.shapes):
        scheme = Scheme.parse(label)
        p = scheme.problem(n, k, "cuda")
        bits = quantized_bits(p)

        def show(
            place: dict[str, Any], found: list[dict[str, Any]], bits: float = bits, int8: bool = scheme.int8
        ) -> None:
            print_cell(place, found, roofline_us(place["m"], place["n"], place["k"], machine, bits, int8))

        cells += tune_shape(p, scheme, tunables, args, share_s, show)
        keep(cells, args, machine)
    print(f"timed {len(cells)} configurations of {every} cells in {time.monotonic() - began:.0f} s")


def keep(cells: list[dict[str, Any]], args: argparse.Namespace, machine: dict[str, Any]) -> None:
    """Figures so far and the table.

    Raises:
        EnvironmentProblem: a table is asked for and no configuration ran right.
    """
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"tune_{'_'.join(args.dtypes + [scheme.label for scheme in args.schemes])}.json"
        write_json(path, {"metric": "us_per_call", "machine": machine, "cells": cells})
    if args.table:
        entries = entries_of(cells, dispatch.normalise_gpu(machine["device"]), dispatch.triton_version())
        if not entries:
            raise EnvironmentProblem("no configuration ran right, so there is no table to write; see the figures above")
        print(f"written: {add_to_table(args.table, entries, {'made_by': 'tune', 'machine': machine})}", flush=True)


if __name__ == "__main__":
    run_command(main)
