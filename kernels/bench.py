"""python -m compress.kernels.bench: every way to compute y = x W^T from packed weights, side by side in one run.

Metric: microseconds a call at a given M (rows of x): the median of replays of a CUDA graph over rotating weight copies
larger than the L2, the contenders of a cell taking turns (`compress.kernels.timing`); p95 beside it in the JSON.
Correctness stands beside every time: the relative error ||y - ref|| / ||ref|| against the same codes dequantized and
multiplied in float64, the worst of the first call, a call on the last weight copy, and, on a GPU, the output of the
very graph that was timed, filled with NaN and replayed once more on activations that it has not seen. x lies between
rows of NaN. An error above 0.01 is reported as wrong and has no time.

Contenders on a GPU: cuBLAS in float16 (the baseline, to which every cell has its ratio; timed again when a shape is
done, its drift is printed) and in --dtype, torch's tinygemm, this project ("ours" is what a QuantLinear with
backend=auto runs; --paths adds the two that it chooses from), and gemlite and Humming where installed
(`compress.kernels.peers`; pip install 'compress-llm[peers]'). A peer that is absent or raises is named, and the rest
goes on. The roofline is max(bytes / copy bandwidth, flops / matmul rate), bytes being codes, scales, zero points, x and
y once, both ceilings measured in the same run.

--schemes: one table a shape and one JSON line for each scheme; --out DIR keeps the line, and the tables as Markdown.
Schemes read w4g128, w4g64-asym, w4-channel, w8g128, w3g128, w2g128 or w8a8: bits, then inputs that share a scale. w8a8
is 8-bit weights with one scale a row and activations rounded to 8 bits, which may be wrong by 0.03. gemlite and Humming
take part in w4g128 alone.

    python -m compress.kernels.bench --out DIR --roofline roofline.html
    python -m compress.kernels.bench --shapes 4096x4096,28672x4096 --ms 1,16,256 --dtype bfloat16 --peers none
    python -m compress.kernels.bench --schemes w4g128-asym,w4g32,w4-channel,w8g128,w3g128,w2g128,w8a8 --out DIR
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.arguments import numbers, run_command, shapes
from compress.errors import EnvironmentProblem
from compress.kernels import bench_plot, bench_report, contenders, peers, timing
from compress.kernels.contenders import Call, Contender
from compress.kernels.problem import W4G128, Problem, Scheme, guarded, schemes
from compress.kernels.reference import relative_error

MAX_ERROR = 0.01
DEFAULT_SHAPES = {
    "cuda": "4096x4096,6144x4096,28672x4096,4096x14336,57344x8192",
    "cpu": "256x256,768x256,1024x256,2048x2048",
}
DEFAULT_MS = {"cuda": "1,4,16,64,256,1024,4096", "cpu": "1,4,16,64,256"}
FRESH = 1  # the draw of activations that a timed graph is checked on


@dataclass
class Trial:
    """One way to call a contender at one M. problem: what it raised, in one line."""

    name: str
    contender: Contender
    variant: str
    call: Call
    error: float = 0.0
    problem: str | None = None
    captured: timing.Captured | None = None
    times: dict[str, float] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        return self.problem is None and self.error < (self.contender.max_error or MAX_ERROR)

    def cell(self) -> dict[str, Any]:
        error = self.error if self.problem is None and math.isfinite(self.error) else None
        return {"variant": self.variant, "error": error, "us": None, "problem": self.problem} | self.times


def one_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"


def _note(trial: Trial, problem: Exception) -> None:
    """Keep what a peer raised; our own errors are bugs and end the run, as does a GPU that no longer answers."""
    if trial.contender.kind != "peer":
        raise problem
    trial.problem = one_line(problem)
    require_gpu(trial.name, problem)


def require_gpu(name: str, problem: Exception) -> None:
    """An illegal access in one kernel makes every later call of the process fail: say whose it was."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError as lost:
        raise EnvironmentProblem(
            f"{name} left the GPU unusable ({one_line(problem)}); run again with a --peers list without it"
        ) from lost


