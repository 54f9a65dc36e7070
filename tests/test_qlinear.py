"""QuantLinear: every width, granularity and backend against the dense dequantized matmul in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compress.errors import ConfigError, EnvironmentProblem
from compress.kernels import planar
from compress.kernels.reference import relative_error
from compress.qlinear import (
    CPU_INT4_MAX_TOKENS,
    Backend,
    Form,
    QuantLinear,
    backend_problem,
    choose_backend,
    triton_max_tokens,
)
from compress.quant import Granularity, QuantizedWeight, QuantScheme, choose_qparams, quantize

BOUND = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def quantized(n=48, k=256, bits=4, granularity=Granularity.GROUP, symmetric=True, group=128, scale_dtype=torch.float32):
    scheme = QuantScheme(bits, granularity, group, symmetric)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k + bits)) * 0.02
    return quantize(weight, *choose_qparams(weight, scheme, scale_dtype=scale_dtype), scheme)


def expected(q: QuantizedWeight, x, bias=None):
    y = x.double() @ q.dequantize(torch.float64).t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("granularity", list(Granularity), ids=lambda g: g.value)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_scheme_and_backend_equals_the_dense_matmul(bits, granularity, symmetric):
    """Oracle: x @ dequantize(q)^T in float64, for each backend that accepts the scheme on a CPU, few and many rows."""
    q = quantized(bits=bits, granularity=granularity, symmetric=symmetric)
    bias = torch.randn(48)
    for dtype, bound in BOUND.items():
        for backend in (Backend.AUTO, Backend.REFERENCE, Backend.DEQUANT, Backend.CPU_INT4):
            if backend_problem(backend, "cpu", dtype, q.scheme, 48, 256):
                with pytest.raises(ConfigError, match="cannot run"):
                    QuantLinear.from_quantized(q, bias, backend, dtype)
                continue
            layer = QuantLinear.from_quantized(q, bias, backend, dtype)
            for m in (1, CPU_INT4_MAX_TOKENS + 1):
                x = torch.randn(m, 256).to(dtype)
                y = layer(x)
                assert y.dtype is dtype and y.shape == (m, 48)
                assert relative_error(y, expected(q, x, bias)) < bound, (backend, dtype, m)


@pytest.mark.parametrize("backend", [Backend.AUTO, Backend.DEQUANT, Backend.REFERENCE])
@pytest.mark.parametrize(("n", "k", "group"), [(5, 30, 10), (1, 7, 7), (33, 96, 96), (7, 40, 8)])
def test_ragged_shapes_fall_to_paths_that_take_them(backend, n, k, group):
    """Oracle: float64 dense matmul, at N and K that no packed kernel accepts."""
    for bits in (2, 3, 4, 8):
        q = quantized(n, k, bits, group=group, symmetric=False)
        x = torch.randn(2, 3, k)
        y = QuantLinear.from_quantized(q, backend=backend)(x)
        assert y.shape == (2, 3, n)
        assert relative_error(y.view(6, n), expected(q, x.view(6, k))) < 2e-6


def test_rows_in_chunks_equal_rows_at_once(monkeypatch):
    """Oracle: float64 dense matmul, with chunks that do not divide N, in both forms that are chunked."""
    monkeypatch.setitem(planar.CHUNK_ELEMENTS, "cpu", 5 * 256)
    q = quantized(208, 256, symmetric=False)
    bias = torch.randn(208)
    x = torch.randn(3, 256)
    assert relative_error(QuantLinear.from_quantized(q, bias)(x), expected(q, x, bias)) < 2e-6
    big = torch.randn(CPU_INT4_MAX_TOKENS + 1, 256).bfloat16()
    layer = QuantLinear.from_quantized(q, bias, dtype=torch.bfloat16)
    assert layer.backend_for(len(big)) is Backend.DEQUANT and layer.form is Form.INT4
    assert relative_error(layer(big), expected(q, big, bias)) < 5e-3


def test_auto_is_the_documented_function():
    """Oracle: the rule in the module docstring, line by line."""
    w4 = QuantScheme()
    shape = (4096, 4096)
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    assert choose_backend("cuda", fp16, w4, shape, 1) is Backend.TRITON
    assert choose_backend("cuda", bf16, w4, shape, triton_max_tokens(4)) is Backend.TRITON
    assert choose_backend("cuda", bf16, w4, shape, triton_max_tokens(4) + 1) is Backend.DEQUANT
    assert choose_backend("cuda", fp32, w4, shape, 1) is Backend.DEQUANT
    for bits in (2, 3, 8):
        other = QuantScheme(bits=bits)
        assert choose_backend("cuda", fp16, other, shape, triton_max_tokens(bits)) is Backend.TRITON
        assert choose_backend("cuda", fp16, other, shape, triton_max_tokens(bits) + 1) is Backend.DEQUANT
    assert choose_backend("cuda", fp16, QuantScheme(group_size=16), shape, 1) is Backend.DEQUANT
    assert choose_backend("cpu", bf16, w4, shape, CPU_INT4_MAX_TOKENS) is Backend.CPU_INT4
    assert choose_backend("cpu", bf16, w4, shape, CPU_INT4_MAX_TOKENS + 1) is Backend.DEQUANT
    assert choose_backend("cpu", fp32, w4, shape, 1) is Backend.DEQUANT
    assert choose_backend("cpu", bf16, w4, (4090, 4096), 1) is Backend.DEQUANT
    assert choose_backend("mps", fp16, w4, shape, 1) is Backend.DEQUANT


def test_only_one_packed_form_is_held():
    """Oracle: bytes counted by hand: codes at their width, scales and zeros, nothing more, in every form."""
    for bits, per_row in ((2, 64), (3, 96), (4, 128), (8, 256)):
        layer = QuantLinear.from_quantized(quantized(64, 256, bits))
        layer.prepare()
        assert layer.form is Form.PLANAR and layer.weight_bytes == 64 * per_row + 64 * 2 * (4 + 1)
    layer = QuantLinear.from_quantized(quantized(64, 256), dtype=torch.bfloat16)
    layer(torch.randn(1, 256).bfloat16())
    assert layer.form is Form.INT4 and layer.weight_bytes == 64 * 128 + 64 * 2 * 2 * 2
    held = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert held == layer.weight_bytes


def test_describe_says_which_path_runs():
    """Oracle: the path names of backend_for."""
    layer = QuantLinear.from_quantized(quantized(), dtype=torch.bfloat16)
    assert f"cpu_int4 up to {CPU_INT4_MAX_TOKENS} rows, dequant above" in layer.describe()
    assert "w4g128 sym 48x256" in layer.describe()
    assert QuantLinear.from_quantized(quantized()).describe().endswith("cpu: dequant")


def test_dtype_casts_leave_the_weight_alone():
    """Oracle: bit-equal outputs before and after `.to(bfloat16)` and `.half()` on the module."""
    q = quantized(symmetric=False)
    layer = QuantLinear.from_quantized(q, torch.randn(48))
    x = torch.randn(2, 256)
    before = layer(x)
    model = nn.Sequential(layer).to(torch.bfloat16).half()
    assert torch.equal(model(x), before)
    assert layer.scale.dtype is torch.float32


def test_moving_devices_works_before_the_first_use_only():
    """Oracle: buffers on the new device before; ConfigError that says what to do after."""
    layer = QuantLinear.from_quantized(quantized())
    assert copy.deepcopy(layer).to("meta").codes.device.type == "meta"
    layer(torch.randn(1, 256))
    layer.to("cpu")
    with pytest.raises(ConfigError, match="before its first forward"):
        layer.to("meta")


def test_named_backends_never_fall_back():
    """Oracle: an error that names the backend and the reason."""
    with pytest.raises(ConfigError, match="4-bit weights, not 8"):
        QuantLinear.from_quantized(quantized(bits=8), backend=Backend.CPU_INT4, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="8-bit weights, not 4"):
        QuantLinear.from_quantized(quantized(), backend=Backend.W8A8, dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"not torch\.float32"):
        QuantLinear.from_quantized(quantized(), backend=Backend.TRITON)
    with pytest.raises(ConfigError, match="multiple of 16, not 33"):
        QuantLinear.from_quantized(quantized(33), backend=Backend.CPU_INT4)


def test_named_triton_on_a_cpu_raises(monkeypatch):
    """Oracle: EnvironmentProblem at the first forward, not a slower result."""
    from compress.kernels import common

    monkeypatch.setattr(common, "device_problem", lambda device: "no GPU here")
    layer = QuantLinear.from_quantized(quantized(), backend=Backend.TRITON, dtype=torch.float16)
    with pytest.raises(EnvironmentProblem, match="backend=triton cannot run on cpu: no GPU here"):
        layer(torch.randn(1, 256).half())


def test_broken_inputs_are_named():
    """Oracle: ConfigError with the value and the rule."""
    q = quantized()
    with pytest.raises(ConfigError, match="must both be"):
        QuantLinear.from_quantized(QuantizedWeight(q.codes, q.scale[:, :1], q.zero, q.scheme))
    with pytest.raises(ConfigError, match="bias"):
        QuantLinear.from_quantized(q, torch.zeros(3))
    layer = QuantLinear.from_quantized(q, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="K=256"):
        layer(torch.randn(2, 8).bfloat16())
    with pytest.raises(ConfigError, match="built for"):
        layer(torch.randn(2, 256))


def test_no_rows_and_dense_weight():
    """Oracle: shape [0, N], and the dequantized weight."""
    q = quantized(symmetric=False)
    for dtype in BOUND:
        layer = QuantLinear.from_quantized(q, dtype=dtype)
        assert layer(torch.randn(0, 256).to(dtype)).shape == (0, 48)
        assert relative_error(layer.dense_weight(torch.float32), q.dequantize()) < BOUND[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("granularity", list(Granularity), ids=lambda g: g.value)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gpu_paths_equal_the_dense_matmul(bits, granularity, symmetric):
    """Oracle: float64 dense matmul on the GPU; AUTO below and above its crossover, and each backend that fits."""
    q = quantized(160, 384, bits, granularity, symmetric).to("cuda")
    bias = torch.randn(160, device="cuda")
    for dtype, bound in BOUND.items():
        for backend in (Backend.AUTO, Backend.REFERENCE, Backend.DEQUANT, Backend.TRITON):
            if backend_problem(backend, "cuda", dtype, q.scheme, 160, 384):
                continue
            layer = QuantLinear.from_quantized(q.to("cpu"), bias.cpu(), backend, dtype).to("cuda")
            for m in (1, 17, triton_max_tokens(bits) + 1):
                x = torch.randn(m, 384, device="cuda").to(dtype)
                assert relative_error(layer(x), expected(q, x, bias)) < bound, (backend, dtype, m)
            if backend is Backend.AUTO:
                assert layer.form is Form.KERNEL
