"""What will happen to every linear, decided and checked before the first hour of work.

A pattern that matches nothing, a group size that does not divide K and members of a fused group with different
schemes are errors here, not surprises in an artifact.
"""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass, fields, replace
from typing import Any

from compress.config_quant import GranularityName, ObserverName, QuantConfig, Rounding, SchemeConfig
from compress.errors import CompressError, ConfigError
from compress.groups import ScaleGroup
from compress.models import LoadedModel, head_name, linear_weight
from compress.quant import Granularity, Observer, QuantScheme


@dataclass
class LinearPlan:
    """One linear of one block: full and block-relative names, shape, and its scheme (None: kept as it is)."""

    name: str
    block: int
    local: str
    n: int
    k: int
    scheme: QuantScheme | None


@dataclass
class Plan:
    """linears: those of the blocks. head: the output head, where it is quantized; its block and local name are none."""

    linears: list[LinearPlan]
    config: QuantConfig
    head: LinearPlan | None = None

    def block(self, index: int) -> dict[str, LinearPlan]:
        """Plans of one block by block-relative name."""
        return {p.local: p for p in self.linears if p.block == index}

    def schemes(self) -> list[QuantScheme]:
        """Distinct schemes of the blocks' linears in order of first use."""
        return list(dict.fromkeys(p.scheme for p in self.linears if p.scheme is not None))

    def label(self) -> str:
        """The schemes in words, for the record; empty where nothing is quantized."""
        head = [f"head {s.label()}"] if self.head is not None and (s := self.head.scheme) is not None else []
        return ", ".join([*(scheme.label() for scheme in self.schemes()), *head])


def scheme_from_config(config: SchemeConfig) -> QuantScheme:
    return QuantScheme(
        bits=config.bits,
        granularity=Granularity(config.granularity.value),
        group_size=config.group_size,
        symmetric=config.symmetric,
        observer=Observer(config.observer.value),
    )


def make_plan(loaded: LoadedModel, config: QuantConfig) -> Plan:
    """Assign a scheme to every linear of every block.

    Raises:
        ConfigError: a pattern that matches nothing, an unknown scheme field, a group size that does not divide K, or a
            head that cannot be quantized alone.
    """
    names = [f"{b.name}.{local}" for b in loaded.blocks for local in b.linears]
    for pattern in [*config.ignore, *config.overrides]:
        if not fnmatch.filter(names, pattern):
            leaves = sorted({n.rsplit(".", 1)[-1] for n in names})
            near = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.3)
            hint = f"*.{near[0]}" if near else f"one ending in {', '.join(leaves)}"
            raise ConfigError(f"pattern {pattern!r} matches none of the {len(names)} linears; did you mean {hint}?")
    base = scheme_from_config(config.scheme)
    overrides = {p: override_scheme(base, f"quant.overrides[{p!r}]", v) for p, v in config.overrides.items()}
    linears = []
    for index, block in enumerate(loaded.blocks):
        for local, module in block.linears.items():
            name = f"{block.name}.{local}"
            n, k = linear_weight(module).shape
            scheme: QuantScheme | None = base
            for pattern, overridden in overrides.items():  # the last match wins, as in a list of exceptions
                if fnmatch.fnmatchcase(name, pattern):
                    scheme = overridden
            if config.rounding is Rounding.none or any(fnmatch.fnmatchcase(name, p) for p in config.ignore):
                scheme = None
            if scheme is not None:
                try:
                    scheme.n_groups(k)
                except CompressError as error:
                    raise ConfigError(f"{name} [{n}, {k}]: {error}") from error
            linears.append(LinearPlan(name, index, local, n, k, scheme))
    if config.rounding is not Rounding.none and not any(p.scheme for p in linears):
        raise ConfigError("quant.ignore leaves no linear to quantize; use recipe=bf16 for a baseline run")
    return Plan(linears, config, _plan_head(loaded, config) if config.lm_head else None)


def _plan_head(loaded: LoadedModel, config: QuantConfig) -> LinearPlan:
    """The output head by its own scheme.

    Raises:
        ConfigError: it shares the embedding's tensor, or its group size does not divide K.
        UnsupportedModel: the model has no linear head.
    """
    name = head_name(loaded)
    weight = f"{name}.weight"
    partner = loaded.tied.get(weight) or next((n for n, holder in loaded.tied.items() if holder == weight), None)
    if partner is not None:
        raise ConfigError(
            f"quant.lm_head=true: {weight} and {partner} are one tensor, so quantizing the head would pack the "
            "embedding too, which a compressed-tensors artifact cannot carry to its readers: transformers (5.23) fails "
            "on an embedding without a dense weight, vLLM and SGLang do not read a tied one (vLLM #45535, SGLang "
            "#36137). Set quant.untie=true, which stores the embedding as it is and the head beside it, or leave "
            "quant.lm_head out"
        )
    n, k = linear_weight(loaded.model.get_submodule(name)).shape
    scheme = scheme_from_config(config.lm_head_scheme)
    try:
        scheme.n_groups(k)
    except CompressError as error:
        raise ConfigError(f"quant.lm_head_scheme on {name} [{n}, {k}]: {error}") from error
    return LinearPlan(name, -1, "", n, k, scheme)


def override_scheme(base: QuantScheme, where: str, values: dict[str, Any]) -> QuantScheme:
    """`base` with the named fields changed.

    Raises:
        ConfigError: a field or value that is none; `where` names the setting.
    """
    known = [f.name for f in fields(SchemeConfig)]
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"{where} has no field {key!r}; {hint}")
        try:
            if key == "granularity":
                value = Granularity(GranularityName(str(value).lower()).value)
            elif key == "observer":
                value = Observer(ObserverName(str(value).lower()).value)
            elif key == "symmetric":
                if not isinstance(value, bool):
                    raise ValueError("must be true or false")
            elif isinstance(value, bool) or int(value) != float(value):
                raise ValueError("must be a whole number")
            else:
                value = int(value)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{where}.{key}={value!r}: {error}") from error
        changes[key] = value
    try:
        return replace(base, **changes)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def check_fused(plan: Plan, block: int, groups: list[ScaleGroup]) -> None:
    """Linears that read one tensor are fused by serving engines (q/k/v, gate/up) and need one scheme.

    Raises:
        ConfigError: they differ and `quant.allow_split_fused` is off.
    """
    if plan.config.allow_split_fused:
        return
    plans = plan.block(block)
    for group in groups:
        schemes = {plans[n].scheme for n in group.linears}
        if len(schemes) > 1:
            described = ", ".join(f"{n}: {s.label() if (s := plans[n].scheme) else 'kept'}" for n in group.linears)
            raise ConfigError(
                f"{plans[group.linears[0]].name} and its siblings read one tensor, so vLLM and SGLang fuse them, but "
                f"their schemes differ ({described}); override them together, or set quant.allow_split_fused=true"
            )
