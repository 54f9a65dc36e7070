"""The settings of how a model is quantized: what is done to its weights, how they are rounded, and under which budget.

As in `config`, whose `RunConfig` holds them, annotations are Hydra's schema and nothing imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from compress.config_rules import at_least, positive
from compress.errors import ConfigError

# Hydra's structured configs read annotations at run time and need `Optional[X]`, not `X | None`.
# ruff: noqa: UP045


class Transform(Enum):
    """What is done to the weights before rounding, leaving the unquantized model's function as it is."""

    none = "none"
    awq = "awq"
    hadamard = "hadamard"


class Rounding(Enum):
    """How real weights become codes. none leaves the model as it is: a baseline run."""

    none = "none"
    rtn = "rtn"
    gptq = "gptq"
    hqq = "hqq"


class GranularityName(Enum):
    tensor = "tensor"
    channel = "channel"
    group = "group"


class ObserverName(Enum):
    absmax = "absmax"
    mse = "mse"


class SensitivityName(Enum):
    """How a budget learns what each choice costs. auto: measured where that takes minutes, estimated otherwise."""

    auto = "auto"
    measured = "measured"
    estimated = "estimated"


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
        positive("quant.scheme", group_size=self.group_size)


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
        positive("quant.awq", n_grid=self.n_grid, clip_grid=self.clip_grid, search_tokens=self.search_tokens)
        if not 0 < self.clip_max_shrink < 1:
            raise ConfigError(f"quant.awq.clip_max_shrink={self.clip_max_shrink} must lie between 0 and 1")


@dataclass
class HadamardConfig:
    """Rotations folded into the weights (QuaRot, arXiv 2404.00456). residual: R1, of the residual stream, which
    unties an embedding from the head. value: R2, of each attention head's values. seed: of their random signs."""

    residual: bool = True
    value: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.residual and not self.value:
            raise ConfigError(
                "quant.hadamard.residual and .value are both false, which rotates nothing; use quant.transform=none"
            )
        at_least(0, "quant.hadamard", seed=self.seed)


@dataclass
class GptqConfig:
    """Second-order rounding (arXiv 2210.17323)."""

    block_size: int = 128
    damping: float = 0.01
    max_damping_steps: int = 4
    act_order: bool = True
    true_sequential: bool = True
    # aim at what the original layer makes of the original model's inputs (arXiv 2504.02692): 0 ignores how the inputs
    # drifted, 1 makes up for all of it, which follows the calibration tokens too closely
    gptaq: bool = False
    gptaq_strength: float = 0.5
    # turns of refitting the scales to the codes and the codes to the scales, after the last column (arXiv 2309.01885)
    refine_rounds: int = 0

    def __post_init__(self) -> None:
        positive("quant.gptq", block_size=self.block_size, damping=self.damping)
        if not 0 <= self.gptaq_strength <= 1:
            raise ConfigError(f"quant.gptq.gptaq_strength={self.gptaq_strength} must lie between 0 and 1")
        if self.gptaq and not self.true_sequential:
            raise ConfigError(
                "quant.gptq.gptaq=true needs quant.gptq.true_sequential=true: without it the inputs are those before "
                "the block was quantized; drop one of the two"
            )
        at_least(0, "quant.gptq", max_damping_steps=self.max_damping_steps, refine_rounds=self.refine_rounds)


@dataclass
class HqqConfig:
    """Half-quadratic fit of each group's grid to its weights; needs no calibration
    (https://mobiusml.github.io/hqq_blog/)."""

    lp_norm: float = 0.7
    # weight of the quadratic term and its growth in each iteration
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.lp_norm <= 1:
            raise ConfigError(f"quant.hqq.lp_norm={self.lp_norm} must lie above 0 and at most 1; the source uses 0.7")
        positive("quant.hqq", beta=self.beta, iterations=self.iterations)
        at_least(1, "quant.hqq", kappa=self.kappa)


