"""The kernels of end-to-end tuning against their twins on the CPU: interpreted there, compiled where a GPU is."""

from __future__ import annotations

import os
from contextlib import nullcontext
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from poisoning import poison_empty
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when the kernels are decorated, at import

from compress.kernels import common, training  # noqa: E402
from compress.methods import distill  # noqa: E402
from compress.norms import fused_norms, rms_epsilon  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# weight [N, K] and groups [N', G]: groups of a row, of 8 and of 192 elements, a whole row, a whole tensor
SHAPES = [((24, 64), (24, 4)), ((3, 40), (3, 5)), ((5, 576), (5, 3)), ((7, 1300), (7, 1)), ((6, 50), (1, 1))]


def weight(shape: tuple[int, int], groups: tuple[int, int], whole: bool = False) -> tuple[Tensor, ...]:
    """u, scale, low and high, on the CPU: u beyond both ends now and then, and at ties; whole: steps of codes, int8."""
    generator = torch.Generator().manual_seed(shape[1])
    low = -torch.randint(3, 9, groups, generator=generator).float()
    scale = torch.rand(groups, generator=generator) + 0.1
    u = torch.randn(shape, generator=generator) * 6
    u[:, ::5] = u[:, ::5].round() + 0.5
    return (u.round().to(torch.int8) if whole else u), scale, low, low + 15


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_dense_weights(
    shape: tuple[int, int], groups: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: `distill.dense_weight` in PyTorch on the CPU, to the bit; of learned and of fixed codes. The interpreter
    cuts bfloat16 off instead of rounding."""
    for whole in (False, True):
        u, scale, low, high = weight(shape, groups, whole)
        expected = distill.dense_weight(u, scale, low, high, DTYPES[dtype])
        with monkeypatch.context() as patch:
            poison_empty(patch)
            found = training.dense_weight(*on_device(u, scale, low, high), DTYPES[dtype])
        last_bit = 2**-7 if dtype == "bf16" and not HAS_GPU else 0.0
        torch.testing.assert_close(found.cpu(), expected, rtol=last_bit, atol=0)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_weight_gradients(
    shape: tuple[int, int], groups: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: `distill.weight_gradients` in PyTorch on the CPU: that of u to the bit, sums up to their order. The same
    bits again, and without u's the same for scales."""
    u, scale, low, high = weight(shape, groups)
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    expected = distill.weight_gradients(dense.clone(), u, scale, low, high, True)
    operands = on_device(dense, u, scale, low, high)
    with monkeypatch.context() as patch:
        poison_empty(patch)
        found, again = (training.weight_gradients(*operands, with_u=True) for _ in range(2))
        alone, none = training.weight_gradients(*operands, with_u=False)
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=1e-5, atol=1e-4)
    assert found[1] is not None and again[1] is not None and expected[1] is not None and none is None
    assert torch.equal(found[1].cpu(), expected[1]) and torch.equal(found[1], again[1])
    assert torch.equal(found[0], again[0]) and torch.equal(found[0], alone)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(5, 50), (3, 4096), (4, 9001)])
def test_kl_of_rows(shape: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: softmax and logarithms in float64. Vocabularies of less than a block, of one and of several; logits that
    overflow exp, in the first block or the last; a row that agrees, which has no KL and no gradient."""
    generator = torch.Generator().manual_seed(2)
    teacher = 3 * torch.randn(shape, generator=generator)
    logits = teacher + torch.randn(shape, generator=generator)
    teacher[0, 1], logits[1, -1], teacher[1, -1] = 200.0, 300.0, 290.0
    logits[2] = teacher[2]
    logits, teacher = logits.to(DTYPES[dtype]), teacher.to(DTYPES[dtype])
    wide, wide_teacher = logits.double(), teacher.double()
    p, q = wide_teacher.softmax(-1), wide.softmax(-1)
    expected = (p * (wide_teacher.log_softmax(-1) - wide.log_softmax(-1))).sum(-1)
    with monkeypatch.context() as patch:
        poison_empty(patch)
        kl, gradient = training.kl_and_gradient(*on_device(logits, teacher))
    torch.testing.assert_close(kl.cpu().double(), expected, rtol=1e-5, atol=2e-5)
    tolerance = 1e-6 if dtype == "fp32" else 2e-3
    assert gradient.dtype == DTYPES[dtype]
    torch.testing.assert_close(gradient.cpu().double(), (q - p) / shape[0], rtol=0, atol=tolerance)
    assert float(gradient[2].abs().max()) < 1e-7 and abs(float(kl[2])) < 1e-5  # two sums, each rounded as it likes


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_bad_logits_are_not_hidden() -> None:
    """Oracle: IEEE 754: a NaN or infinite logit makes its row's KL NaN or infinite, as the check of losses expects."""
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(2, 40)
        logits[1, 7] = bad
        kl, _ = training.kl_and_gradient(*on_device(logits, torch.zeros(2, 40)))
        assert kl.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(3, 7, 50), (2, 4096), (1, 5000), (9, 256)])
