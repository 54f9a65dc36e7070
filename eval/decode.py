"""python -m compress.eval.decode: tokens a second of a whole model's decode step, 4-bit beside dense, in one run.

Metric: milliseconds of a step of one token in each of `batch` sequences, median and 95th percentile of --steps steps.
On CUDA a step is timed between two events, and steps are queued without waiting: what the device takes. Three ways:

    transformers   the dense model as transformers runs it: StaticCache, torch.compile(mode="reduce-overhead")
    engine         the dense model in `compress.decoder`, replayed as a CUDA graph
    engine int4    the same with 4-bit linears, symmetric, group 128; head and embedding as in the dense model

Weights are random (`compress.eval.random_models`). The prompt fills the cache so far that the last timed step is the
last that fits. Before it is timed, each way computes three steps after the prompt, whose logits must agree with those
of an eager forward of transformers; one that does not agree has no time and fails the run.

Roofline: bytes / bandwidth / median. Bytes are weights (codes and scales, norms, head) once, the embedding rows, and of
the KV cache what the tokens present at the *mean* timed position take, and the one written; they are the same for both
ways of the dense model, although transformers reads the whole static cache, empty rows too. Bandwidth is that of a copy
kernel (read + written), measured in the same run.

    python -m compress.eval.decode --shape llama-3-8b --batches 1,4,16,64 --out DIR
    python -m compress.eval.decode --shape llama-3-8b --batches 1 --no-compiled --breakdown
    python -m compress.eval.decode --device cpu --shape tiny --cache 64 --steps 5

On a CPU (a test of this script) the engine runs on PyTorch twins, and transformers eagerly.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.arguments import numbers, run_command
from compress.atomic import write_json
from compress.decode_weights import DecodeModel, read_model
from compress.decoder import Decoder
from compress.environment import describe
from compress.eval.random_models import SHAPES, random_pair
from compress.eval.roofline import measure_machine, synchronize
from compress.kernels.reference import relative_error
from compress.models import choose_device

log = logging.getLogger(__name__)

CHECKED_STEPS = 3
WARM_STEPS = 5
# of logits; `random_models` says what rounding and what mistakes give
MAX_ERROR = {torch.bfloat16: 0.04, torch.float32: 1e-4}
_BREAKDOWN_STEPS = 5


@dataclass(frozen=True)
class Options:
    device: torch.device
    dtype: torch.dtype
    cache_tokens: int
    steps: int
    compiled: bool
    breakdown: bool
    pdl: bool | None

    @property
    def prompt_tokens(self) -> int:
        return self.cache_tokens - self.steps - WARM_STEPS

    @property
    def mean_cached_tokens(self) -> float:
        return self.cache_tokens - (self.steps + 1) / 2


@dataclass
class Row:
    """One way of one shape at one batch; times are None where the logits disagree or it failed."""

    shape: str
    batch: int
    way: str
    dtype: str
    mean_cached_tokens: float
    bytes_moved: float
    error: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    tokens_per_s: float | None = None
    roofline_fraction: float | None = None
    failure: str | None = None
    breakdown: list[dict[str, Any]] = field(default_factory=list)


class Problem:
    """A prompt at one batch size, and the logits that transformers computes eagerly for the tokens after it."""

    def __init__(self, model: nn.Module, batch: int, options: Options) -> None:
        from transformers import StaticCache

        self.model, self.batch, self.options = model, batch, options
        vocabulary: Any = model.config.vocab_size  # type: ignore[union-attr]
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(vocabulary, (batch, options.prompt_tokens + CHECKED_STEPS), generator=generator)
        ids = ids.to(options.device)
        self.tokens = list(ids[:, options.prompt_tokens :].unbind(dim=1))
        self.cache = StaticCache(model.config, options.cache_tokens)
        model(input_ids=ids[:, : options.prompt_tokens], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.expected = [self.eager_step(token).clone() for token in self.tokens]

    def eager_step(self, token: Tensor) -> Tensor:
        return self.model(input_ids=token[:, None], past_key_values=self.cache, use_cache=True).logits[:, -1]

    def rewind(self) -> None:
        """Back to the end of the prompt; rows after it are written again before they are read."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.options.prompt_tokens)

    def error(self, step: Callable[[Tensor], Tensor]) -> float:
        """Largest relative error of the logits of the checked steps."""
        return max(
            relative_error(step(token), wanted) for token, wanted in zip(self.tokens, self.expected, strict=True)
        )