def check_first(trial: Trial, x: Tensor, reference: Tensor) -> None:
    """Errors of the call itself, on the first and the last weight copy."""
    try:
        weights = trial.contender.weights
        errors = [relative_error(trial.call(weights[i], x), reference) for i in {0, len(weights) - 1}]
        trial.error = max(errors)
    except Exception as problem:
        _note(trial, problem)


def time_calls(trials: list[Trial], xs: dict[torch.dtype, Tensor], budget_s: float) -> None:
    """Fill `times` on a CPU."""
    for trial in trials:
        call, weight, x = trial.call, trial.contender.weights[0], xs[trial.contender.dtype]

        def once(call: Call = call, weight: Any = weight, x: Tensor = x) -> Tensor:
            return call(weight, x)

        trial.times = timing.summary(timing.time_cpu(once, budget_s), fastest=True)


def time_graphs(trials: list[Trial], xs: dict[torch.dtype, Tensor]) -> None:
    """Fill `times` on a GPU: a graph for each trial, replayed in turns."""
    for trial in trials:
        call, x = trial.call, xs[trial.contender.dtype]

        def rotating(weight: Any, call: Call = call, x: Tensor = x) -> Tensor:
            return call(weight, x)

        try:
            trial.captured = timing.capture(rotating, trial.contender.weights)
        except Exception as problem:
            _note(trial, problem)
    captured = [t for t in trials if t.captured is not None]
    samples = timing.take_turns([t.captured for t in captured if t.captured is not None])
    for trial, own in zip(captured, samples, strict=True):
        trial.times = timing.summary(own)


def check_timed(trials: list[Trial], reference: Tensor) -> None:
    """Errors of the timed graphs on activations they have not seen, written over the ones they were timed with."""
    for trial in trials:
        if trial.captured is not None:
            trial.captured.output.fill_(math.nan)
            trial.captured.graph.replay()
            trial.error = max(trial.error, relative_error(trial.captured.output, reference))
            trial.captured = None  # frees the graph's memory
            if not trial.right:
                trial.times = {}


def measure_m(
    p: Problem, m: int, rows: dict[str, Contender], budget_s: float, graphs: bool
) -> dict[str, dict[str, Any]]:
    """One cell for each contender at M = m: its fastest right variant, or why there is none."""
    x = p.x(m)
    xs = {dtype: guarded(x, dtype) for dtype in {c.dtype for c in rows.values()}}
    trials = [Trial(name, c, *variant) for name, c in rows.items() for variant in c.variants(m)]
    reference = p.reference(x)
    for trial in trials:
        check_first(trial, xs[trial.contender.dtype], reference)
    right = [t for t in trials if t.right]
    if not graphs:
        time_calls(right, xs, budget_s)
    else:
        time_graphs(right, xs)
        fresh = p.x(m, FRESH)
        for held in xs.values():
            held.copy_(fresh)
        check_timed(trials, p.reference(fresh))
    cells: dict[str, dict[str, Any]] = {}
    for name in rows:
        own = [t.cell() for t in trials if t.name == name]
        cells[name] = min(own, key=lambda cell: math.inf if cell["us"] is None else cell["us"])
    return cells


def build_peers(names: list[str], problems: dict[str, str]) -> dict[str, peers.Peer]:
    """The installed ones of `names`; why the others are absent goes into `problems` and one printed line each."""
    built: dict[str, peers.Peer] = {}
    installed = peers.versions()
    for name in names:
        if installed[name] == peers.NOT_INSTALLED:
            problems[name] = peers.NOT_INSTALLED
        else:
            try:
                built[name] = peers.PEERS[name]()
            except Exception as problem:  # whatever a package raises where it cannot run is a result of this run
                problems[name] = one_line(problem)
        if name in problems:
            print(f"{name}: {problems[name]}")
    return built


