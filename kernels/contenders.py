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
from compress.kernels.choose import Backend, capability, choose_backend
from compress.kernels.problem import Problem
from compress.quant import QuantScheme

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
    """Bits a weight that every kernel must read: the code and a 16-bit scale a group."""
    return p.bits + 16 / p.group


def auto_path(x: Tensor, n: int, group_size: int) -> Backend:
    """What QuantLinear with backend=auto takes for x [M, K] on its GPU; in the interpreter, as on one before Hopper."""
    scheme = QuantScheme(bits=4, group_size=group_size)
    return choose_backend("cuda", x.dtype, scheme, (n, x.shape[1]), x.shape[0], capability(x.device))


def auto_linear(x: Tensor, weight: Any) -> Tensor:
    """y = x W^T as QuantLinear computes it from a symmetric KernelWeight: fused, or dequantized for cuBLAS."""
    from compress.kernels import dequant, w4a16

    if auto_path(x, weight.n, weight.group_size) is Backend.TRITON:
        return w4a16.matmul(x, weight)
    return F.linear(x, dequant.dense(weight, x.dtype))


def gpu_contenders(p: Problem, dtype: torch.dtype, paths: bool = False) -> dict[str, Contender]:
    """cuBLAS first: it is the baseline. paths: also the two that "ours" chooses from, each at every M."""
    from compress.kernels import dequant, w4a16

    name, bits = str(dtype).removeprefix("torch."), quantized_bits(p)
    copies = timing.rotating_copies(w4a16.pack_kernel_layout(p.codes, p.scale.to(dtype), None))
    pairs = (p.codes[:, 0::2] << 4 | p.codes[:, 1::2]).contiguous()
    tiny = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    scale_zero = torch.stack([p.scale.t(), torch.zeros_like(p.scale.t())], dim=-1).to(torch.bfloat16).contiguous()
    rows = {
        f"cuBLAS {name}": Contender.of(
            dtype, timing.rotating_copies((p.dense(dtype),)), lambda w, x: F.linear(x, w[0]), "dense", 16
        ),
        "tinygemm bfloat16": Contender.of(
            torch.bfloat16,
            timing.rotating_copies((tiny, scale_zero)),
            lambda w, x: torch.ops.aten._weight_int4pack_mm(x, w[0], p.group, w[1]),
            "peer",
            bits,
        ),
        f"ours {name}": Contender.of(dtype, copies, lambda w, x: auto_linear(x, w), "ours", bits),
    }
    if paths:
        rows |= {
            f"  fused kernel {name}": Contender.of(dtype, copies, lambda w, x: w4a16.matmul(x, w), "path", bits),
            f"  dequant + cuBLAS {name}": Contender.of(
                dtype, copies, lambda w, x: F.linear(x, dequant.dense(w, x.dtype)), "path", bits
            ),
        }
    return rows


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
        if p.bits == 4 and cpu_int4.has_op() and p.n % 16 == 0 and cpu_int4.block_rows():
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
