"""W8A16, W3A16, W2A16 (`wna16`) and W8A8 against their twins: interpreted on a CPU, compiled where a GPU is.

Outputs and workspaces are poisoned first, and `relative_error` is inf for NaN.
"""

from __future__ import annotations

import os

import pytest
import torch
from poisoning import poison_empty

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when the kernels are decorated, at import

from compress.errors import ConfigError, EnvironmentProblem  # noqa: E402
from compress.kernels import common, contenders_wna16, timing, w8a8, wna16, wna16_layout  # noqa: E402
from compress.kernels.problem import Problem  # noqa: E402
from compress.kernels.reference import (  # noqa: E402
    dequantize_weight,
    quantize_rows,
    relative_error,
    w4a16_linear,
    w8a8_linear,
    w8a8_sums,
)
from compress.qlinear import Backend, Form, QuantLinear, backend_problem  # noqa: E402
from compress.quant import Granularity, QuantScheme, choose_qparams, quantize  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
# the interpreter rounds float32 -> bfloat16 toward zero, which alone may cost 4e-3
BOUND = {torch.float16: 5e-4, torch.bfloat16: 4e-3 if HAS_GPU else 7e-3}
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def problem(bits, m, n, k, group, symmetric, dtype=torch.float16, seed=0):
    """x [m, k], codes [n, k], scale and zero [n, G], bias [n]; group None is one group a row."""
    gen = torch.Generator().manual_seed(seed + 7919 * n + k + bits)
    groups = k // group if group else 1
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=gen)
    scale = (torch.rand(n, groups, generator=gen) * 0.01 + 0.005).to(dtype)
    zero = torch.full((n, groups), 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zero = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=gen)
    x = torch.randn(m, k, generator=gen).to(dtype)
    bias = torch.randn(n, generator=gen).to(dtype)
    return tuple(t.to(DEVICE) for t in (x, codes, scale, zero, bias))


def wna16_error(monkeypatch, bits, m, n, k, group, symmetric, dtype, config=None):
    x, codes, scale, zero, bias = problem(bits, m, n, k, group, symmetric, dtype)
    weight = wna16_layout.pack(codes, scale, None if symmetric else zero, bits)
    expected = w4a16_linear(x, codes, scale, zero, bias)
    with monkeypatch.context() as patch:
        poison_empty(patch)
        return relative_error(wna16.launch(x, weight, bias, config), expected)


def w8a8_error(monkeypatch, m, n, k, group, symmetric, dtype, config=None):
    x, codes, scale, zero, bias = problem(8, m, n, k, group, symmetric, dtype)
    weight = w8a8.pack(codes, scale, None if symmetric else zero)
    expected = w8a8_linear(x, codes, scale, zero, bias)
    with monkeypatch.context() as patch:
        poison_empty(patch)
        return relative_error(w8a8.launch(x, weight, bias, config), expected)


RAGGED = [  # m, n, k, group, symmetric
    (1, 64, 128, 128, True),
    (3, 33, 256, 128, False),
    (5, 48, 96, 32, False),
    (17, 70, 192, 64, True),
    (2, 31, 576, 96, False),
    (2, 33, 1024, 512, False),
    (4, 40, 200, None, False),
    (1, 32, 8, None, True),
]


@DTYPES
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_weight_only_matmul_equals_the_float64_twin(monkeypatch, shape, dtype):
    """Oracle: `reference.w4a16_linear` in float64; edges of N, K and M, groups within and across tiles, splits."""
    config = wna16.Config(block_m=16, block_n=32, split_k=3, num_warps=4, num_stages=2)
    for bits in (8, 3, 2, 4) if dtype is torch.float16 or HAS_GPU else (8, 3):
        assert wna16_error(monkeypatch, bits, *shape, dtype, config) < BOUND[dtype], bits


@DTYPES
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_w8a8_equals_its_twin(monkeypatch, shape, dtype):
    """Oracle: `reference.w8a8_linear`, which rounds the same activations to the same codes."""
    config = w8a8.Config(block_m=16, block_n=32, split_k=3, num_warps=4, num_stages=2)
    assert w8a8_error(monkeypatch, *shape, dtype, config) < BOUND[dtype]


