"""Kernels of the one-token step against their twins: in Triton's interpreter on a CPU, compiled where a GPU is.

The twins run on float64 copies of the operands, so a kernel's own rounding is all that a bound has to cover. What a
kernel must not read is NaN here, and outputs start as NaN, so both would show in `relative_error`.
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
from compress.kernels import decode_attention, decode_ops, dense_decode, pdl  # noqa: E402
from compress.kernels import decode_reference as twin  # noqa: E402
from compress.kernels.decode_attention import AttentionConfig  # noqa: E402
from compress.kernels.reference import relative_error  # noqa: E402

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
BOUND = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch)


@DTYPES
@pytest.mark.parametrize("m, k", [(1, 64), (3, 100), (2, 1536)])
def test_rms_norm_equals_its_twin(m: int, k: int, dtype: torch.dtype) -> None:
    """Oracle: `decode_reference.rms_norm` in float64, plain and with a residual, which must be updated in place."""
    x, weight, residual = random(m, k, dtype=dtype), random(k, dtype=dtype, seed=1), random(m, k, dtype=dtype, seed=2)
    normed, h = decode_ops.rms_norm(x, weight, 1e-5)
    assert h is x
    assert relative_error(normed, twin.rms_norm(x.double(), weight.double(), 1e-5)[0]) < BOUND[dtype]
    expected, stream = twin.rms_norm(x, weight, 1e-5, residual.clone())
    normed, h = decode_ops.rms_norm(x, weight, 1e-5, residual)
    assert h is residual and relative_error(h, stream) < BOUND[dtype]
    if HAS_GPU or dtype is torch.float16:  # the interpreter truncates to bfloat16
        assert torch.equal(h, stream)
    assert relative_error(normed, expected) < BOUND[dtype]


@DTYPES
def test_rms_norm_gathers_rows(dtype: torch.dtype) -> None:
    """Oracle: the twin, and indexing: the stream starts as the embedding's rows."""
    table, weight = random(50, 72, dtype=dtype), random(72, dtype=dtype, seed=1)
    ids = torch.tensor([49, 0, 7], device=DEVICE)
    normed, h = decode_ops.rms_norm(table, weight, 1e-6, ids=ids)
    assert torch.equal(h, table[ids])
    assert relative_error(normed, twin.rms_norm(table.double(), weight.double(), 1e-6, ids=ids)[0]) < BOUND[dtype]


@DTYPES
@pytest.mark.parametrize("m, f", [(1, 96), (3, 700)])
def test_silu_mul_equals_its_twin(m: int, f: int, dtype: torch.dtype) -> None:
    """Oracle: `decode_reference.silu_mul` in float64, on values up to +-90 where exp would overflow float16."""
    gate_up = random(m, 2 * f, dtype=dtype) * 20
    assert relative_error(decode_ops.silu_mul(gate_up), twin.silu_mul(gate_up.double())) < BOUND[dtype]
    if f % 8 == 0:
        mixed = twin.interleave(*gate_up.chunk(2, dim=1), 1)
        assert torch.equal(decode_ops.silu_mul(mixed, interleaved=True), decode_ops.silu_mul(gate_up))


