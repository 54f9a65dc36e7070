"""What a run will need, said before the first block instead of found out in the last: memory and context."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from compress.config import RunConfig
from compress.errors import ConfigError, EnvironmentProblem
from compress.models import LoadedModel
from compress.plan import Plan
from compress.units import format_bytes

# batches of calibration sequences that sequences for tuning alone pass a block in at once: all they need is outputs
TUNING_BATCHES = 8


@dataclass
class Forecast:
    """Bytes at the peak of quantization: on the compute device, in host memory (activations kept there), on disk."""

    device_bytes: int
    host_bytes: int
    disk_bytes: int

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Load:
    """What passes through the model: calibration tokens, those of one batch, tokens that end-to-end tuning alone reads,
    and the bytes that sampling takes on the device, which comes first."""

    n_tokens: int
    batch_tokens: int
    tuning_tokens: int = 0
    generation_bytes: int = 0


def forecast(loaded: LoadedModel, plan: Plan, load: Load, dtype: torch.dtype) -> Forecast:
    """Estimate the peak from shapes alone.

    The device holds the largest block in the compute dtype and as float32 masters, up to four float32 copies of what
    is quantized at once (working weights and their transpose, the dequantized result, what a search compares),
    the Hessians of its inputs (float32, and three float64 of the widest while one is inverted), and a batch of
    activations; the embedding and head are there before and after the blocks, not with them.
    """
    n_tokens, batch_tokens = load.n_tokens, load.batch_tokens
    largest = max(sum(p.numel() for p in b.module.parameters()) for b in loaded.blocks)
    widths = {p.k for p in plan.linears if p.block == 0}
    hidden = int(loaded.model.config.get_text_config().hidden_size)  # type: ignore[operator,union-attr]
    widest = max((p.n for p in plan.linears if p.block == 0), default=hidden)
    outside = _n_outside(loaded)
    hessians = 4 * sum(w * w for w in widths) + 3 * 8 * max(widths, default=0) ** 2 if n_tokens else 0
    at_once = max(batch_tokens, min(load.tuning_tokens, TUNING_BATCHES * batch_tokens))
    activations = at_once * (hidden * 4 + widest * 4) * dtype.itemsize
    in_blocks = largest * (dtype.itemsize + 5 * 4) + hessians + activations
    config = plan.config
    if config.learn.enabled:  # latents, their gradients and what the backward pass of the block keeps
        in_blocks += largest * 4 * 4 + 2 * batch_tokens * sum(p.n + p.k for p in plan.linears if p.block == 0) * 4
    device = max(in_blocks, outside * dtype.itemsize, load.generation_bytes)
    if config.tune.enabled:  # and a dense weight in the making
        state = tuning_state_bytes(loaded, plan, dtype)
        device = max(device, state + 8 * largest + tuning_logit_bytes(loaded, batch_tokens))
    # the quantized model's hidden states, and the original's before and after a block
    host = n_tokens * hidden * dtype.itemsize * (3 if config.needs_teacher else 1)
    # the original's alone: 8.6 GB for 2048 x 512 tokens at a width of 4096
    host += load.tuning_tokens * hidden * dtype.itemsize
    if config.needs_drift:  # what the original's linears read; every linear counted, though some share an input
        host += n_tokens * dtype.itemsize * sum(p.k for p in plan.linears if p.block == 0)
    total = sum(p.numel() for _, p in loaded.model.named_parameters())
    return Forecast(device, host, 2 * total * loaded.dtype.itemsize)


def tuning_state_bytes(loaded: LoadedModel, plan: Plan, dtype: torch.dtype) -> int:
    """What end-to-end tuning holds on the device whatever the batch: each code in one byte, or as a float32 with its
    gradient and two moments where codes are trained; all that lies outside the blocks, as much as a code where it is
    trained, and a second head where that is quantized."""
    codes = sum(p.n * p.k for p in plan.linears if p.scheme is not None)
    kept = sum(p.n * p.k for p in plan.linears if p.scheme is None)
    outside = _n_outside(loaded)
    head = plan.head.n * plan.head.k if plan.head is not None else 0
    trained = 16 * outside if plan.config.tune.embedding_rate > 0 else 0
    return (16 if plan.config.tune.trains_codes else 1) * codes + (kept + outside + head) * dtype.itemsize + trained


def _n_outside(loaded: LoadedModel) -> int:
    """Parameters outside of the blocks, those that share storage once."""
    return sum(loaded.model.get_parameter(n).numel() for n in loaded.outside_blocks() if n not in loaded.tied)


def tuning_logit_bytes(loaded: LoadedModel, n_tokens: int) -> int:
    """Logits of the original and of the quantized model, and their gradient, on so many tokens at once."""
    vocabulary = int(loaded.model.config.get_text_config().vocab_size)  # type: ignore[operator,union-attr]
    return 3 * 4 * n_tokens * vocabulary


def check_forecast(plan: Forecast, device: torch.device, out: Path) -> None:
    """Stop now if it cannot fit.

    Raises:
        EnvironmentProblem: names what is needed, what is there, and which setting lowers it.
    """
    free_host = available_memory_bytes()
    on_host = plan.host_bytes + (plan.device_bytes if device.type == "cpu" else 0)
    if free_host is not None and on_host > free_host:
        raise EnvironmentProblem(
            f"quantizing needs about {format_bytes(on_host)} of memory, {format_bytes(free_host)} are free; "
            "lower calibration.n_sequences, calibration.tune_generated or calibration.sequence_length"
        )
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if plan.device_bytes > free:
            raise EnvironmentProblem(
                f"quantizing needs about {format_bytes(plan.device_bytes)} on {device}, {format_bytes(free)} are free; "
                "lower calibration.batch_size or calibration.generated_batch_size, leave codes out of the tuning "
                "(quant.tune.code_rate=0), free the GPU, or set device=cpu"
            )
    free_disk = shutil.disk_usage(out).free
    if plan.disk_bytes > free_disk:
        raise EnvironmentProblem(
            f"checkpoints and artifact may take {format_bytes(plan.disk_bytes)}, {format_bytes(free_disk)} are free "
            f"at {out}; free space or set output_dir=<another disk>"
        )


def context_length(loaded: LoadedModel) -> int | None:
    """The longest sequence the model was made for; None where its config does not say."""
    length = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator,union-attr]
    return length if isinstance(length, int) and length > 0 else None


def check_lengths(config: RunConfig, loaded: LoadedModel) -> None:
    """No sequence that a stage will run may be longer than the model's context.

    Raises:
        ConfigError: names the setting to lower.
    """
    limit = context_length(loaded)
    wanted = {
        "calibration.sequence_length": config.calibration.sequence_length if config.needs_calibration else 0,
        "eval.sequence_length": config.eval.sequence_length if config.eval.enabled else 0,
        "bench.prompt_tokens + bench.decode_tokens": (
            config.bench.prompt_tokens + config.bench.decode_tokens if config.bench.enabled else 0
        ),
    }
    for name, length in wanted.items():
        if limit is not None and length > limit:
            raise ConfigError(f"{name}={length} is longer than the model's context of {limit} tokens; lower it")


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on the device; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory_bytes()


def available_memory_bytes() -> int | None:
    try:
        with open("/proc/meminfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None