def test_more_than_128_groups(monkeypatch):
    """Oracle: the twins at K = 16512, group 128 (129 groups) and one group a row."""
    for bits, group in ((8, 128), (8, None), (3, 128)):
        assert wna16_error(monkeypatch, bits, 2, 16, 16512, group, False, torch.float16) < BOUND[torch.float16]
    for group in (128, None):
        assert w8a8_error(monkeypatch, 2, 16, 16512, group, False, torch.float16) < BOUND[torch.float16]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@DTYPES
def test_activations_round_to_the_twins_codes(dtype):
    """Oracle: `reference.quantize_rows` bit for bit: K beyond one block, ties, zeros, subnormals, NaN and Inf; sums."""
    x = torch.randn(7, 5000, dtype=torch.float32).to(dtype)
    x[1] = 0.0
    x[2, ::2] = 0.5  # with a largest value of 127, halves are ties
    x[2, 0] = 127.0
    x[3] = 1e-7
    x[4, 7], x[5, 4999] = float("nan"), float("-inf")
    x = x.to(DEVICE)
    codes, scale, sums = w8a8.quantize_rows(x, 5120, 128)
    want, want_scale = quantize_rows(x)
    assert torch.equal(codes[:, :5000], want) and not codes[:, 5000:].any()
    assert torch.equal(scale.nan_to_num(-1.0), want_scale.nan_to_num(-1.0)) and scale[4:6].isnan().all()
    assert torch.equal(sums.t(), codes.view(7, 40, 128).sum(-1, dtype=torch.int32))


def test_w8a8_sums_are_exact():
    """Oracle: `reference.w8a8_sums` in integers: one group a row gives the same bits for every tile and split."""
    for symmetric in (True, False):
        x, codes, scale, zero, _ = problem(8, 19, 50, 1000, None, symmetric)
        weight = w8a8.pack(codes, scale, None if symmetric else zero)
        x_codes, x_scale = quantize_rows(x)
        sums = w8a8_sums(x_codes, codes, zero)[0].float()
        expected = (sums * scale.float().t() * x_scale[:, None]).half()
        for block_m, block_n, split in ((16, 64, 1), (32, 64, 5)):
            assert torch.equal(w8a8.launch(x, weight, None, w8a8.Config(block_m, block_n, split, 4, 2)), expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_broken_row_of_activations_stays_one_broken_row():
    """Oracle: NaN in that row of W8A8's result and nowhere else."""
    x, codes, scale, zero, bias = problem(8, 3, 16, 64, 32, False)
    x[1, 5] = float("inf")
    y = w8a8.launch(x, w8a8.pack(codes, scale, zero), bias)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_splits_are_deterministic():
    """Oracle: the same bits twice, 5 tiles over 2 and 16 splits."""
    for split in (2, 16):
        x, codes, scale, zero, bias = problem(8, 4, 40, 5 * 128, 64, False)
        weight = wna16_layout.pack(codes, scale, zero, 8)
        config = wna16.Config(16, 64, split, 4, 2)
        assert torch.equal(*(wna16.launch(x, weight, bias, config) for _ in range(2)))
        int8 = w8a8.pack(codes, scale, zero)
        assert torch.equal(*(w8a8.launch(x, int8, bias, w8a8.Config(16, 64, split, 4, 2)) for _ in range(2)))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("n", "k", "group"), [(3, 512, 128), (5, 96, 32), (2, 200, None), (1, 0, None)])
