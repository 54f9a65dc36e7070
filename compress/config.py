"""Every setting of a run, as dataclasses. The annotations are Hydra's schema; `__post_init__` holds the rules.

Nothing here imports torch: `python -m compress --help` and a mistyped key must answer at once. The classes
are not frozen (Hydra would refuse overrides) and are never changed once `RunConfig` is built. Enum members are
lower case because OmegaConf reads them from YAML by name. How a model is quantized: `config_quant`.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, Optional

from compress.config_quant import BudgetConfig, QuantConfig, Rounding, Transform
from compress.config_rules import at_least, positive
from compress.errors import ConfigError

# Hydra's structured configs read annotations at run time and need `Optional[X]`, not `X | None`.
# ruff: noqa: UP045

EMBEDDED_MODEL = "reference"


class ComputeDtype(Enum):
    """auto: float32 on a CPU, the checkpoint's own dtype on a GPU."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass
class CalibrationConfig:
    """Where calibration tokens come from: `path` (a text or .jsonl file) or `dataset` (a hub id). With neither, the
    texts shipped for the embedded model, or WikiText-2 from the hub for a model with another tokenizer."""

    path: Optional[str] = None
    dataset: Optional[str] = None
    dataset_config: Optional[str] = None
    split: str = "train"
    text_column: str = "text"
    n_sequences: int = 128
    sequence_length: int = 512
    batch_size: int = 4
    # sequences sampled from the original model (arXiv 2305.17888) that are added to those of the text
    generated: int = 0
    # and those that quant.tune alone reads besides, where it is enabled: the block-by-block work stays as fast as it is
    tune_generated: int = 0
    # tokens of the text that each begins with; 0: the BOS token
    generated_prompt: int = 32
    generated_temperature: float = 1.0
    generated_seed: int = 0
    # sampled at a time: memory for keys and values against speed; default 64 on a CPU, on a GPU what its memory holds
    generated_batch_size: Optional[int] = None
    # on a GPU, the step of a token as a CUDA graph, with the same result up to how logits round; false for models whose
    # forward waits for the GPU
    generated_graphs: bool = True

    def __post_init__(self) -> None:
        positive(
            "calibration",
            n_sequences=self.n_sequences,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            generated_temperature=self.generated_temperature,
        )
        if self.generated_batch_size is not None:
            positive("calibration", generated_batch_size=self.generated_batch_size)
        at_least(
            0,
            "calibration",
            generated=self.generated,
            tune_generated=self.tune_generated,
            generated_prompt=self.generated_prompt,
            generated_seed=self.generated_seed,
        )
        if self.n_sampled and max(self.generated_prompt, 1) >= self.sequence_length:
            raise ConfigError(
                f"calibration.generated_prompt={self.generated_prompt} leaves nothing to sample of sequence_length="
                f"{self.sequence_length}; lower it"
            )
        if self.path and self.dataset:
            raise ConfigError("calibration.path and calibration.dataset are both set; give one of them")

    @property
    def n_sampled(self) -> int:
        return self.generated + self.tune_generated


@dataclass
class VerifyConfig:
    """Reload of the artifact in a fresh process. It cannot be switched off."""

    n_sequences: int = 2
    # ||logits - reference|| / ||reference||, both computed from dequantized weights
    max_relative_error: float = 2e-3

    def __post_init__(self) -> None:
        positive("verify", n_sequences=self.n_sequences, max_relative_error=self.max_relative_error)
        if self.max_relative_error > 0.1:
            raise ConfigError(
                f"verify.max_relative_error={self.max_relative_error} would let a broken artifact pass; use at most 0.1"
            )


@dataclass
class BenchConfig:
    """Speed of the artifact against the unquantized model, alternating in one process."""

    enabled: bool = True
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4])
    prompt_tokens: int = 128
    decode_tokens: int = 32
    repeats: int = 3
    warmup: int = 1

    def __post_init__(self) -> None:
        positive(
            "bench",
            prompt_tokens=self.prompt_tokens,
            decode_tokens=self.decode_tokens,
            repeats=self.repeats,
        )
        at_least(0, "bench", warmup=self.warmup)
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"bench.batch_sizes={self.batch_sizes} must name at least one positive batch size")