def measure_engine(problem: Problem, weights: DecodeModel, row: Row) -> None:
    """Fills the row's error and times; see the module docstring."""
    options = problem.options
    decoder = Decoder(weights, problem.batch, options.cache_tokens, options.pdl)
    decoder.load_cache(problem.cache, options.prompt_tokens)
    if options.device.type == "cuda":
        decoder.capture()
    row.error = problem.error(decoder.step)
    if not row.error < MAX_ERROR[options.dtype]:
        return
    decoder.seek(options.prompt_tokens)
    set_times(row, time_steps(lambda: decoder.step(problem.tokens[0]), options))
    if options.breakdown:
        decoder.seek(options.prompt_tokens)
        row.breakdown = break_down(lambda: decoder.step(problem.tokens[0]))


def measure_transformers(problem: Problem, row: Row) -> None:
    """Fills the row's error and times; compiled on CUDA, eager on a CPU."""
    options = problem.options
    call: Callable[..., Any] = problem.model.forward
    if options.device.type == "cuda":
        torch._dynamo.reset()  # one batch size's code must not make the next one's shapes dynamic
        call = torch.compile(call, mode="reduce-overhead", dynamic=False)

    def step(token: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        logits = call(input_ids=token[:, None], past_key_values=problem.cache, use_cache=True).logits[:, -1]
        return logits.clone()

    try:
        problem.rewind()
        row.error = problem.error(step)  # the first calls compile and record
        if row.error < MAX_ERROR[options.dtype]:
            problem.rewind()
            set_times(row, time_steps(lambda: step(problem.tokens[0]), options))
    finally:
        torch._dynamo.reset()  # compiled code would keep the model and its graph's memory


def time_steps(step: Callable[[], object], options: Options) -> list[float]:
    """Milliseconds of each of `options.steps` steps, after warm ones."""
    for _ in range(WARM_STEPS):
        step()
    synchronize(options.device)
    if options.device.type != "cuda":
        times = []
        for _ in range(options.steps):
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1e3)
        return times
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(options.steps)
    ]
    for before, after in events:
        before.record()
        step()
        after.record()
    synchronize(options.device)
    return [before.elapsed_time(after) for before, after in events]


def set_times(row: Row, times: list[float]) -> None:
    row.p50_ms = statistics.median(times)
    row.p95_ms = sorted(times)[math.ceil(0.95 * len(times)) - 1]
    row.tokens_per_s = row.batch / row.p50_ms * 1e3