def test_layout_round_trip_and_picture(bits, n, k, group):
    """Oracle: unpack(pack(codes)) = codes, the documented place of each code, and the bytes of the picture."""
    _, codes, scale, zero, _ = problem(bits, 1, n, k, group, False)
    weight = wna16_layout.pack(codes, scale, zero, bits)
    assert torch.equal(wna16_layout.unpack(weight), codes)
    assert weight.words.numel() * 16 == n * weight.words.shape[0] * weight.tile * bits
    size = 64 if bits == 8 and group != 32 else 32
    width = {8: 8, 4: 4, 3: 2, 2: 2}[bits]
    for kk in range(0, k, 37):
        tile, p, j = kk // weight.tile, kk % weight.tile // size, kk % size
        row = weight.words[tile, n - 1]
        code = (int(row[j]) >> (width * p)) & (2**width - 1)
        if bits == 3:
            code |= (int(row[size:].contiguous().view(torch.uint8)[j]) >> p & 1) << 2
        assert code == int(codes[n - 1, kk])


def test_int8_layout_round_trip():
    """Oracle: the identity, and codes minus 128 padded with zeros."""
    _, codes, scale, zero, _ = problem(8, 1, 5, 200, None, False)
    weight = w8a8.pack(codes, scale, zero)
    assert torch.equal(w8a8.unpack(weight), codes)
    assert weight.codes.shape == (5, 256) and not weight.codes[:, 200:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("n", "k", "group"), [(70, 256, 128), (33, 96, 32), (5, 200, None)])
def test_dense_equals_its_twin(monkeypatch, n, k, group, bits, dtype):
    """Oracle: `reference.dequantize_weight` in float32, rounded once: bit for bit where rounding is a GPU's."""
    _, codes, scale, zero, _ = problem(bits, 1, n, k, group, False)
    weight = wna16_layout.pack(codes, scale, zero, bits)
    poison_empty(monkeypatch)
    got, expected = wna16.dense(weight, dtype), dequantize_weight(codes, scale, zero)
    if dtype is torch.bfloat16 and not HAS_GPU:
        assert relative_error(got, expected) < 2**-7
    else:
        assert torch.equal(got, expected.to(dtype))


def test_no_tokens_give_an_empty_result():
    """Oracle: the shape [0, N]."""
    x, codes, scale, zero, _ = problem(8, 0, 24, 64, 32, False)
    for y in (
        wna16.matmul(x, wna16_layout.pack(codes, scale, zero, 8)),
        w8a8.matmul(x, w8a8.pack(codes, scale, zero)),
    ):
        assert y.shape == (0, 24) and y.dtype is torch.float16


def test_misaligned_buffers_are_read_where_they_are():
    """Oracle: the twins, with x, words, scales and zeros that begin 2 (zeros: 1) bytes into their storage."""

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    x, codes, scale, zero, bias = problem(8, 3, 40, 256, 64, False)
    for w in (wna16_layout.pack(codes, scale, zero, 8), wna16_layout.pack(codes & 7, scale, zero & 7, 3)):
        moved = type(w)(**{**vars(w), **{name: shifted(getattr(w, name)) for name in ("words", "scale", "zero")}})
        expected = w4a16_linear(x, codes & (2**w.bits - 1), scale, zero & (2**w.bits - 1), bias)
        assert relative_error(wna16.launch(shifted(x), moved, shifted(bias)), expected) < BOUND[torch.float16]
    w = w8a8.pack(codes, scale, zero)
    moved = type(w)(**{**vars(w), **{name: shifted(getattr(w, name)) for name in ("codes", "scale", "zero")}})
    expected = w8a8_linear(x, codes, scale, zero, bias)
    assert relative_error(w8a8.launch(shifted(x), moved, shifted(bias)), expected) < BOUND[torch.float16]


def test_operators_have_fakes():
    """Oracle: torch.library.opcheck."""
    x, codes, scale, zero, bias = problem(8, 2, 32, 128, 64, False)
    checks = ("test_schema", "test_faketensor")
    packed = wna16_layout.pack(codes & 7, scale, zero & 7, 3)
    args = (x, packed.words, packed.scale, packed.zero, bias, 3, packed.group_size)
    torch.library.opcheck(torch.ops.compress.wna16.default, args, test_utils=checks)
    args = (packed.words, packed.scale, packed.zero, 3, 128, packed.group_size, torch.float16)
    torch.library.opcheck(torch.ops.compress.wna16_dense.default, args, test_utils=checks)
    w = w8a8.pack(codes, scale, zero)
    args = (x, w.codes, w.scale, w.zero, bias, w.group_size)
    torch.library.opcheck(torch.ops.compress.w8a8.default, args, test_utils=checks)


