"""What end-to-end tuning does beside matrix products, each in one pass over its memory (`compress.methods.distill`).

In PyTorch a weight that is rounded anew in every step takes some twenty small kernels in forward and backward pass, and
the loss a dozen passes over tables [tokens, vocabulary] in float32. Here:

    dense_weight        u, scale -> clamp(round(u), low, high) * scale                      one read, one write
    weight_gradients    gradient of the dense weight, u, scale -> of scale, and of u        two reads, one write
    kl_and_gradient     logits, teacher's -> KL of each row, gradient of their mean         two reads (the second from
                                                                                            the cache), one write
    rms_norm            x, gain -> x / rms(x) * gain                                        one read, one write
    rms_norm_gradients  gradient of that, x, gain -> of x, and of gain                      two reads, one write

Twins: the same functions of `compress.methods.distill` on a CPU, and what autograd makes of a norm. Groups are E
consecutive elements of a row-major weight. No atomics: the same bits every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels import common


@triton.jit
def _steps(u, low, high):  # type: ignore[no-untyped-def]
    """u rounded, half to even, and clamped; and before it was clamped. |u| is far below 2^22."""
    rounded = (u + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(rounded, low), high), rounded


@triton.jit
def _dense_kernel(u_ptr, scale_ptr, low_ptr, high_ptr, out_ptr, size, E, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    g = i // E
    low, high = tl.load(low_ptr + g, mask=mask, other=0.0), tl.load(high_ptr + g, mask=mask, other=0.0)
    steps, _ = _steps(tl.load(u_ptr + i, mask=mask, other=0).to(tl.float32), low, high)
    w = steps * tl.load(scale_ptr + g, mask=mask, other=0.0)
    tl.store(out_ptr + i, w.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradients_kernel(  # type: ignore[no-untyped-def]
    dense_ptr, u_ptr, scale_ptr, low_ptr, high_ptr, grad_u_ptr, grad_scale_ptr, groups, E,
    WITH_U: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    g_mask = g < groups
    low = tl.load(low_ptr + g, mask=g_mask, other=0.0)[:, None]
    high = tl.load(high_ptr + g, mask=g_mask, other=0.0)[:, None]
    scale = tl.load(scale_ptr + g, mask=g_mask, other=0.0)[:, None]
    total = tl.zeros((GROUPS,), tl.float32)
    for start in range(0, E, BLOCK):
        e = start + tl.arange(0, BLOCK)
        at = g[:, None] * E + e[None, :]
        mask = g_mask[:, None] & (e < E)[None, :]
        dense = tl.load(dense_ptr + at, mask=mask, other=0.0).to(tl.float32)
        steps, rounded = _steps(tl.load(u_ptr + at, mask=mask, other=0).to(tl.float32), low, high)
        total += tl.sum(dense * steps, axis=1)
        if WITH_U:
            tl.store(grad_u_ptr + at, tl.where(steps == rounded, dense * scale, 0.0), mask=mask)
    tl.store(grad_scale_ptr + g, total, mask=g_mask)


@triton.jit
def _kl_kernel(logits_ptr, teacher_ptr, gradient_ptr, kl_ptr, V, share, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row: sums of both distributions relative to their largest logit so far, then the gradient."""
    LEAST: tl.constexpr = -60000.0  # of all three dtypes; exp of it is 0, and no infinity is subtracted from another
    row = tl.program_id(0).to(tl.int64)
    at_q, at_p, at_g = logits_ptr + row * V, teacher_ptr + row * V, gradient_ptr + row * V
    max_p = tl.full((), float("-inf"), tl.float32)
    max_q = max_p
    sum_p = tl.zeros((), tl.float32)
    sum_q = sum_p
    gap = sum_p  # of p (log p - log q), but for the sums
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        mask = v < V
        a = tl.load(at_p + v, mask=mask, other=LEAST).to(tl.float32)
        b = tl.load(at_q + v, mask=mask, other=LEAST).to(tl.float32)
        top_p, top_q = tl.maximum(max_p, tl.max(a, 0)), tl.maximum(max_q, tl.max(b, 0))
        p = tl.exp(a - top_p)
        less = tl.exp(max_p - top_p)
        sum_p = sum_p * less + tl.sum(p, 0)
        gap = gap * less + tl.sum(p * (a - b), 0)
        sum_q = sum_q * tl.exp(max_q - top_q) + tl.sum(tl.exp(b - top_q), 0)
        max_p, max_q = top_p, top_q
    tl.store(kl_ptr + row, gap / sum_p + (max_q + tl.log(sum_q)) - (max_p + tl.log(sum_p)))
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        mask = v < V
        a = tl.load(at_p + v, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at_q + v, mask=mask, other=0.0).to(tl.float32)
        difference = tl.exp(b - max_q) / sum_q - tl.exp(a - max_p) / sum_p
        tl.store(at_g + v, (difference * share).to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_rows(x_ptr, rows, H, eps, r, h):  # type: ignore[no-untyped-def]
    """Some rows of x divided by their root mean square, and what that multiplied them by."""
    mask = (r < rows)[:, None] & (h < H)[None, :]
    x = tl.load(x_ptr + r.to(tl.int64)[:, None] * H + h[None, :], mask=mask, other=0.0).to(tl.float32)
    by = tl.rsqrt(tl.sum(x * x, axis=1) / H + eps)[:, None]
    return x * by, by, mask


@triton.jit
def _norm_kernel(x_ptr, gain_ptr, out_ptr, rows, H, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    r, h = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    unit, _, mask = _norm_rows(x_ptr, rows, H, eps, r, h)
    y = unit * tl.load(gain_ptr + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + r.to(tl.int64)[:, None] * H + h[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_gradients_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, gain_ptr, grad_x_ptr, grad_gain_ptr, rows, H, eps, per_program,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """per_program rows: their gradients, and the sum over them of the gain's."""
    h = tl.arange(0, BLOCK)
    gain = tl.load(gain_ptr + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    first = tl.program_id(0) * per_program
    for start in range(0, per_program, ROWS):
        r = first + start + tl.arange(0, ROWS)
        unit, by, mask = _norm_rows(x_ptr, rows, H, eps, r, h)
        at = r.to(tl.int64)[:, None] * H + h[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total += grad * unit
        grad = grad * gain
        grad = (grad - unit * (tl.sum(grad * unit, axis=1) / H)[:, None]) * by
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_gain_ptr + tl.program_id(0).to(tl.int64) * H + h, tl.sum(total, axis=0), mask=h < H)


@common.on_operand_device
def dense_weight(u: Tensor, scale: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """u [N, K] of any dtype; scale, low, high float32 [N', G], one for each N K / (N' G) elements -> `dtype` [N, K].

    Raises:
        EnvironmentProblem: the device cannot run Triton kernels.
    """
    common.check_device("training", u.device)
    out = torch.empty(u.shape, dtype=dtype, device=u.device)
    block = 1024
    _dense_kernel[(triton.cdiv(u.numel(), block),)](
        u, scale.contiguous(), low.contiguous(), high.contiguous(), out, u.numel(), u.numel() // scale.numel(),
        BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


@common.on_operand_device
def weight_gradients(
    dense: Tensor, u: Tensor, scale: Tensor, low: Tensor, high: Tensor, with_u: bool
) -> tuple[Tensor, Tensor | None]:
    """From the gradient of `dense_weight` [N, K], in any float dtype, those of scale, float32 [N', G], and of u,
    float32 [N, K], which passes the rounding but not the clamping. Others as there."""
    common.check_device("training", u.device)
    grad_scale = torch.empty_like(scale)
    grad_u = torch.empty(u.shape, dtype=torch.float32, device=u.device) if with_u else None
    elements = u.numel() // scale.numel()
    block = min(1024, triton.next_power_of_2(elements))
    per_program = max(1, 1024 // block)
    _gradients_kernel[(triton.cdiv(scale.numel(), per_program),)](
        dense.contiguous(), u, scale.contiguous(), low.contiguous(), high.contiguous(), grad_u, grad_scale,
        scale.numel(), elements, WITH_U=with_u, GROUPS=per_program, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return grad_scale, grad_u


@common.on_operand_device
def kl_and_gradient(logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || model) in nats of each row, float32 [n], for logits [n, V] of any float dtypes; and the gradient of
    their mean, [n, V] in that of `logits`."""
    common.check_device("training", logits.device)
    n, v = logits.shape
    kl = torch.empty(n, dtype=torch.float32, device=logits.device)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _kl_kernel[(n,)](
        logits.contiguous(), teacher.contiguous(), gradient, kl, v, 1.0 / n,
        BLOCK=min(4096, triton.next_power_of_2(v)), num_warps=8,
    )  # fmt: skip
    return kl, gradient


_NORM_TILE = 4096  # elements of rows that a program works on at a time, where a row is no longer
_NORM_PROGRAMS = 512  # of the backward pass at most: each leaves a sum over its rows


def _norm_tile(width: int) -> tuple[int, int]:
    """Rows and columns of a program's tile."""
    block = triton.next_power_of_2(width)
    return max(1, _NORM_TILE // block), block


@common.on_operand_device
def rms_norm(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x [..., H] / sqrt(mean(x^2) + eps) * gain [H], computed in float32, in `dtype`."""
    common.check_device("training", x.device)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows, block = _norm_tile(x.shape[-1])
    n = x.numel() // x.shape[-1]
    _norm_kernel[(triton.cdiv(n, rows),)](
        x.contiguous(), gain, out, n, x.shape[-1], eps, ROWS=rows, BLOCK=block, num_warps=8
    )
    return out


@common.on_operand_device
def rms_norm_gradients(grad: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """From the gradient of `rms_norm` [..., H], in any float dtype, those of x, in x's dtype, and of gain, float32."""
    common.check_device("training", x.device)
    width = x.shape[-1]
    n = x.numel() // width
    rows, block = _norm_tile(width)
    per_program = triton.cdiv(triton.cdiv(n, _NORM_PROGRAMS), rows) * rows
    programs = triton.cdiv(n, per_program)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_gain = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _norm_gradients_kernel[(programs,)](
        grad.contiguous(), x.contiguous(), gain, grad_x, grad_gain, n, width, eps, per_program, ROWS=rows, BLOCK=block,
        num_warps=8,
    )  # fmt: skip
    return grad_x, grad_gain.sum(0)
