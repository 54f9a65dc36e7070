"""Rounding to a grid: error bounds, observers and the formats' own library."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams as ct_calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import ConfigError, NumericalError
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

ALL_SCHEMES = [
    QuantScheme(bits, granularity, 16, symmetric)
    for bits in (2, 3, 4, 8)
    for granularity in Granularity
    for symmetric in (True, False)
]
KINDS = ("normal", "positive", "negative", "denormal", "constant", "outlier", "zeros", "large", "sparse")


def matrix(kind: str, n: int, k: int, seed: int) -> Tensor:
    """float32 [n, k] of the named kind."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    match kind:
        case "normal":
            return w
        case "positive":
            return w.abs() + 0.1
        case "negative":
            return -w.abs() - 0.1
        case "denormal":
            return w * 1e-41
        case "constant":
            return torch.full_like(w, float(w[0, 0]))
        case "outlier":
            w[0, k // 2] = 1e6
            return w
        case "zeros":
            return torch.zeros_like(w)
        case "large":
            return w * 1e37
        case "sparse":
            return w * (torch.rand(n, k, generator=generator) < 0.1)
    raise AssertionError(kind)


schemes = st.builds(
    QuantScheme,
    bits=st.sampled_from([2, 3, 4, 8]),
    granularity=st.sampled_from(list(Granularity)),
    group_size=st.sampled_from([1, 8, 16]),
    symmetric=st.booleans(),
    observer=st.just(Observer.ABSMAX),
)
shapes = st.tuples(st.integers(1, 6), st.sampled_from([16, 32, 48]))


@settings(max_examples=100, deadline=None)
@given(schemes, st.sampled_from(KINDS), shapes, st.integers(0, 2**31))
def test_error_is_at_most_half_a_step(scheme: QuantScheme, kind: str, shape: tuple[int, int], seed: int) -> None:
    """Oracle: the definition of rounding. absmax covers every weight up to half a step, so no weight is further than
    half a step from its value (1e-5 of the range for float32 arithmetic)."""
    weight = matrix(kind, *shape, seed)
    scale, zero = choose_qparams(weight, scheme)
    q = quantize(weight, scale, zero, scheme)
    assert int(q.codes.max()) <= scheme.max_code and q.codes.dtype is torch.uint8
    assert bool((scale > 0).all())
    error = group_view((dequantize(q).double() - weight.double()).abs(), scheme)
    reach = group_view(weight.double().abs(), scheme).amax(-1, keepdim=True)
    assert bool((error <= 0.5 * scale.double().unsqueeze(-1) + 1e-5 * reach).all())


@settings(max_examples=40, deadline=None)
@given(schemes, st.sampled_from(KINDS), shapes, st.integers(0, 2**31))
def test_zero_stays_zero(scheme: QuantScheme, kind: str, shape: tuple[int, int], seed: int) -> None:
    """Oracle: padding and pruned weights are exactly 0 and must come back as exactly 0."""
    weight = matrix(kind, *shape, seed)
    weight[:, ::3] = 0
    scale, zero = choose_qparams(weight, scheme)
    assert torch.count_nonzero(dequantize(quantize(weight, scale, zero, scheme))[:, ::3]) == 0


@settings(max_examples=40, deadline=None)
@given(schemes, st.sampled_from(KINDS), shapes, st.integers(0, 2**31))
def test_quantizing_twice_changes_nothing(scheme: QuantScheme, kind: str, shape: tuple[int, int], seed: int) -> None:
    """Oracle: a weight that lies on the grid already gets its own codes again, and fake_quantize is the same map."""
    weight = matrix(kind, *shape, seed)
    scale, zero = choose_qparams(weight, scheme)
    q = quantize(weight, scale, zero, scheme)
    assert torch.equal(quantize(dequantize(q), scale, zero, scheme).codes, q.codes)
    assert torch.equal(fake_quantize(weight, scale, zero, scheme), dequantize(q))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(list(Granularity)),
    st.booleans(),
    st.sampled_from(KINDS),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_mse_observer_is_never_worse_than_absmax(
    bits: int, granularity: Granularity, symmetric: bool, kind: str, weighted: bool, seed: int
) -> None:
    """Oracle: (importance-weighted) squared error of every group under absmax ranges; the search starts from them."""
    weight = matrix(kind, 4, 32, seed)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(seed)) * 10 if weighted else None
    errors = {}
    for observer in Observer:
        scheme = QuantScheme(bits, granularity, 16, symmetric, observer)
        scale, zero = choose_qparams(weight, scheme, importance)
        error = (fake_quantize(weight, scale, zero, scheme) - weight).double().square()
        error = error * importance.double() if importance is not None else error
        errors[observer] = group_view(error, scheme).sum(-1)
    # "large" weights overflow float32 when squared: their search may find nothing, but must not lose
    assert bool((errors[Observer.MSE] <= errors[Observer.ABSMAX] * (1 + 1e-5)).all())