def _wna16_op(x, w, bias=None, **changes):
    a = {**vars(w), **changes}
    return torch.ops.compress.wna16(x, a["words"], a["scale"], a["zero"], bias, a["bits"], a["group_size"])


def _w8a8_op(x, w, bias=None, **changes):
    a = {**vars(w), **changes}
    return torch.ops.compress.w8a8(x, a["codes"], a["scale"], a["zero"], bias, a["group_size"])


@pytest.mark.parametrize("call", [_wna16_op, _w8a8_op], ids=["wna16", "w8a8"])
def test_operands_that_do_not_fit_are_named(call):
    """Oracle: one ConfigError for each broken precondition, with the value in it."""
    x, codes, scale, zero, bias = problem(8, 2, 32, 256, 64, False)
    w = wna16_layout.pack(codes, scale, zero, 8) if call is _wna16_op else w8a8.pack(codes, scale, zero)
    main, launch = ("words", wna16.launch) if call is _wna16_op else ("codes", w8a8.launch)
    assert call(x, w, bias).isfinite().all()
    for match, broken in (
        (r"x is torch\.float32", lambda: call(x.float(), w)),
        (r"x is \(1, 2, 256\)", lambda: call(x[None], w)),
        ("x with strides", lambda: call(x.t().contiguous().t(), w)),
        ("scale is .* expected", lambda: call(x, w, scale=w.scale[:1])),
        (r"scale is torch\.int64", lambda: call(x, w, scale=w.scale.long())),
        (r"zero is torch\.int32", lambda: call(x, w, zero=w.zero.int())),
        (r"bias is \(3,\)", lambda: call(x, w, bias[:3])),
        ("multiple of 32", lambda: call(x, w, group_size=40)),
        ("must be a multiple", lambda: call(x, w, group_size=0)),
        ("does not divide K=256", lambda: call(x, w, group_size=96)),
        (main, lambda: call(x, w, **{main: getattr(w, main).to(torch.int32)})),
        (main, lambda: call(x, w, **{main: getattr(w, main)[..., :-1]})),
        ("K=", lambda: call(x[:, :64].contiguous(), w)),
        ("zero is on meta", lambda: launch(x, type(w)(**{**vars(w), "zero": w.zero.to("meta")}))),
    ):
        with pytest.raises(ConfigError, match=match):
            broken()


def test_weights_that_do_not_fit_are_named():
    """Oracle: ConfigError from pack and matmul for codes, widths, groups and K outside the rules."""
    x, codes, scale, zero, _ = problem(8, 2, 8, 96, 48, True)
    with pytest.raises(ConfigError, match="below 8"):
        wna16_layout.pack(codes | 8, scale, None, 3)
    with pytest.raises(ConfigError, match="bits=5"):
        wna16_layout.pack(codes & 31, scale, None, 5)
    for pack in (lambda *a: wna16_layout.pack(*a, 8), w8a8.pack):
        with pytest.raises(ConfigError, match="multiple of 32"):
            pack(codes, scale, zero)
        with pytest.raises(ConfigError, match="K=96 in 5 groups"):
            pack(codes, scale[:, :1].expand(8, 5), None)
    with pytest.raises(ConfigError, match=r"uint8"):
        w8a8.pack(codes.char(), scale, None)
    with pytest.raises(ConfigError, match="overflow int32"):
        w8a8.pack(codes[:1].expand(1, 96).repeat(1, 700), scale[:1, :1], None)
    with pytest.raises(ConfigError, match=r"dtype=torch\.int8"):
        wna16.dense(wna16_layout.pack(codes, scale[:, :1], None, 8), torch.int8)
    with pytest.raises(ConfigError, match="K=96"):
        wna16.matmul(x[:, :32], wna16_layout.pack(codes, scale[:, :1], None, 8))


