"""W4A16 kernels against float64 twins: in Triton's interpreter on a CPU, compiled where a GPU is (marker `gpu`).

Every comparison uses fresh random operands and `relative_error`, which is inf for NaN or Inf, so an output element that
a kernel leaves unwritten (outputs are poisoned with NaN here) fails too.
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
from compress.kernels import common, cpu_int4, dequant, planar, w4a16  # noqa: E402
from compress.kernels.reference import dequantize_weight, relative_error, w4a16_linear  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
BOUND = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
SMALL = w4a16.Config(block_m=16, block_n=32, split_k=1, num_warps=4, num_stages=2)


def problem(n, k, group, symmetric, m=5, dtype=torch.float16, device=DEVICE, seed=0):
    """x [m, k], codes [n, k], scale [n, G], zero [n, G], bias [n]; group None is one group a row."""
    gen = torch.Generator().manual_seed(seed + 7919 * n + k)
    groups = k // group if group else 1
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=gen)
    scale = (torch.rand(n, groups, generator=gen) * 0.01 + 0.005).to(dtype)
    zero = torch.full((n, groups), 8, dtype=torch.uint8)
    if not symmetric:
        zero = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=gen)
    x = torch.randn(m, k, generator=gen).to(dtype)
    bias = torch.randn(n, generator=gen).to(dtype)
    return tuple(t.to(device) for t in (x, codes, scale, zero, bias))


def error_of(monkeypatch, m, n, k, group, symmetric, dtype, use_bias=True, config=None):
    x, codes, scale, zero, bias = problem(n, k, group, symmetric, m, dtype)
    bias = bias if use_bias else None
    weight = w4a16.pack_kernel_layout(codes, scale, None if symmetric else zero)
    expected = w4a16_linear(x, codes, scale, zero, bias)
    poison_empty(monkeypatch)
    return relative_error(w4a16.launch(x, weight, bias, config), expected)


RAGGED = [  # m, n, k, group, symmetric
    (1, 64, 128, 128, True),
    (3, 33, 256, 128, False),
    (5, 48, 96, 32, False),
    (17, 70, 192, 64, True),
    (2, 31, 576, 96, False),
    (2, 65, 1024, 256, False),
    (4, 40, 200, None, False),
    (1, 32, 8, None, True),
    (1, 1, 160, 32, True),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_matmul_equals_the_float64_twin_at_ragged_shapes(monkeypatch, shape, dtype):
    """Oracle: `reference.w4a16_linear` in float64; edges of N, K and M inside a tile, each group size."""
    for config in (SMALL, w4a16.Config(16, 32, 3, 4, 2)):
        assert error_of(monkeypatch, *shape, dtype, config=config) < BOUND[dtype], config


def test_more_than_128_groups(monkeypatch):
    """Oracle: float64 twin; K = 16512 at group 128 is 129 groups, where another kernel once broke."""
    assert error_of(monkeypatch, 2, 16, 16512, 128, False, torch.float16) < BOUND[torch.float16]


def test_split_k_is_deterministic_and_covers_uneven_splits():
    """Oracle: the same bits twice, and the float64 twin, with 7 tiles over 4, 5 and 16 splits."""
    x, codes, scale, zero, bias = problem(40, 7 * 128, 128, False)
    weight = w4a16.pack_kernel_layout(codes, scale, zero)
    expected = w4a16_linear(x, codes, scale, zero, bias)
    for split in (4, 5, 16):
        config = w4a16.Config(16, 32, split, 4, 2)
        first, second = (w4a16.launch(x, weight, bias, config) for _ in range(2))
        assert torch.equal(first, second)
        assert relative_error(first, expected) < BOUND[torch.float16]


def test_no_tokens_gives_an_empty_result():
    """Oracle: the shape [0, N]."""
    x, codes, scale, zero, _ = problem(24, 64, 32, False, m=0)
    y = w4a16.matmul(x, w4a16.pack_kernel_layout(codes, scale, zero))
    assert y.shape == (0, 24) and y.dtype is torch.float16


@pytest.mark.parametrize(("n", "k", "group"), [(3, 256, 128), (5, 96, 32), (2, 200, None)])
def test_kernel_layout_round_trip_and_picture(n, k, group):
    """Oracle: unpack(pack(codes)) = codes, and nibble p of word j of tile t is code 128 t + 32 p + j."""
    _, codes, scale, zero, _ = problem(n, k, group, False)
    weight = w4a16.pack_kernel_layout(codes, scale, zero)
    assert torch.equal(w4a16.unpack_kernel_layout(weight), codes)
    for kk in range(0, k, 37):
        word = int(weight.words[kk // 128, n - 1, kk % 32])
        assert (word >> (4 * (kk % 128 // 32))) & 15 == int(codes[n - 1, kk])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_row_behind_the_scales_is_their_unit(dtype):
    """Oracle: the definition. A power of two, at or above the largest scale of the row and at most twice that; 1 where
    all are zero; what float16 cannot hold is the nearest that it can."""
    top = torch.tensor([1.0, 0.75, 2.0**-9, 0.0, 3e-7 if dtype is torch.float16 else 1e-20, 65504.0], dtype=dtype)
    scale = torch.stack([top / 3, top], 1)
    weight = w4a16.pack_kernel_layout(torch.zeros(6, 64, dtype=torch.uint8), scale, None)
    unit = weight.scale[-1].double()
    assert torch.equal(weight.scale[:-1], scale.t()) and unit.dtype is torch.float64
    assert torch.equal(unit.log2(), unit.log2().round()) and unit[3] == 1
    most = 2.0**15 if dtype is torch.float16 else float("inf")
    held = top.double() > 0
    assert bool(((unit >= top.double().clamp(max=most)) & (unit <= 2 * top.double()))[held].all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k", "group"), [(70, 256, 128), (33, 96, 32), (5, 200, None)])
def test_dequantize_kernel_equals_its_twin(monkeypatch, n, k, group, dtype):
    """Oracle: `reference.dequantize_weight` in float32, rounded once: bit for bit."""
    _, codes, scale, zero, _ = problem(n, k, group, False)
    weight = w4a16.pack_kernel_layout(codes, scale, zero)
    poison_empty(monkeypatch)
    # the interpreter rounds float32 -> bfloat16 toward zero, a GPU to nearest; both are within one bfloat16 step
    expected = dequantize_weight(codes, scale, zero)
    got = dequant.dense(weight, dtype)
    if dtype is torch.bfloat16 and not HAS_GPU:
        assert relative_error(got, expected) < 2**-8
    else:
        assert torch.equal(got, expected.to(dtype))


def test_operator_has_a_fake_and_refuses_what_it_cannot_do():
    """Oracle: torch.library.opcheck, and one CompressError for each broken precondition."""
    x, codes, scale, zero, bias = problem(32, 128, 64, False)
    weight = w4a16.pack_kernel_layout(codes, scale, zero)
    args = (x, weight.words, weight.scale, weight.zero, bias, weight.group_size)
    torch.library.opcheck(torch.ops.compress.w4a16.default, args, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(ConfigError, match="float32"):
        w4a16.matmul(x.float(), weight)
    with pytest.raises(ConfigError, match="K=128"):
        w4a16.matmul(x[:, :64], weight)
    with pytest.raises(ConfigError, match="not contiguous"):
        w4a16.matmul(x.t().contiguous().t(), weight)
    with pytest.raises(ConfigError, match="bias is"):
        w4a16.matmul(x, weight, bias[:3])
    with pytest.raises(ConfigError, match="multiple of 32"):
        w4a16.pack_kernel_layout(codes[:, :48].contiguous(), scale[:, :1].expand(32, 2), zero[:, :1].expand(32, 2))
    with pytest.raises(ConfigError, match="below 16"):
        w4a16.pack_kernel_layout(codes + 16, scale, zero)


def test_device_problem_names_the_reason(monkeypatch):
    """Oracle: EnvironmentProblem on a CPU without the interpreter, and below compute capability 8.0."""
    monkeypatch.setattr(common, "INTERPRETED", False)
    probe = common.device_problem.__wrapped__
    assert "not a CUDA GPU" in probe(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5 is below 8.0" in probe(torch.device("cuda"))
    monkeypatch.setattr(common, "device_problem", probe)
    x, codes, scale, _, _ = problem(16, 32, 32, True, device="cpu")
    with pytest.raises(EnvironmentProblem, match="backend=auto"):
        w4a16.launch(x, w4a16.pack_kernel_layout(codes, scale, None))


def test_choose_config_is_sane_over_shapes():
    """Oracle: the rules themselves: M is covered, splits never exceed the tiles of K, large M is not split."""
    for m in (1, 16, 17, 64, 65, 4096):
        for n, k in ((4096, 4096), (28672, 4096), (4096, 14336), (1, 8)):
            config = w4a16.choose_config(m, n, k, 132)
            assert config.block_m >= min(m, 16) and config.block_m & (config.block_m - 1) == 0
            assert 1 <= config.split_k <= max(1, -(-k // 128))
    assert w4a16.choose_config(4096, 4096, 4096, 132).split_k == 1
    assert w4a16.choose_config(1, 4096, 4096, 132).split_k > 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("k", [8, 100, 256])
def test_planar_round_trip(bits, k):
    """Oracle: the identity, and the documented size of a row."""
    codes = torch.randint(0, 2**bits, (3, k), dtype=torch.uint8)
    packed = planar.pack(codes, bits)
    assert packed.shape == (3, planar.row_bytes(k, bits)) and packed.dtype is torch.uint8
    assert torch.equal(planar.unpack(packed, bits, k), codes)


@pytest.mark.parametrize("n", [16, 48, 64, 112, 208])
@pytest.mark.parametrize(("k", "group"), [(64, 32), (256, 256), (384, 128)])
def test_cpu_int4_layout_is_inverted(n, k, group):
    """Oracle: dense rows read back from the op's own layout equal the dequantized codes, at full blocks and tails."""
    _, codes, scale, zero, _ = problem(n, k, group, False, dtype=torch.float32, device="cpu")
    weight = cpu_int4.pack(codes, scale, zero, torch.float32)
    dense = torch.cat([rows for _, rows in cpu_int4.dense_blocks(weight, torch.float32)])
    assert relative_error(dense, dequantize_weight(codes, scale, zero, torch.float64)) < 1e-6


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 4e-3)])
def test_cpu_int4_matmul_equals_the_float64_twin(dtype, bound, symmetric):
    """Oracle: float64 twin; both the packed op and the product through dense blocks, scales exact in the dtype."""
    x, codes, scale, zero, _ = problem(112, 256, 64, symmetric, m=3, dtype=dtype, device="cpu")
    weight = cpu_int4.pack(codes, scale, zero, dtype)
    expected = w4a16_linear(x, codes, scale, zero)
    assert relative_error(cpu_int4.int4_matmul(x, weight), expected) < bound
    by_blocks = planar.linear_by_blocks(x, 112, cpu_int4.dense_blocks(weight, dtype))
    assert relative_error(by_blocks, expected) < bound


