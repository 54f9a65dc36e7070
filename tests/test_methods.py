"""RTN, GPTQ, AWQ and input statistics as functions of tensors, each against its definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.config_quant import AwqConfig, GptqConfig, HqqConfig
from compress.errors import NumericalError
from compress.methods.awq import clip_ranges, scaled_fake_quantize, search_scales
from compress.methods.gptq import gptq_quantize, gptq_quantize_shared
from compress.methods.hqq import hqq_quantize, lp_error, shrink
from compress.methods.quantease import refine
from compress.methods.rtn import rtn_quantize
from compress.methods.stats import CrossStats, InputStats, output_error, relative_output_error
from compress.quant import (
    Granularity,
    Observer,
    QuantizedWeight,
    QuantScheme,
    choose_qparams,
    dequantize,
    fake_quantize,
    group_view,
)

SCHEMES = [QuantScheme(b, group_size=16, symmetric=s) for b in (2, 3, 4) for s in (True, False)]


def random_weight(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def random_hessian(k: int, correlation: float, seed: int = 0, n_tokens: int = 256) -> Tensor:
    """E[x x^T] float32 [k, k] of inputs that share a common part and have channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, k, generator=generator)
    x = (1 - correlation) * x + correlation * x[:, :1]
    x = x * torch.logspace(-1, 1, k)[torch.randperm(k, generator=generator)]
    return x.t() @ x / n_tokens


RealLayers = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def real_layers() -> RealLayers:
    """Weight [N, K] and Hessian [K, K] over 1024 held-out tokens of linears in the embedded model's third block."""
    from transformers import AutoModelForCausalLM

    from compress.reference import heldout_tokens, model_path

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    layers: RealLayers = {}
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        linear = model.model.layers[2].get_submodule(name)
        stats = InputStats.empty(linear.in_features, torch.device("cpu"))
        linear.register_forward_pre_hook(lambda _, args, stats=stats: stats.update(args[0]))
        layers[name] = linear.weight.detach().clone(), stats.hessian
    with torch.no_grad():
        model.model(heldout_tokens()[:2])
    return layers


def naive_gptq(weight: Tensor, hessian: Tensor, scheme: QuantScheme, config: GptqConfig) -> Tensor:
    """Algorithm 1 of arXiv 2210.17323 for one column at a time, without batches or Cholesky factors: after column i is
    rounded, every column still open absorbs its error along row i of the inverse of H restricted to the open
    columns. float64. Returns codes uint8 [N, K]."""
    w, h = weight.double().clone(), hessian.double().clone()
    k = w.shape[1]
    scale, zero = choose_qparams(weight, scheme)
    step = scale.double().repeat_interleave(k // scale.shape[1], 1).expand_as(w)
    offset = zero.double().repeat_interleave(k // zero.shape[1], 1).expand_as(w)
    h += config.damping * h.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    order = h.diagonal().argsort(descending=True, stable=True).tolist() if config.act_order else list(range(k))
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    for position, i in enumerate(order):
        remaining = order[position:]
        inverse = torch.linalg.inv(h[remaining][:, remaining])
        q = (torch.round(w[:, i] / step[:, i]) + offset[:, i]).clamp(0, scheme.max_code)
        codes[:, i] = q.to(torch.uint8)
        error = (w[:, i] - (q - offset[:, i]) * step[:, i]) / inverse[0, 0]
        w[:, remaining] -= error.unsqueeze(1) * inverse[0].unsqueeze(0)
    return codes


# RTN


@pytest.mark.parametrize("scheme", SCHEMES, ids=QuantScheme.label)
def test_rtn_takes_the_nearest_code(scheme: QuantScheme) -> None:
    """Oracle: exhaustive search over all codes for every weight."""
    weight = random_weight(8, 32)
    q = rtn_quantize(weight, scheme)
    step = q.scale.repeat_interleave(16, 1).unsqueeze(-1)
    offset = q.zero.float().repeat_interleave(16, 1).unsqueeze(-1)
    every = (torch.arange(scheme.max_code + 1) - offset) * step  # [N, K, codes]
    least = (every - weight.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((dequantize(q) - weight).abs(), least, rtol=0, atol=1e-7)


# GPTQ


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=QuantScheme.label)
def test_gptq_with_identity_hessian_is_rtn(scheme: QuantScheme, act_order: bool) -> None:
    """Oracle: with uncorrelated inputs no column can absorb another's error, so GPTQ is RTN, bit for bit."""
    weight = random_weight(12, 64)
    for size in (1.0, 1e-30, 1e20):  # the result must not depend on the scale of H
        result = gptq_quantize(weight, torch.eye(64) * size, scheme, GptqConfig(act_order=act_order))
        rtn = rtn_quantize(weight, scheme)
        assert torch.equal(result.weight.codes, rtn.codes)
        assert torch.equal(result.weight.scale, rtn.scale) and torch.equal(result.weight.zero, rtn.zero)
        assert result.damping == 0.01 and result.damping_steps == 0 and result.n_dead == 0


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=QuantScheme.label)
@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_gptq_loses_less_than_rtn(scheme: QuantScheme, act_order: bool, correlation: float) -> None:
    """Oracle: the loss GPTQ minimises, trace(D H D^T), summed over the rows, against RTN's on the same grid."""
    weight = random_weight(48, 64, seed=1)
    hessian = random_hessian(64, correlation, seed=2)
    result = gptq_quantize(weight, hessian, scheme, GptqConfig(act_order=act_order))
    loss = output_error(result.weight.dequantize() - weight, hessian)
    loss_rtn = output_error(rtn_quantize(weight, scheme).dequantize() - weight, hessian)
    assert loss <= loss_rtn
    if correlation == 0.9:
        assert loss < 0.7 * loss_rtn


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=QuantScheme.label)
def test_gptq_matches_algorithm_1(scheme: QuantScheme, act_order: bool) -> None:
    """Oracle: `naive_gptq` in float64. A weight within float32 rounding of a boundary may fall to the other side and
    move what follows in its row, so whole rows are compared: nearly all must agree to the bit."""
    weight, hessian = random_weight(64, 48, seed=3), random_hessian(48, 0.5, seed=4)
    config = GptqConfig(act_order=act_order, block_size=16)
    codes = gptq_quantize(weight, hessian, scheme, config).weight.codes
    same = (codes == naive_gptq(weight, hessian, scheme, config)).all(1).float().mean()
    assert float(same) >= 0.95
    assert not torch.equal(codes, rtn_quantize(weight, scheme).codes)


