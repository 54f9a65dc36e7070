"""Mixed precision under a budget: which scheme each group of linears gets.

Linears that read one tensor (q/k/v, gate/up), which serving engines fuse, take one scheme together; with
`quant.allow_split_fused` every linear chooses for itself. Linears named in `quant.overrides` keep the scheme given
there, and their bits and bytes count in the budget, as they count in the report; those in `quant.ignore` stay as they
are and do not count.

`compress.sensitivity` says what each choice costs in KL, and an exact integer program (`compress.methods.knapsack`)
picks the choices of least total KL within budget.bits or budget.bytes, or of least bytes within budget.max_kl. That
KLs of single units add up is an approximation; see there for how good it is. Costs are those of the recipe's rounding
on the source's own weights: what a transform, learned rounding or tuning win on top is taken as alike for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint import scheme_from_dict, scheme_to_dict
from compress.config_quant import BudgetConfig, SensitivityName
from compress.errors import CompressError, ConfigError, EnvironmentProblem
from compress.forecast import available_memory_bytes
from compress.methods.knapsack import Infeasible, choose
from compress.models import LoadedModel, linear_weight, load_dense, load_model
from compress.packing import packed_words
from compress.plan import LinearPlan, Plan, override_scheme, scheme_from_config
from compress.quant import Granularity, QuantScheme
from compress.sensitivity import HESSIAN_SEQUENCES, SensitivityInputs, unit_scores
from compress.units import format_bytes

# Multiply-adds that measuring may take before `auto` estimates: about a minute of a CPU or a GPU
_AUTO_LIMIT = {"cpu": 2e12, "cuda": 1e15}
# KLs enter the integer program as whole numbers: in units of the worst total over this
_KL_STEPS = 10**9


@dataclass(frozen=True)
class Option:
    """One choice for a unit: stored bits without padding, bytes on disk, and KL in nats a token."""

    scheme: QuantScheme
    bits: int
    nbytes: int
    kl: float


@dataclass(frozen=True)
class Unit:
    """Linears, by full name, that share one choice."""

    linears: list[str]
    options: list[Option]


def stored_bits(plan: LinearPlan, scheme: QuantScheme) -> int:
    """Bits of codes, scales and zero points, as the report's bits a weight count them."""
    return round(scheme.bits_per_weight(plan.n, plan.k) * plan.n * plan.k)


def stored_bytes(plan: LinearPlan, scheme: QuantScheme, scale_bytes: int) -> int:
    """Bytes of the tensors that `checkpoint.encode` makes of an [n, k] weight: words are whole, shapes are stored."""
    whole = scheme.granularity is Granularity.TENSOR
    rows, groups = (1 if whole else plan.n), scheme.n_groups(plan.k)
    total = plan.n * packed_words(plan.k, scheme.bits) * 4 + rows * groups * scale_bytes + 16
    if not scheme.symmetric:
        total += 1 if whole else packed_words(plan.n, scheme.bits) * 4 * groups
    return total


def solve(budget: BudgetConfig, units: list[Unit], fixed: Option | None, n_weights: int) -> list[int]:
    """Index of the option for each unit.

    Args:
        fixed: what the linears that cannot choose take together; its scheme says nothing.
        n_weights: weights of all units and fixed linears.

    Raises:
        ConfigError: the budget cannot be kept; the message names the range that can.
    """
    bits = [[o.bits for o in u.options] for u in units]
    sizes = [[o.nbytes for o in u.options] for u in units]
    step = (sum(max(o.kl for o in u.options) for u in units) or 1.0) / _KL_STEPS
    costs = [[math.ceil(o.kl / step) for o in u.options] for u in units]
    fixed_bits, fixed_bytes = (fixed.bits, fixed.nbytes) if fixed else (0, 0)
    try:
        if budget.bits is not None:
            limit = math.floor(budget.bits * n_weights + 1e-6)
            return choose(costs, bits, limit - fixed_bits)
        if budget.bytes is not None:
            return choose(costs, sizes, budget.bytes - fixed_bytes)
        assert budget.max_kl is not None
        return choose(sizes, costs, math.floor(min(budget.max_kl / step, 2 * _KL_STEPS)))
    except Infeasible as error:
        if budget.max_kl is not None:
            most = sum(max(row) for row in costs) * step
            raise ConfigError(
                f"budget.max_kl={budget.max_kl:g} cannot be kept: budget.choices span a predicted KL of "
                f"{error.least * step:.3g} to {most:.3g}; raise it, or add finer budget.choices"
            ) from error
        if budget.bits is not None:
            least, most = ((fixed_bits + sum(pick(r) for r in bits)) / n_weights for pick in (min, max))
            raise ConfigError(
                f"budget.bits={budget.bits:g} cannot be kept: budget.choices span {_ceil(least)} to {most:.4f} bits a "
                "weight, scales and fixed linears counted; raise it, or add coarser budget.choices"
            ) from error
        least, most = (fixed_bytes + sum(pick(r) for r in sizes) for pick in (min, max))
        raise ConfigError(
            f"budget.bytes={budget.bytes} cannot be kept: budget.choices span {least:,} to {most:,} bytes, fixed "
            "linears counted; raise it, or add coarser budget.choices"
        ) from error


