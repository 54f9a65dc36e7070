"""RTN, GPTQ, AWQ and input statistics as functions of tensors, each against its definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.config import AwqConfig, GptqConfig
from compress.errors import NumericalError
from compress.methods.awq import clip_ranges, scaled_fake_quantize, search_scales
from compress.methods.gptq import gptq_quantize, gptq_quantize_shared
from compress.methods.rtn import rtn_quantize
from compress.methods.stats import InputStats, output_error, relative_output_error
from compress.quant import Granularity, Observer, QuantScheme, choose_qparams, dequantize, fake_quantize

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