def test_gptq_does_not_depend_on_block_size() -> None:
    """Oracle: lazy batches are a reordering of the same sums; only float32 rounding may differ."""
    weight, hessian = random_weight(64, 64, seed=5), random_hessian(64, 0.5, seed=6)
    scheme = QuantScheme(3, group_size=16)
    results = [gptq_quantize(weight, hessian, scheme, GptqConfig(block_size=b)).weight.codes for b in (1, 7, 64, 128)]
    for codes in results[1:]:
        assert float((codes == results[0]).all(1).float().mean()) >= 0.95


def test_gptq_dead_inputs_change_nothing_for_the_others() -> None:
    """Oracle: GPTQ on the matrix without its dead columns. Their weights become 0; the live codes are the same, also
    when live inputs are tiny (a dead input must not inflate the damping)."""
    live = torch.ones(64, dtype=torch.bool)
    live[[0, 13, 14, 63]] = False
    weight = random_weight(32, 64, seed=7)
    hessian = torch.zeros(64, 64)
    small = random_hessian(60, 0.9, seed=8) * 1e-6
    hessian[live.outer(live)] = small.flatten()
    config = GptqConfig()
    for symmetric in (True, False):
        scheme = QuantScheme(4, Granularity.CHANNEL, symmetric=symmetric)
        result = gptq_quantize(weight, hessian, scheme, config)
        assert result.n_dead == 4
        assert torch.count_nonzero(result.weight.dequantize()[:, ~live]) == 0
        alone = gptq_quantize(weight[:, live].contiguous(), small, scheme, config)
        assert torch.equal(result.weight.codes[:, live], alone.weight.codes)
    everything_dead = gptq_quantize(weight, torch.zeros(64, 64), QuantScheme(4, group_size=16), config)
    assert everything_dead.n_dead == 64 and torch.count_nonzero(everything_dead.weight.dequantize()) == 0


