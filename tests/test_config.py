"""Settings: every shipped recipe composes into what its name says, and values that cannot be run are refused."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import compress.cli as cli
from compress.config import (
    BenchConfig,
    CalibrationConfig,
    EvalConfig,
    GateConfig,
    PublishConfig,
    RunConfig,
    VerifyConfig,
    to_plain,
)
from compress.config_quant import (
    AwqConfig,
    GptqConfig,
    GranularityName,
    HqqConfig,
    ObserverName,
    QuantConfig,
    Rounding,
    SchemeConfig,
    Transform,
    TuneConfig,
)
from compress.errors import ConfigError

# recipe -> transform, rounding, bits, granularity, needs calibration: what the name says, written down by hand
RECIPES = {
    "awq4": ("awq", "rtn", 4, "group", True),
    "awq_gptq4": ("awq", "gptq", 4, "group", True),
    "bf16": ("none", "none", 4, "group", False),
    "gptq3": ("none", "gptq", 3, "group", True),
    "best4": ("none", "gptq", 4, "group", True),
    "best3": ("none", "gptq", 3, "group", True),
    "best2": ("none", "gptq", 2, "group", True),
    "gptq4": ("none", "gptq", 4, "group", True),
    "mixed3_5": ("none", "gptq", 4, "group", True),
    "hqq4": ("none", "hqq", 4, "group", False),
    "rtn3": ("none", "rtn", 3, "group", False),
    "rtn4": ("none", "rtn", 4, "group", False),
    "rtn8_channel": ("none", "rtn", 8, "channel", False),
    "rtn8_tensor": ("none", "rtn", 8, "tensor", False),
    "smoke": ("none", "gptq", 4, "group", True),
}


def composed(*overrides: str) -> RunConfig:
    with initialize_config_module("compress.recipes", version_base="1.3"):
        config = OmegaConf.to_object(compose("config", overrides=list(overrides)))
    assert isinstance(config, RunConfig)
    return config


def test_recipes_shipped_are_the_recipes_tested() -> None:
    """Oracle: the hand-written table above."""
    assert cli.recipes() == sorted(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_composes_into_what_its_name_says(recipe: str) -> None:
    """Oracle: the hand-written table above."""
    config = composed(f"recipe={recipe}")
    quant = config.quant
    found = (
        quant.transform.value,
        quant.rounding.value,
        quant.scheme.bits,
        quant.scheme.granularity.value,
        quant.needs_calibration,
    )
    assert config.name == recipe
    assert found == RECIPES[recipe]
    assert quant.scheme.symmetric == (recipe != "hqq4")


def test_awq4_is_the_default_and_command_line_wins_over_recipe() -> None:
    """Oracle: the README's claim, and Hydra's order of precedence."""
    assert to_plain(composed()) == to_plain(composed("recipe=awq4"))
    assert composed("recipe=gptq3", "quant.scheme.bits=2").quant.scheme.bits == 2


@pytest.mark.parametrize(
    ("recipe", "sampled", "steps", "own"),
    [
        ("best4", 8192, 2100, {"embedding_rate": 5e-4, "scale_rate": 1e-3}),
        ("best3", 4096, 2100, {}),
        ("best2", 4096, 2100, {}),
        ("mixed3_5", 4096, 2100, {}),
    ],
)
def test_codes_are_trained_on_a_gpu(
    recipe: str, sampled: int, steps: int, own: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the README and what the recipes say of themselves: on a CPU the settings of `TuneConfig` itself, but for
    some rates; device=auto goes by what torch sees; the command line wins over both."""
    on_cpu, on_gpu = (composed(f"recipe={recipe}", f"device={device}") for device in ("cpu", "cuda:1"))
    assert on_cpu.quant.tune == TuneConfig(enabled=True, **own)
    assert on_cpu.calibration.tune_generated == 0
    assert on_gpu.quant.tune.trains_codes and on_gpu.calibration.tune_generated == sampled
    n = on_gpu.calibration.n_sequences + on_gpu.calibration.generated + sampled
    assert on_gpu.quant.tune.epochs * n / on_gpu.quant.tune.batch_sequences == pytest.approx(steps, rel=0.05)
    for seen, expected in ((True, on_gpu), (False, on_cpu)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda seen=seen: seen)
        assert composed(f"recipe={recipe}").quant.tune == expected.quant.tune
    set_here = composed(f"recipe={recipe}", "device=cuda", "quant.tune.code_rate=0.5", "calibration.tune_generated=7")
    assert set_here.quant.tune.code_rate == 0.5 and set_here.calibration.tune_generated == 7


def test_overrides_take_patterns_that_no_schema_could_declare() -> None:
    """Oracle: the dictionary itself, as written in the README."""
    config = composed("quant.overrides={*.down_proj:{bits:8},*.v_proj:{symmetric:false}}")
    assert config.quant.overrides == {"*.down_proj": {"bits": 8}, "*.v_proj": {"symmetric": False}}


