"""Mixed precision under a budget: the integer program, what a choice costs, and whole runs that keep a budget."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import hashes, scheme, stages, tiny_config, verify_in_process

import compress
from compress.allocate import Option, Unit, allocate, apply_allocation, check_budget, solve, stored_bytes
from compress.checkpoint import encode
from compress.config import RunConfig
from compress.config_quant import BudgetConfig, ObserverName, QuantConfig, Rounding, SensitivityName, Transform
from compress.errors import ConfigError
from compress.methods.knapsack import Infeasible, choose
from compress.methods.rtn import rtn_quantize
from compress.models import LoadedModel, linear_weight, load_dense, load_model, set_linear_weight
from compress.pipeline import run_pipeline
from compress.plan import LinearPlan, Plan, make_plan
from compress.qlinear import Backend
from compress.quant import Granularity, QuantScheme
from compress.run import quantize_mark
from compress.sensitivity import EstimatedKl, MeasuredKl, agreement

CHOICES = ["2g32", "3g32", "3g32-asym", "4g32", "8-channel"]
CPU = torch.device("cpu")


def brute_force(costs: list[list[int]], weights: list[list[int]], limit: int) -> tuple[int, int] | None:
    """Least (cost, weight) over all combinations within the limit; None where there is none."""
    sums = (
        (sum(c[i] for c, i in zip(costs, picked, strict=True)), sum(w[i] for w, i in zip(weights, picked, strict=True)))
        for picked in itertools.product(*(range(len(row)) for row in costs))
    )
    return min((s for s in sums if s[1] <= limit), default=None)


@pytest.mark.parametrize("seed", range(40))
def test_integer_program_finds_what_trying_everything_finds(seed: int) -> None:
    """Oracle: all combinations. Numbers of the size of KLs and bytes, rows of unequal length, ties and duplicates;
    the answer has the least cost, of those the least weight, and comes out the same again."""
    draw = random.Random(seed)
    few = seed % 2  # small numbers, so that many answers tie
    costs, weights = [], []
    for _ in range(draw.randint(1, 5)):
        n = draw.randint(1, 5)
        costs.append([draw.randint(0, 3 if few else 10**8) for _ in range(n)])
        weights.append([draw.randint(1, 4) if few else 16 * draw.randint(1, 10**6) for _ in range(n)])
    least, most = (sum(pick(row) for row in weights) for pick in (min, max))
    for limit in {least, most, most + 1, *(draw.randint(least, most) for _ in range(3))}:
        picked = choose(costs, weights, limit)
        found = tuple(sum(row[i] for row, i in zip(table, picked, strict=True)) for table in (costs, weights))
        assert found == brute_force(costs, weights, limit)
        assert choose(costs, weights, limit) == picked
    with pytest.raises(Infeasible) as caught:
        choose(costs, weights, least - 1)
    assert caught.value.least == least


def test_solver_leaves_stdout_to_results(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the file descriptor: what the solver's own code writes there during a solve goes to stderr."""
    import os

    import scipy.optimize

    real = scipy.optimize.milp

    def noisy(*args: Any, **options: Any) -> Any:
        os.write(1, b"a stray line")
        return real(*args, **options)

    monkeypatch.setattr(scipy.optimize, "milp", noisy)
    assert choose([[2, 1]], [[1, 2]], 2) == [1]
    out, err = capfd.readouterr()
    assert out == "" and "a stray line" in err


