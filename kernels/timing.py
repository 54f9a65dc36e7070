"""Timing of matmuls whose weights must come from memory, not from a cache. Used by `bench` and `tune`.

On a GPU: a CUDA graph of many calls (GRAPH_MS at least) that rotates over copies of the weight, at least ROTATE_BYTES
together (an H100's L2 holds 50 MB), replayed and timed with events; a replay divided by its calls is one sample. Graphs
that are to be compared are replayed in turns, round after round in alternating order, so that a clock that drifts, or
a chip that the neighbour has heated, shifts all of them alike. Activations and outputs stay warm, as they do in a
model. A sample includes every kernel of a call and the gaps between graph nodes.
On a CPU: wall time of single calls on one weight; the fastest, because other processes on the machine only ever add.
Small weights stay in the caches there, as in a model.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

ROTATE_BYTES = 256 * 10**6
GRAPH_MS = 4.0
REPLAYS = 15
_MAX_COPIES = 64
_MAX_CALLS = 2000
_WARM_UP = 2
_ENOUGH_MS, _AT_LEAST = 600.0, 5  # a graph of slow calls is replayed no further

Weight = TypeVar("Weight")


def tensors_of(weight: Any) -> list[Tensor]:
    """The tensors of a tuple or a dataclass."""
    values = weight if isinstance(weight, tuple) else [getattr(weight, f.name) for f in dataclasses.fields(weight)]
    return [v for v in values if isinstance(v, Tensor)]


def rotating_copies(weight: Weight) -> list[Weight]:
    """Distinct copies of a tuple or dataclass of tensors, together at least ROTATE_BYTES; the first is the original."""
    one = sum(t.numel() * t.element_size() for t in tensors_of(weight))
    count = max(1, min(_MAX_COPIES, math.ceil(ROTATE_BYTES / max(one, 1))))
    return [weight, *(_clone(weight) for _ in range(count - 1))]


def _clone(weight: Any) -> Any:
    if isinstance(weight, tuple):
        return tuple(v.clone() if isinstance(v, Tensor) else v for v in weight)
    named = {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight)}
    return dataclasses.replace(weight, **{n: v.clone() for n, v in named.items() if isinstance(v, Tensor)})


@dataclass
class Captured:
    """A CUDA graph of `calls` calls; `output` [M, N] is what the last of them writes."""

    graph: Any
    calls: int
    output: Tensor


def capture(call: Callable[[Any], Tensor], weights: Sequence[Any], graph_ms: float = GRAPH_MS) -> Captured:
    """Record `call(weight)` over the rotating weights, whole rounds of them, as many as fill `graph_ms`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(weights[-1])  # compiles, and allocates what a capture may not
        torch.cuda.synchronize()
        began = time.perf_counter()
        call(weights[0])
        torch.cuda.synchronize()
    if time.perf_counter() - began > 1e-3:  # bound by arithmetic: which copy it reads no longer matters
        weights = weights[:2]
    rounds, most = 1, max(1, _MAX_CALLS // len(weights))
    while True:
        captured = _record(call, weights, rounds * len(weights), stream)
        _replay_ms(captured)  # the first one also uploads the graph
        ms = _replay_ms(captured)
        if ms >= 0.8 * graph_ms or rounds == most:
            return captured
        rounds = min(most, max(2 * rounds, math.ceil(rounds * graph_ms / max(ms, 1e-3))))


def _record(call: Callable[[Any], Tensor], weights: Sequence[Any], calls: int, stream: Any) -> Captured:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            output = call(weights[i % len(weights)])
    return Captured(graph, calls, output)


def _replay_ms(captured: Captured) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    captured.graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def take_turns(
    captured: Sequence[Captured], replays: int = REPLAYS, replay_ms: Callable[[Captured], float] = _replay_ms
) -> list[list[float]]:
    """Samples in microseconds a call for each graph, taken in alternating order, those of warm-up rounds left out."""
    samples: list[list[float]] = [[] for _ in captured]
    order = list(range(len(captured)))
    for at in range(replays + _WARM_UP):
        for i in order if at % 2 else reversed(order):
            calls = captured[i].calls
            if len(samples[i]) >= _AT_LEAST and sum(samples[i]) * calls / 1e3 > _ENOUGH_MS:
                continue
            us = replay_ms(captured[i]) * 1e3 / calls
            if at >= _WARM_UP:
                samples[i].append(us)
    return samples


def time_gpu(
    call: Callable[[Any], Tensor], weights: Sequence[Any], graph_ms: float = GRAPH_MS, replays: int = REPLAYS
) -> float:
    """Median microseconds of `call(weight)` over the rotating weights."""
    return statistics.median(take_turns([capture(call, weights, graph_ms)], replays)[0])


def time_cpu(call: Callable[[], Tensor], budget_s: float = 0.3, at_least: int = 5) -> list[float]:
    """Microseconds of single calls of `call()` on the calling threads."""
    call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < at_least or time.perf_counter() - began < budget_s:
        at = time.perf_counter()
        call()
        times.append((time.perf_counter() - at) * 1e6)
    return times


def summary(samples: Sequence[float], fastest: bool = False) -> dict[str, float]:
    """Microseconds a call: `us`, the figure (the median, or the fastest), then percentiles, least and how many."""
    ordered = sorted(samples)
    p50, p95 = statistics.median(ordered), ordered[math.ceil(0.95 * len(ordered)) - 1]
    us = ordered[0] if fastest else p50
    return {"us": us, "us_p50": p50, "us_p95": p95, "us_min": ordered[0], "samples": len(ordered)}


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