def break_down(step: Callable[[], object]) -> list[dict[str, Any]]:
    """Device time by kernel: name, microseconds a step and launches a step, the longest first. With programmatic
    dependent launch kernels overlap, and a kernel's time holds its wait for the one before: use --no-pdl."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(_BREAKDOWN_STEPS):
            step()
        torch.cuda.synchronize()
    kernels = [
        {
            "kernel": event.key,
            "us": event.self_device_time_total / _BREAKDOWN_STEPS,
            "launches": event.count / _BREAKDOWN_STEPS,
        }
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA and event.self_device_time_total
    ]
    return sorted(kernels, key=lambda kernel: -kernel["us"])


def measure_batch(
    shape: str, models: dict[str, DecodeModel], dense: nn.Module, batch: int, options: Options
) -> list[Row]:
    """All ways at one batch size. The error of one way leaves the others their figures; the run fails at its end."""
    problem = Problem(dense, batch, options)
    calls: dict[str, Callable[[Row], None]] = {
        way: lambda row, weights=weights: measure_engine(problem, weights, row)  # type: ignore[misc]
        for way, weights in models.items()
    }
    if options.compiled:
        calls = {"transformers": lambda row: measure_transformers(problem, row), **calls}
    rows = []
    for way, call in calls.items():
        moved = models.get(way, models["engine"]).step_bytes(batch, options.mean_cached_tokens)
        row = Row(shape, batch, way, str(options.dtype).removeprefix("torch."), options.mean_cached_tokens, moved)
        began = time.perf_counter()
        try:
            call(row)
        except Exception as error:
            log.exception("%s at batch %d failed", way, batch)
            row.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if row.p50_ms is None and row.failure is None:
            row.failure = f"logits are off by {row.error:.3g} (limit {MAX_ERROR[options.dtype]})"
        log.info("%s, batch %d, %s: %.1f s", shape, batch, way, time.perf_counter() - began)
        rows.append(row)
    return rows


def print_rows(rows: list[Row]) -> None:
    """A table of one shape and batch; speed-ups are against transformers and against the dense engine."""
    p50 = {row.way: row.p50_ms for row in rows}
    for row in rows:
        start = f"{row.shape:12} {row.batch:>5}  {row.way:13}"
        if row.p50_ms is None:
            print(f"{start} FAILED: {row.failure}")
            continue
        ratios = [f"{base / row.p50_ms:.2f}x" if base else "-" for base in (p50.get("transformers"), p50.get("engine"))]
        print(
            f"{start} {row.p50_ms:9.3f} {row.p95_ms:9.3f} {row.tokens_per_s:10,.0f} {ratios[0]:>9} {ratios[1]:>9} "
            f"{row.bytes_moved / 1e9:9.3f} {row.roofline_fraction or 0:8.1%} {row.error:9.1e}"
        )
    for row in (r for r in rows if r.breakdown):
        total = sum(kernel["us"] for kernel in row.breakdown)
        launches = sum(kernel["launches"] for kernel in row.breakdown)
        print(f"\n  {row.way}, batch {row.batch}: {total:.0f} us in {launches:.0f} launches a step")
        for kernel in row.breakdown[:16]:
            share = kernel["us"] / total
            print(f"  {kernel['us']:9.1f} us {share:6.1%} {kernel['launches']:6.1f} x  {kernel['kernel'][:80]}")
        print()


def copy_bandwidth(options: Options) -> float:
    """Bytes a second of a copy, read + written."""
    if options.device.type != "cuda":
        return measure_machine(options.device, options.dtype).bandwidth_bytes_per_s
    from compress.kernels.timing import gpu_ceilings

    return gpu_ceilings()["copy_TB_per_s"] * 1e12


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Options]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=(*SHAPES, "all"), default="all", help="all: without tiny")
    parser.add_argument("--batches", type=numbers, default="1,4,16,64", help="numbers of sequences")
    parser.add_argument("--cache", type=int, default=1024, help="tokens of each sequence that the KV cache holds")
    parser.add_argument("--steps", type=int, default=50, help="timed steps")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-compiled", action="store_true", help="leave transformers out; compiling takes a minute")
    parser.add_argument("--no-pdl", action="store_true", help="no programmatic dependent launch in the engine")
    parser.add_argument("--breakdown", action="store_true", help="device time of the engine's steps by kernel (CUDA)")
    parser.add_argument("--out", type=Path, help="directory for decode_<device>.json")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options = Options(
        device, dtype, args.cache, args.steps, not args.no_compiled, args.breakdown, False if args.no_pdl else None
    )
    if args.steps < 1 or options.prompt_tokens < 1:
        least = args.steps + WARM_STEPS + 1
        parser.error(f"--cache {args.cache} with --steps {args.steps}: needs a step or more and a cache of {least}")
    if args.breakdown and device.type != "cuda":
        parser.error("--breakdown shows kernels of a CUDA device")
    return args, options


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args, options = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    bandwidth = copy_bandwidth(options)
    result: dict[str, Any] = {
        "metric": "milliseconds of a decode step",
        "environment": describe(options.device, options.dtype),
        "bandwidth_bytes_per_s": bandwidth,
        "cache_tokens": options.cache_tokens,
        "timed_steps": options.steps,
        "rows": [],
    }
    print(f"{result['environment']['device_name']}, copy {bandwidth / 1e12:.2f} TB/s, {options.dtype}")
    print(
        f"{'shape':12} {'batch':>5}  {'way':13} {'ms p50':>9} {'p95':>9} {'tokens/s':>10} {'vs trf':>9} "
        f"{'vs dense':>9} {'GB':>9} {'roofline':>8} {'error':>9}"
    )
    names = [name for name in SHAPES if name != "tiny"] if args.shape == "all" else [args.shape]
    for name in names:
        dense, quantized = random_pair(SHAPES[name], options.device, options.dtype)
        models = {"engine": read_model(dense), "engine int4": read_model(quantized)}
        del quantized
        for batch in args.batches:
            rows = measure_batch(name, models, dense, batch, options)
            for row in rows:
                if row.p50_ms is not None:
                    row.roofline_fraction = row.bytes_moved / bandwidth / row.p50_ms * 1e3
            print_rows(rows)
            result["rows"] += [asdict(row) for row in rows]
            if args.out:  # after each batch size: what is measured is kept
                args.out.mkdir(parents=True, exist_ok=True)
                write_json(args.out / f"decode_{options.device.type}.json", result)
        del dense, models
    print(json.dumps(result))
    if any(row["failure"] for row in result["rows"]):
        sys.exit("a way above failed")


if __name__ == "__main__":
    run_command(main)