class Step:
    """Random operands of one attention step; the cache beyond `lengths` is NaN, and the rope table is any rotation."""

    def __init__(self, lengths: list[int], heads: int, kv: int, d: int, capacity: int, dtype: torch.dtype, norms: bool):
        batch = len(lengths)
        self.shape = twin.HeadShape(heads, kv, d, d**-0.5, 1e-6)
        self.qkv = random(batch, (heads + 2 * kv) * d, dtype=dtype)
        angle = random(capacity, d // 2, dtype=torch.float32, seed=1) * 3
        self.rope = (angle.cos(), angle.sin())
        self.positions = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        self.cache = tuple(random(batch, kv, capacity, d, dtype=dtype, seed=s) for s in (2, 3))
        for states in self.cache:
            for b, length in enumerate(lengths):
                states[b, :, length:] = float("nan")
        weights = tuple(1 + 0.3 * random(d, dtype=dtype, seed=s) for s in (4, 5))
        self.norms = weights if norms else None

    def run(self, config: AttentionConfig, workspace=None, pdl: bool = False):
        """(output, the cache it leaves) of the kernel, on a copy of the cache."""
        cache = tuple(states.clone() for states in self.cache)
        out = decode_attention.attention(
            self.qkv, self.rope, self.positions, cache, self.shape, self.norms, config, workspace, pdl
        )
        return out, cache

    def expected(self):
        """The same of the twin, in float64."""
        cache = tuple(states.double() for states in self.cache)
        norms = None if self.norms is None else tuple(w.double() for w in self.norms)
        return twin.attention(self.qkv.double(), self.rope, self.positions, cache, self.shape, norms), cache

    def check(self, config: AttentionConfig, pdl: bool = False) -> None:
        (out, cache), (expected, expected_cache) = self.run(config, pdl=pdl), self.expected()
        dtype = self.qkv.dtype
        assert relative_error(out, expected) < BOUND[dtype], config
        for states, wanted, before in zip(cache, expected_cache, self.cache, strict=True):
            for b, at in enumerate(self.positions.tolist()):
                assert relative_error(states[b, :, at], wanted[b, :, at]) < BOUND[dtype]
            written = states.view(torch.int16) != before.view(torch.int16)
            rows = {(b, t) for b, _, t, _ in written.nonzero().tolist()}
            assert rows == set(enumerate(self.positions.tolist()))  # nothing else was touched


CASES = [  # lengths, heads, KV heads, head_dim, norms of q and k
    ([0], 4, 2, 64, False),
    ([1, 16, 17], 6, 3, 64, True),
    ([33, 31, 32], 3, 3, 16, False),
    ([70], 8, 1, 128, True),
    ([47, 64, 5], 7, 1, 32, False),
]


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_equals_its_twin(case: tuple, dtype: torch.dtype) -> None:
    """Oracle: `decode_reference.attention` in float64, for output, new key and value, and everything left alone;
    lengths at and beside the edges of blocks and splits, one, two and more splits than blocks."""
    lengths, heads, kv, d, norms = case
    step = Step(lengths, heads, kv, d, 80, dtype, norms)
    for splits in (1, 2, 5):
        step.check(AttentionConfig(16, splits, num_warps=2, num_stages=2))


def test_splits_leave_the_counter_at_zero_and_repeat_their_bits() -> None:
    """Oracle: a second launch on the same workspace gives the same bits; the counters are zero after each."""
    step = Step([70, 3], 4, 2, 64, 80, torch.float16, True)
    config = AttentionConfig(16, 4)
    workspace = decode_attention.make_workspace(2, step.shape, 4, DEVICE)
    outputs = []
    for _ in range(3):
        outputs.append(step.run(config, workspace)[0])
        assert not workspace.arrived.any()
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_a_step_at_the_last_position() -> None:
    """Oracle: the twin; the new token takes the last row of the cache and nothing follows it."""
    Step([79, 78], 4, 2, 32, 80, torch.float16, False).check(AttentionConfig(16, 3))


def test_more_splits_than_are_combined_at_a_time() -> None:
    """Oracle: the twin; of 32 heads of 128, two splits fit a program's registers, and five are there, three or five of
    them with a share."""
    for length in (40, 80 - 1):
        Step([length], 32, 1, 128, 80, torch.float16, False).check(AttentionConfig(16, 5))


def test_splits_fill_the_chip_and_no_more() -> None:
    """Oracle: by hand: two programs a multiprocessor of an H100 (132), one where pairs are 67 to 132, never a split
    without a block; six stages of 32 KiB where each has one to itself, unless a smaller GPU has no room for them."""
    choose = decode_attention.choose_attention
    h100, small = 232448, 101376
    found = {b: choose(b, 8, 128, 1024, 132, h100) for b in (1, 2, 4, 16, 64, 512)}
    assert {b: (c.block_t, c.splits, c.num_stages) for b, c in found.items()} == {
        1: (64, 16, 6), 2: (64, 16, 3), 4: (64, 8, 3), 16: (128, 1, 3), 64: (64, 1, 3), 512: (64, 1, 3),
    }  # fmt: skip
    assert choose(1, 8, 128, 64, 132, h100) == AttentionConfig(64, 1, 4, 3)
    assert choose(1, 8, 256, 1024, 132, h100).block_t == 32
    for b in (1, 16, 64):
        config = choose(b, 8, 128, 1024, 132, small)
        assert config.block_t == 64 and config.num_stages == 3


@DTYPES
@pytest.mark.parametrize(("n", "k"), [(70, 2600), (32, 64), (200, 2048)])
def test_a_dense_product_behind_a_norm_equals_its_twin(n: int, k: int, dtype: torch.dtype) -> None:
    """Oracle: `decode_reference.dense_behind_norm` in float64; edges of N and K inside a tile; a position counted by
    hand."""
    x, weight = random(1, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    squares = random(5, 1, dtype=torch.float32, seed=2).square() * k / 5
    expected = twin.dense_behind_norm(x.double(), weight.double(), squares.double(), 1e-5)
    position = torch.tensor([6], dtype=torch.int32, device=DEVICE)
    for use_pdl in {False, pdl.supported(DEVICE)}:
        for counted in (None, position):
            found = dense_decode.dense_behind_norm(x, weight, squares, 1e-5, counted, use_pdl)
            assert relative_error(found, expected) < BOUND[dtype]
    assert position.item() == 6 + len({False, pdl.supported(DEVICE)})
    with pytest.raises(ConfigError, match="int64"):
        dense_decode.dense_behind_norm(x, weight, squares, 1e-5, position.long())
    for bad in ((x, weight[:, 1:], squares), (x, weight.float(), squares), (x.repeat(2, 1), weight, squares)):
        with pytest.raises(ConfigError):
            dense_decode.dense_behind_norm(*bad, 1e-5)


def test_unfit_operands_are_refused() -> None:
    """Oracle: a ConfigError that names the operand, before anything is launched."""
    step = Step([4], 4, 2, 64, 80, torch.float16, False)
    config = AttentionConfig(16, 2)
    good = (step.qkv, step.rope, step.positions, step.cache, step.shape)
    for i, bad, match in [
        (0, step.qkv.float(), "float32"),
        (0, step.qkv[:, :-1].contiguous(), "x is"),
        (1, (step.rope[0][:10].contiguous(), step.rope[1][:10].contiguous()), "10 positions and the cache 80"),
        (2, step.positions.long(), "positions is torch.int64"),
        (3, (step.cache[0].transpose(2, 3), step.cache[1]), "keys"),
        (4, twin.HeadShape(4, 2, 48, 1.0), "head_dim=48"),
        (4, twin.HeadShape(5, 2, 64, 1.0), "5 heads"),
    ]:
        with pytest.raises(ConfigError, match=match):
            decode_attention.attention(*good[:i], bad, *good[i + 1 :], config=config)
    with pytest.raises(ConfigError, match="make_workspace"):
        other = decode_attention.make_workspace(1, step.shape, 3, DEVICE)
        decode_attention.attention(*good, config=config, workspace=other)
    with pytest.raises(ConfigError, match="weight is"):
        decode_ops.rms_norm(step.qkv, step.qkv[0, :5], 1e-6)
    with pytest.raises(ConfigError, match="even"):
        decode_ops.silu_mul(step.qkv[:, :-1].contiguous())


def test_pdl_is_refused_where_it_does_not_exist() -> None:
    """Oracle: `pdl.supported` of a CPU is False, and asking for it raises instead of being ignored."""
    assert not pdl.supported(torch.device("cpu"))
    with pytest.raises(EnvironmentProblem, match="pdl=True"):
        pdl.options(True, torch.device("cpu"))
    assert pdl.options(False, torch.device("cpu")) == {"PDL": False}


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("use_pdl", [False, True], ids=["plain", "pdl"])
def test_shapes_of_real_models_on_a_gpu(use_pdl: bool, dtype: torch.dtype) -> None:
    """Oracle: float64 twins at the heads of Llama-3-8B and Qwen3-1.7B, with the blocking that a step would choose."""
    if use_pdl and not pdl.supported(DEVICE):
        use_pdl = False
    for heads, kv, norms in ((32, 8, False), (16, 8, True)):
        for lengths in ([1000], [0, 511, 512, 1023], [700] * 16):
            config = decode_attention.choose_attention(len(lengths), kv, 128, 1024, 132, 232448)
            Step(lengths, heads, kv, 128, 1024, dtype, norms).check(config, use_pdl)
    x, weight, residual = (random(*s, dtype=dtype, seed=i) for i, s in enumerate([(16, 4096), (4096,), (16, 4096)]))
    expected, stream = twin.rms_norm(x, weight, 1e-5, residual.clone())
    normed, h = decode_ops.rms_norm(x, weight, 1e-5, residual, pdl=use_pdl)
    assert torch.equal(h, stream) and relative_error(normed, expected) < BOUND[dtype]
    gate_up = random(16, 2 * 14336, dtype=dtype)
    assert relative_error(decode_ops.silu_mul(gate_up, pdl=use_pdl), twin.silu_mul(gate_up.double())) < BOUND[dtype]


@pytest.mark.gpu
def test_attention_in_a_graph_follows_its_positions() -> None:
    """Oracle: the twin at each of several lengths, from one recorded launch whose positions tensor alone changes."""
    step = Step([0, 40], 32, 8, 128, 1024, torch.float16, False)
    for states in step.cache:
        states.copy_(torch.randn_like(states))
    config = decode_attention.choose_attention(2, 8, 128, 1024, 132, 232448)
    workspace = decode_attention.make_workspace(2, step.shape, config.splits, DEVICE)
    operands = (step.qkv, step.rope, step.positions, step.cache, step.shape)
    decode_attention.attention(*operands, config=config, workspace=workspace)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention.attention(*operands, config=config, workspace=workspace)
    for lengths in ([0, 1], [64, 63], [1023, 500]):
        step.positions.copy_(torch.tensor(lengths))
        expected, _ = step.expected()
        graph.replay()
        assert relative_error(out, expected) < BOUND[torch.float16], lengths


@pytest.mark.gpu("hopper")
@DTYPES
def test_products_with_what_is_around_them_on_a_gpu(dtype: torch.dtype) -> None:
    """Oracle: `decode_reference.linear_around` in float64; each kind, with bias, zeros, and M up to 8."""
    from compress.kernels import w4a16, w4a16_decode

    for n, k, zero in ((96, 256, True), (4096, 1536, False)):
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=DEVICE)
        scale = (torch.rand(n, k // 128, device=DEVICE) * 0.01 + 0.005).to(dtype)
        zeros = torch.randint(0, 16, (n, k // 128), dtype=torch.uint8, device=DEVICE) if zero else None
        weight = w4a16.pack_kernel_layout(codes, scale, zeros)
        if not w4a16_decode.takes(weight):
            pytest.fail("the Hopper kernels do not take this weight on this GPU")
        for m in (1, 3, 8):
            x, bias, norm = random(m, k, dtype=dtype), random(n, dtype=dtype, seed=3), random(n, dtype=dtype, seed=4)
            residual, squares = random(m, n, dtype=dtype, seed=5), random(37, m, dtype=torch.float32).square() * k / 37
            for around in (
                twin.Around(squares, 1e-5),
                twin.Around(residual=residual, norm=norm),
                twin.Around(squares, 1e-5, silu=True),
            ):
                wide = twin.Around(*(v.double() if isinstance(v, torch.Tensor) else v for v in around))
                expected = twin.linear_around(x.double(), weight, bias.double(), wide)
                for use_pdl in (False, True):
                    found = w4a16_decode.linear_around(x, weight, bias, around, use_pdl)
                    if isinstance(found, twin.Stream):
                        assert isinstance(expected, twin.Stream)
                        assert relative_error(found.squares.sum(0), expected.squares.sum(0)) < BOUND[dtype]
                        assert relative_error(found.normed, expected.normed) < BOUND[dtype]
                        found, expected_y = found.h, expected.h
                    else:
                        expected_y = expected
                    assert relative_error(found, expected_y) < BOUND[dtype], (n, m, around)
