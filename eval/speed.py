"""Speed of a quantized model beside the unquantized one: same process, same shapes, taking turns.

For each batch size both models read a prompt (prefill) and then take `decode_tokens` steps of one token on their KV
cache, `repeats` times over, in the order reference, quantized, reference, quantized, ... so that clocks and
neighbours that drift touch both alike. A latency is the wall time of one forward pass, from before its launch until
the device is done: what a generation loop waits for. Prefill yields `repeats` samples, decode
`repeats * decode_tokens`.

On CUDA the decode step is captured in a CUDA graph over a static KV cache, as serving engines run it: the step of
`compress.decoder` where it knows both models, otherwise that of transformers; where either model cannot be captured,
both run eagerly and `mode` says so with the reason. Prefill is eager always.

Token ids are random (fixed seed): speed does not depend on them, and the random state of the process is not touched.
"""

from __future__ import annotations

import logging
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import torch
from torch import nn

from compress.config import BenchConfig
from compress.decode_weights import DecodeModel
from compress.errors import ConfigError, EnvironmentProblem
from compress.eval.roofline import Machine, measure_machine
from compress.eval.session import PHASES, Session, choose_launch, weights_of

log = logging.getLogger(__name__)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class SpeedRow:
    """One phase at one batch size. Times in ms; the quantized model's figures are without a prefix.

    `tokens_per_s` counts all tokens over all the time of the samples. `p95_ms` and `p99_ms` are samples, not
    interpolations: of few samples (`n_samples`) they are the slowest. `speedup` is reference_p50_ms / p50_ms.

    `peak_memory_bytes` is the model's resident weights plus the most that its cache, activations and workspaces
    added during the phase. On CUDA that is exact, from torch's allocator. On a CPU it is the growth of the resident
    set of the process, which misses pages the allocator already had; null where the system does not tell. The fused
    copies that `compress.decoder` makes of packed weights are left out: a process that only decodes holds one of both.

    `kernels` counts the quantized layers by the path that computed them, for example {"triton": 224}.
    """

    phase: str
    batch: int
    prompt_tokens: int
    decode_tokens: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    tokens_per_s: float
    reference_p50_ms: float
    reference_p95_ms: float
    reference_p99_ms: float
    reference_tokens_per_s: float
    speedup: float
    bytes_moved: float
    reference_bytes_moved: float
    flops: float
    intensity: float
    roofline_fraction: float
    reference_roofline_fraction: float
    peak_memory_bytes: int | None
    reference_peak_memory_bytes: int | None
    n_samples: int
    mode: str
    kernels: dict[str, int]