def test_norms(shape: tuple[int, ...], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: autograd of the formula in float64. Rows of less than a tile, of one and of more; rows that a program
    does not fill; the same bits again."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator).mul(3).to(DTYPES[dtype])
    gain = torch.rand(shape[-1], generator=generator) + 0.5
    grad = torch.randn(shape, generator=generator).to(DTYPES[dtype])
    wide, wide_gain = (t.double().requires_grad_() for t in (x, gain))
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * wide_gain
    expected.backward(grad.double())
    assert wide.grad is not None and wide_gain.grad is not None
    with monkeypatch.context() as patch:
        poison_empty(patch)
        y = training.rms_norm(*on_device(x, gain), 1e-6, torch.float32)
        found, again = (training.rms_norm_gradients(*on_device(grad, x, gain), 1e-6) for _ in range(2))
    assert y.dtype == torch.float32 and found[0].dtype == x.dtype and found[1].dtype == torch.float32
    torch.testing.assert_close(y.cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    last_bit = 1e-5 if dtype == "fp32" else 2**-9 if dtype == "fp16" else 2**-6
    torch.testing.assert_close(found[0].cpu().double(), wide.grad, rtol=last_bit, atol=last_bit)
    torch.testing.assert_close(found[1].cpu().double(), wide_gain.grad, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


class _OnePlus(torch.nn.Module):
    """Gemma's norm: another function of the same weight and epsilon."""

    def __init__(self) -> None:
        super().__init__()
        self.eps, self.weight = 1e-6, torch.nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (8,), 1 + self.weight, self.eps)


class _Gated(torch.nn.RMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x) if gate is None else super().forward(x) * gate


def test_only_rms_norms_are_replaced() -> None:
    """Oracle: modules that compute the formula and others that nearly do; their own outputs and gradients."""
    plain = torch.nn.RMSNorm(8, eps=1e-5)
    others = [torch.nn.LayerNorm(8), _OnePlus(), _Gated(8, eps=1e-5), torch.nn.Linear(8, 8)]
    silent, small = torch.nn.RMSNorm(8, eps=1e-5), torch.nn.LayerNorm(8, bias=False)
    torch.nn.init.zeros_(silent.weight)
    torch.nn.init.constant_(small.weight, 5e-5)
    unasked = [torch.nn.BatchNorm2d(8), torch.nn.InstanceNorm2d(8, affine=True), silent, small]
    assert all(rms_epsilon(m) is None for m in (*unasked, torch.nn.RMSNorm(8, eps=1e-5, device="meta")))
    model = torch.nn.Sequential(plain, *others).to(DEVICE)
    torch.nn.init.uniform_(plain.weight, 0.5, 2)
    assert rms_epsilon(plain) == 1e-5 and all(rms_epsilon(m) is None for m in others)
    x = torch.linspace(-1, 2, 48, device=DEVICE).view(2, 3, 8)

    def run() -> list[Tensor]:
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        return [y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters())]  # type: ignore[list-item, union-attr]

    expected = run()
    with fused_norms(model) as count:
        assert count == 1 and "forward" in vars(plain)
        found = run()
    assert "forward" not in vars(plain)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_norms_under_autocast_come_in_its_dtype() -> None:
    """Oracle: torch's bfloat16 of the float32 result."""
    norm = torch.nn.RMSNorm(16, eps=1e-5).to(DEVICE)
    x = torch.linspace(-1, 2, 48, device=DEVICE).view(3, 16)
    expected = norm(x)
    with fused_norms(norm), torch.autocast(DEVICE, torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected.float(), rtol=2**-7, atol=0)


def test_twins_and_kernels_take_the_same_arguments() -> None:
    """Oracle: both signatures: `distill` hands a twin's arguments on to the kernel of its name."""
    for name in ("dense_weight", "weight_gradients", "kl_and_gradient"):
        twin, kernel = (list(signature(getattr(m, name)).parameters.values()) for m in (distill, training))
        assert [(p.name, p.kind, p.default) for p in twin] == [(p.name, p.kind, p.default) for p in kernel]


def test_kernels_run_where_their_operands_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand: the device is changed for operands on another GPU than the current one, and for no others."""
    entered: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    sum_of = common.on_operand_device(lambda first, more, *, last: f"{first.device} {more} {last}")
    for device in ("cpu", "cuda:0", "cuda:1"):
        operand: Any = SimpleNamespace(device=torch.device(device))
        assert sum_of(operand, 2, last=3) == f"{device} 2 3"
    assert entered == [torch.device("cuda:1")]