def test_unsupported_devices_are_refused(monkeypatch):
    """Oracle: EnvironmentProblem that names the capability and the way out."""
    x, codes, scale, _, _ = problem(8, 1, 8, 64, 64, True)
    monkeypatch.setattr(common, "device_problem", lambda device: "compute capability 7.5 is below 8.0")
    for call in (
        lambda: wna16.launch(x, wna16_layout.pack(codes, scale, None, 8)),
        lambda: wna16.launch_dense(wna16_layout.pack(codes, scale, None, 8), torch.float16),
        lambda: w8a8.launch(x, w8a8.pack(codes, scale, None)),
    ):
        with pytest.raises(EnvironmentProblem, match=r"7\.5 is below 8\.0; use backend=auto"):
            call()


def test_configurations_are_sane_over_shapes():
    """Oracle: the rules: buffers fit the shared memory, splits leave tiles to each, many rows are not split."""
    for bits in (8, 3, 2):
        for n, k in ((64, 4096), (1000, 256), (1, 8)):
            weight = wna16_layout.pack(*problem(bits, 1, n, k, None, True)[1:3], None, bits)
            for shared in (101376, 232448):
                for m in (1, 16, 17, 64, 65, 4096):
                    c = wna16.choose_config(weight, m, 132, shared)
                    assert c.num_stages * 2 * (weight.tile * c.block_m + weight.words.shape[2] * c.block_n) <= shared
                    assert c.num_stages >= 1 and 1 <= c.split_k <= max(1, k // 256)
                    d = w8a8.choose_config(m, n, k, 132, shared)
                    assert d.num_stages * 128 * (d.block_m + d.block_n) <= shared and d.split_k <= max(1, k // 256)
    assert w8a8.choose_config(4096, 4096, 4096, 132, 232448).split_k == 1
    assert w8a8.choose_config(1, 4096, 4096, 132, 232448).split_k > 1


@pytest.mark.parametrize("granularity", list(Granularity), ids=lambda g: g.value)
@pytest.mark.parametrize("backend", [Backend.TRITON, Backend.W8A8], ids=lambda b: b.value)
@pytest.mark.parametrize("bits", [8, 3, 2])
def test_quantlinear_takes_the_kernels_by_name(bits, backend, granularity):
    """Oracle: the twins on the layer's own codes, symmetric and not; the dense weight and the bytes held as well."""
    for symmetric in (True, False):
        scheme = QuantScheme(bits, granularity, 64, symmetric)
        if backend_problem(backend, "cuda", torch.float16, scheme, 40, 192):
            assert backend is Backend.W8A8 and bits != 8
            continue
        weight = torch.randn(40, 192, generator=torch.Generator().manual_seed(bits)) * 0.02
        q = quantize(weight, *choose_qparams(weight, scheme), scheme).to(DEVICE)
        x = torch.randn(2, 3, 192).half().to(DEVICE)
        layer = QuantLinear.from_quantized(q, torch.ones(40, device=DEVICE), backend, torch.float16)
        y = layer(x).view(6, 40)
        twin = w4a16_linear if backend is Backend.TRITON else w8a8_linear
        expected = twin(x.view(6, 192), q.codes, q.scale, q.zero, torch.ones(40, device=DEVICE))
        assert relative_error(y, expected) < 1e-3
        assert layer.form is (Form.KERNEL if backend is Backend.TRITON else Form.INT8)
        assert relative_error(layer.dense_weight(), q.dequantize()) < 1e-6


@pytest.mark.parametrize("scheme", ["8", "3", "2", "w8a8"])
def test_bench_contenders_compute_the_problem(monkeypatch, scheme):
    """Oracle: the problem's own float64 answer, within the error that bench allows; every contender is there."""
    monkeypatch.setattr(timing, "ROTATE_BYTES", 1)
    int8 = scheme == "w8a8"
    p = Problem(48, 256, DEVICE, 256 if int8 else 128, bits=8 if int8 else int(scheme))
    rows = contenders_wna16.gpu_contenders(p, torch.float16, int8, paths=True)
    assert [c.kind for c in rows.values()] == (["dense", "peer", "ours"] if int8 else ["dense", "ours", "path", "path"])
    x = p.x(3)
    for name, contender in rows.items():
        y = contender.variants(3)[0][1](contender.weights[0], x.half())
        assert relative_error(y, p.reference(x)) < (contender.max_error or 1e-3), name


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_compiled_kernels_over_model_shapes(monkeypatch, dtype, symmetric, group):
    """Oracle: the twins, at model shapes and every branch of choose_config, plain and inline-PTX decoding."""
    shapes = ((1, 4096, 4096), (7, 1000, 4096), (33, 777, 2048), (64, 1024, 4096), (300, 2049, 1024))
    for m, n, k in shapes:
        for bits in (8, 3, 2):
            weight = wna16_layout.pack(*problem(bits, 1, 64, k, group, True)[1:3], None, bits)
            for use_asm in (False, True) if m == 1 else (True,):
                chosen = wna16.choose_config(weight, m, 132, 232448)
                config = wna16.Config(**{**vars(chosen), "use_asm": use_asm})
                error = wna16_error(monkeypatch, bits, m, n, k, group, symmetric, dtype, config)
                assert error < BOUND[dtype], (bits, m, n, k, config, error)
            error = wna16_error(monkeypatch, bits, m, n, k, group, symmetric, dtype)
            assert error < BOUND[dtype], (bits, m, n, k, error)
        error = w8a8_error(monkeypatch, m, n, k, group, symmetric, dtype)
        assert error < BOUND[dtype], ("w8a8", m, n, k, error)


@pytest.mark.gpu
def test_offsets_beyond_int32():
    """Oracle: the twins on the last rows; N * K beyond 2^31 elements, and M * N for W8A8."""
    n, k, m = 2**19 + 16, 4352, 3
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, device="cuda")
    scale = torch.rand(n, 34, device="cuda").half() * 0.01 + 0.005
    x = torch.randn(m, k, device="cuda").half()
    zero = torch.full((64, 34), 128, dtype=torch.uint8, device="cuda")
    y = wna16.launch(x, wna16_layout.pack(codes, scale, None, 8))
    assert relative_error(y[:, -64:], w4a16_linear(x, codes[-64:], scale[-64:], zero)) < BOUND[torch.float16]
    y = w8a8.launch(x, w8a8.pack(codes, scale, None))
    assert relative_error(y[:, -64:], w8a8_linear(x, codes[-64:], scale[-64:], zero)) < BOUND[torch.float16]
    del codes, scale, y
    x, codes, scale, zero, _ = problem(8, 2**19 + 5, 4096, 128, 128, True)
    for y, twin in (
        (wna16.launch(x, wna16_layout.pack(codes, scale, None, 8)), w4a16_linear),
        (w8a8.launch(x, w8a8.pack(codes, scale, None)), w8a8_linear),
    ):
        assert relative_error(y[-64:], twin(x[-64:], codes, scale, zero)) < BOUND[torch.float16]


@pytest.mark.gpu
def test_cuda_graph_replay_and_torch_compile():
    """Oracle: the eager result, bit for bit."""
    x, codes, scale, zero, bias = problem(8, 4, 512, 1024, 128, False)
    for weight, matmul in (
        (wna16_layout.pack(codes, scale, zero, 8), wna16.matmul),
        (wna16_layout.pack(codes & 7, scale, zero & 7, 3), wna16.matmul),
        (w8a8.pack(codes, scale, zero), w8a8.matmul),
    ):
        eager = matmul(x, weight, bias)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = matmul(x, weight, bias)
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, eager)

        def step(v, matmul=matmul, weight=weight):
            return matmul(v, weight, bias)

        assert torch.equal(torch.compile(step, fullgraph=True)(x), eager)