def random_units(seed: int) -> list[Unit]:
    """Five units of up to four options; KL falls with bits, as it does, but not always."""
    draw = random.Random(seed)
    units = []
    for i in range(5):
        n = draw.randint(64, 256)
        options = [
            Option(QuantScheme(b), b * n * 8, b * n + 16, draw.uniform(0.5, 1.5) * 4.0**-b)
            for b in draw.sample([2, 3, 4, 8], draw.randint(1, 4))
        ]
        units.append(Unit([f"linear {i}"], options))
    return units


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["bits", "bytes", "max_kl"])
def test_budgets_are_kept_at_the_least_cost(kind: str, seed: int) -> None:
    """Oracle: all combinations of options. What is kept is the sum of the options' own figures, fixed linears
    included; KL counts to a billionth of the worst total."""
    units = random_units(seed)
    fixed = Option(QuantScheme(), 12345, 1600, 0.0)
    n_weights = sum(u.options[0].bits // u.options[0].scheme.bits for u in units) + 3000
    combined = [
        (sum(o.kl for o in c), sum(o.bits for o in c) + fixed.bits, sum(o.nbytes for o in c) + fixed.nbytes)
        for c in itertools.product(*(u.options for u in units))
    ]
    middle = sorted(combined)[len(combined) // 2]
    limits = {"bits": middle[1] / n_weights, "bytes": middle[2], "max_kl": middle[0] + 1e-8}
    budget = BudgetConfig(**{kind: limits[kind]})
    picked = [u.options[i] for u, i in zip(units, solve(budget, units, fixed, n_weights), strict=True)]
    kl, bits, nbytes = sum(o.kl for o in picked), sum(o.bits for o in picked), sum(o.nbytes for o in picked)
    if kind == "max_kl":
        assert kl <= limits[kind]
        assert nbytes + fixed.nbytes == min(c[2] for c in combined if c[0] <= limits[kind])
    else:
        used = [(c[0], c[1] / n_weights if kind == "bits" else c[2]) for c in combined]
        assert (bits + fixed.bits) / n_weights <= limits["bits"] or kind == "bytes"
        assert nbytes + fixed.nbytes <= limits["bytes"] or kind == "bits"
        assert kl == pytest.approx(min(c for c, size in used if size <= limits[kind]), abs=1e-8)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (BudgetConfig(bits=1.9), r"budget.bits=1.9 cannot be kept: .* span 2.0000 to 4.0000 bits"),
        (BudgetConfig(bytes=199), r"budget.bytes=199 cannot be kept: .* span 200 to 400 bytes"),
        (BudgetConfig(max_kl=0.01), r"budget.max_kl=0.01 cannot be kept: .* predicted KL of 0.02 to 0.2"),
    ],
)
def test_budget_that_cannot_be_kept_names_what_can(budget: BudgetConfig, message: str) -> None:
    """Oracle: two units by hand. The bound that the message names can be kept."""
    options = [Option(QuantScheme(2), 800, 100, 0.1), Option(QuantScheme(4), 1600, 200, 0.01)]
    units = [Unit(["a"], options), Unit(["b"], options)]
    with pytest.raises(ConfigError, match=message):
        solve(budget, units, None, 800)
    for named in (BudgetConfig(bits=2.0), BudgetConfig(bytes=200), BudgetConfig(max_kl=0.02)):
        assert solve(named, units, None, 800) in ([0, 0], [1, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BudgetConfig(bits=3, max_kl=0.1), "budget.bits and budget.max_kl are both set"),
        (lambda: BudgetConfig(bits=3, bytes=10, max_kl=0.1), "give one of bits, bytes and max_kl"),
        (lambda: BudgetConfig(bits=0), "budget.bits=0"),
        (lambda: BudgetConfig(bytes=-1), "budget.bytes=-1"),
        (lambda: BudgetConfig(max_kl=float("nan")), "budget.max_kl=nan"),
        (lambda: BudgetConfig(choices=[]), "budget.choices is empty"),
        (lambda: BudgetConfig(choices=["4g128", "5g128"]), "budget.choices has '5g128'"),
        (lambda: BudgetConfig(choices=["4g0"]), "budget.choices has '4g0'"),
        (lambda: BudgetConfig(choices=["4"]), "budget.choices has '4'"),
        (lambda: RunConfig(quant=QuantConfig(rounding=Rounding.none), budget=BudgetConfig(bits=4)), "baseline run"),
    ],
)
def test_contradictory_budget_is_refused_by_name(make: Any, message: str) -> None:
    """Oracle: the rule each one breaks; the message names setting and value."""
    with pytest.raises(ConfigError, match=message):
        make()


def test_choices_read_as_schemes(tiny_model_dir: Path) -> None:
    """Oracle: the fields by hand; what a choice does not say comes from quant.scheme."""
    from compress.allocate import choices

    base = scheme(4, symmetric=False)
    plan = make_plan(load_model(str(tiny_model_dir)), QuantConfig(scheme=replace(base, observer=ObserverName.mse)))
    found = choices(plan, BudgetConfig(choices=["2g64", "3g32-sym", "8-channel-sym", "4-tensor-asym", "2g64-asym"]))
    assert [s.label() for s in found] == ["w2g64 asym", "w3g32 sym", "w8 channel sym", "w4 tensor asym"]
    assert {s.observer.value for s in found} == {"mse"}


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_stored_bytes_are_those_of_the_encoded_tensors(bits: int, symmetric: bool, granularity: Granularity) -> None:
    """Oracle: `checkpoint.encode` of a real weight, at widths that do not fill their words."""
    chosen = QuantScheme(bits, granularity, 35, symmetric)
    weight = torch.randn(13, 70, generator=torch.Generator().manual_seed(0))
    encoded = encode(rtn_quantize(weight, chosen, scale_dtype=torch.bfloat16))
    size = sum(t.nbytes for t in encoded.values())
    assert stored_bytes(LinearPlan("x", 0, "x", 13, 70, chosen), chosen, 2) == size