@dataclass(frozen=True)
class SpeedReport:
    """All rows, and the limits of the machine that their roofline fractions refer to.

    backend: device, its name, threads and torch version. mode: how steps were launched.
    n_samples: samples behind the percentiles of each phase.
    """

    rows: list[SpeedRow]
    bandwidth_bytes_per_s: float
    flops_per_s: float
    backend: str
    mode: str
    n_samples: dict[str, int]

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def benchmark_pair(
    reference: nn.Module,
    quantized: nn.Module,
    config: BenchConfig,
    device: torch.device | str,
    progress: Progress | None = None,
) -> SpeedReport:
    """Measure both models, in eval mode and on `device`, at every batch size of `config`.

    Args:
        progress: called with a line of text before each timed pass.

    Raises:
        ConfigError: prompt and decode tokens exceed the positions the model has.
        EnvironmentProblem: a batch size does not fit the device's memory.
    """
    device = torch.device(device)
    check_positions(reference, config)
    if reference.training or quantized.training:
        raise ValueError("a model in training mode was given to the benchmark; call model.eval() first")
    dtype = dtype_of(reference)
    say = progress or log.debug
    say("measuring memory bandwidth and matrix-product peak")
    machine = measure_machine(device, dtype)
    # fused for the decode engine once, whatever the number of batch sizes
    models = {name: (model, weights_of(model)) for name, model in (("reference", reference), ("quantized", quantized))}
    rows: list[SpeedRow] = []
    with torch.inference_mode():
        for batch in config.batch_sizes:
            try:
                rows += _bench_batch(models, batch, config, device, machine, say)
            except torch.OutOfMemoryError as error:
                raise EnvironmentProblem(
                    f"bench.batch_sizes holds {batch}, which does not fit {device} beside both models; "
                    f"leave it out ({error})"
                ) from error
    return SpeedReport(
        rows=rows,
        bandwidth_bytes_per_s=machine.bandwidth_bytes_per_s,
        flops_per_s=machine.flops_per_s,
        backend=_describe_backend(device, dtype),
        mode="; ".join(dict.fromkeys(row.mode for row in rows)),
        n_samples={"prefill": config.repeats, "decode": config.repeats * config.decode_tokens},
    )


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype an unquantized model computes in."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def check_positions(model: nn.Module, config: BenchConfig) -> None:
    """Raises ConfigError when the benchmark would run past the positions the model was made for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    wanted = config.prompt_tokens + config.decode_tokens
    if limit is not None and wanted > limit:
        raise ConfigError(
            f"bench.prompt_tokens + bench.decode_tokens = {wanted} exceeds the model's {limit} positions; lower one"
        )


def _bench_batch(
    models: dict[str, tuple[nn.Module, Callable[[], DecodeModel]]],
    batch: int,
    config: BenchConfig,
    device: torch.device,
    machine: Machine,
    say: Progress,
) -> list[SpeedRow]:
    """One row a phase. `models`, each with its `weights_of`, are measured in their order, over and over."""
    sessions = {name: Session(model, batch, config, device, read) for name, (model, read) in models.items()}
    for session in sessions.values():
        session.count()
    mode = choose_launch(list(sessions.values()))
    for i in range(config.warmup + config.repeats):
        keep = i >= config.warmup
        what = f"repeat {i - config.warmup + 1} of {config.repeats}" if keep else "warm-up"
        for name, session in sessions.items():
            say(f"batch {batch}, {what}: {name}")
            session.run(keep)
    return [_row(phase, sessions["quantized"], sessions["reference"], machine, mode) for phase in PHASES]


def _row(phase: str, quantized: Session, reference: Session, machine: Machine, mode: str) -> SpeedRow:
    config, batch = quantized.config, quantized.batch
    ms, reference_ms = quantized.ms[phase], reference.ms[phase]
    p50, p95, p99 = _percentiles(ms)
    reference_p50, reference_p95, reference_p99 = _percentiles(reference_ms)
    work, reference_work = quantized.work[phase], reference.work[phase]
    tokens = batch * (config.prompt_tokens if phase == "prefill" else 1)
    return SpeedRow(
        phase=phase,
        batch=batch,
        prompt_tokens=config.prompt_tokens,
        decode_tokens=config.decode_tokens,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        tokens_per_s=1e3 * tokens * len(ms) / sum(ms),
        reference_p50_ms=reference_p50,
        reference_p95_ms=reference_p95,
        reference_p99_ms=reference_p99,
        reference_tokens_per_s=1e3 * tokens * len(reference_ms) / sum(reference_ms),
        speedup=reference_p50 / p50,
        bytes_moved=work.bytes_moved,
        reference_bytes_moved=reference_work.bytes_moved,
        flops=work.flops,
        intensity=work.intensity,
        roofline_fraction=1e3 * machine.least_seconds(work.bytes_moved, work.flops) / p50,
        reference_roofline_fraction=1e3
        * machine.least_seconds(reference_work.bytes_moved, reference_work.flops)
        / reference_p50,
        peak_memory_bytes=quantized.peak_bytes(phase),
        reference_peak_memory_bytes=reference.peak_bytes(phase),
        n_samples=len(ms),
        mode=mode,
        kernels=quantized.kernels(phase, dtype_of(reference.model)),
    )


def _percentiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, and by nearest rank the 95th and 99th percentile."""
    ordered = sorted(samples)
    return (
        statistics.median(ordered),
        ordered[ceil(0.95 * len(ordered)) - 1],
        ordered[ceil(0.99 * len(ordered)) - 1],
    )


def _describe_backend(device: torch.device, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {name}, torch {torch.__version__}"
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads, {name}, torch {torch.__version__}"
