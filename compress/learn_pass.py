"""Learned rounding on a live block: gradients of the block's output error, through the block's own forward.

The block reads what the quantized blocks before it compute, and is asked for what the original block computes from
the original's own hidden states, so that it also makes up for errors made before it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from compress import replay
from compress.config_quant import LearnConfig
from compress.errors import NumericalError
from compress.methods.signround import LearnedWeight, cell_offsets, signed_step
from compress.models import Block, is_transposed
from compress.quant import QuantizedWeight
from compress.streams import HiddenStream

_STEPS_BETWEEN_CHECKS = 32


@dataclass
class LearnJob:
    """One quantized block to improve. targets: what each batch of the stream should become, [B, T, H]; weights:
    float32 [N, K] by linear, what the codes stand for; quantized is replaced by what is learned."""

    block: Block
    index: int
    stream: HiddenStream
    targets: list[Tensor]
    weights: dict[str, Tensor]
    quantized: dict[str, QuantizedWeight]
    config: LearnConfig


@dataclass
class LearnNote:
    """Mean squared error of the block's output on calibration sequences that were not learned from, relative to what
    the block adds to its input, before and after; codes that changed; steps made. When it did not fall on those
    sequences, nothing is changed and `kept` is False."""

    error_before: float
    error_after: float
    changed: float
    steps: int
    kept: bool


def learn_block(job: LearnJob) -> LearnNote:
    """Improve job.quantized in place.

    Raises:
        NumericalError: a loss that is not finite.
    """
    config, n_batches = job.config, len(job.targets)
    learned = {
        name: LearnedWeight(q, config.pull * cell_offsets(q, job.weights[name])) for name, q in job.quantized.items()
    }
    training, held_out = split_batches(n_batches, config.held_out)
    size = _added_power(job)
    before = _held_out_error(job, learned, held_out, size)
    steps = _train(job, learned, training, size)
    after = _held_out_error(job, learned, held_out, size)
    kept = after < before
    n_changed = n_codes = 0
    for name, weight in learned.items():
        result = weight.quantized()
        n_changed += int((result.codes != job.quantized[name].codes).sum())
        n_codes += result.codes.numel()
        if kept:
            job.quantized[name] = result
    return LearnNote(before, after, n_changed / n_codes, steps, kept)


def _train(job: LearnJob, learned: dict[str, LearnedWeight], training: list[int], size: float) -> int:
    """Make all steps; their number. Raises NumericalError as `learn_block`."""
    config, weights = job.config, list(learned.values())
    generator = torch.Generator().manual_seed(job.index)
    order = _epochs(training, generator)
    per_step = max(1, round(config.batch_sequences / job.stream.token_batches[0].shape[0]))
    steps = max(1, round(config.epochs * len(training) / per_step))
    loss_sum = torch.zeros((), device=job.stream.device)

    def gradients(*tensors: Tensor, calls: tuple[int, ...]) -> None:
        for batch, hidden, target in zip(calls, tensors[::2], tensors[1::2], strict=True):
            loss = _batch_error(job, learned, batch, hidden, target) / size
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum.add_(loss.detach())  # looked at now and then: every look waits for the device

    parameters = [p for weight in weights for p in weight.parameters()]
    # a graph keeps no more than a plain step has at its peak, and nothing else runs before it is given back
    captured = config.graphs and replay.can_capture(job.stream.device)
    replayed = replay.Replay(gradients, parameters, job.stream.device, captured, "quant.learn.graphs")
    with torch.enable_grad(), repeatable(job.stream.device), replayed:
        for step in range(steps):
            batches = [next(order) for _ in range(per_step)]
            pairs = [(job.stream.hidden[i], job.targets[i]) for i in batches]
            replayed(*(t for pair in pairs for t in pair), calls=tuple(map(job.stream.called_as, batches)))
            left = 1 - step / steps
            signed_step(weights, config.rate / steps * left, config.gain_rate / steps * left)
            if (step + 1) % _STEPS_BETWEEN_CHECKS == 0 or step + 1 == steps:
                _check_losses(job, loss_sum)
    return steps


def split_batches(n_batches: int, share: float) -> tuple[list[int], list[int]]:
    """Batches to learn from, and the last ones, about `share` of all and at least one, that only judge.

    A single batch does both: what is learned is then judged on what it was learned from.
    """
    count = min(max(1, round(n_batches * share)), max(n_batches - 1, 1))
    batches = list(range(n_batches))
    return batches[:-count] or batches, batches[-count:]


def _epochs(items: list[int], generator: torch.Generator) -> Iterator[int]:
    while True:
        for i in torch.randperm(len(items), generator=generator).tolist():
            yield items[i]


def _added_power(job: LearnJob) -> float:
    """Mean square of what the original block adds to its input, on the first batch: the unit of the error."""
    target = job.targets[0].float()
    return float((target - job.stream.hidden[0].float()).square().mean().clamp(min=1e-20))


def _batch_error(
    job: LearnJob, learned: dict[str, LearnedWeight], batch: int, hidden: Tensor, target: Tensor
) -> Tensor:
    """Mean squared error of the block's output, called as for batch number `batch`, on hidden states [B, T, H]."""
    run = with_weights(job.block, {name: weight() for name, weight in learned.items()})
    with training_precision(job.stream.device, job.targets[0].dtype):
        output = job.stream.forward(run, job.index, batch, hidden)
    return (output.float() - target.to(output.device).float()).square().mean()


def _check_losses(job: LearnJob, loss_sum: Tensor) -> None:
    if not torch.isfinite(loss_sum):
        raise NumericalError(
            f"{job.block.name}: learned rounding met a loss of {loss_sum.item()}; use compute_dtype=bfloat16 or float32"
        )


def _held_out_error(job: LearnJob, learned: dict[str, LearnedWeight], batches: list[int], size: float) -> float:
    with torch.no_grad():
        errors = [float(_batch_error(job, learned, i, job.stream.hidden[i], job.targets[i])) for i in batches]
    return sum(errors) / len(errors) / size


def with_weights(block: Block, weights: dict[str, Tensor]) -> Callable[..., Any]:
    """The block's forward with dense weights [N, K] in place of those of its linears, differentiable in them."""
    placed = {}
    for name, weight in weights.items():
        module = block.linears[name]
        own = module.weight
        assert isinstance(own, Tensor)
        value = weight.to(own.dtype)
        placed[f"{name}.weight"] = value.t() if is_transposed(module) else value

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(block.module, placed, args, kwargs)

    return run


@contextmanager
def training_precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Gradients need no float32 products: bfloat16 where the machine multiplies it fast, the model's dtype elsewhere.

    Signed and normalised steps look at the direction of a gradient, which is noisy anyway; what is saved is computed
    in full precision.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    with torch.autocast(device.type, torch.bfloat16, enabled=fast and dtype is torch.float32):
        yield


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Gradients that come out the same each time: on a GPU, attention's kernels add their parts in whatever order these
    get ready, unless torch is told to wait."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    # torch asks for it before any matmul; it has no other effect once cuBLAS is up, where torch brings the workspace
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings.fill_uninitialized_memory = False  # a launch for every tensor made
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled
