"""python -m compress.kernels.bench: every way this project can compute y = x W^T from 4-bit weights, side by side.

Metric: microseconds a call at a given M (rows of x), and beside it the relative error ||y - ref|| / ||ref|| against the
same codes dequantized and multiplied in float64; a call whose error passes 0.01 is reported as wrong and has no time.
On a GPU also the roofline: max(bytes / copy bandwidth, flops / matmul rate), bytes being 4-bit codes, scales, x and y
once, both ceilings measured in the same run. How a call is timed: `compress.kernels.timing`.

Weights are symmetric, group 128. One table a shape, then one JSON line; --out DIR keeps the raw figures.

    python -m compress.kernels.bench --shapes 4096x4096,28672x4096 --ms 1,16,256 --dtype float16 --out DIR
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.kernels import cpu_int4, planar, timing
from compress.kernels.reference import dequantize_weight, relative_error

GROUP = 128
MAX_ERROR = 0.01
DEFAULT_SHAPES = {"cuda": "4096x4096,14336x4096,4096x14336,28672x4096", "cpu": "256x256,768x256,1024x256,2048x2048"}
DEFAULT_MS = {"cuda": "1,16,64,256,1024", "cpu": "1,4,16,64,256"}

# a contender: weights to rotate over, and call(weights, x) -> y [M, N]; its dtype is x's
Contender = tuple[torch.dtype, list[Any], Callable[[Any, Tensor], Tensor]]


class Problem:
    """Random codes uint8 [N, K], scale [N, K/128] (exact in float16 and bfloat16), zero 8, dense float64 weight."""

    def __init__(self, n: int, k: int, device: str) -> None:
        self.n, self.k, self.device = n, k, device
        gen = torch.Generator(device=device).manual_seed(n * 7 + k)
        self.codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device, generator=gen)
        scale = torch.rand((n, k // GROUP), device=device, generator=gen) * 0.010 + 0.005
        self.scale = scale.to(torch.bfloat16).float()
        self.zero = torch.full((n, k // GROUP), 8, dtype=torch.uint8, device=device)
        self.dense = dequantize_weight(self.codes, self.scale, self.zero, torch.float64)

    def x(self, m: int) -> Tensor:
        """float64 [m, K] whose values are exact in bfloat16 and float16."""
        gen = torch.Generator(device=self.device).manual_seed(m)
        x = torch.randn((m, self.k), device=self.device, generator=gen)
        return x.to(torch.bfloat16).to(torch.float16).double()


def gpu_contenders(p: Problem, dtype: torch.dtype) -> dict[str, Contender]:
    from compress.kernels import dequant, w4a16

    name = str(dtype).removeprefix("torch.")
    dense = p.dense.to(dtype)
    weight = w4a16.pack_kernel_layout(p.codes, p.scale.to(dtype), None)
    copies = [
        w4a16.KernelWeight(words, scale, None, weight.n, weight.k, weight.group_size)
        for words, scale in timing.rotating_copies((weight.words, weight.scale))
    ]
    pairs = (p.codes[:, 0::2] << 4 | p.codes[:, 1::2]).contiguous()
    tiny = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    scale_zero = torch.stack([p.scale.t(), torch.zeros_like(p.scale.t())], dim=-1).to(torch.bfloat16).contiguous()
    return {
        f"cuBLAS {name}": (dtype, timing.rotating_copies((dense,)), lambda w, x: F.linear(x, w[0])),
        "tinygemm bfloat16": (
            torch.bfloat16,
            timing.rotating_copies((tiny, scale_zero)),
            lambda w, x: torch.ops.aten._weight_int4pack_mm(x, w[0], GROUP, w[1]),
        ),
        f"triton w4a16 {name}": (dtype, copies, lambda w, x: w4a16.launch(x, w)),
        f"dequant + cuBLAS {name}": (dtype, copies, lambda w, x: F.linear(x, dequant.launch(w, x.dtype))),
    }


def cpu_contenders(p: Problem, dtype: torch.dtype) -> dict[str, Contender]:
    rows = planar.pack(p.codes, 4)
    result: dict[str, Contender] = {}
    for dt in dict.fromkeys((torch.float32, dtype)):
        name = str(dt).removeprefix("torch.")
        result[f"F.linear {name}"] = (dt, [p.dense.to(dt)], lambda w, x: F.linear(x, w))
        result[f"dequant + F.linear {name}"] = (
            dt,
            [rows],
            lambda w, x: planar.linear_by_blocks(x, p.n, planar.dense_blocks(w, p.scale, p.zero, 4, p.k, x.dtype)),
        )
        if cpu_int4.has_op() and p.n % 16 == 0 and cpu_int4.block_rows():
            packed = cpu_int4.pack(p.codes, p.scale, p.zero, dt)
            result[f"int4 op {name}"] = (dt, [packed], lambda w, x: cpu_int4.int4_matmul(x, w))
            result[f"int4 layout, dequant {name}"] = (
                dt,
                [packed],
                lambda w, x: planar.linear_by_blocks(x, p.n, cpu_int4.dense_blocks(w, x.dtype)),
            )
    return result


def measure(contender: Contender, x64: Tensor, reference: Tensor, budget_s: float) -> dict[str, Any]:
    """Error, then time: {"error", "us"}; "us" is None when the result is wrong."""
    dtype, weights, call = contender
    x = x64.to(dtype)
    error = max(relative_error(call(weights[i], x), reference) for i in {0, len(weights) - 1})
    if not error < MAX_ERROR:
        return {"error": None if math.isinf(error) else error, "us": None}
    if x.is_cuda:
        return {"error": error, "us": timing.time_gpu(lambda w: call(w, x), weights)}
    return {"error": error, "us": timing.time_cpu(lambda: call(weights[0], x), budget_s)}


def roofline_us(m: int, n: int, k: int, ceilings: dict[str, float]) -> float:
    moved = n * k / 2 + n * k / GROUP * 2 + 2 * m * (n + k)
    return max(moved / ceilings["copy_TB_per_s"], 2 * m * n * k / ceilings["fp16_TFLOP_per_s"]) / 1e6


def describe_machine(device: str) -> dict[str, Any]:
    info: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        import triton

        props = torch.cuda.get_device_properties(0)
        info |= {"device": props.name, "multiprocessors": props.multi_processor_count, "triton": triton.__version__}
        return info | timing.gpu_ceilings()
    capability = torch.backends.cpu.get_cpu_capability()
    return info | {"device": f"{platform.machine()} {capability}", "threads": torch.get_num_threads()}


def print_table(n: int, k: int, ms: list[int], rows: dict[str, dict[int, dict[str, Any]]]) -> None:
    print(f"\nN={n} K={k}, microseconds (relative error)")
    print(f"{'M':>28} |" + "".join(f"{m:>20}" for m in ms))
    for name, cells in rows.items():
        texts = []
        for m in ms:
            us, error = cells[m]["us"], cells[m].get("error")
            texts.append("wrong" if us is None else f"{us:.1f}" + (f" ({error:.0e})" if error is not None else ""))
        print(f"{name:>28} |" + "".join(f"{text:>20}" for text in texts))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--shapes", help="N x K pairs, e.g. 4096x4096,28672x4096; K a multiple of 128")
    parser.add_argument("--ms", help="rows of x, e.g. 1,16,256")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), help="default float16 on a GPU, bfloat16 on a CPU")
    parser.add_argument("--budget-s", type=float, default=0.3, help="seconds of timing for a cell on a CPU")
    parser.add_argument("--out", type=Path, help="directory for bench_kernels_<device>.json")
    args = parser.parse_args(argv)
    args.dtype = getattr(torch, args.dtype or ("float16" if args.device == "cuda" else "bfloat16"))
    args.ms = [int(m) for m in (args.ms or DEFAULT_MS[args.device]).split(",")]
    pairs = (args.shapes or DEFAULT_SHAPES[args.device]).split(",")
    args.shapes = [(int(n), int(k)) for n, k in (pair.split("x") for pair in pairs)]
    for n, k in args.shapes:
        if k % GROUP:
            parser.error(f"shape {n}x{k}: K must be a multiple of {GROUP}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_grad_enabled(False)
    machine = describe_machine(args.device)
    print(json.dumps(machine))
    cells: list[dict[str, Any]] = []
    for n, k in args.shapes:
        problem = Problem(n, k, args.device)
        contenders = (gpu_contenders if args.device == "cuda" else cpu_contenders)(problem, args.dtype)
        rows: dict[str, dict[int, dict[str, Any]]] = {}
        if args.device == "cuda":
            rows["roofline"] = {m: {"us": roofline_us(m, n, k, machine)} for m in args.ms}
        for m in args.ms:
            x = problem.x(m)
            reference = x @ problem.dense.t()
            for name, contender in contenders.items():
                rows.setdefault(name, {})[m] = measure(contender, x, reference, args.budget_s)
        print_table(n, k, args.ms, rows)
        cells += [{"n": n, "k": k, "m": m, "what": name, **cell} for name, r in rows.items() for m, cell in r.items()]
    result = {"metric": "us_per_call", "group": GROUP, "machine": machine, "cells": cells}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"bench_kernels_{args.device}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    if any(cell["us"] is None for cell in cells):
        sys.exit("a result above was wrong")


if __name__ == "__main__":
    main()
