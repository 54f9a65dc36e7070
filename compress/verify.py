"""Proof that what was saved is what was made: a fresh process reloads the artifact and recomputes logits.

The engine's in-memory quantized model gave logits for the verify tokens before anything was packed. The fresh
process loads the files, checks them against the manifest, and computes the same logits twice: from dequantized
weights, which must agree closely, and as the artifact would be served (the checkpoint's own dtype, the kernels that
inference picks at few tokens and at many), which must agree within the precision of that dtype.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.artifact import tensor_sha256
from compress.atomic import write_atomically
from compress.config import VerifyConfig
from compress.errors import VerifyError
from compress.source import SourceCheckpoint

# ||difference|| / ||logits|| a kernel may add over dequantized weights: it rounds activations and partial sums
# to the compute dtype, layer after layer.
_RUNTIME_TOLERANCE = {"float32": 2e-2, "float16": 2e-2, "bfloat16": 1e-1}

# Served models compute few tokens and many with different kernels; both are checked.
_DECODE_TOKENS = 16


def save_expected(path: Path, input_ids: Tensor, logits: Tensor) -> None:
    """Keep the in-memory model's logits float32 [V, T, vocab] for input_ids int64 [V, T]."""
    tensors = {"input_ids": input_ids.contiguous(), "logits": logits.contiguous()}
    write_atomically(path, lambda p: save_file(tensors, p))


def verify_artifact(artifact: Path, expected: Path, device: str, dtype: str, config: VerifyConfig,
                    trust_remote_code: bool) -> dict[str, Any]:  # fmt: skip
    """Run the check in a fresh process and judge its figures.

    Raises:
        VerifyError: the process failed, or the logits differ by more than the limit.
    """
    command = [sys.executable, "-m", "compress.verify", str(artifact), str(expected), device, dtype]
    command += ["trust_remote_code"] if trust_remote_code else []
    root = str(Path(__file__).resolve().parent.parent)
    process = subprocess.run(command, capture_output=True, text=True, env=_environment(root))
    if process.returncode != 0:
        tail = "\n".join(process.stderr.strip().splitlines()[-3:]) or "no message; was it killed for memory?"
        raise VerifyError(f"a fresh process could not load and run {artifact} (exit {process.returncode}): {tail}")
    figures = json.loads(process.stdout.strip().splitlines()[-1])
    for key, limit in (
        ("relative_error", config.max_relative_error),
        ("runtime_relative_error", _RUNTIME_TOLERANCE[figures["runtime_dtype"]]),
    ):
        if not figures[key] <= limit:  # NaN fails too
            raise VerifyError(
                f"the reloaded artifact's logits differ from the in-memory quantized model's: {key} = "
                f"{figures[key]:.2e}, limit {limit:.0e}. The artifact {artifact} is not to be trusted or published"
            )
    return figures


def check_kept(source: SourceCheckpoint, manifest: dict[str, Any]) -> int:
    """Every tensor recorded as kept must be in the artifact bit for bit; returns how many are.

    Raises:
        VerifyError: one differs, or a source tensor has no record.
    """
    kept = 0
    for name in source.names():
        entry = manifest["source_tensors"].get(name)
        if entry is None:
            raise VerifyError(f"source tensor {name} is not accounted for in the manifest")
        if entry["status"] == "kept":
            if tensor_sha256(source.raw(name)) != manifest["tensors"][entry["as"][0]]["sha256"]:
                raise VerifyError(f"{name} is recorded as kept, but its bytes in the artifact differ from the source")
            kept += 1
    return kept


def _environment(root: str) -> dict[str, str]:
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def _reload(artifact: str, device: str, dtype: torch.dtype | None, backend: Any, trust: bool) -> Any:
    from compress.loading import load

    return load(artifact, device=device, dtype=dtype, backend=backend, trust_remote_code=trust)


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids.to(model.device), use_cache=False).logits.float().cpu()


def _relative(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def _main(arguments: list[str]) -> None:
    from compress.qlinear import Backend, QuantLinear

    artifact, expected, device, dtype = arguments[:4]
    trust = "trust_remote_code" in arguments[4:]
    stored = load_file(expected)
    ids = stored["input_ids"]
    reference = _logits(_reload(artifact, device, getattr(torch, dtype), Backend.REFERENCE, trust), ids)
    # as it would be served: in the checkpoint's own dtype, through the kernels that inference picks
    served = _reload(artifact, device, None, Backend.AUTO, trust)
    linears = [m for m in served.modules() if isinstance(m, QuantLinear)]
    few = ids[:1, :_DECODE_TOKENS]  # logits of the first positions need no later ones
    runtime_errors = [
        _relative(_logits(served, ids), stored["logits"]),
        _relative(_logits(served, few), stored["logits"][:1, : few.shape[1]]),
    ]
    figures = {
        "relative_error": _relative(reference, stored["logits"]),
        "runtime_relative_error": max(runtime_errors),
        "runtime_dtype": str(served.dtype).removeprefix("torch."),
        "runtime_backends": sorted({m.backend_for(n).value for m in linears for n in (ids.numel(), few.numel())}),
        "max_abs_error": float((reference - stored["logits"]).abs().max()),
        "top1_agreement": float((reference.argmax(-1) == stored["logits"].argmax(-1)).float().mean()),
        "n_logits": stored["logits"].numel(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    _main(sys.argv[1:])