def tokens(n: int = 6, length: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, length), generator=torch.Generator().manual_seed(3))


def quant_config(**changes: Any) -> QuantConfig:
    return QuantConfig(Transform.none, Rounding.rtn, replace(scheme(4), observer=ObserverName.mse), **changes)


def allocated(model: Path, budget: BudgetConfig, quant: QuantConfig | None = None) -> tuple[dict[str, Any], Plan]:
    loaded = load_model(str(model))
    plan = make_plan(loaded, quant or quant_config())
    found = allocate(loaded, plan, budget, tokens(), 2, CPU, torch.float32, lambda done, total: None)
    return found, apply_allocation(plan, found)


def test_fused_linears_share_a_choice_and_the_budget_is_kept(tiny_model_dir: Path) -> None:
    """Oracle: the architecture (q/k/v read one tensor, gate/up another), and the plan's own bits a weight."""
    found, plan = allocated(tiny_model_dir, BudgetConfig(bits=4.2, choices=CHOICES))
    assert [len(u["linears"]) for u in found["units"]] == [3, 1, 2, 1] * 2
    assert len(plan.schemes()) > 1
    bits = sum(p.scheme.bits_per_weight(p.n, p.k) * p.n * p.k for p in plan.linears if p.scheme)
    assert bits / sum(p.n * p.k for p in plan.linears) == pytest.approx(found["bits"])
    assert 3.6 < found["bits"] <= 4.2
    for unit in found["units"]:
        assert {p.scheme.label() for p in plan.linears if p.scheme and p.name in unit["linears"]} == {unit["choice"]}


def test_overridden_linears_keep_their_scheme_and_ignored_ones_do_not_count(tiny_model_dir: Path) -> None:
    """Oracle: arithmetic by hand on shapes; 8-bit overrides eat into what the others may take."""
    quant = quant_config(overrides={"*.down_proj": {"bits": 8}}, ignore=["*.o_proj"])
    found, plan = allocated(tiny_model_dir, BudgetConfig(bits=5.0, choices=["2g32", "3g32", "4g32"]), quant)
    schemes = {p.name: p.scheme for p in plan.linears}
    assert all((s is not None and s.bits == 8) for n, s in schemes.items() if n.endswith("down_proj"))
    assert all(s is None for n, s in schemes.items() if n.endswith("o_proj"))
    counted = [p for p in plan.linears if p.scheme]
    total = sum((p.scheme.bits + 0.5) * p.n * p.k for p in counted if p.scheme)
    assert found["bits"] == pytest.approx(total / sum(p.n * p.k for p in counted))
    assert found["bits"] <= 5.0
    with pytest.raises(ConfigError, match=r"budget.bits=3.5 cannot be kept: .* span 4\.\d+ to"):
        check_budget(plan, BudgetConfig(bits=3.5, choices=["2g32", "3g32", "4g32"]))


def test_override_of_a_part_of_a_fused_group(tiny_model_dir: Path) -> None:
    """Oracle: the rule: refused with its remedy; with the remedy every linear chooses for itself."""
    quant = quant_config(overrides={"*.v_proj": {"bits": 8}})
    budget = BudgetConfig(bits=5.0, choices=CHOICES)
    with pytest.raises(ConfigError, match=r"q_proj reads the same tensor as .*v_proj.*allow_split_fused"):
        allocated(tiny_model_dir, budget, quant)
    found, _ = allocated(tiny_model_dir, budget, replace(quant, allow_split_fused=True))
    assert [len(u["linears"]) for u in found["units"]] == [1] * 12


