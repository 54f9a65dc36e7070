"""This project's W4A16 path for a timing harness that loads PEERS from a file and gives each class one problem `P`:

    P.n, P.k, P.g     N, K and the group size        P.q      codes uint8 [N, K], 0..15, zero point 8
    P.s, P.sb         scale [N, K/g] in float16 and in bfloat16
    P.copies(tuple)   distinct copies of a tuple of tensors to rotate over

`prepare(P)` -> such copies; `run(one copy, x [M, K])` -> y [M, N], fit for a CUDA graph; `ok(m)`: whether M is taken.
What runs is what a QuantLinear with backend=auto runs, at every M. Needs nothing but this package on the path.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor


class Ours:
    """float16 activations."""

    name = "compress fp16"
    dtype = torch.float16

    def setup(self) -> None:
        from compress.kernels import contenders, w4a16

        self.linear, self.pack = contenders.auto_linear, w4a16.pack_kernel_layout

    def ok(self, m: int) -> bool:
        return m >= 1

    def prepare(self, P: Any) -> Any:
        scale = P.s if self.dtype is torch.float16 else P.sb
        self.weight = self.pack(P.q, scale, None)
        fields = {f.name: getattr(self.weight, f.name) for f in dataclasses.fields(self.weight)}
        self.held = [name for name, value in fields.items() if isinstance(value, Tensor)]
        return P.copies(tuple(fields[name] for name in self.held))

    def run(self, w: tuple[Tensor, ...], x: Tensor) -> Tensor:
        tensors: dict[str, Any] = dict(zip(self.held, w, strict=True))
        return self.linear(x, dataclasses.replace(self.weight, **tensors))


class OursBfloat16(Ours):
    """bfloat16 activations."""

    name = "compress bf16"
    dtype = torch.bfloat16


PEERS = [Ours, OursBfloat16]
