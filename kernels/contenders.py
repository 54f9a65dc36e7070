"""What `bench` compares: torch's own matmuls and every path of this project, on one `Problem`.

A contender is weights to rotate over and, for each M, one or more ways to call: the fastest right one counts.
`peers` has those of other packages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.kernels import cpu_int4, planar, timing
from compress.kernels.choose import Backend, choose_backend, hopper_kernels
from compress.kernels.problem import Problem
from compress.quant import QuantScheme

TINYGEMM_GROUPS = (32, 64, 128, 256)
Call = Callable[[Any, Tensor], Tensor]  # call(weight, x [M, K]) -> y [M, N] in x's dtype


@dataclass
class Contender:
    """dtype: of x and y. variants(m): (label, call) pairs. kind: "dense", "ours" or "peer".

    max_error: above which a result is wrong, where it is not that of `bench`.
    """

    dtype: torch.dtype
    weights: list[Any]
    variants: Callable[[int], list[tuple[str, Call]]]
    kind: str
    weight_bits: float
    max_error: float | None = None

    @classmethod
    def of(cls, dtype: torch.dtype, weights: list[Any], call: Call, kind: str, weight_bits: float) -> Contender:
        return cls(dtype, weights, lambda m: [("", call)], kind, weight_bits)


def quantized_bits(p: Problem) -> float:
    """Bits a weight that every kernel must read: the code, and a group's 16-bit scale and zero point."""
    return p.bits + (16 if p.symmetric else 16 + p.bits) / p.group


def zero_of(p: Problem) -> Tensor | None:
    """Zero points as the kernels' `pack` wants them."""
    return None if p.symmetric else p.zero


def auto_path(x: Tensor, n: int, group_size: int) -> Backend:
    """What QuantLinear with backend=auto takes for x [M, K] on its GPU; in the interpreter, as on one before Hopper."""
    scheme = QuantScheme(bits=4, group_size=group_size)
    return choose_backend("cuda", x.dtype, scheme, (n, x.shape[1]), x.shape[0], hopper_kernels(x.device))


def auto_linear(x: Tensor, weight: Any) -> Tensor:
    """y = x W^T as QuantLinear computes it from a KernelWeight: fused, or dequantized for cuBLAS."""
    from compress.kernels import dequant, w4a16

    if auto_path(x, weight.n, weight.group_size) is Backend.TRITON:
        return w4a16.matmul(x, weight)
    return F.linear(x, dequant.dense(weight, x.dtype))


def dense_contenders(p: Problem, dtype: torch.dtype) -> dict[str, Contender]:
    """cuBLAS in float16, the baseline, and in `dtype`."""
    rows = {}
    for dt in dict.fromkeys((torch.float16, dtype)):
        copies = timing.rotating_copies((p.dense(dt),))
        name = f"cuBLAS {str(dt).removeprefix('torch.')}"
        rows[name] = Contender.of(dt, copies, lambda w, x: F.linear(x, w[0]), "dense", 16)
    return rows


def gpu_contenders(p: Problem, dtype: torch.dtype, paths: bool = False) -> dict[str, Contender]:
    """4 bits, cuBLAS first. paths: also the two that "ours" chooses from, each at every M."""
    from compress.kernels import dequant, w4a16

    name, bits = str(dtype).removeprefix("torch."), quantized_bits(p)
    copies = timing.rotating_copies(w4a16.pack_kernel_layout(p.codes, p.scale.to(dtype), zero_of(p)))
    rows = dense_contenders(p, dtype)
    if p.codes.is_cuda and p.group in TINYGEMM_GROUPS:
        rows["tinygemm bfloat16"] = _tinygemm(p)
    rows[f"ours {name}"] = Contender.of(dtype, copies, lambda w, x: auto_linear(x, w), "ours", bits)
    if paths:
        rows |= {
            f"  fused kernel {name}": Contender.of(dtype, copies, lambda w, x: w4a16.matmul(x, w), "path", bits),
            f"  dequant + cuBLAS {name}": Contender.of(
                dtype, copies, lambda w, x: F.linear(x, dequant.dense(w, x.dtype)), "path", bits
            ),
        }
    return rows


def _tinygemm(p: Problem) -> Contender:
    """torch's own int4 matmul for GPUs: w = (code - 8) * scale + zero, scale and zero in bfloat16."""
    pairs = (p.codes[:, 0::2] << 4 | p.codes[:, 1::2]).contiguous()
    words = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    offset = (8 - p.zero.float()) * p.scale
    scale_zero = torch.stack([p.scale.t(), offset.t()], dim=-1).to(torch.bfloat16).contiguous()
    return Contender.of(
        torch.bfloat16,
        timing.rotating_copies((words, scale_zero)),
        lambda w, x: torch.ops.aten._weight_int4pack_mm(x, w[0], p.group, w[1]),
        "peer",
        quantized_bits(p),
    )


def _cpu_int4_takes(p: Problem) -> bool:
    fits = p.bits == 4 and p.group in cpu_int4.GROUP_SIZES and p.n % 16 == 0
    return fits and cpu_int4.has_op() and bool(cpu_int4.block_rows())


def cpu_contenders(p: Problem, dtype: torch.dtype) -> dict[str, Contender]:
    rows, bits = planar.pack(p.codes, p.bits), quantized_bits(p)
    result: dict[str, Contender] = {}
    for dt in dict.fromkeys((torch.float32, dtype)):
        name = str(dt).removeprefix("torch.")
        dense_bits = torch.finfo(dt).bits
        result[f"F.linear {name}"] = Contender.of(dt, [p.dense(dt)], lambda w, x: F.linear(x, w), "dense", dense_bits)
        result[f"dequant + F.linear {name}"] = Contender.of(
            dt,
            [rows],
            lambda w, x: planar.linear_by_blocks(x, p.n, planar.dense_blocks(w, p.scale, p.zero, p.bits, p.k, x.dtype)),
            "path",
            bits,
        )
        if _cpu_int4_takes(p):
            packed = cpu_int4.pack(p.codes, p.scale, p.zero, dt)
            result[f"int4 op {name}"] = Contender.of(
                dt, [packed], lambda w, x: cpu_int4.int4_matmul(x, w), "path", bits
            )
            result[f"int4 layout, dequant {name}"] = Contender.of(
                dt,
                [packed],
                lambda w, x: planar.linear_by_blocks(x, p.n, cpu_int4.dense_blocks(w, x.dtype)),
                "path",
                bits,
            )
    return result