def test_choice_that_does_not_divide_the_inputs(tiny_model_dir: Path) -> None:
    """Oracle: K is 64 or 128: group 128 is open to down_proj alone, and 96 to none."""
    found, _ = allocated(tiny_model_dir, BudgetConfig(bits=4.1, choices=["2g32", "4g128"]))
    assert {u["linears"][0].rsplit(".", 1)[1] for u in found["units"] if u["choice"] == "w4g128 sym"} == {"down_proj"}
    with pytest.raises(ConfigError, match=r"none of budget.choices fits model.layers.0.self_attn.q_proj"):
        allocated(tiny_model_dir, BudgetConfig(bits=4.1, choices=["4g96"]))


@pytest.fixture(scope="module")
def dense(tiny_model_dir: Path) -> LoadedModel:
    loaded = load_model(str(tiny_model_dir))
    load_dense(loaded, CPU, torch.float32)
    return loaded


def test_measured_kl_is_the_evaluation_of_the_changed_model(dense: LoadedModel, tiny_model_dir: Path) -> None:
    """Oracle: `eval.quality` on a second model whose one linear is quantized; the first is as it was afterwards."""
    from compress.eval.quality import kl_quality

    other = load_model(str(tiny_model_dir))
    load_dense(other, CPU, torch.float32)
    score = MeasuredKl(dense, tokens())
    assert score.enters and score.kl() == 0.0
    for block, name in ((0, "self_attn.q_proj"), (1, "mlp.down_proj")):
        module = other.blocks[block].linears[name]
        original = linear_weight(module).clone()
        weight = rtn_quantize(original, QuantScheme(3, group_size=32)).dequantize()
        set_linear_weight(module, weight)
        expected = kl_quality(dense.model, other.model, tokens(), 4).kl
        set_linear_weight(module, original)
        assert score(block, {name: weight}) == pytest.approx(expected, rel=1e-2)
        assert torch.equal(linear_weight(dense.blocks[block].linears[name]), original)


def test_estimated_kl_ranks_as_the_measured_one(dense: LoadedModel) -> None:
    """Oracle: the measured KL of 56 choices; on this untrained model the estimate has its order and its size."""
    measured, estimated = MeasuredKl(dense, tokens(8)), EstimatedKl(dense, tokens(8))
    pairs = []
    for index, block in enumerate(dense.blocks):
        for name, module in block.linears.items():
            for bits in (2, 3, 4, 8):
                weight = rtn_quantize(linear_weight(module), QuantScheme(bits, group_size=32)).dequantize()
                pairs.append((estimated(index, {name: weight}), measured(index, {name: weight})))
    found = agreement([e for e, _ in pairs], [m for _, m in pairs])
    assert found["spearman"] > 0.9
    assert 0.5 < found["ratio"] < 2


def test_estimated_kl_is_the_second_order_term(dense: LoadedModel) -> None:
    """Oracle: half the squared change of log p of labels, by hand, for one token and a change of one weight."""
    ids = tokens(1, 1)
    score = EstimatedKl(dense, ids)
    weight = linear_weight(dense.blocks[1].linears["mlp.down_proj"])
    x, g = score.inputs[1, "mlp.down_proj"][0], score.gradients[1, "mlp.down_proj"][0]
    changed = weight.clone()
    changed[3, 5] += 0.25
    expected = 0.5 * float(g[0, 3] * 0.25 * x[0, 5]) ** 2
    assert score(1, {"mlp.down_proj": changed}) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["measured", "estimated"])
def test_allocation_repeats_and_leaves_the_global_generator_alone(name: str, tiny_model_dir: Path) -> None:
    """Oracle: the state of torch's and Python's generators before and after, and the first allocation."""
    before, python = torch.get_rng_state(), random.getstate()
    budget = BudgetConfig(bits=4.0, choices=CHOICES, sensitivity=SensitivityName(name))
    first, _ = allocated(tiny_model_dir, budget)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    second, _ = allocated(tiny_model_dir, budget)
    assert first == second and first["sensitivity"] == name
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    torch.set_rng_state(before)