def test_relative_error_rejects_nan_and_wrong_shapes():
    """Oracle: inf."""
    good = torch.ones(2, 2)
    assert relative_error(good, good) == 0.0
    assert relative_error(good * float("nan"), good) == float("inf")
    assert relative_error(good[0], good) == float("inf")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_compiled_matmul_over_model_shapes(monkeypatch, dtype, symmetric, group):
    """Oracle: float64 twin, at model shapes and every branch of choose_config, plain and inline-PTX dequantization."""
    shapes = ((1, 4096, 4096), (7, 1000, 4096), (33, 777, 2048), (64, 1024, 4096), (300, 2049, 1024), (1024, 512, 4096))
    for m, n, k in shapes:
        chosen = w4a16.choose_config(m, n, k, 132)
        for use_asm in (False, True) if k == 4096 else (True,):
            config = w4a16.Config(**{**vars(chosen), "use_asm": use_asm})
            error = error_of(monkeypatch, m, n, k, group, symmetric, dtype, config=config)
            monkeypatch.undo()
            assert error < BOUND[dtype], (m, n, k, config, error)


@pytest.mark.gpu
@pytest.mark.parametrize("portable", [False, True], ids=["chosen", "portable"])
def test_offsets_beyond_int32(portable):
    """Oracle: float64 twin on the last rows; N * K and M * N beyond 2^31 elements, in this GPU's kernel and in the
    portable one."""
    n, k, m = 2**19 + 16, 4352, 3
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    scale = torch.rand(n, 34, device="cuda").half() * 0.01 + 0.005
    x = torch.randn(m, k, device="cuda").half()
    config = w4a16.choose_config(m, n, k, 132) if portable else None
    y = w4a16.launch(x, w4a16.pack_kernel_layout(codes, scale, None), config=config)
    zero = torch.full((64, 34), 8, dtype=torch.uint8, device="cuda")
    assert relative_error(y[:, -64:], w4a16_linear(x, codes[-64:], scale[-64:], zero)) < BOUND[torch.float16]
    del codes, scale, y
    x, codes, scale, zero, _ = problem(4096, 128, 128, True, m=2**19 + 5)
    config = w4a16.choose_config(x.shape[0], 4096, 128, 132) if portable else None
    y = w4a16.launch(x, w4a16.pack_kernel_layout(codes, scale, None), config=config)
    assert relative_error(y[-64:], w4a16_linear(x[-64:], codes, scale, zero)) < BOUND[torch.float16]


@pytest.mark.gpu
def test_cuda_graph_replay_and_torch_compile():
    """Oracle: the eager result, bit for bit."""
    x, codes, scale, zero, bias = problem(512, 1024, 128, False, m=4)
    weight = w4a16.pack_kernel_layout(codes, scale, zero)
    eager = w4a16.matmul(x, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = w4a16.matmul(x, weight, bias)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, eager)
    assert torch.equal(torch.compile(lambda v: w4a16.matmul(v, weight, bias), fullgraph=True)(x), eager)
