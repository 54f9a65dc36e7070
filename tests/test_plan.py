"""What a plan decides and what it refuses, before any weight is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.config_quant import GranularityName, ObserverName, QuantConfig, Rounding, SchemeConfig
from compress.errors import ConfigError
from compress.groups import ScaleGroup
from compress.models import LoadedModel, load_model
from compress.plan import Plan, check_fused, make_plan
from compress.quant import Granularity, Observer, QuantScheme

QKV = ScaleGroup(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "self_attn")


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path) -> LoadedModel:
    return load_model(str(tiny_model_dir))


def config(**changes: Any) -> QuantConfig:
    return QuantConfig(scheme=SchemeConfig(group_size=32), **changes)


def scheme_of(plan: Plan, name: str) -> QuantScheme | None:
    return next(p.scheme for p in plan.linears if p.name == name)


def test_every_linear_of_every_block_has_a_place(loaded: LoadedModel) -> None:
    """Oracle: the tiny Llama by hand: 7 linears in each of 2 blocks, with their shapes, all under the base scheme."""
    plan = make_plan(loaded, config())
    shapes = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (128, 64),
        "mlp.up_proj": (128, 64),
        "mlp.down_proj": (64, 128),
    }
    expected = {f"model.layers.{i}.{n}": (i, n, *shape) for i in range(2) for n, shape in shapes.items()}
    assert {p.name: (p.block, p.local, p.n, p.k) for p in plan.linears} == expected
    assert plan.schemes() == [QuantScheme(4, Granularity.GROUP, 32)]
    assert set(plan.block(1)) == set(shapes)


def test_overrides_and_ignore(loaded: LoadedModel) -> None:
    """Oracle: the rules in words: an override changes the named fields only, the last match wins, ignore beats all."""
    plan = make_plan(
        loaded,
        config(
            overrides={
                "*.down_proj": {"bits": 8, "granularity": "channel"},
                "*.1.mlp.down_proj": {"bits": 3, "symmetric": False, "observer": "MSE", "group_size": "64"},
            },
            ignore=["*.0.self_attn.*"],
        ),
    )
    base = QuantScheme(4, Granularity.GROUP, 32)
    assert scheme_of(plan, "model.layers.0.mlp.down_proj") == QuantScheme(8, Granularity.CHANNEL, 32)
    assert scheme_of(plan, "model.layers.1.mlp.down_proj") == QuantScheme(3, Granularity.GROUP, 64, False, Observer.MSE)
    assert scheme_of(plan, "model.layers.0.self_attn.o_proj") is None
    assert scheme_of(plan, "model.layers.1.self_attn.o_proj") == base
    assert len(plan.schemes()) == 3


@pytest.mark.parametrize("field", ["ignore", "overrides"])
@pytest.mark.parametrize(("pattern", "hint"), [("*.dwon_proj", r"\*\.down_proj"), ("lm_head", "one ending in down")])
def test_a_pattern_that_matches_nothing_is_an_error(loaded: LoadedModel, field: str, pattern: str, hint: str) -> None:
    """Oracle: the documented error, with the nearest real name."""
    value: Any = [pattern] if field == "ignore" else {pattern: {"bits": 8}}
    with pytest.raises(ConfigError, match=rf"matches none of the 14 linears; did you mean {hint}"):
        make_plan(loaded, config(**{field: value}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bit": 8}, r"no field 'bit'; did you mean bits"),
        ({"bits": 5}, r"quant.overrides\['\*.down_proj'\]: bits=5 is not supported"),
        ({"bits": 4.5}, "whole number"),
        ({"bits": True}, "whole number"),
        ({"bits": "four"}, "bits='four'"),
        ({"symmetric": "no"}, "must be true or false"),
        ({"granularity": "row"}, "granularity='row'"),
        ({"observer": "max"}, "observer='max'"),
        ({"group_size": None}, "group_size=None"),
    ],
)
def test_overrides_that_cannot_be_read(loaded: LoadedModel, values: dict[str, Any], message: str) -> None:
    """Oracle: the documented error names the pattern, the field and the value."""
    with pytest.raises(ConfigError, match=message):
        make_plan(loaded, config(overrides={"*.down_proj": values}))


def test_a_group_size_that_does_not_divide_is_refused(loaded: LoadedModel) -> None:
    """Oracle: 48 divides neither 64 nor 128; the error names the linear, its shape and sizes that would do. A size that
    fits only some linears is refused too, and channel granularity never is."""
    with pytest.raises(
        ConfigError, match=r"q_proj \[64, 64\]: group_size=48 does not divide K=64; use one of \[32, 64\]"
    ):
        make_plan(loaded, QuantConfig(scheme=SchemeConfig(group_size=48)))
    with pytest.raises(ConfigError, match="does not divide K=64"):
        make_plan(loaded, QuantConfig(scheme=SchemeConfig(group_size=128)))
    channel = SchemeConfig(group_size=48, granularity=GranularityName.channel)
    assert len(make_plan(loaded, QuantConfig(scheme=channel)).linears) == 14
    only_down = QuantConfig(scheme=SchemeConfig(group_size=128), ignore=["*.self_attn.*", "*.gate_proj", "*.up_proj"])
    assert len(make_plan(loaded, only_down).schemes()) == 1


def test_ignoring_everything_is_refused_and_a_baseline_is_not(loaded: LoadedModel) -> None:
    """Oracle: a run that quantizes nothing while claiming to is an error; rounding=none keeps every linear."""
    with pytest.raises(ConfigError, match="leaves no linear to quantize"):
        make_plan(loaded, config(ignore=["*"]))
    baseline = make_plan(loaded, QuantConfig(rounding=Rounding.none))
    assert all(p.scheme is None for p in baseline.linears) and baseline.schemes() == []


def test_fused_siblings_need_one_scheme(loaded: LoadedModel) -> None:
    """Oracle: vLLM fuses q/k/v: a scheme, a group size or a kept member that differs is refused, equal overrides are
    not, and the check can be switched off by name."""
    for changes in (
        {"overrides": {"*.v_proj": {"bits": 8}}},
        {"overrides": {"*.q_proj": {"group_size": 64}}},
        {"ignore": ["*.k_proj"]},
    ):
        with pytest.raises(ConfigError, match="read one tensor, so vLLM and SGLang fuse them"):
            check_fused(make_plan(loaded, config(**changes)), 0, [QKV])
        check_fused(make_plan(loaded, config(**changes, allow_split_fused=True)), 0, [QKV])
    check_fused(make_plan(loaded, config(overrides={"*.[qkv]_proj": {"bits": 8}})), 0, [QKV])
    check_fused(make_plan(loaded, config(overrides={"*.1.*.v_proj": {"bits": 8}})), 0, [QKV])
    with pytest.raises(ConfigError, match=r"q_proj: w4g32 sym.*v_proj: w8g32 sym"):
        check_fused(make_plan(loaded, config(overrides={"*.1.*.v_proj": {"bits": 8}})), 1, [QKV])


def test_config_enums_and_scheme_enums_agree() -> None:
    """Oracle: plan.scheme_from_config maps one onto the other by value, so the two lists must be the same."""
    assert {g.value for g in GranularityName} == {g.value for g in Granularity}
    assert {o.value for o in ObserverName} == {o.value for o in Observer}