@pytest.fixture
def config(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    verify_in_process(monkeypatch)
    quant = QuantConfig(Transform.none, Rounding.gptq, replace(scheme(4), observer=ObserverName.mse))
    return tiny_config(tiny_model_dir, tmp_path, quant=quant, budget=BudgetConfig(bits=4.2, choices=CHOICES))


def test_whole_run_keeps_its_budget_and_is_read_by_others(config: RunConfig) -> None:
    """Oracle: transformers with compressed-tensors, whose logits on the mixed artifact (3 bits among its schemes) are
    ours; the manifest's own sizes; the budget."""
    from transformers import AutoModelForCausalLM

    config = replace(config, budget=replace(config.budget, choices=[c for c in CHOICES if "asym" not in c]))
    record = run_pipeline(config)
    allocation = record["allocation"]
    assert record["verified"] and record["size"]["quantized_bits_per_weight"] == pytest.approx(allocation["bits"])
    assert allocation["bits"] <= 4.2 and not record["warnings"]
    artifact = Path(record["artifact"])
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["recipe"]["allocation"] == allocation
    assert {layer["scheme"] for layer in record["layers"]} == {u["choice"] for u in allocation["units"]}
    groups = json.loads((artifact / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) == len({u["choice"] for u in allocation["units"]}) > 1
    assert any(u["scheme"]["bits"] == 3 for u in allocation["units"])
    own = compress.load(artifact, device="cpu", dtype=torch.float32, backend=Backend.REFERENCE)
    other = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32).eval()
    with torch.inference_mode():
        torch.testing.assert_close(other(tokens()).logits, own(tokens()).logits, rtol=1e-5, atol=1e-6)


def test_zero_points_among_mixed_schemes(config: RunConfig) -> None:
    """Oracle: compressed-tensors' own decompression of each linear by the config group that names it. transformers has
    no way to read such an artifact (its general path makes room for zero points that are not packed, `dequantize`
    takes every linear for the first scheme), so the run says so."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file

    config = replace(config, budget=replace(config.budget, choices=["2g32", "3g32-asym", "4g32"]))
    record = run_pipeline(config)
    artifact = Path(record["artifact"])
    assert any(not u["scheme"]["symmetric"] for u in record["allocation"]["units"])
    assert any("cannot read" in warning for warning in record["warnings"])
    stored = load_file(artifact / "model.safetensors")
    groups = json.loads((artifact / "config.json").read_text())["quantization_config"]["config_groups"]
    own = compress.load(artifact, device="cpu", dtype=torch.float32, backend=Backend.REFERENCE)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    seen = 0
    for group in groups.values():
        for name in group["targets"]:
            parts = {key.removeprefix(name + "."): t for key, t in stored.items() if key.startswith(name + ".")}
            weight = compressor.decompress(parts, QuantizationScheme(**group))["weight"]
            x = torch.eye(weight.shape[1])
            torch.testing.assert_close(own.get_submodule(name)(x).t(), weight.float(), rtol=1e-5, atol=1e-6)
            seen += 1
    assert seen == 14


def test_bytes_of_the_budget_are_bytes_on_disk(config: RunConfig) -> None:
    """Oracle: the manifest's list of tensors."""
    config = replace(config, budget=BudgetConfig(bytes=40_000, choices=CHOICES))
    record = run_pipeline(config)
    tensors = json.loads((Path(record["artifact"]) / "manifest.json").read_text())["tensors"]
    of_quantized = [t for name, t in tensors.items() if ".weight_" in name]
    size = sum(math.prod(t["shape"]) * getattr(torch, t["dtype"]).itemsize for t in of_quantized)
    assert size == record["allocation"]["bytes"] <= 40_000


def test_budget_by_kl_takes_the_least_bytes(config: RunConfig) -> None:
    """Oracle: a looser limit costs no more bytes, and the prediction keeps the limit."""
    sizes = []
    for limit in (1e-5, 1e-3):
        run = run_pipeline(replace(config, budget=BudgetConfig(max_kl=limit, choices=CHOICES)))
        assert run["allocation"]["predicted_kl"] <= limit
        sizes.append(run["allocation"]["bytes"])
    assert sizes[0] > sizes[1]


def test_allocation_is_a_stage_of_its_own(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the bytes of the first run. A finished allocation is reused, also when the artifact is made again;
    another budget is another run directory."""
    first = run_pipeline(config)
    run_dir = Path(first["run_dir"])
    assert stages(run_dir) == ["allocate", "eval", "quantize", "verify"]
    before = hashes(run_dir / "artifact")

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("allocated again")

    with monkeypatch.context() as patch:
        patch.setattr("compress.pipeline.allocate", forbidden)
        assert run_pipeline(config)["allocation"] == first["allocation"]
        (run_dir / "artifact" / "model.safetensors").unlink()
        assert run_pipeline(config)["verified"]
    assert hashes(run_dir / "artifact") == before
    other = replace(config, budget=replace(config.budget, bits=5.0))
    marks = [quantize_mark(c, "source", CPU, torch.float32) for c in (config, other)]
    assert marks[0] != marks[1]
