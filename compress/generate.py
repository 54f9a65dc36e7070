"""Calibration sequences sampled from the original model itself (LLM-QAT, arXiv 2305.17888, section 3.1).

Text to calibrate on is scarce, the model is not: sequences drawn from its own next-token distribution are on its
distribution by construction, and what learned rounding and tuning fit on them carries over to text. Every sequence
begins with some tokens of the calibration text (so that it stays near the user's subject), or with the BOS token, and
every token after that is drawn by inverting the cumulative distribution in float64 (`compress.sampling`).

Differs from the paper: all tokens are drawn, none are taken greedily, and the beginnings come from text.

The draws are fixed before the first one is made, one row of uniforms a sequence, from a generator of their own. Which
batch a sequence falls in changes its logits by rounding alone; the process's own random state is never touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.atomic import write_atomically
from compress.calibration import CalibrationSet
from compress.config import CalibrationConfig
from compress.errors import EnvironmentProblem
from compress.forecast import free_bytes
from compress.models import LoadedModel, load_dense, load_model
from compress.sampling import continue_sequences
from compress.units import format_bytes

OnStep = Callable[[int, int], None]

_CPU_BATCH, _LARGEST_BATCH = 64, 2048


@dataclass
class GenerateJob:
    """text: where sequences begin; file: where finished ones are kept; mark: fingerprint of all that decides them, so
    that a file of another job is not taken for this one's."""

    loaded: LoadedModel
    text: CalibrationSet
    config: CalibrationConfig
    device: torch.device
    dtype: torch.dtype
    file: Path
    mark: str
    trust_remote_code: bool = False


def generate(job: GenerateJob, on_step: OnStep) -> dict[str, Any]:
    """Sample the sequences into `job.file`, going on where an earlier call stopped; facts of them as JSON values.

    Raises:
        EnvironmentProblem: the whole model, which the quantization itself never holds, does not fit the device.
        UnsupportedModel, NumericalError, EnvironmentProblem: as `continue_sequences`.
    """
    config = job.config
    length, n = config.sequence_length, config.n_sampled
    begin = beginnings(job.text.input_ids, n, config.generated_prompt, _first_id(job.loaded))
    new = length - begin.shape[1]
    seeded = torch.Generator().manual_seed(config.generated_seed)
    uniforms = torch.rand(n, new, dtype=torch.float64, generator=seeded)
    done = _read(job.file, job.mark)
    done = done[:n] if done is not None else torch.empty(0, length, dtype=torch.int64)
    batch_size = sampling_batch(job.loaded, config, job.device, job.dtype)
    if len(done) < n:
        _check_memory(job, batch_size)
        model = load_dense(load_model(str(job.loaded.source.path), None, job.trust_remote_code), job.device, job.dtype)
        batches = list(range(len(done), n, batch_size))
        for number, start in enumerate(batches):
            rows = slice(start, start + batch_size)

            def step(t: int, number: int = number) -> None:
                on_step(number * new + t, len(batches) * new)

            found = continue_sequences(
                model, begin[rows].to(job.device), uniforms[rows], config.generated_temperature, step,
                config.generated_graphs,
            )  # fmt: skip
            done = torch.cat([done, found.cpu()])
            _write(job.file, done, job.mark)
        del model
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "n_sequences": config.generated,
        "n_tuning": config.tune_generated,
        "n_tokens": n * new,
        "prompt_tokens": config.generated_prompt,
        "temperature": config.generated_temperature,
        "seed": config.generated_seed,
        "batch_size": batch_size,
        "sha256": _sha256(done),
    }


def read_generated(file: Path, sha256: str) -> Tensor | None:
    """Finished sequences int64 [S, T]; None when the file is gone, damaged or holds others."""
    tokens = _read(file, None)
    return tokens if tokens is not None and _sha256(tokens) == sha256 else None