def contenders_of(
    p: Problem, scheme: Scheme, args: argparse.Namespace, built: dict[str, peers.Peer], problems: dict[str, str]
) -> dict[str, Contender]:
    if args.device == "cpu":
        return contenders.cpu_contenders(p, args.dtype)
    if scheme.bits != 4:
        from compress.kernels import contenders_wna16

        return contenders_wna16.gpu_contenders(p, args.dtype, scheme.int8, args.paths)
    rows = contenders.gpu_contenders(p, args.dtype, args.paths)
    for name, peer in built.items() if scheme == W4G128 else ():
        try:
            rows[f"{name} {str(args.dtype).removeprefix('torch.')}"] = peer.contender(p, args.dtype, args.ms)
        except Exception as problem:
            problems[f"{name} {p.n}x{p.k}"] = one_line(problem)
            print(f"{name} at {p.n}x{p.k}: {one_line(problem)}")
            require_gpu(name, problem)
    return rows


def measure_shape(p: Problem, args: argparse.Namespace, rows: dict[str, Contender]) -> list[dict[str, Any]]:
    """Cells of every contender and M; on a GPU the baseline is timed again at the end, as `us_again`."""
    graphs = args.device == "cuda"
    by_m = {m: measure_m(p, m, rows, args.budget_s, graphs) for m in args.ms}
    if graphs:
        baseline = next(iter(rows))
        for m in args.ms:
            again = measure_m(p, m, {baseline: rows[baseline]}, args.budget_s, graphs)[baseline]
            by_m[m][baseline]["us_again"] = again["us"]
    return [
        {"n": p.n, "k": p.k, "m": m, "what": name, "kind": rows[name].kind, "bits": rows[name].weight_bits, **cell}
        for m, cells in by_m.items()
        for name, cell in cells.items()
    ]


def drift(cells: list[dict[str, Any]]) -> dict[str, float] | None:
    """Median and worst |us_again / us - 1| of the baseline."""
    changes = [abs(c["us_again"] / c["us"] - 1) for c in cells if c.get("us_again") and c["us"]]
    return {"median": statistics.median(changes), "worst": max(changes)} if changes else None


def describe_machine(device: str) -> dict[str, Any]:
    info: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        import triton

        props = torch.cuda.get_device_properties(0)
        info |= {"device": props.name, "multiprocessors": props.multi_processor_count, "triton": triton.__version__}
        return info | timing.gpu_ceilings()
    capability = torch.backends.cpu.get_cpu_capability()
    return info | {"device": f"{platform.machine()} {capability}", "threads": torch.get_num_threads()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--shapes", type=shapes, help="N x K pairs, e.g. 4096x4096,28672x4096; K a multiple of 128")
    parser.add_argument("--ms", "--tokens", type=numbers, help="rows of x, e.g. 1,16,256")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), help="default float16 on a GPU, bfloat16 on a CPU")
    parser.add_argument(
        "--schemes", type=schemes, default="w4g128", help="comma list, e.g. w4g128,w4g32-asym,w4-channel,w8g128,w8a8"
    )
    parser.add_argument("--peers", default=",".join(peers.PEERS), help="comma list, or none (default %(default)s)")
    parser.add_argument("--paths", action="store_true", help='also time both paths behind "ours" at every M')
    parser.add_argument("--budget-s", type=float, default=0.3, help="seconds of timing for a cell on a CPU")
    parser.add_argument("--out", type=Path, help="directory for bench_kernels_<device>_<dtype>[_<scheme>].json, .md")
    parser.add_argument("--roofline", type=Path, help="plot of rates against arithmetic intensity: .html, .png or .svg")
    args = parser.parse_args(argv)
    args.dtype = getattr(torch, args.dtype or ("float16" if args.device == "cuda" else "bfloat16"))
    args.ms = sorted(args.ms or numbers(DEFAULT_MS[args.device]))
    args.shapes = args.shapes or shapes(DEFAULT_SHAPES[args.device])
    args.peers = [] if args.peers == "none" or args.device == "cpu" else args.peers.split(",")
    for n, k in args.shapes:
        if odd := [s.label for s in args.schemes if k % 128 or k % (s.group or k)]:
            parser.error(f"shape {n}x{k}: K must be a multiple of 128 and of the group of {', '.join(odd)}")
    unknown = [name for name in args.peers if name not in peers.PEERS]
    if unknown:
        parser.error(f"--peers {','.join(unknown)}: known are {', '.join(peers.PEERS)}, or none")
    if any(scheme.int8 for scheme in args.schemes) and (args.device == "cpu" or args.roofline):
        parser.error("--schemes w8a8 needs a GPU, and its ceiling is not the float16 one of --roofline")
    if args.roofline and args.device == "cpu":
        parser.error("--roofline needs the ceilings of a GPU; leave it out on a CPU")
    if args.roofline and args.roofline.suffix not in bench_plot.SUFFIXES:
        parser.error(f"--roofline {args.roofline}: the suffix must be one of {', '.join(bench_plot.SUFFIXES)}")
    return args