def test_mse_observer_cuts_a_useless_outlier() -> None:
    """Oracle: at 2 bits a single outlier with importance 0 may be given up entirely; the range must shrink and the
    weighted error must fall, which shows that the importance is read along K."""
    weight = matrix("normal", 2, 32, 0)
    weight[:, 5] = 12.0
    importance = torch.ones(32)
    importance[5] = 0
    absmax = choose_qparams(weight, QuantScheme(2, Granularity.CHANNEL, observer=Observer.ABSMAX))[0]
    mse = choose_qparams(weight, QuantScheme(2, Granularity.CHANNEL, observer=Observer.MSE), importance)[0]
    assert bool((mse < 0.5 * absmax).all())


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=QuantScheme.label)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_agrees_with_compressed_tensors(scheme: QuantScheme, scale_dtype: torch.dtype) -> None:
    """Oracle: compressed-tensors' own quantize, dequantize and (in float32) range formula."""
    weight = matrix("normal", 8, 64, 3) * 0.02
    scale, zero = choose_qparams(weight, scheme, scale_dtype=scale_dtype)
    q = quantize(weight, scale, zero, scheme)
    group = scheme.granularity is Granularity.GROUP
    args = QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        symmetric=scheme.symmetric,
        strategy=scheme.granularity.value,
        group_size=scheme.group_size if group else None,
    )
    theirs = (scale.reshape(1), zero.reshape(1)) if scheme.granularity is Granularity.TENSOR else (scale, zero)
    scale_ct = theirs[0].float()
    zero_ct = theirs[1].to(torch.int8) if scheme.bits < 8 else theirs[1].to(torch.int16)
    zero_ct = (zero_ct - scheme.mid_code).to(torch.int8)
    codes_ct = ct_quantize(weight, scale_ct, zero_ct, args, dtype=torch.int8)
    assert torch.equal(codes_ct.to(torch.int16) + scheme.mid_code, q.codes.to(torch.int16))
    restored = ct_dequantize(codes_ct, scale_ct, zero_ct, args, dtype=torch.float32)
    assert torch.equal(restored, dequantize(q))
    if scale_dtype is torch.float32:
        groups = group_view(weight, scheme)
        scale_theirs, zero_theirs = ct_calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        torch.testing.assert_close(scale_theirs.reshape(scale.shape), scale, rtol=1e-6, atol=0)
        assert torch.equal(zero_theirs.reshape(zero.shape).to(torch.int16) + scheme.mid_code, zero.to(torch.int16))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_scale_is_rounded_before_codes_are_chosen(scale_dtype: torch.dtype) -> None:
    """Oracle: the scale survives a trip through its stored dtype, and with it, not with the exact one, every code is
    the nearest."""
    weight = matrix("normal", 8, 64, 4)
    scheme = QuantScheme(4, group_size=16)
    scale, zero = choose_qparams(weight, scheme, scale_dtype=scale_dtype)
    assert scale.dtype is scale_dtype
    q = quantize(weight, scale, zero, scheme)
    error = (dequantize(q) - weight).abs()
    for shift in (-1, 1):
        moved = (q.codes.int() + shift).clamp(0, scheme.max_code).to(torch.uint8)
        other = dequantize(type(q)(moved, scale, zero, scheme))
        assert bool((error <= (other - weight).abs()).all())


def test_small_float16_weights_keep_their_values() -> None:
    """Oracle: relative error of 4-bit rounding, about 0.05 of the norm for any scale: weights of 1e-4 in a float16
    checkpoint have scales below float16's smallest normal number, and must not round to 0."""
    scheme = QuantScheme(4, group_size=16)
    for size in (1.0, 1e-2, 1e-4, 3e-5):
        weight = (matrix("normal", 16, 64, 5) * size).half().float()
        scale, zero = choose_qparams(weight, scheme, scale_dtype=torch.float16)
        error = float((fake_quantize(weight, scale, zero, scheme) - weight).norm() / weight.norm())
        assert error < 0.12, size


def test_what_cannot_be_quantized_is_said() -> None:
    """Oracle: the documented errors."""
    scheme = QuantScheme(4, group_size=16)
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = matrix("normal", 2, 32, 6)
        weight[1, 7] = bad
        with pytest.raises(NumericalError, match="NaN or Inf"):
            choose_qparams(weight, scheme)
    with pytest.raises(NumericalError, match=r"does not fit torch.float16"):
        choose_qparams(matrix("normal", 2, 32, 6) * 1e7, scheme, scale_dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"group_size=128 does not divide K=96; use one of \[32\]"):
        QuantScheme(4).n_groups(96)
    with pytest.raises(ConfigError, match="use granularity=channel"):
        QuantScheme(4).n_groups(65)
    for bits in (0, 1, 5, 16):
        with pytest.raises(ConfigError, match="use 2, 3, 4 or 8"):
            QuantScheme(bits)
    with pytest.raises(ConfigError, match="at least 1"):
        QuantScheme(4, group_size=0)


def test_bits_per_weight_counts_what_is_stored() -> None:
    """Oracle: arithmetic by hand: 4 bits + 16/128 for the scale, + 4/128 for a zero point; one pair for a tensor."""
    assert QuantScheme(4).bits_per_weight(256, 512) == 4 + 16 / 128
    assert QuantScheme(4, symmetric=False).bits_per_weight(256, 512) == 4 + 20 / 128
    assert QuantScheme(8, Granularity.CHANNEL).bits_per_weight(256, 512) == 8 + 16 / 512
    assert QuantScheme(8, Granularity.TENSOR, symmetric=False).bits_per_weight(10, 10) == 8 + 24 / 100
