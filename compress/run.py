"""What the stages of one run share, and what tells one run from another."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.config import CalibrationConfig, ComputeDtype, RunConfig, to_plain
from compress.config_quant import Rounding
from compress.errors import ModelFileError
from compress.loading import load
from compress.models import LoadedModel, load_dense, load_model
from compress.plan import Plan
from compress.state import RunState, code_sha256, fingerprint

log = logging.getLogger(__name__)

_QUANTIZE_CODE = (
    "quant.py", "packing.py", "methods", "rotated.py", "rotation.py", "blocks.py", "head.py", "awq_pass.py",
    "learn_pass.py", "tune.py", "groups.py", "streams.py", "models.py", "naming.py", "source.py", "plan.py",
    "allocate.py", "sensitivity.py", "calibration.py", "generate.py", "sampling.py", "checkpoint.py",
    "artifact.py", "norms.py", "kernels/training.py",
)  # fmt: skip


@dataclass
class Run:
    """What the stages of one run share. Models that only later stages need are loaded when first asked for."""

    config: RunConfig
    loaded: LoadedModel
    source_sha256: str
    plan: Plan
    device: torch.device
    dtype: torch.dtype
    run_dir: Path
    state: RunState
    allocation: dict[str, Any] | None = None  # what a budget decided
    warnings: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    _models: dict[str, Any] = field(default_factory=dict)

    @property
    def is_baseline(self) -> bool:
        return self.config.quant.rounding is Rounding.none

    @property
    def artifact(self) -> Path:
        return self.run_dir / "artifact"

    def tokenizer(self) -> Any:
        if "tokenizer" not in self._models:
            self._models["tokenizer"] = load_tokenizer(self.loaded.source.path, self.config.trust_remote_code)
        return self._models["tokenizer"]

    def reference(self, dtype: torch.dtype) -> Any:
        """The unquantized model on the device, in the given dtype."""
        key = f"reference {dtype}"
        if key not in self._models:
            fresh = load_model(str(self.loaded.source.path), None, self.config.trust_remote_code)
            self._models[key] = load_dense(fresh, self.device, dtype)
        return self._models[key]

    def quantized(self, dtype: torch.dtype) -> Any:
        """The artifact as reloaded from disk; the unquantized model itself for a baseline run."""
        if self.is_baseline:
            return self.reference(dtype)
        key = f"quantized {dtype}"
        if key not in self._models:
            self._models[key] = load(
                self.artifact, str(self.device), dtype, trust_remote_code=self.config.trust_remote_code
            )
        return self._models[key]

    def stage(
        self, name: str, inputs: Any, work: Callable[[], Any], damage: Callable[[Any], str | None] = lambda _: None
    ) -> Any:
        """Run or reuse a stage, as `RunState.run`; remembers its seconds and says so."""
        outcome = self.state.run(name, inputs, work, damage)
        self.timings[name] = outcome.seconds
        log.info("%s: %s", name, "done before, reused" if outcome.reused else f"{outcome.seconds:.1f} s")
        return outcome.result


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory.

    Raises:
        ModelFileError: there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelFileError(
            f"{path} has no tokenizer that transformers can load ({str(error).strip().splitlines()[0]}); "
            "put the model's tokenizer.json and tokenizer_config.json there"
        ) from error


def quantize_mark(config: RunConfig, source_sha256: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that decides the bytes of the artifact, as far as it is known before text is read.

    Whether steps are replayed as CUDA graphs does not: a run that cannot be captured goes on without, where it stopped.
    """
    quant = to_plain(config.quant)
    for part in ("learn", "tune"):
        del quant[part]["graphs"]
    return {
        "source": source_sha256,
        "quant": quant,
        "budget": to_plain(config.budget) if config.budget.enabled else None,
        "calibration_config": calibration_mark(config.calibration) if config.needs_calibration else None,
        "device": device.type,
        "dtype": str(dtype),
        "code": code_sha256(*_QUANTIZE_CODE),
    }


def calibration_mark(config: CalibrationConfig) -> dict[str, Any]:
    """All settings of calibration that decide its tokens: as with `quantize_mark`, how steps are launched does not."""
    mark: dict[str, Any] = to_plain(config)
    del mark["generated_graphs"]
    return mark


def default_run_dir(config: RunConfig, mark: dict[str, Any]) -> Path:
    """<output_dir>/<model>/<recipe>-<fingerprint>: runs whose weights would differ never share a directory."""
    slug = re.sub(r"[^\w.-]+", "--", config.model.strip("/")).strip("-")[-80:]
    return Path(config.output_dir) / slug / f"{config.name}-{fingerprint(mark)[:8]}"


def compute_dtype(wanted: ComputeDtype, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype activations have: by default float32 on a CPU, the checkpoint's own on a GPU."""
    if wanted is not ComputeDtype.auto:
        return getattr(torch, wanted.value)  # type: ignore[no-any-return]
    return torch.float32 if device.type == "cpu" else stored