@pytest.mark.parametrize("kind", [Transform, Rounding, GranularityName, ObserverName])
def test_enum_members_are_named_by_their_value(kind: type[Enum]) -> None:
    """Oracle: OmegaConf reads members by name and fingerprints write values; a user must see one word for both."""
    assert [m.name for m in kind] == [m.value for m in kind]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SchemeConfig(bits=5), "quant.scheme.bits=5"),
        (lambda: SchemeConfig(group_size=0), "quant.scheme.group_size=0"),
        (lambda: AwqConfig(n_grid=0), "quant.awq.n_grid=0"),
        (lambda: AwqConfig(clip_max_shrink=1.0), "quant.awq.clip_max_shrink=1.0"),
        (lambda: GptqConfig(damping=float("nan")), "quant.gptq.damping=nan"),
        (lambda: GptqConfig(damping=float("inf")), "quant.gptq.damping=inf"),
        (lambda: GptqConfig(max_damping_steps=-1), "quant.gptq.max_damping_steps=-1"),
        (lambda: GptqConfig(gptaq_strength=1.5), "quant.gptq.gptaq_strength=1.5"),
        (lambda: GptqConfig(gptaq=True, true_sequential=False), "quant.gptq.gptaq=true needs"),
        (lambda: HqqConfig(lp_norm=0.0), "quant.hqq.lp_norm=0.0"),
        (lambda: HqqConfig(lp_norm=2.0), "quant.hqq.lp_norm=2.0"),
        (lambda: HqqConfig(beta=0.0), "quant.hqq.beta=0.0"),
        (lambda: HqqConfig(kappa=0.9), "quant.hqq.kappa=0.9"),
        (lambda: HqqConfig(iterations=0), "quant.hqq.iterations=0"),
        (lambda: CalibrationConfig(n_sequences=0), "calibration.n_sequences=0"),
        (lambda: CalibrationConfig(tune_generated=-1), "calibration.tune_generated=-1"),
        (lambda: CalibrationConfig(generated_batch_size=0), "calibration.generated_batch_size=0"),
        (lambda: CalibrationConfig(path="a", dataset="b"), "calibration.path and calibration.dataset"),
        (lambda: VerifyConfig(n_sequences=0), "verify.n_sequences=0"),
        (lambda: VerifyConfig(max_relative_error=1e9), "would let a broken artifact pass"),
        (lambda: VerifyConfig(max_relative_error=float("nan")), "verify.max_relative_error=nan"),
        (lambda: BenchConfig(batch_sizes=[]), r"bench.batch_sizes=\[\]"),
        (lambda: BenchConfig(batch_sizes=[1, 0]), r"bench.batch_sizes=\[1, 0\]"),
        (lambda: BenchConfig(warmup=-1), "bench.warmup=-1"),
        (lambda: EvalConfig(n_sequences=1), "eval.n_sequences=1 .*standard error"),
        (lambda: EvalConfig(sequence_length=1), "eval.sequence_length=1"),
        (lambda: EvalConfig(limit=0), "eval.limit=0"),
        (lambda: EvalConfig(path="a", dataset="b"), "eval.path and eval.dataset"),
        (lambda: GateConfig(max_kl_rise=-0.1), "gate.max_kl_rise=-0.1"),
        (lambda: GateConfig(update=True), "gate.update=true needs gate.baseline"),
        (lambda: RunConfig(model=""), "model is empty"),
        (lambda: RunConfig(name="a/b"), "name='a/b'"),
        (lambda: RunConfig(output_dir=" "), "output_dir is empty"),
        (lambda: _baseline(publish=PublishConfig(dest="x")), "makes no artifact"),
        (lambda: RunConfig(quant=QuantConfig(Transform.awq, Rounding.none)), "baseline run"),
        (lambda: RunConfig(gate=GateConfig(baseline="b"), eval=EvalConfig(enabled=False)), "eval.enabled=true"),
    ],
)
def test_value_out_of_range_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    """Oracle: the rule each value breaks; the message names setting and value."""
    with pytest.raises(ConfigError, match=message):
        make()


def _baseline(**changes: Any) -> RunConfig:
    return RunConfig(quant=QuantConfig(rounding=Rounding.none), **changes)


def test_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: HOME itself. A shell leaves `output_dir=~/runs` alone, and a folder named ~ helps nobody."""
    monkeypatch.setenv("HOME", "/home/someone")
    config = RunConfig(output_dir="~/runs", run_dir="~/one", gate=GateConfig(baseline="~/b.json"))
    assert (config.output_dir, config.run_dir) == ("/home/someone/runs", "/home/someone/one")
    assert config.gate.baseline == "/home/someone/b.json"


def test_plain_config_is_json_and_keeps_every_setting() -> None:
    """Oracle: json, and the list of keys taken from the type annotations."""
    import json

    plain = json.loads(json.dumps(to_plain(RunConfig())))
    for key in cli.config_keys(RunConfig):
        section = plain
        for part in key.split("."):
            assert part in section, key
            section = section[part]