@dataclass
class LearnConfig:
    """Learned rounding (arXiv 2309.05516): signed gradients of each block's output error, from what rounding gave."""

    enabled: bool = False
    # passes over the calibration sequences, and sequences a step
    epochs: float = 8.0
    batch_sequences: int = 8
    # the sum of all steps in units of the quantization step, and of the scale, had they not fallen to 0
    rate: float = 0.4
    gain_rate: float = 0.08
    # how far towards the real weight a weight begins in its rounding cell
    pull: float = 0.8
    # share of the calibration sequences that only judges
    held_out: float = 0.0625
    # on a GPU, steps as CUDA graphs, with the same result; false for blocks that wait for the GPU (routed experts)
    graphs: bool = True

    def __post_init__(self) -> None:
        positive("quant.learn", epochs=self.epochs, batch_sequences=self.batch_sequences, rate=self.rate)
        at_least(0, "quant.learn", gain_rate=self.gain_rate)
        for name in ("pull", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"quant.learn.{name}={getattr(self, name)} must be at least 0 and less than 1")


@dataclass
class TuneConfig:
    """End-to-end tuning of scales and norms, and of codes, by KL to the original's logits (arXiv 2407.11062, second
    phase; arXiv 2305.17888)."""

    enabled: bool = False
    # passes over the sequences to learn from, and sequences a step
    epochs: float = 3.0
    batch_sequences: int = 4
    # largest relative change of a scale in one step, and of a norm's gain
    scale_rate: float = 2e-3
    norm_rate: float = 1e-3
    # largest move of an entry of the embedding and of the head in one step, of the root mean square of all; 0, or where
    # these are quantized: they stay
    embedding_rate: float = 0.0
    # largest move of a weight in one step, in quantization steps; 0: codes stay
    code_rate: float = 0.0
    # how far towards the real weight a weight begins in its rounding cell
    pull: float = 0.9
    # share of the calibration sequences that only judges
    held_out: float = 0.0625
    # evaluations on the held-out sequences without improvement before it stops; codes get worse before they get better
    # and are trained to the end
    patience: int = 2
    # on a GPU, steps as CUDA graphs, with the same result; false for models whose forward waits for the GPU
    graphs: bool = True

    def __post_init__(self) -> None:
        positive("quant.tune", epochs=self.epochs, batch_sequences=self.batch_sequences, patience=self.patience)
        at_least(0, "quant.tune", scale_rate=self.scale_rate, norm_rate=self.norm_rate, code_rate=self.code_rate,
                  embedding_rate=self.embedding_rate)  # fmt: skip
        if not 0 < self.held_out < 1:
            raise ConfigError(f"quant.tune.held_out={self.held_out} must lie between 0 and 1")
        if not 0 <= self.pull < 1:
            raise ConfigError(f"quant.tune.pull={self.pull} must be at least 0 and less than 1")

    @property
    def trains_codes(self) -> bool:
        return self.enabled and self.code_rate > 0