def _ceil(bits: float) -> str:
    """Four decimals, rounded up: a bound that is printed must be one that can be kept."""
    return f"{math.ceil(bits * 1e4 - 1e-9) / 1e4:.4f}"


def choices(plan: Plan, budget: BudgetConfig) -> list[QuantScheme]:
    """The candidate schemes, without repetition.

    Raises:
        ConfigError: a choice that is no scheme.
    """
    base = scheme_from_config(plan.config.scheme)
    pairs = zip(budget.choices, budget.fields_of_choices(), strict=True)
    return list(dict.fromkeys(override_scheme(base, f"budget.choices: {name}", values) for name, values in pairs))


def check_budget(plan: Plan, budget: BudgetConfig) -> None:
    """Before the first hour of work: every linear that may choose has something to choose from.

    Raises:
        ConfigError: no choice fits a linear's K, or a size budget that no choice can keep.
    """
    schemes = choices(plan, budget)
    free = [p for p in plan.linears if p.scheme is not None and not _is_fixed(plan, p)]
    if not free:
        raise ConfigError("budget: quant.overrides and quant.ignore leave no linear to choose for; leave budget out")
    units = [Unit([p.name], _options([p], _fitting([p], schemes), None, 2)) for p in free]
    if budget.bits is not None:  # bytes take the scales' dtype, KL takes measuring
        solve(budget, units, _fixed(plan, 2), sum(p.n * p.k for p in plan.linears if p.scheme is not None))