def mixed(text: CalibrationSet, generated: Tensor) -> CalibrationSet:
    """Text and generated sequences spread evenly among each other: every share of consecutive sequences (a batch, what
    is held out at the end) is then a sample of both."""
    counts = (len(text.input_ids), len(generated))
    place = torch.cat([(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in counts])
    order = torch.argsort(place, stable=True)
    return CalibrationSet(torch.cat([text.input_ids, generated])[order], text.source)


def beginnings(text_ids: Tensor, n: int, prompt: int, first_id: int | None) -> Tensor:
    """What n sequences begin with, int64 [n, P].

    Sequence i takes `prompt` tokens of window i; when the windows are used up, the next ones further in. With prompt=0
    it is `first_id` alone, or where the model has none the first token of window i.
    """
    n_windows, length = text_ids.shape
    if prompt == 0 and first_id is not None:
        return torch.full((n, 1), first_id, dtype=torch.int64)
    width = max(prompt, 1)
    rounds = [(i // n_windows) * width % (length - width + 1) for i in range(n)]
    return torch.stack([text_ids[i % n_windows, at : at + width] for i, at in enumerate(rounds)])


def generation_bytes(loaded: LoadedModel, config: CalibrationConfig, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes on the device while sampling: the whole model, keys and values of one batch, and the float64 tables of its
    logits. 0 where nothing is sampled."""
    if not config.n_sampled:
        return 0
    return _batch_bytes(loaded, config, sampling_batch(loaded, config, device, dtype), dtype)


def sampling_batch(loaded: LoadedModel, config: CalibrationConfig, device: torch.device, dtype: torch.dtype) -> int:
    """Sequences sampled at a time. Unless the recipe says it: few on a CPU, which gains nothing by more; on a GPU the
    largest power of two that half of its memory holds, the same on every day that this half is free."""
    rows = config.generated_batch_size or _CPU_BATCH
    if config.generated_batch_size is None and device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        rows = _LARGEST_BATCH
        while rows > 1 and _batch_bytes(loaded, config, rows, dtype) > min(total // 2, free):
            rows //= 2
    return min(rows, config.n_sampled)


def _batch_bytes(loaded: LoadedModel, config: CalibrationConfig, rows: int, dtype: torch.dtype) -> int:
    text = loaded.model.config.get_text_config()  # type: ignore[operator,union-attr]
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    weights = sum(p.numel() for p in loaded.model.parameters())
    block = 2 * kv_heads * head_dim * config.sequence_length * rows
    # A growing cache has keys and values of one block twice while a token is appended, a static one only once; and
    # attention may repeat those of one block for each query head that shares them.
    cache = (len(loaded.blocks) + 1 + heads // kv_heads) * block
    return int((weights + cache) * dtype.itemsize + 3 * 8 * rows * text.vocab_size)


def _check_memory(job: GenerateJob, batch_size: int) -> None:
    needed, free = _batch_bytes(job.loaded, job.config, batch_size, job.dtype), free_bytes(job.device)
    if free is not None and needed > free:
        raise EnvironmentProblem(
            f"calibration.generated: sampling holds the whole model and a KV cache, about {format_bytes(needed)} on "
            f"{job.device}, where {format_bytes(free)} are free; set calibration.generated_batch_size lower, or "
            "calibration.generated=0 and calibration.tune_generated=0"
        )


def _first_id(loaded: LoadedModel) -> int | None:
    """The BOS token of the model's config."""
    first = getattr(loaded.model.config.get_text_config(), "bos_token_id", None)  # type: ignore[operator,union-attr]
    return first if isinstance(first, int) else None


def _write(file: Path, tokens: Tensor, mark: str) -> None:
    write_atomically(file, lambda p: save_file({"tokens": tokens}, p, metadata={"mark": mark}))


def _read(file: Path, mark: str | None) -> Tensor | None:
    """Tokens of a file, if it is whole and, given a mark, bears it."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as f:
            if mark is not None and (f.metadata() or {}).get("mark") != mark:
                return None
            tokens: Tensor = f.get_tensor("tokens")
    except SafetensorError:
        return None  # half a file is none: the sequences are drawn again, and are the same
    return tokens


def _sha256(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
