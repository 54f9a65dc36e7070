"""Run records for the tests of the report, the frontier, the gate and the publisher: small, whole and realistic."""

from __future__ import annotations

from typing import Any

MB = 1e6
BANDWIDTH, PEAK = 2.1e10, 4.0e11


def make_task(name: str = "arc_easy", difference: float = -0.012, **changes: Any) -> dict[str, Any]:
    """One lm-eval task of a record; the unquantized model scores 0.61."""
    task = {
        "task": name,
        "metric": "acc",
        "value": 0.61 + difference,
        "stderr": 0.010,
        "n": 2376,
        "higher_is_better": True,
        "reference": 0.61,
        "reference_stderr": 0.010,
        "difference": difference,
        "difference_stderr": 0.004,
    }
    return task | changes


def make_row(
    phase: str = "decode", batch: int = 1, p50_ms: float = 6.0, reference_p50_ms: float = 9.0
) -> dict[str, Any]:
    """One speed row; percentiles 4 and 11 % above the median."""
    tokens = batch * (128 if phase == "prefill" else 1)
    bytes_moved, flops = 21 * MB, 6e7 * tokens
    least_ms = 1e3 * max(bytes_moved / BANDWIDTH, flops / PEAK)
    reference_least_ms = 1e3 * max(3.1 * bytes_moved / BANDWIDTH, flops / PEAK)
    return {
        "phase": phase,
        "batch": batch,
        "prompt_tokens": 128,
        "decode_tokens": 32,
        "p50_ms": p50_ms,
        "p95_ms": 1.04 * p50_ms,
        "p99_ms": 1.11 * p50_ms,
        "tokens_per_s": 1e3 * tokens / p50_ms,
        "reference_p50_ms": reference_p50_ms,
        "reference_p95_ms": 1.04 * reference_p50_ms,
        "reference_p99_ms": 1.11 * reference_p50_ms,
        "reference_tokens_per_s": 1e3 * tokens / reference_p50_ms,
        "speedup": reference_p50_ms / p50_ms,
        "bytes_moved": bytes_moved,
        "reference_bytes_moved": 3.1 * bytes_moved,
        "flops": flops,
        "intensity": flops / bytes_moved,
        "roofline_fraction": least_ms / p50_ms,
        "reference_roofline_fraction": reference_least_ms / reference_p50_ms,
        "peak_memory_bytes": int(60 * MB),
        "reference_peak_memory_bytes": int(120 * MB),
    }


def make_layers(n_blocks: int = 6, scale: float = 0.004) -> list[dict[str, Any]]:
    """Seven linears a block; errors grow with depth, and the second down_proj needed a fallback."""
    layers = []
    for block in range(n_blocks):
        for i, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")):
            parent = "self_attn" if name[0] in "qkvo" else "mlp"
            error = scale * (1 + 0.15 * block) * (1 + 0.2 * i)
            layers.append(
                {
                    "name": f"model.layers.{block}.{parent}.{name}",
                    "scheme": "w4g128 sym",
                    "status": "quantized",
                    "n_tokens": 65536,
                    "error_rtn": 1.9 * error,
                    "error": error,
                    "error_of": "outputs",
                    "damping": 0.01,
                    "fallback": "damping raised to 0.1" if (block, name) == (1, "down_proj") else None,
                    "seconds": 0.4,
                }
            )
    return layers


def make_record(
    name: str = "awq4", *, kl: float = 0.0379, weight_mb: float = 19.4, decode_ms: float = 6.0, **changes: Any
) -> dict[str, Any]:
    """A finished run; keyword arguments replace top-level keys."""
    nll_rise = 0.8 * kl
    record = {
        "schema": 1,
        "name": name,
        "model": "reference",
        "source_sha256": "a1" * 32,
        "fingerprint": f"{abs(hash((name, kl))):016x}",
        "run_dir": f"/runs/reference/{name}",
        "artifact": f"/runs/reference/{name}/artifact",
        "finished": "2026-08-14T10:21:07+00:00",
        "compress_version": "0.1.0",
        "verified": True,
        "scheme": "w4g128 sym",
        "transform": "awq",
        "rounding": "rtn",
        "environment": {
            "device": "cpu",
            "device_name": "AMD EPYC 9R14",
            "python": "3.11.9",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "triton": "3.9.0",
            "threads": 2,
        },
        "calibration": {"source": "wikitext2-train", "sha256": "c3" * 32, "n_sequences": 128, "sequence_length": 512},
        "quality": {
            "kl": kl,
            "kl_stderr": 0.012 * kl,
            "ppl": 44.32 * (1 + nll_rise),
            "ppl_stderr": 0.61,
            "ppl_reference": 44.32,
            "ppl_reference_stderr": 0.60,
            "nll_rise": nll_rise,
            "nll_rise_stderr": 0.0011,
            "top1": 1 - 0.62 * kl**0.5,
            "top1_stderr": 0.0013,
            "n_tokens": 65408,
            "n_sequences": 128,
            "dataset": "wikitext2-test",
            "dataset_sha256": "d4" * 32,
            "tasks": [
                make_task(),
                make_task("hellaswag", -0.003),
                make_task(
                    "wikitext",
                    1.4,
                    metric="ppl",
                    value=45.7,
                    reference=44.3,
                    stderr=0.6,
                    reference_stderr=0.6,
                    difference_stderr=0.2,
                    higher_is_better=False,
                    n=128,
                ),
            ],
        },
        "size": {
            "weight_bytes": int(weight_mb * MB),
            "reference_weight_bytes": int(61.8 * MB),
            "ratio": 61.8 / weight_mb,
            "bits_per_weight": 16 * weight_mb / 61.8,
            "quantized_bits_per_weight": 4.125,
            "artifact_bytes": int(weight_mb * MB) + 700_000,
        },
        "speed": {
            "rows": [
                make_row("prefill", 1, 41.0, 36.0),
                make_row("decode", 1, decode_ms),
                make_row("prefill", 4, 140.0, 139.0),
                make_row("decode", 4, 1.6 * decode_ms, 13.0),
            ],
            "bandwidth_bytes_per_s": BANDWIDTH,
            "flops_per_s": PEAK,
            "backend": "cpu (AMD EPYC 9R14, 2 threads), torch 2.13.0, float32",
            "mode": "eager",
            "n_samples": {"prefill": 3, "decode": 96},
        },
        "layers": make_layers(scale=0.1 * kl),
        "timings": {"load": 1.2, "calibrate": 3.4, "quantize": 74.0, "save": 0.6, "verify": 9.8, "evaluate": 121.0},
        "warnings": [],
    }
    return record | changes