def test_gptq_counts_raised_damping() -> None:
    """Oracle: eigenvalues by hand. H has mean diagonal 1 and least eigenvalue -0.5, so damping d works if and only if
    d > 0.5: of 0.01, 0.1, 1 the third, two raises."""
    v = torch.full((16, 1), 0.25)  # a unit vector
    hessian = torch.eye(16) - 1.5 * (v @ v.t())
    hessian = hessian / hessian.diagonal().mean()
    least = float(torch.linalg.eigvalsh(hessian)[0])
    assert -1 < least < -0.1
    result = gptq_quantize(random_weight(4, 16), hessian, QuantScheme(4, group_size=16), GptqConfig())
    assert result.damping == pytest.approx(1.0) and result.damping_steps == 2


def test_gptq_stops_rather_than_turning_into_rtn() -> None:
    """Oracle: the documented errors, for matrices that no permitted damping makes positive definite."""
    scheme = QuantScheme(4, group_size=16)
    weight = random_weight(4, 16)
    with pytest.raises(NumericalError, match="even with damping 100 x"):
        gptq_quantize(weight, torch.full((16, 16), 1000.0).fill_diagonal_(1.0), scheme, GptqConfig())
    with pytest.raises(NumericalError, match="negative diagonal"):
        gptq_quantize(weight, -torch.eye(16), scheme, GptqConfig())
    with pytest.raises(NumericalError, match=r"even with damping 0.01 x.*raise gptq.damping"):
        gptq_quantize(weight, torch.eye(16) - 0.2, scheme, GptqConfig(max_damping_steps=0))
    for bad in (float("nan"), float("inf")):
        hessian = torch.eye(16)
        hessian[2, 3] = bad
        with pytest.raises(NumericalError, match="activations overflowed"):
            gptq_quantize(weight, hessian, scheme, GptqConfig())
    with pytest.raises(NumericalError, match="weight holds NaN"):
        gptq_quantize(weight * float("nan"), torch.eye(16), scheme, GptqConfig())


@pytest.mark.parametrize("granularity", list(Granularity))
def test_gptq_of_linears_that_share_an_input_is_gptq_of_each(granularity: Granularity) -> None:
    """Oracle: separate calls. Rows do not see each other, but a scale for each tensor must not become one for all."""
    weights = [random_weight(24, 32, seed=i) * (i + 1) for i in range(3)]
    hessian = random_hessian(32, 0.5, seed=14)
    scheme = QuantScheme(4, granularity, 16, symmetric=False)
    together = gptq_quantize_shared(weights, hessian, scheme, GptqConfig())
    for weight, result in zip(weights, together, strict=True):
        alone = gptq_quantize(weight, hessian, scheme, GptqConfig()).weight
        assert torch.equal(result.weight.scale, alone.scale) and torch.equal(result.weight.zero, alone.zero)
        assert float((result.weight.codes == alone.codes).all(1).float().mean()) >= 0.95