@contextmanager
def imports_left_out_of_collection() -> Iterator[None]:
    """A capture collects garbage first; what is imported by now is not worth looking through each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@torch.no_grad()
def run(
    scheme: Scheme,
    args: argparse.Namespace,
    machine: dict[str, Any],
    built: dict[str, peers.Peer],
    problems: dict[str, str],
) -> dict[str, Any]:
    """Measure one scheme and print its tables; the record that becomes the JSON line."""
    cells: list[dict[str, Any]] = []
    for n, k in args.shapes:
        p = scheme.problem(n, k, args.device)
        found = measure_shape(p, args, contenders_of(p, scheme, args, built, problems))
        print(bench_report.text_table(n, k, args.ms, found, machine, scheme.label), flush=True)
        cells += found
    return {
        "metric": "us_per_call",
        "scheme": scheme.label,
        "bits": scheme.bits,
        "group": scheme.group or "channel",
        "symmetric": scheme.symmetric,
        "dtype": str(args.dtype).removeprefix("torch."),
        "machine": machine,
        "peers": {name: version for name, version in peers.versions().items() if name in args.peers},
        "problems": problems,
        "baseline_drift": drift(cells),
        "cells": cells,
    }


def report(record: dict[str, Any], args: argparse.Namespace, command: str) -> None:
    """What went wrong, the files, and the record as one line."""
    if moved := record["baseline_drift"]:
        print(
            f"cuBLAS timed again after each shape: {moved['median']:.1%} away in the median, {moved['worst']:.1%} worst"
        )
    for c in record["cells"]:
        if c["problem"]:
            print(f"{c['what']} at {c['n']}x{c['k']}, M={c['m']}: {c['problem']}")
    suffix = "" if record["scheme"] == W4G128.label else f"_{record['scheme']}"
    if args.out:
        stem = args.out / f"bench_kernels_{args.device}_{record['dtype']}{suffix}"
        print("written: " + ", ".join(map(str, bench_report.write(stem, record, args.ms, command))))
    if args.roofline:
        bench_plot.write(args.roofline.with_stem(args.roofline.stem + suffix), record)
    print(json.dumps(record), flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    command = "python -m compress.kernels.bench " + " ".join(argv if argv is not None else sys.argv[1:])
    machine = describe_machine(args.device)
    print(json.dumps(machine))
    problems: dict[str, str] = {}
    built = build_peers(args.peers, problems)
    wrong: list[str] = []
    with imports_left_out_of_collection():
        for scheme in args.schemes:
            record = run(scheme, args, machine, built, problems)
            report(record, args, command)
            if any(cell["us"] is None and cell["kind"] != "peer" for cell in record["cells"]):
                wrong.append(scheme.label)
    if wrong:
        sys.exit(f"a result of this project or of torch was wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    run_command(main)
