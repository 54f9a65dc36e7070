"""What `bench` times on a GPU for weights of 8, 3 and 2 bits, as `contenders.gpu_contenders` does for 4.

int8: 8-bit weights with one scale a row, and activations rounded to 8 bits a row; rounding and scales are part of every
time. Of symmetric ones cuBLAS has an int8 matmul.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.kernels import timing, w8a8, wna16, wna16_layout
from compress.kernels.choose import Backend, choose_backend, hopper_kernels
from compress.kernels.contenders import Contender, dense_contenders, quantized_bits, zero_of
from compress.kernels.problem import Problem
from compress.quant import QuantScheme

# of ||y|| for normally distributed x, whose rounding alone costs about 0.01
MAX_ERROR_W8A8 = 0.03


def gpu_contenders(p: Problem, dtype: torch.dtype, int8: bool = False, paths: bool = False) -> dict[str, Contender]:
    """cuBLAS first: it is the baseline. paths: also the two that "ours" chooses from, each at every M."""
    return dense_contenders(p, dtype) | (_int8_rows(p, dtype) if int8 else _weight_only_rows(p, dtype, paths))


def _int8_rows(p: Problem, dtype: torch.dtype) -> dict[str, Contender]:
    name, bits = str(dtype).removeprefix("torch."), quantized_bits(p)
    copies = timing.rotating_copies(w8a8.pack(p.codes, p.scale.to(dtype), zero_of(p)))
    rows = {f"ours w8a8 {name}": Contender.of(dtype, copies, lambda w, x: w8a8.matmul(x, w), "ours", bits)}
    if p.symmetric:
        rows = {f"int8 cuBLAS {name}": Contender.of(dtype, copies, _int8_cublas, "peer", bits)} | rows
    for contender in rows.values():
        contender.max_error = MAX_ERROR_W8A8
    return rows


def _weight_only_rows(p: Problem, dtype: torch.dtype, paths: bool) -> dict[str, Contender]:
    name, bits = str(dtype).removeprefix("torch."), quantized_bits(p)
    packed = timing.rotating_copies(wna16_layout.pack(p.codes, p.scale.to(dtype), zero_of(p), p.bits))
    rows = {f"ours w{p.bits}a16 {name}": Contender.of(dtype, packed, _auto_linear, "ours", bits)}
    if paths:
        rows |= {
            f"  fused kernel {name}": Contender.of(dtype, packed, lambda w, x: wna16.matmul(x, w), "path", bits),
            f"  dequant + cuBLAS {name}": Contender.of(dtype, packed, _dense_linear, "path", bits),
        }
    return rows


def _auto_linear(weight: Any, x: Tensor) -> Tensor:
    """y = x W^T as QuantLinear computes it from a PackedWeight."""
    scheme = QuantScheme(bits=weight.bits, group_size=weight.group_size)
    shape = (weight.n, weight.k)
    if choose_backend("cuda", x.dtype, scheme, shape, x.shape[0], hopper_kernels(x.device)) is Backend.TRITON:
        return wna16.matmul(x, weight)
    return _dense_linear(weight, x)


def _dense_linear(weight: Any, x: Tensor) -> Tensor:
    return F.linear(x, wna16.dense(weight, x.dtype))


def _int8_cublas(weight: Any, x: Tensor) -> Tensor:
    """torch._int_mm between our rounding of x and a plain scaling; it needs more than 16 rows, so fewer are padded."""
    codes, x_scale, _ = w8a8.quantize_rows(x, weight.codes.shape[1])
    sums = torch._int_mm(F.pad(codes, (0, 0, 0, max(0, 32 - len(x)))), weight.codes.t())[: len(x)]
    return (sums * (x_scale[:, None] * weight.scale)).to(x.dtype)