def test_gptq_leaves_its_arguments_alone_and_rounds_scales_to_their_dtype() -> None:
    """Oracle: copies made before; the scale's dtype is the one asked for."""
    weight, hessian = random_weight(8, 32), random_hessian(32, 0.5)
    before = weight.clone(), hessian.clone()
    result = gptq_quantize(weight, hessian, QuantScheme(4, group_size=16), GptqConfig(), torch.bfloat16)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
    assert result.weight.scale.dtype is torch.bfloat16


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("linear", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_gptq_loses_less_than_rtn_on_a_real_model(linear: str, act_order: bool, real_layers: RealLayers) -> None:
    """Oracle: trace(D H D^T) with the inputs that a trained model's own linears read, for both kinds of range."""
    weight, hessian = real_layers[linear]
    for observer in Observer:
        for bits in (3, 4):
            scheme = QuantScheme(bits, group_size=128, observer=observer)
            result = gptq_quantize(weight, hessian, scheme, GptqConfig(act_order=act_order))
            rtn = rtn_quantize(weight, scheme, hessian.diagonal())
            loss = output_error(result.weight.dequantize() - weight, hessian)
            assert loss < 0.7 * output_error(rtn.dequantize() - weight, hessian)


# GPTQ with asymmetric calibration


def drifting_inputs(k: int, n_tokens: int, drift: float, seed: int) -> tuple[Tensor, Tensor]:
    """float64 [M, K]: correlated inputs of a quantized model, and of the original, which differ by a linear map of
    them (what calibration can see) and noise (what it cannot)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, k, generator=generator, dtype=torch.float64)
    x = 0.5 * x + 0.5 * x[:, :1]
    mixing = torch.randn(k, k, generator=generator, dtype=torch.float64) / k**0.5
    return x + drift * (x @ mixing + 0.3 * torch.randn(n_tokens, k, generator=generator, dtype=torch.float64)), x


def drift_stats(original: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Hessian and cross statistic, float32 [K, K]."""
    stats, cross = InputStats.empty(x.shape[1], torch.device("cpu")), CrossStats.empty(x.shape[1], torch.device("cpu"))
    for a, b in zip(original.split(50), x.split(50), strict=True):
        stats.update(b)
        cross.update(a, b)
    return stats.hessian, cross.cross


def test_cross_statistics_do_not_depend_on_batches() -> None:
    """Oracle: one product over all rows in float64; a copy of the statistics holds its own."""
    original, x = drifting_inputs(24, 170, 0.1, seed=20)
    _, cross = drift_stats(original, x)
    torch.testing.assert_close(cross.double(), (original - x).t() @ x / 170, rtol=1e-4, atol=1e-6)
    stats = InputStats.empty(24, torch.device("cpu"))
    stats.drift = CrossStats.empty(24, torch.device("cpu"))
    stats.drift.update(original.view(2, 85, 24), x.view(2, 85, 24))
    copy = stats.clone()
    assert copy.drift is not None and copy.drift.n_tokens == 170
    copy.drift.update(original * 2, x)
    assert stats.drift.n_tokens == 170 and not torch.equal(copy.drift.cross, stats.drift.cross)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptaq_without_drift_is_gptq(act_order: bool) -> None:
    """Oracle: GPTQ itself, bit for bit, for a cross statistic of zeros and for strength 0."""
    weight, hessian = random_weight(24, 64, seed=21), random_hessian(64, 0.5, seed=22)
    scheme = QuantScheme(4, group_size=16, symmetric=False)
    plain = gptq_quantize(weight, hessian, scheme, GptqConfig(act_order=act_order))
    cross = random_weight(64, 64, seed=23)
    for strength, statistic in ((1.0, torch.zeros(64, 64)), (0.0, cross)):
        config = GptqConfig(act_order=act_order, gptaq=True, gptaq_strength=strength)
        result = gptq_quantize(weight, hessian, scheme, config, cross=statistic)
        assert torch.equal(result.weight.codes, plain.weight.codes)
        assert torch.equal(result.weight.scale, plain.weight.scale)
        assert result.moved == 0.0 and plain.moved is None


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_gptaq_rounds_the_weight_that_fits_the_original_outputs(act_order: bool, strength: float) -> None:
    """Oracle: ridge regression in float64 on the tokens themselves: the minimum over real-valued Q of
    mean ||Q x - W y||^2 + damping ||Q - W||^2 by least squares over stacked rows. At 8 bits what GPTQ returns must lie
    within rounding of it, and plain GPTQ must not."""
    original, x = drifting_inputs(32, 400, 0.2, seed=24)
    weight = random_weight(16, 32, seed=25)
    hessian, cross = drift_stats(original, x)
    config = GptqConfig(act_order=act_order, gptaq_strength=strength)
    damping = config.damping * float(hessian.diagonal().mean())
    target = (x + strength * (original - x)) @ weight.double().t()
    rows = torch.cat([x / 400**0.5, damping**0.5 * torch.eye(32, dtype=torch.float64)])
    values = torch.cat([target / 400**0.5, damping**0.5 * weight.double().t()])
    best = torch.linalg.lstsq(rows, values).solution.t()
    scheme = QuantScheme(8, group_size=16)
    result = gptq_quantize(weight, hessian, scheme, config, cross=cross)
    moved = (best - weight.double()).norm()
    assert result.moved == pytest.approx(float(moved / weight.double().norm()), rel=1e-3)
    assert (result.weight.dequantize().double() - best).norm() < 0.1 * moved
    assert (gptq_quantize(weight, hessian, scheme, config).weight.dequantize().double() - best).norm() > 0.9 * moved


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=QuantScheme.label)
def test_gptaq_comes_closer_to_the_original_outputs_than_gptq(scheme: QuantScheme, act_order: bool) -> None:
    """Oracle: the outputs themselves, mean over tokens of ||Q x - W x_original||^2, on the calibration tokens and on
    others of the same kind; the sum over several matrices."""
    losses = {False: [0.0, 0.0], True: [0.0, 0.0]}
    for seed in range(30, 34):
        original, x = drifting_inputs(32, 1200, 0.3, seed)
        weight = random_weight(32, 32, seed)
        hessian, cross = drift_stats(original[:800], x[:800])
        for gptaq in (False, True):
            config = GptqConfig(act_order=act_order, gptaq_strength=1.0)
            result = gptq_quantize(weight, hessian, scheme, config, cross=cross if gptaq else None)
            error = x @ result.weight.dequantize().double().t() - original @ weight.double().t()
            losses[gptaq][0] += float(error[:800].square().mean())
            losses[gptaq][1] += float(error[800:].square().mean())
    assert losses[True][0] < losses[False][0] and losses[True][1] < losses[False][1]