def allocate(
    loaded: LoadedModel,
    plan: Plan,
    budget: BudgetConfig,
    calibration_ids: Tensor,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    on_block: Callable[[int, int], None],
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Score every choice on the model and solve for the budget; JSON values, which `apply_allocation` reads.

    Args:
        calibration_ids: int64 [S, T]; second moments come from the first sequences, scores from the last ones.

    Raises:
        ConfigError: the budget cannot be kept, or an override names only a part of a fused group.
        NumericalError: activations or scores that are not finite.
    """
    schemes = choices(plan, budget)
    _check_memory(loaded, calibration_ids[-budget.n_sequences :].numel(), device, dtype)
    free = {p.name for p in plan.linears if p.scheme is not None and not _is_fixed(plan, p)}
    measured = _measures(loaded, plan, budget, len(schemes), calibration_ids.shape[1], device)
    dense = load_model(str(loaded.source.path), None, trust_remote_code, plan.config.blocks)
    load_dense(dense, device, dtype)
    n_scored = min(budget.n_sequences, len(calibration_ids))
    n_hessian = min(HESSIAN_SEQUENCES, max(len(calibration_ids) - n_scored, n_scored))
    inputs = SensitivityInputs(
        loaded, dense, plan.config, calibration_ids[:n_hessian], calibration_ids[-n_scored:], batch_size, device, dtype
    )

    def candidates(block: int, names: list[str]) -> list[tuple[list[str], list[QuantScheme]]]:
        plans = plan.block(block)
        chosen = [n for n in names if plans[n].name in free]
        if plan.config.allow_split_fused:
            return [([n], _fitting([plans[n]], schemes)) for n in chosen]
        if chosen and len(chosen) < len(names):
            settled = next(n for n in names if n not in chosen)
            raise ConfigError(
                f"{plans[chosen[0]].name} reads the same tensor as {plans[settled].name}, which quant.overrides or "
                "quant.ignore names, so budget cannot choose for it alone; name both, or set "
                "quant.allow_split_fused=true"
            )
        return [(names, _fitting([plans[n] for n in names], schemes))] if chosen else []

    scores = unit_scores(inputs, candidates, measured, on_block)
    units = []
    for scored in scores:
        plans = plan.block(scored.block)
        members = [plans[n] for n in scored.linears]
        options = _options(members, _fitting(members, schemes), scored.kl, loaded.dtype.itemsize)
        units.append(Unit([p.name for p in members], options))
    fixed = _fixed(plan, loaded.dtype.itemsize)
    n_weights = sum(p.n * p.k for p in plan.linears if p.scheme is not None)
    picked = [u.options[i] for u, i in zip(units, solve(budget, units, fixed, n_weights), strict=True)]
    total_bits = fixed.bits + sum(o.bits for o in picked)
    return {
        "budget": {k: v for k in ("bits", "bytes", "max_kl") if (v := getattr(budget, k)) is not None},
        "sensitivity": "measured" if measured else "estimated",
        "n_tokens": inputs.score_ids.numel(),
        "bits": total_bits / n_weights,
        "bytes": fixed.nbytes + sum(o.nbytes for o in picked),
        "predicted_kl": sum(o.kl for o in picked),
        "units": [
            {
                "linears": unit.linears,
                "choice": option.scheme.label(),
                "scheme": scheme_to_dict(option.scheme),
                "bytes": option.nbytes,
                "kl": option.kl,
            }
            for unit, option in zip(units, picked, strict=True)
        ],
    }


def apply_allocation(plan: Plan, allocation: dict[str, Any]) -> Plan:
    """The plan with the chosen schemes."""
    chosen = {name: scheme_from_dict(unit["scheme"]) for unit in allocation["units"] for name in unit["linears"]}
    return replace(plan, linears=[replace(p, scheme=chosen.get(p.name, p.scheme)) for p in plan.linears])


def describe(allocation: dict[str, Any]) -> str:
    """One line for the log."""
    counts: dict[str, int] = {}
    for unit in allocation["units"]:
        counts[unit["choice"]] = counts.get(unit["choice"], 0) + len(unit["linears"])
    budget = ", ".join(f"{name}={value:g}" for name, value in allocation["budget"].items())
    return (
        f"budget {budget}: {allocation['bits']:.4f} bits a weight, {allocation['bytes']:,} bytes, predicted KL "
        f"{allocation['predicted_kl']:.3g} ({allocation['sensitivity']}); linears "
        + ", ".join(f"{n} {label}" for label, n in sorted(counts.items()))
    )


def _is_fixed(plan: Plan, linear: LinearPlan) -> bool:
    return any(fnmatchcase(linear.name, pattern) for pattern in plan.config.overrides)


def _fitting(members: list[LinearPlan], schemes: list[QuantScheme]) -> list[QuantScheme]:
    """Schemes whose groups divide K, which members of a unit share."""
    k = members[0].k
    found = [s for s in schemes if s.granularity is not Granularity.GROUP or k % s.group_size == 0]
    if not found:
        try:
            schemes[0].n_groups(k)
        except CompressError as error:
            raise ConfigError(f"none of budget.choices fits {members[0].name}: {error}") from error
    return found


def _options(
    members: list[LinearPlan], schemes: list[QuantScheme], kl: list[float] | None, scale_bytes: int
) -> list[Option]:
    return [
        Option(
            scheme,
            sum(stored_bits(p, scheme) for p in members),
            sum(stored_bytes(p, scheme, scale_bytes) for p in members),
            kl[i] if kl is not None else 0.0,
        )
        for i, scheme in enumerate(schemes)
    ]


def _fixed(plan: Plan, scale_bytes: int) -> Option:
    settled = [(p, p.scheme) for p in plan.linears if p.scheme is not None and _is_fixed(plan, p)]
    bits = sum(stored_bits(p, s) for p, s in settled)
    return Option(QuantScheme(), bits, sum(stored_bytes(p, s, scale_bytes) for p, s in settled), 0.0)


def _check_memory(loaded: LoadedModel, n_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
    """Unlike quantization, scoring holds the whole model, and what it compares with or multiplies on the host.

    Raises:
        EnvironmentProblem: it cannot fit.
    """
    model = sum(p.numel() for _, p in loaded.model.named_parameters()) * dtype.itemsize
    widths = sum(sum(linear_weight(m).shape) for b in loaded.blocks for m in b.linears.values())
    vocabulary = int(loaded.model.config.get_text_config().vocab_size)  # type: ignore[operator,union-attr]
    kept = n_tokens * max(widths * dtype.itemsize, vocabulary * 4)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if model > free:
            raise EnvironmentProblem(
                f"budget: scoring choices holds the whole model, {format_bytes(model)} on {device}, where "
                f"{format_bytes(free)} are free; free the GPU, set device=cpu, or give schemes in quant.overrides"
            )
    free_host, needed = available_memory_bytes(), kept + (model if device.type == "cpu" else 0)
    if free_host is not None and needed > free_host:
        raise EnvironmentProblem(
            f"budget: scoring choices needs about {format_bytes(needed)} of memory, {format_bytes(free_host)} are "
            "free; lower budget.n_sequences or calibration.sequence_length"
        )


def _measures(
    loaded: LoadedModel, plan: Plan, budget: BudgetConfig, n_choices: int, length: int, device: torch.device
) -> bool:
    """Whether sensitivities are measured; `auto` decides by the work it would be."""
    if budget.sensitivity is not SensitivityName.auto:
        return budget.sensitivity is SensitivityName.measured
    parameters = sum(p.numel() for p in loaded.model.parameters())
    work = len(plan.linears) * n_choices * budget.n_sequences * length * parameters
    return work <= _AUTO_LIMIT[device.type]
