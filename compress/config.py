"""Every setting of a run, as dataclasses. The annotations are Hydra's schema; `__post_init__` holds the rules.

Nothing here imports torch: `python -m compress --help` and a mistyped key must answer at once. The classes
are not frozen (Hydra would refuse overrides) and are never changed once `RunConfig` is built. Enum members are
lower case because OmegaConf reads them from YAML by name.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, Optional

from compress.errors import ConfigError

# Hydra's structured configs read annotations at run time and need `Optional[X]`, not `X | None`.
# ruff: noqa: UP045

EMBEDDED_MODEL = "reference"


class Transform(Enum):
    """What is done to the weights before rounding, leaving the unquantized model's function as it is."""

    none = "none"
    awq = "awq"


class Rounding(Enum):
    """How real weights become codes. none leaves the model as it is: a baseline run."""

    none = "none"
    rtn = "rtn"
    gptq = "gptq"


class GranularityName(Enum):
    tensor = "tensor"
    channel = "channel"
    group = "group"


class ObserverName(Enum):
    absmax = "absmax"
    mse = "mse"


class ComputeDtype(Enum):
    """auto: float32 on a CPU, the checkpoint's own dtype on a GPU."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _positive(cls: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):  # NaN fails too
            raise ConfigError(f"{cls}.{name}={value} must be positive and finite")


def _at_least(least: float, cls: str, why: str = "", **values: float) -> None:
    for name, value in values.items():
        if not least <= value < float("inf"):
            raise ConfigError(f"{cls}.{name}={value} must be at least {least}{why and ': ' + why}")


@dataclass
class SchemeConfig:
    """Grid of the quantized weights."""

    bits: int = 4
    granularity: GranularityName = GranularityName.group
    group_size: int = 128
    symmetric: bool = True
    observer: ObserverName = ObserverName.absmax

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ConfigError(f"quant.scheme.bits={self.bits} is not supported; use 2, 3, 4 or 8")
        _positive("quant.scheme", group_size=self.group_size)


@dataclass
class AwqConfig:
    """Activation-aware scale search (arXiv 2306.00978)."""

    n_grid: int = 20
    duo_scaling: bool = True
    clip: bool = True
    clip_grid: int = 10
    clip_max_shrink: float = 0.5
    search_tokens: int = 2048

    def __post_init__(self) -> None:
        _positive("quant.awq", n_grid=self.n_grid, clip_grid=self.clip_grid, search_tokens=self.search_tokens)
        if not 0 < self.clip_max_shrink < 1:
            raise ConfigError(f"quant.awq.clip_max_shrink={self.clip_max_shrink} must lie between 0 and 1")


@dataclass
class GptqConfig:
    """Second-order rounding (arXiv 2210.17323)."""

    block_size: int = 128
    damping: float = 0.01
    max_damping_steps: int = 4
    act_order: bool = True
    true_sequential: bool = True

    def __post_init__(self) -> None:
        _positive("quant.gptq", block_size=self.block_size, damping=self.damping)
        _at_least(0, "quant.gptq", max_damping_steps=self.max_damping_steps)


@dataclass
class QuantConfig:
    """transform x rounding x scheme: independent slots, because that is the mathematics."""

    transform: Transform = Transform.none
    rounding: Rounding = Rounding.rtn
    scheme: SchemeConfig = field(default_factory=SchemeConfig)
    # glob over linear names -> scheme fields that differ there, e.g. {"*.down_proj": {bits: 8}}
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    # globs of linears that stay as they are
    ignore: list[str] = field(default_factory=list)
    # globs over ModuleLists, used instead of the search for decoder blocks
    blocks: Optional[str] = None
    awq: AwqConfig = field(default_factory=AwqConfig)
    gptq: GptqConfig = field(default_factory=GptqConfig)
    # one scheme for q/k/v and for gate/up, as serving engines that fuse them need
    allow_split_fused: bool = False

    @property
    def needs_calibration(self) -> bool:
        observers = [str(o["observer"]).lower() for o in self.overrides.values() if "observer" in o]
        return (
            self.transform is not Transform.none
            or self.rounding is Rounding.gptq
            or ObserverName.mse.value in [self.scheme.observer.value, *observers]
        )


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

    def __post_init__(self) -> None:
        _positive(
            "calibration",
            n_sequences=self.n_sequences,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
        )
        if self.path and self.dataset:
            raise ConfigError("calibration.path and calibration.dataset are both set; give one of them")


@dataclass
class VerifyConfig:
    """Reload of the artifact in a fresh process. It cannot be switched off."""

    n_sequences: int = 2
    # ||logits - reference|| / ||reference||, both computed from dequantized weights
    max_relative_error: float = 2e-3

    def __post_init__(self) -> None:
        _positive("verify", n_sequences=self.n_sequences, max_relative_error=self.max_relative_error)
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
        _positive(
            "bench",
            prompt_tokens=self.prompt_tokens,
            decode_tokens=self.decode_tokens,
            repeats=self.repeats,
        )
        _at_least(0, "bench", warmup=self.warmup)
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
        _positive("eval", batch_size=self.batch_size, task_batch_size=self.task_batch_size)
        _at_least(2, "eval", "a standard error takes two sequences", n_sequences=self.n_sequences)
        _at_least(2, "eval", "the first token of a sequence is given", sequence_length=self.sequence_length)
        if self.limit is not None:
            _positive("eval", limit=self.limit)
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
        _at_least(0, "gate", **{name: getattr(self, name) for name in limits})
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
        if self.gate.baseline and not self.eval.enabled:
            raise ConfigError(
                "gate.baseline needs the quality of this run; set eval.enabled=true or drop gate.baseline"
            )


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
