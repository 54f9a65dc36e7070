"""What a one-token decode step computes between its matmuls, in Triton: RMSNorm with the residual sum, and SiLU.

    rms_norm    one program a row of x [M, K]: the sum x + residual, rounded to the stream's dtype, its mean square and
                the norm in one pass; rows may be gathered by token id (the embedding)
    silu_mul    one program for BLOCK columns of a row of gate_up [M, 2 F]

Attention is in `decode_attention`. Math in float32. `pdl`: see `compress.kernels.pdl`.

Twins: `compress.kernels.decode_reference`. Runs under TRITON_INTERPRET=1 on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compress.errors import ConfigError, EnvironmentProblem
from compress.kernels import pdl as pdl_launch
from compress.kernels.common import device_problem

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SILU_BLOCK = 512


@triton.jit
def _rms_norm_kernel(
    x_ptr, ids_ptr, residual_ptr, weight_ptr, out_ptr, h_ptr, K, eps,
    HAS_IDS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Row h of x (+ residual), stored where it is new, and h / rms(h) * weight. Twin: `decode_reference.rms_norm`."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < K
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    source = row
    if HAS_IDS:
        source = tl.load(ids_ptr + row)
    h = tl.load(x_ptr + source * K + cols, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        h = (h.to(tl.float32) + tl.load(residual_ptr + row * K + cols, mask=mask, other=0.0).to(tl.float32)).to(h.dtype)
    if HAS_IDS or HAS_RESIDUAL:
        tl.store(h_ptr + row * K + cols, h, mask=mask)
    h = h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, axis=0) / K + eps)
    tl.store(out_ptr + row * K + cols, (h * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr, out_ptr, F, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """out [M, F] = silu(gate) * up. Twin: `decode_reference.silu_mul`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    if INTERLEAVED:
        at, step = cols // 8 * 16 + cols % 8, 8
    else:
        at, step = cols, F
    gate = tl.load(gate_up_ptr + row * 2 * F + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * F + step + at, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * F + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, ids: Tensor | None = None, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """(RMSNorm(h) * weight, h) with h = x, x + residual, or x[ids]. Arguments and twin: `decode_reference.rms_norm`.

    Raises:
        ConfigError: a dtype, shape, stride or device that does not fit.
        EnvironmentProblem: the device cannot run the kernel.
    """
    k = x.shape[-1]
    m = x.shape[0] if ids is None else ids.shape[0]
    check_operands(x, {"weight": (weight, (k,)), "residual": (residual, (m, k)), "ids": (ids, (m,))})
    if ids is not None and residual is not None:
        raise ConfigError("ids and residual were both given; gathered rows start a residual stream")
    out = torch.empty(m, k, dtype=x.dtype, device=x.device)
    h = residual if residual is not None else (x if ids is None else torch.empty_like(out))
    block = triton.next_power_of_2(k)
    _rms_norm_kernel[(m,)](
        x, ids, residual, weight, out, h, k, eps, HAS_IDS=ids is not None, HAS_RESIDUAL=residual is not None,
        BLOCK=block, num_warps=max(1, min(block // 512, 16)), **pdl_launch.options(pdl, x.device),
    )  # fmt: skip
    return out, h


def silu_mul(gate_up: Tensor, interleaved: bool = False, pdl: bool = False) -> Tensor:
    """silu(gate) * up, gate_up [M, 2 F] -> [M, F]. Twin: `decode_reference.silu_mul`. Raises as `rms_norm`."""
    check_operands(gate_up, {})
    m, f = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.shape[1] != 2 * f:
        raise ConfigError(f"gate_up is {tuple(gate_up.shape)}; it holds gate and up, so its columns must be even")
    out = torch.empty(m, f, dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul_kernel[(triton.cdiv(f, _SILU_BLOCK), m)](
        gate_up,
        out,
        f,
        INTERLEAVED=interleaved,
        BLOCK=_SILU_BLOCK,
        num_warps=2,
        **pdl_launch.options(pdl, gate_up.device),
    )
    return out


def check_operands(x: Tensor, others: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """x is a matrix the kernels take; every other operand has the shape beside it; all contiguous, on one device.

    Raises:
        ConfigError, EnvironmentProblem: they are not, or the device cannot run Triton's kernels.
    """
    problem = device_problem(x.device)
    if problem:
        raise EnvironmentProblem(f"the decode kernels cannot run: {problem}; use compress.kernels.decode_reference")
    if x.dtype not in _DTYPES or x.dim() != 2:
        raise ConfigError(f"x is {x.dtype} {tuple(x.shape)}; the decode kernels take a matrix of {_DTYPES}")
    for name, (t, shape) in {"x": (x, tuple(x.shape)), **others}.items():
        if t is None:
            continue
        if tuple(t.shape) != shape:
            raise ConfigError(f"{name} is {tuple(t.shape)}, expected {shape} beside x {tuple(x.shape)}")
        if not t.is_contiguous():
            raise ConfigError(f"{name} with strides {t.stride()} is not contiguous; call .contiguous() first")
        if t.device != x.device:
            raise ConfigError(f"{name} is on {t.device} and x on {x.device}; move them to one device")