def test_gptaq_leaves_dead_inputs_dead_and_refuses_nonsense() -> None:
    """Oracle: an input that is always 0 in the quantized model gets weight 0, however it was in the original: its part
    of the output moves to the live ones. NaN in the cross statistic is the documented error."""
    original, x = drifting_inputs(32, 400, 0.2, seed=26)
    x[:, 5] = 0
    weight = random_weight(16, 32, seed=27)
    hessian, cross = drift_stats(original, x)
    scheme, config = QuantScheme(8, group_size=16), GptqConfig(gptaq_strength=1.0)
    result = gptq_quantize(weight, hessian, scheme, config, cross=cross)
    assert result.n_dead == 1 and torch.count_nonzero(result.weight.dequantize()[:, 5]) == 0

    def loss(q: Tensor) -> float:
        return float((x @ q.double().t() - original @ weight.double().t()).square().mean())

    plain = gptq_quantize(weight, hessian, scheme, config)
    assert loss(result.weight.dequantize()) < 0.5 * loss(plain.weight.dequantize())
    cross[3, 4] = float("nan")
    with pytest.raises(NumericalError, match="cross statistic holds NaN or Inf"):
        gptq_quantize(weight, hessian, scheme, config, cross=cross)


# refinement


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("symmetric", [True, False])
def test_refinement_never_raises_the_loss(granularity: Granularity, symmetric: bool) -> None:
    """Oracle: trace(D H D^T) of every row (of the whole matrix where it shares one scale) in float64, before and after,
    from GPTQ's codes and from nearest ones; scales stay in their dtype, codes in range, zero points as they are."""
    weight, hessian = random_weight(24, 64, seed=40), random_hessian(64, 0.5, seed=41)
    scheme = QuantScheme(3, granularity, 16, symmetric)
    for start in (
        rtn_quantize(weight, scheme, scale_dtype=torch.bfloat16),
        gptq_quantize(weight, hessian, scheme, GptqConfig(), torch.bfloat16).weight,
    ):
        q = start
        for block_size in (7, 128, 64):
            better = refine(weight, hessian, q, 1, block_size)
            losses = []
            for candidate in (q, better):
                d = (dequantize(candidate) - weight).double()
                losses.append(((d @ hessian.double()) * d).sum(1))
            if granularity is Granularity.TENSOR:
                losses = [loss.sum() for loss in losses]
            assert bool((losses[1] <= losses[0] * (1 + 1e-5)).all())
            assert torch.equal(better.zero, start.zero) and better.scale.dtype is torch.bfloat16
            assert bool((better.scale > 0).all()) and int(better.codes.max()) <= scheme.max_code
            q = better
        assert output_error(dequantize(q) - weight, hessian) < 0.97 * output_error(dequantize(start) - weight, hessian)


def test_refined_codes_are_a_coordinate_minimum() -> None:
    """Oracle: every code of every row moved by one step either way, in float64: none is better once sweeps with fixed
    scales have settled (a weight of scales that cannot be improved: those of the least-squares fit)."""
    weight, hessian = random_weight(6, 32, seed=42), random_hessian(32, 0.5, seed=43)
    scheme = QuantScheme(3, group_size=16)
    q = refine(weight, hessian, rtn_quantize(weight, scheme), 30, 16)
    d = (dequantize(q) - weight).double()
    gradient, diagonal = d @ hessian.double(), hessian.double().diagonal()
    step = q.scale.double().repeat_interleave(16, 1)
    for move in (-1, 1):
        allowed = (q.codes.int() + move >= 0) & (q.codes.int() + move <= scheme.max_code)
        change = 2 * move * step * gradient + step.square() * diagonal
        assert bool((change[allowed] >= -1e-6 * (step.square() * diagonal)[allowed]).all())