@dataclass
class EvalConfig:
    """Quality of the reloaded artifact: KL to the original on held-out tokens, and lm-eval tasks."""

    enabled: bool = True
    # text for KL and perplexity; without it as for calibration
    path: Optional[str] = None
    dataset: Optional[str] = None
    dataset_config: Optional[str] = None
    split: str = "test"
    text_column: str = "text"
    n_sequences: int = 64
    sequence_length: int = 512
    batch_size: int = 8
    # lm-eval task names; default: the shipped minimal pairs, and for the embedded model its held-out texts
    tasks: Optional[list[str]] = None
    include_path: Optional[str] = None
    limit: Optional[int] = None
    task_batch_size: int = 64

    def __post_init__(self) -> None:
        positive("eval", batch_size=self.batch_size, task_batch_size=self.task_batch_size)
        at_least(2, "eval", "a standard error takes two sequences", n_sequences=self.n_sequences)
        at_least(2, "eval", "the first token of a sequence is given", sequence_length=self.sequence_length)
        if self.limit is not None:
            positive("eval", limit=self.limit)
        if self.path and self.dataset:
            raise ConfigError("eval.path and eval.dataset are both set; give one of them")


@dataclass
class GateConfig:
    """Regression gate against a committed baseline. Exit code 3 when a limit is passed."""

    baseline: Optional[str] = None
    update: bool = False
    # allowed relative rise over the baseline, beyond 2 standard errors of the difference
    max_kl_rise: float = 0.10
    max_ppl_rise: float = 0.02
    max_top1_drop: float = 0.01
    max_size_rise: float = 0.01

    def __post_init__(self) -> None:
        limits = ("max_kl_rise", "max_ppl_rise", "max_top1_drop", "max_size_rise")
        at_least(0, "gate", **{name: getattr(self, name) for name in limits})
        self.baseline = self.baseline and os.path.expanduser(self.baseline)
        if self.update and not self.baseline:
            raise ConfigError("gate.update=true needs gate.baseline=<file> to write to")


@dataclass
class PublishConfig:
    """Where a verified artifact goes."""

    dest: Optional[str] = None
    repo_id: Optional[str] = None
    private: bool = True


@dataclass
class RunConfig:
    """One run: one model, one recipe, one run directory."""

    name: str = "awq4"
    # hub id or local directory; `reference` is the embedded model
    model: str = EMBEDDED_MODEL
    revision: Optional[str] = None
    trust_remote_code: bool = False
    device: str = "auto"
    compute_dtype: ComputeDtype = ComputeDtype.auto
    output_dir: str = "outputs"
    # default: <output_dir>/<model>/<name>-<fingerprint of what decides the weights>
    run_dir: Optional[str] = None
    force: bool = False
    quant: QuantConfig = field(default_factory=QuantConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model is empty; give a hub id, a directory, or leave it out for the embedded model")
        for name in ("name", "output_dir", "run_dir"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise ConfigError(f"{name} is empty; leave it out for its default")
        self.output_dir = os.path.expanduser(self.output_dir)
        self.run_dir = self.run_dir and os.path.expanduser(self.run_dir)
        if "/" in self.name:
            raise ConfigError(f"name={self.name!r} names a part of a path; use letters, digits, _ and -")
        if self.quant.rounding is Rounding.none and self.quant.transform is not Transform.none:
            raise ConfigError("quant.rounding=none is a baseline run and takes no quant.transform; leave that out")
        if self.quant.rounding is Rounding.none and (self.publish.dest or self.publish.repo_id):
            raise ConfigError("publish: a baseline run (quant.rounding=none) makes no artifact; choose another recipe")
        if self.quant.rounding is Rounding.none and (self.quant.learn.enabled or self.quant.tune.enabled):
            raise ConfigError("quant.rounding=none is a baseline run; leave quant.learn and quant.tune out")
        if self.quant.rounding is Rounding.none and self.budget.enabled:
            raise ConfigError("budget: a baseline run (quant.rounding=none) has no schemes to choose; leave budget out")
        if self.gate.baseline and not self.eval.enabled:
            raise ConfigError(
                "gate.baseline needs the quality of this run; set eval.enabled=true or drop gate.baseline"
            )

    @property
    def needs_calibration(self) -> bool:
        return self.quant.needs_calibration or self.budget.enabled


def to_plain(config: Any) -> Any:
    """A config as JSON-ready dicts, enums as their values."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    return plain(asdict(config))