@dataclass
class QuantConfig:
    """transform x rounding x scheme: independent slots, because that is the mathematics."""

    transform: Transform = Transform.none
    rounding: Rounding = Rounding.rtn
    scheme: SchemeConfig = field(default_factory=SchemeConfig)
    # glob over linear names -> scheme fields that differ there, e.g. {"*.down_proj": {bits: 8}}
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    # the output head, which no glob reaches and which stays as it is otherwise
    lm_head: bool = False
    lm_head_scheme: SchemeConfig = field(default_factory=lambda: SchemeConfig(bits=8))
    # give a head that is tied to the embedding a tensor of its own, so that it can be quantized
    untie: bool = False
    # globs of linears that stay as they are
    ignore: list[str] = field(default_factory=list)
    # globs over ModuleLists, used instead of the search for decoder blocks
    blocks: Optional[str] = None
    awq: AwqConfig = field(default_factory=AwqConfig)
    hadamard: HadamardConfig = field(default_factory=HadamardConfig)
    gptq: GptqConfig = field(default_factory=GptqConfig)
    learn: LearnConfig = field(default_factory=LearnConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    hqq: HqqConfig = field(default_factory=HqqConfig)
    # one scheme for q/k/v and for gate/up, as serving engines that fuse them need
    allow_split_fused: bool = False

    def __post_init__(self) -> None:
        if self.untie and not self.lm_head:
            raise ConfigError("quant.untie=true only makes the artifact larger without quant.lm_head=true; set both")
        if self.lm_head and self.rounding is Rounding.none:
            raise ConfigError("quant.rounding=none is a baseline run; leave quant.lm_head out")

    @property
    def rounding_label(self) -> str:
        """All that chose the codes and scales, for reports: `gptq + learned + tuned`, `gptq + tuned codes`."""
        parts = [self.rounding.value]
        parts += ["learned"] if self.learn.enabled else []
        parts += ["tuned codes" if self.tune.trains_codes else "tuned"] if self.tune.enabled else []
        return " + ".join(parts)

    @property
    def needs_teacher(self) -> bool:
        """Whether the original model's own hidden states are wanted beside those of the quantized one."""
        return self.needs_drift or self.learn.enabled or self.tune.enabled

    @property
    def needs_drift(self) -> bool:
        """Whether GPTQ corrects for how the inputs drifted from the original model's."""
        return self.rounding is Rounding.gptq and self.gptq.gptaq

    @property
    def needs_calibration(self) -> bool:
        observers = [str(o["observer"]).lower() for o in self.overrides.values() if "observer" in o]
        return (
            self.transform is Transform.awq
            or self.rounding is Rounding.gptq
            or self.learn.enabled
            or self.tune.enabled
            or ObserverName.mse.value in [self.scheme.observer.value, *observers]
        )


_CHOICES = ("2g32", "2g64", "2g128", "3g32", "3g64", "3g128", "4g32", "4g64", "4g128", "8g32", "8g64", "8g128")


@dataclass
class BudgetConfig:
    """Mixed precision: one scheme for each group of fused linears, chosen so that the whole keeps a budget.

    With none of bits, bytes and max_kl set there is no budget and every linear has quant.scheme.
    """

    # average stored bits for each weight of the quantized linears, scales and zero points counted
    bits: Optional[float] = None
    # bytes of the quantized linears on disk
    bytes: Optional[int] = None
    # nats a token: the least size whose predicted KL is at most this
    max_kl: Optional[float] = None
    # <bits>g<group size>, <bits>-channel or <bits>-tensor, with -sym or -asym where it differs from quant.scheme
    choices: list[str] = field(default_factory=lambda: list(_CHOICES))
    sensitivity: SensitivityName = SensitivityName.auto
    # calibration sequences that a choice is judged on
    n_sequences: int = 4

    def __post_init__(self) -> None:
        limits = {name: v for name in ("bits", "bytes", "max_kl") if (v := getattr(self, name)) is not None}
        if len(limits) > 1:
            raise ConfigError(
                f"budget.{' and budget.'.join(limits)} are both set; give one of bits, bytes and max_kl, and null for "
                "what a recipe sets, as in budget.bits=null"
            )
        positive("budget", n_sequences=self.n_sequences, **limits)
        if not self.choices:
            raise ConfigError("budget.choices is empty; name what to choose from, as in budget.choices=[3g128,4g128]")
        self.fields_of_choices()

    @property
    def enabled(self) -> bool:
        return self.bits is not None or self.bytes is not None or self.max_kl is not None

    def fields_of_choices(self) -> list[dict[str, Any]]:
        """For each choice the fields in which it differs from quant.scheme, as quant.overrides has them.

        Raises:
            ConfigError: a choice that cannot be read.
        """
        found = []
        for choice in self.choices:
            match = re.fullmatch(r"([2348])(?:g([1-9]\d*)|-(channel|tensor))(?:-(a?sym))?", choice)
            if match is None:
                raise ConfigError(
                    f"budget.choices has {choice!r}; write <bits>g<group size>, <bits>-channel or <bits>-tensor with "
                    "2, 3, 4 or 8 bits, and -sym or -asym after it where wanted, as in 3g128 or 4-channel-asym"
                )
            bits, group_size, granularity, symmetry = match.groups()
            values: dict[str, Any] = {"bits": int(bits), "granularity": granularity or "group"}
            values |= {"group_size": int(group_size)} if group_size else {}
            values |= {"symmetric": symmetry == "sym"} if symmetry else {}
            found.append(values)
        return found
