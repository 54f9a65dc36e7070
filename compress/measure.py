"""The measuring stages: size, speed and quality of what ships, against the unquantized model in the same run."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from compress.artifact import MANIFEST
from compress.calibration import CalibrationSet
from compress.models import LoadedModel
from compress.plan import Plan
from compress.progress import progress
from compress.run import Run

log = logging.getLogger(__name__)


def measure_size(loaded: LoadedModel, manifest: dict[str, Any] | None, artifact: Path, plan: Plan) -> dict[str, Any]:
    """Bytes of weights on disk before and after, and stored bits for each weight, all tensors counted."""
    reference = {n: loaded.source.raw(n) for n in loaded.source_names.values()}
    tied = {loaded.source_names[n] for n in (*loaded.tied, *loaded.untied) if n in loaded.source_names}
    counted = {n: t for n, t in reference.items() if n not in tied}
    reference_bytes = sum(t.nbytes for t in counted.values())
    n_weights = sum(t.numel() for t in counted.values())
    weight_bytes, artifact_bytes, quantized_bits = reference_bytes, None, None
    if manifest is not None:
        files = list(artifact.glob("*.safetensors"))
        # not the card, which is written from these figures
        artifact_bytes = sum(
            p.stat().st_size for p in [*files, *(artifact / n for n in [*manifest["files"], MANIFEST])]
        )
        weight_bytes = sum(_nbytes(t) for t in manifest["tensors"].values())
        bits = [(p.n * p.k, p.scheme.bits_per_weight(p.n, p.k)) for p in plan.linears if p.scheme is not None]
        quantized_bits = sum(n * b for n, b in bits) / sum(n for n, _ in bits)
    return {
        "weight_bytes": weight_bytes,
        "reference_weight_bytes": reference_bytes,
        "ratio": reference_bytes / weight_bytes,
        "bits_per_weight": 8 * weight_bytes / n_weights,
        "quantized_bits_per_weight": quantized_bits,
        "artifact_bytes": artifact_bytes,
        "n_weights": n_weights,
    }


def _nbytes(described: dict[str, Any]) -> int:
    count = 1
    for n in described["shape"]:
        count *= n
    return count * getattr(torch, described["dtype"]).itemsize


def measure_speed(run: Run) -> dict[str, Any]:
    """Prefill and decode of the artifact and of the unquantized model, alternating, in the checkpoint's dtype.

    The dtype is the one each would be served in: bfloat16 or float16 activations, whatever quantization used.
    """
    from compress.eval.speed import benchmark_pair

    dtype = run.loaded.dtype
    reference, quantized = run.reference(dtype), run.quantized(dtype)
    return benchmark_pair(reference, quantized, run.config.bench, run.device, log.info).to_plain()


def measure_quality(run: Run, evaluation: CalibrationSet, tasks: list[str]) -> dict[str, Any]:
    """KL, perplexity and top-1 agreement on held-out tokens, and lm-eval tasks, original and artifact side by side."""
    from compress.eval.lm import TaskOptions, compare_tasks
    from compress.eval.quality import kl_quality

    config = run.config.eval
    reference, quantized = run.reference(run.dtype), run.quantized(run.dtype)
    with progress(f"KL of {run.config.name}") as report:
        quality = asdict(kl_quality(reference, quantized, evaluation.input_ids, config.batch_size, report))
    options = TaskOptions(config.include_path, config.limit, config.task_batch_size)
    rows = compare_tasks(reference, quantized, run.tokenizer(), tasks, options) if tasks else []
    return {
        **quality,
        "dataset": evaluation.source,
        "dataset_sha256": evaluation.sha256,
        "tasks": [asdict(row) for row in rows],
    }