def test_refinement_fits_scales_by_least_squares() -> None:
    """Oracle: numpy's least squares on the tokens themselves: with all codes right, the scales that made the weight are
    found again from scales that are 10 % off, and the codes stay."""
    generator = torch.Generator().manual_seed(44)
    scheme = QuantScheme(4, group_size=16)
    codes = torch.randint(0, 16, (8, 32), generator=generator).to(torch.uint8)
    scale = 0.01 + 0.01 * torch.rand(8, 2, generator=generator)
    truth = QuantizedWeight(codes, scale, torch.full((8, 2), 8, dtype=torch.uint8), scheme)
    start = QuantizedWeight(codes, scale * 1.1, truth.zero, scheme)
    q = refine(dequantize(truth), random_hessian(32, 0.5, seed=45), start, 1, 128)
    torch.testing.assert_close(q.scale, scale, rtol=1e-4, atol=0)
    assert torch.equal(q.codes, codes)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_refines_in_its_own_objective(act_order: bool) -> None:
    """Oracle: the damped loss around the weight it rounds, W itself or, with a cross statistic, the ridge solution W*
    computed here in float64; also where an input is dead."""
    original, x = drifting_inputs(64, 400, 0.2, seed=46)
    x[:, 7] = 0
    weight = random_weight(24, 64, seed=47)
    hessian, cross = drift_stats(original, x)
    damped = hessian.double() + 0.01 * hessian.diagonal()[hessian.diagonal() > 0].double().mean() * torch.eye(64)
    scheme = QuantScheme(4, group_size=16)
    for statistic in (None, cross):
        target = weight.double()
        if statistic is not None:
            target = target + 0.5 * torch.linalg.solve(damped, (target @ statistic.double()).t()).t()
        target[:, 7] = 0
        losses = []
        for rounds in (0, 2):
            config = GptqConfig(act_order=act_order, refine_rounds=rounds)
            result = gptq_quantize(weight, hessian, scheme, config, cross=statistic)
            d = result.weight.dequantize().double() - target
            losses.append(float(((d @ damped) * d).sum()))
            assert torch.count_nonzero(result.weight.dequantize()[:, 7]) == 0
        assert losses[1] < 0.98 * losses[0]


