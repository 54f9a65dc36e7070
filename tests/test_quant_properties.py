"""Properties of the grid that hold for any weights: hypothesis looks for the weights that break them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.quant import (
    Granularity,
    Observer,
    QuantScheme,
    choose_qparams,
    dequantize,
    fake_quantize,
    group_view,
    quantize,
)

# everything a checkpoint may hold, signed zeros and denormals included, up to where a range still fits float32
values = st.one_of(
    st.floats(-(2.0**122), 2.0**122, width=32),
    st.floats(-1.0, 1.0, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.1754944e-38, 3e-5, 65504.0, 2.0**122, -(2.0**122)]),
)
schemes = st.builds(
    QuantScheme,
    bits=st.sampled_from([2, 3, 4, 8]),
    granularity=st.sampled_from(list(Granularity)),
    group_size=st.sampled_from([1, 2, 4, 8]),
    symmetric=st.booleans(),
    observer=st.sampled_from(list(Observer)),
)
rows = st.lists(values, min_size=8, max_size=8)
weights = st.lists(rows, min_size=1, max_size=3).map(lambda m: torch.tensor(m, dtype=torch.float32))
ordinary = st.one_of(st.just(0.0), st.floats(2.0**-30, 2.0**30, width=32), st.floats(-(2.0**30), -(2.0**-30), width=32))
ordinary_weights = st.lists(ordinary, min_size=16, max_size=16).map(lambda row: torch.tensor(row).view(2, 8))
scale_dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def by_group(values: Tensor) -> Tensor:
    """[N', G] -> float64 [N', G, 1], to be combined with a `group_view`."""
    return values.double().unsqueeze(-1)


@settings(max_examples=100, deadline=None)
@given(weights, schemes, scale_dtypes)
@example(torch.full((1, 8), 1e-45), QuantScheme(2, group_size=8), torch.bfloat16)
@example(torch.tensor([[2.0**122] + [1e-45] * 7]), QuantScheme(8, group_size=8, symmetric=False), torch.float32)
def test_every_code_is_the_nearest_of_the_grid(weight: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> None:
    """Oracle: the grid itself in float64. Codes lie on it; no neighbouring code comes closer to the weight; inside the
    range the error is at most half a step, outside it the code is the end of the grid that lies on that side."""
    scale, zero = choose_qparams(weight, scheme, scale_dtype=dtype)
    assert scale.dtype is dtype and bool(torch.isfinite(scale).all() and (scale > 0).all())
    assert zero.dtype is torch.uint8 and int(zero.max()) <= scheme.max_code
    q = quantize(weight, scale, zero, scheme)
    assert q.shape == weight.shape and int(q.codes.max()) <= scheme.max_code
    exact = group_view(weight.double(), scheme)
    codes = group_view(q.codes.double(), scheme)
    step, offset = by_group(scale), by_group(zero)
    error = ((codes - offset) * step - exact).abs()
    tolerance = 1e-6 * (exact.abs() + step)  # a quotient in float32 may tie
    for move in (-1, 1):
        other = ((codes + move).clamp(0, scheme.max_code) - offset) * step
        assert bool((error <= (other - exact).abs() + tolerance).all())
    low, high = -offset * step, (scheme.max_code - offset) * step
    inside = (exact >= low) & (exact <= high)
    assert bool((error <= 0.5 * step + tolerance)[inside].all())
    assert bool((codes == 0)[exact < low - tolerance].all())
    assert bool((codes == scheme.max_code)[exact > high + tolerance].all())


@settings(max_examples=100, deadline=None)
@given(weights, schemes, scale_dtypes)
def test_a_dequantized_weight_is_a_fixed_point(weight: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> None:
    """Oracle: idempotence: weights on the grid get their own codes back, whatever observer chose it, and exact zeros
    (also negative ones) are on every grid."""
    scale, zero = choose_qparams(weight, scheme, scale_dtype=dtype)
    q = quantize(weight, scale, zero, scheme)
    restored = dequantize(q)
    assume(bool(torch.isfinite(restored).all()))  # a float32 product may overflow
    assert torch.equal(quantize(restored, scale, zero, scheme).codes, q.codes)
    assert torch.equal(fake_quantize(restored, scale, zero, scheme), restored)
    assert torch.count_nonzero(restored[weight == 0]) == 0


@settings(max_examples=60, deadline=None)
@given(ordinary_weights, schemes, st.integers(-20, 20))
def test_powers_of_two_pass_through(weight: Tensor, scheme: QuantScheme, exponent: int) -> None:
    """Oracle: floating point: multiplying all weights by a power of two is exact, so scales are multiplied and codes
    stay, where nothing underflows on the way: in the weights, their steps or the squares an observer sums."""
    factor = math.ldexp(1.0, exponent)
    scale, zero = choose_qparams(weight, scheme)
    live = group_view(weight, scheme).abs().amax(-1) > 0  # a group of zeros has the least scale there is
    scaled, zero_scaled = choose_qparams(weight * factor, scheme)
    assert torch.equal(scaled[live], scale[live] * factor) and torch.equal(zero_scaled, zero)
    codes = quantize(weight * factor, scaled, zero_scaled, scheme).codes
    assert torch.equal(codes, quantize(weight, scale, zero, scheme).codes)


@settings(max_examples=30, deadline=None)
@given(weights, schemes)
def test_groups_do_not_see_each_other(weight: Tensor, scheme: QuantScheme) -> None:
    """Oracle: every group quantized as a matrix of its own: same scale, zero and codes."""
    scale, zero = choose_qparams(weight, scheme)
    codes = group_view(quantize(weight, scale, zero, scheme).codes, scheme)
    groups = group_view(weight, scheme)
    alone = replace(scheme, granularity=Granularity.TENSOR)
    for n in range(groups.shape[0]):
        for g in range(groups.shape[1]):
            part = groups[n, g].reshape(1, -1)
            s, z = choose_qparams(part, alone)
            assert s.item() == scale[n, g].item() and z.item() == zero[n, g].item()
            assert torch.equal(quantize(part, s, z, alone).codes.flatten(), codes[n, g])


@settings(max_examples=60, deadline=None)
@given(values, schemes)
def test_constant_groups_come_back(value: float, scheme: QuantScheme) -> None:
    """Oracle: a group of one repeated value, which an asymmetric grid from 0 to that value holds to rounding of its
    scale, and a symmetric one as its largest code or within half a step of it."""
    scheme = replace(scheme, observer=Observer.ABSMAX)
    assume(value == 0 or abs(value) > 1e-35)  # below, the step is at the floor of float32
    weight = torch.full((2, 8), value)
    scale, zero = choose_qparams(weight, scheme)
    error = (dequantize(quantize(weight, scale, zero, scheme)).double() - weight.double()).abs()
    limit = 0.5 * float(scale.max()) if scheme.symmetric and value > 0 else 1e-6 * abs(value)
    if scheme.symmetric and value < 0:  # -2^bits / 2 of 2^bits - 1 halves of the step: half a step beyond it
        limit = 0.5 * float(scale.max())
    # the product of code and scale is rounded to float32, half a unit of 2^-23
    assert float(error.max()) <= limit * (1 + 1e-5) + 2**-23 * abs(value)


@settings(max_examples=40, deadline=None)
@given(weights, schemes, st.integers(0, 7), st.sampled_from([10.0, 1e3, 1e6]))
def test_an_outlier_ruins_its_own_group_only(weight: Tensor, scheme: QuantScheme, column: int, size: float) -> None:
    """Oracle: the other groups of the same matrix without the outlier."""
    scheme = replace(scheme, granularity=Granularity.GROUP)
    weight = weight.clamp(-1e30, 1e30)
    before = quantize(weight, *choose_qparams(weight, scheme), scheme)
    spoiled = weight.clone()
    spoiled[0, column] = size * (1 + weight.abs().max())
    after = quantize(spoiled, *choose_qparams(spoiled, scheme), scheme)
    others = torch.ones(group_view(weight, scheme).shape[:2], dtype=torch.bool)
    others[0, column // scheme.group_size] = False
    assert torch.equal(group_view(before.codes, scheme)[others], group_view(after.codes, scheme)[others])
    assert torch.equal(before.scale[others], after.scale[others])


@settings(max_examples=60, deadline=None)
@given(weights, st.sampled_from([2, 3, 4, 8]), st.booleans())
def test_scales_of_float16_checkpoints_are_usable(weight: Tensor, bits: int, symmetric: bool) -> None:
    """Oracle: float16's range: its scales are finite, positive and survive the trip, for all weights it can hold."""
    weight = weight.clamp(-65504, 65504).half()
    scheme = QuantScheme(bits, group_size=4, symmetric=symmetric)
    scale, zero = choose_qparams(weight, scheme, scale_dtype=torch.float16)
    assert scale.dtype is torch.float16 and bool(torch.isfinite(scale).all() and (scale > 0).all())
    assert bool(torch.isfinite(dequantize(quantize(weight, scale, zero, scheme))).all())
