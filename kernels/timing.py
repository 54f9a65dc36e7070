"""Timing of matmuls whose weights must come from memory, not from a cache. Used by `bench` and `tune`.

On a GPU: a CUDA graph of many calls that rotates over copies of the weight, at least ROTATE_BYTES together (an H100's
L2 holds 50 MB), replayed and timed with events; the median replay divided by the calls. Activations and outputs stay
warm, as they do in a model. The figure includes every kernel of a call and the gaps between graph nodes.
On a CPU: wall time of single calls on one weight; the fastest, because other processes on the machine only ever add.
Small weights stay in the caches there, as in a model.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ROTATE_BYTES = 256 * 10**6
_MAX_COPIES = 64


def rotating_copies(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Distinct copies of a tuple of tensors, together at least ROTATE_BYTES; the first are the originals."""
    one = sum(t.numel() * t.element_size() for t in tensors)
    count = max(1, min(_MAX_COPIES, math.ceil(ROTATE_BYTES / max(one, 1))))
    clones = [tuple(t.clone() for t in tensors) for _ in range(count - 1)]
    return [tuple(tensors), *clones]


def time_gpu(call: Callable[[Any], Tensor], weights: Sequence[Any], graph_ms: float = 3.0, replays: int = 11) -> float:
    """Median microseconds of `call(weight)` over the rotating weights."""
    stream = torch.cuda.Stream()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        call(weights[0])
        start.record()
        for i in range(3):
            call(weights[i % len(weights)])
        stop.record()
    torch.cuda.synchronize()
    estimate = max(start.elapsed_time(stop) / 3, 1e-3)  # ms, launch overhead included
    rounds = max(1, math.ceil(min(graph_ms / estimate * 3, 400) / len(weights)))
    calls = rounds * len(weights) if estimate < 1 else min(len(weights), 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            call(weights[i % len(weights)])
    times = []
    with torch.cuda.stream(stream):
        for _ in range(replays + 2):
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) * 1e3 / calls)
    return statistics.median(times[2:])


def time_cpu(call: Callable[[], Tensor], budget_s: float = 0.3, at_least: int = 5) -> float:
    """Fewest microseconds of `call()` on the calling threads."""
    call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < at_least or time.perf_counter() - began < budget_s:
        at = time.perf_counter()
        call()
        times.append((time.perf_counter() - at) * 1e6)
    return min(times)


def gpu_ceilings() -> dict[str, float]:
    """What this GPU reaches: a copy (bytes read + written), an 8192^3 float16 matmul, and an empty graph node."""
    # a kernel, not copy_: a graph would make that a memcpy node, which is a fifth slower
    source = torch.randint(-(2**31), 2**31 - 1, (2**28,), device="cuda", dtype=torch.int32)
    target = torch.empty_like(source)
    copy_us = time_gpu(lambda pair: torch.bitwise_not(pair[0], out=pair[1]), [(source, target)])
    copy_bytes = 2 * source.numel() * source.element_size()
    del source, target
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    matmul_us = time_gpu(lambda pair: pair[0] @ pair[1].t(), [(a, b)])
    dot = torch.zeros(32, device="cuda")
    node_us = time_gpu(lambda v: v.add_(1.0), [dot])
    return {
        "copy_TB_per_s": copy_bytes / copy_us / 1e6,
        "fp16_TFLOP_per_s": 2 * 8192**3 / matmul_us / 1e6,
        "empty_node_us": node_us,
    }