# HQQ


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(list(Granularity)),
    st.booleans(),
    st.sampled_from([0.5, 0.7, 1.0]),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e20]),
    st.integers(0, 2**31),
)
def test_hqq_never_loses_to_rtn_by_its_own_objective(
    bits: int, granularity: Granularity, symmetric: bool, p: float, size: float, seed: int
) -> None:
    """Oracle: sum |w - Q(w)|^p of every group in float64, recomputed from the codes, against round to nearest."""
    weight = random_weight(6, 32, seed)
    weight[0, 3], weight[1, :16] = 1.0, 0.0
    weight = weight * size
    scheme = QuantScheme(bits, granularity, 16, symmetric)
    losses = []
    for q in (hqq_quantize(weight, scheme, HqqConfig(lp_norm=p)), rtn_quantize(weight, scheme)):
        assert bool(torch.isfinite(q.scale).all() and (q.scale > 0).all()) and int(q.codes.max()) <= scheme.max_code
        losses.append(group_view((dequantize(q) - weight).double().abs().pow(p), scheme).sum(-1))
    assert bool((losses[0] <= losses[1] * (1 + 1e-4)).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_lowers_the_lp_error(symmetric: bool) -> None:
    """Oracle: lp error of round to nearest on Gaussian weights, in the scale's stored dtype; codes are the nearest for
    the grid that was found, and a symmetric grid keeps its zero point."""
    weight = random_weight(64, 256, seed=28)
    scheme = QuantScheme(3, group_size=64, symmetric=symmetric)
    q, rtn = hqq_quantize(weight, scheme, HqqConfig(), torch.bfloat16), rtn_quantize(weight, scheme)
    groups = group_view(weight, scheme)
    total = float(lp_error(groups, q.scale, q.zero, scheme, 0.7).sum())
    assert total < 0.97 * float(lp_error(groups, rtn.scale, rtn.zero, scheme, 0.7).sum())
    assert total == pytest.approx(float((dequantize(q) - weight).abs().pow(0.7).sum()), rel=1e-4)
    assert q.scale.dtype is torch.bfloat16
    assert not symmetric or bool((q.zero == scheme.mid_code).all())
    assert torch.equal(q.codes, rtn_quantize_with(weight, q.scale, q.zero, scheme))


def rtn_quantize_with(weight: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme) -> Tensor:
    step = scale.float().repeat_interleave(scheme.group_size, 1)
    offset = zero.float().repeat_interleave(scheme.group_size, 1)
    return (torch.round(weight / step) + offset).clamp(0, scheme.max_code).to(torch.uint8)


def test_hqq_shrinkage_is_the_published_operator() -> None:
    """Oracle: sign(x) max(|x| - |x|^(p-1) / beta, 0) written out for single numbers, and soft thresholding at p = 1."""
    x = torch.tensor([-2.0, -0.3, -1e-3, 0.0, 1e-6, 0.2, 1.0, 5.0])
    for beta, p in ((10.0, 0.7), (2.0, 0.5)):
        expected = []
        for value in x.tolist():
            size = abs(value)
            kept = max(size - size ** (p - 1) / beta, 0.0) if size > 0 else 0.0
            expected.append(kept if value > 0 else -kept)
        torch.testing.assert_close(shrink(x, beta, p), torch.tensor(expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(shrink(x, 4.0, 1.0), torch.nn.functional.softshrink(x, 0.25))


def test_hqq_refuses_what_no_grid_holds() -> None:
    """Oracle: the documented error."""
    weight = random_weight(4, 32)
    weight[2, 2] = float("nan")
    with pytest.raises(NumericalError, match="NaN or Inf"):
        hqq_quantize(weight, QuantScheme(4, group_size=16), HqqConfig())


# AWQ


def group_loss(
    weights: list[Tensor], hessian: Tensor, channel_map: Tensor, scheme: QuantScheme
) -> Callable[..., float]:
    def loss_of(scales: Tensor) -> float:
        return sum(output_error(scaled_fake_quantize(w, scales[channel_map], scheme) - w, hessian) for w in weights)

    return loss_of


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SCHEMES), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_awq_search_never_loses_to_identity(scheme: QuantScheme, seed: int, duo: bool, grouped_query: bool) -> None:
    """Oracle: the loss recomputed from the winning scales, against the loss of scales 1, which are in the grid."""
    weights = [random_weight(8, 32, seed), random_weight(4, 32, seed + 1)]
    hessian = random_hessian(32, 0.3, seed)
    channel_map = torch.arange(32) % 16 if grouped_query else torch.arange(32)
    loss_of = group_loss(weights, hessian, channel_map, scheme)
    found = search_scales(
        weights, hessian.diagonal().sqrt(), channel_map, scheme, AwqConfig(n_grid=5, duo_scaling=duo), loss_of
    )
    n_producer = 16 if grouped_query else 32
    assert found.scales.shape == (n_producer,) and bool((found.scales > 0).all())
    assert found.loss == loss_of(found.scales) and found.identity_loss == loss_of(torch.ones(n_producer))
    assert found.loss <= found.identity_loss


def test_awq_protects_channels_with_large_inputs() -> None:
    """Oracle: the paper's finding (section 3.1): with a few inputs 50 times as large, scaling cuts the output error of
    3-bit rounding by far, and those inputs get the largest scales."""
    weight = random_weight(64, 128, seed=9)
    size = torch.ones(128)
    size[[3, 77, 100]] = 50.0
    hessian = torch.diag(size.square())
    scheme = QuantScheme(3, group_size=32)
    identity_map = torch.arange(128)
    loss_of = group_loss([weight], hessian, identity_map, scheme)
    found = search_scales([weight], size, identity_map, scheme, AwqConfig(), loss_of)
    assert found.loss < 0.6 * found.identity_loss
    assert sorted(found.scales.topk(3).indices.tolist()) == [3, 77, 100]


def test_awq_survives_dead_channels_and_refuses_nonsense() -> None:
    """Oracle: scales stay finite and positive where an input is always 0; a loss that is not finite is an error."""
    weight = random_weight(8, 32)
    absmean = torch.rand(32)
    absmean[[0, 5]] = 0
    hessian = torch.diag(absmean.square())
    scheme, identity_map = QuantScheme(3, group_size=16), torch.arange(32)
    seen: list[Tensor] = []
    loss_of = group_loss([weight], hessian, identity_map, scheme)
    search_scales([weight], absmean, identity_map, scheme, AwqConfig(), lambda s: seen.append(s) or loss_of(s))
    assert 10 < len(seen) < 30  # the identity and both families, coarse to fine instead of all 41 candidates
    assert all(bool(torch.isfinite(s).all() and (s > 0).all()) for s in seen)
    with pytest.raises(NumericalError, match="not finite even unscaled"):
        search_scales([weight], absmean, identity_map, scheme, AwqConfig(), lambda _: float("nan"))


def test_awq_ignores_candidates_whose_loss_is_nan() -> None:
    """Oracle: identity wins when every other loss is NaN."""
    weight, identity_map = random_weight(8, 32), torch.arange(32)
    found = search_scales(
        [weight], torch.rand(32) + 0.1, identity_map, QuantScheme(4, group_size=16), AwqConfig(),
        lambda s: 1.0 if bool((s == 1).all()) else float("nan"),
    )  # fmt: skip
    assert found.label == "identity" and found.loss == 1.0


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_never_raises_a_groups_own_error(granularity: Granularity, symmetric: bool) -> None:
    """Oracle: for a block-diagonal Hessian the loss is the sum of the groups' losses, so the total may only fall."""
    weight = random_weight(16, 64, seed=10)
    weight[3, 10] = 1.0
    scheme = QuantScheme(3, granularity, 16, symmetric)
    size = 16 if granularity is Granularity.GROUP else 64
    hessian = torch.block_diag(*[random_hessian(size, 0.3, seed=i) for i in range(64 // size)])
    scale, zero = clip_ranges(weight, hessian, scheme, AwqConfig(), torch.float32)
    plain = choose_qparams(weight, scheme)
    clipped = output_error(fake_quantize(weight, scale, zero, scheme) - weight, hessian)
    assert clipped < output_error(fake_quantize(weight, *plain, scheme) - weight, hessian)
    assert scale.shape == plain[0].shape and bool((scale <= plain[0] * (1 + 1e-6)).all())


# statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_do_not_depend_on_batches(dtype: torch.dtype) -> None:
    """Oracle: one product over all rows in float64."""
    x = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(11)).to(dtype)
    stats = InputStats.empty(24, torch.device("cpu"))
    for batch in x:
        stats.update(batch)
    rows = x.reshape(-1, 24).double()
    assert stats.n_tokens == 35
    torch.testing.assert_close(stats.hessian.double(), rows.t() @ rows / 35, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.absmean.double(), rows.abs().mean(0), rtol=1e-6, atol=0)
    assert torch.equal(stats.importance, stats.hessian.diagonal())
    copy = stats.clone()
    copy.update(x[0])
    assert stats.n_tokens == 35 and not torch.equal(copy.hessian, stats.hessian)


def test_output_error_is_the_error_of_the_outputs() -> None:
    """Oracle: the outputs themselves: mean over tokens of ||D x||^2."""
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(12))
    stats = InputStats.empty(24, torch.device("cpu"))
    stats.update(x)
    weight = random_weight(8, 24)
    quantized = rtn_quantize(weight, QuantScheme(3, group_size=8)).dequantize()
    direct = float(((quantized - weight) @ x.t()).square().sum(0).mean())
    assert output_error(quantized - weight, stats.hessian) == pytest.approx(direct, rel=1e-4)
    relative = direct / float((weight @ x.t()).square().sum(0).mean())
    assert relative_output_error(quantized, weight, stats.hessian) == pytest.approx(relative, rel=1e-4)
    assert relative_output_error(quantized, torch.zeros_like(weight), stats.hessian) == 0.0


def test_rtn_reads_importance_along_the_inputs() -> None:
    """Oracle: the output error under a diagonal Hessian, which is what the importance stands for."""
    weight, size = random_weight(32, 64, seed=13), torch.logspace(-2, 1, 64)
    hessian = torch.diag(size.square())
    scheme = QuantScheme(3, group_size=16, observer=Observer.MSE)
    plain = output_error(rtn_quantize(weight, scheme).dequantize() - weight, hessian)
    aware = output_error(rtn_quantize(weight, scheme, size.square()).dequantize() - weight, hessian)
    assert aware < plain
