"""A random problem to check and time kernels on, with its answer in float64."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import ConfigError
from compress.kernels.reference import dequantize_weight

GROUP = 128
GUARD_ROWS = 128
_BLOCK_ELEMENTS = 2**26


@dataclass(frozen=True)
class Scheme:
    """What is compared or tuned: w4g128, w4g64-asym, w8-channel, w3g128, w8a8 (one scale a row), w8a8-asym.

    group: inputs that share a scale; None: the whole row. int8: activations are rounded to 8 bits as well.
    """

    bits: int = 4
    group: int | None = GROUP
    symmetric: bool = True
    int8: bool = False

    @classmethod
    def parse(cls, label: str) -> Scheme:
        """The inverse of `label`.

        Raises:
            ConfigError: another text, or a group size that no kernel takes.
        """
        found = re.fullmatch(r"w([2348])(?:g(\d+)|(-channel)|(a8))(-asym)?", label)
        if found is None or (found[4] and found[1] != "8"):
            raise ConfigError(f"scheme {label!r} is none: they read w4g128, w4g64-asym, w8-channel, w3g128 or w8a8")
        group = int(found[2]) if found[2] else None
        if group is not None and (group == 0 or group % 32):
            raise ConfigError(f"scheme {label!r}: the group size must be a multiple of 32, or -channel")
        return cls(int(found[1]), group, not found[5], bool(found[4]))

    @property
    def label(self) -> str:
        where = "a8" if self.int8 else ("-channel" if self.group is None else f"g{self.group}")
        return f"w{self.bits}{where}{'' if self.symmetric else '-asym'}"

    def problem(self, n: int, k: int, device: str) -> Problem:
        return Problem(n, k, device, self.group or k, self.symmetric, self.bits)


W4G128 = Scheme()


def schemes(text: str) -> list[Scheme]:
    """A list of labels on a command line, each once.

    Raises:
        ArgumentTypeError: one is no scheme's.
    """
    try:
        return list(dict.fromkeys(Scheme.parse(label) for label in text.split(",")))
    except ConfigError as problem:
        raise ArgumentTypeError(str(problem)) from problem


class Problem:
    """Codes uint8 [N, K] below 2^bits, scale float32 [N, G] exact in float16 and bfloat16, zero uint8 [N, G].

    symmetric: zero is 2^(bits - 1).
    """

    def __init__(self, n: int, k: int, device: str, group: int = GROUP, symmetric: bool = True, bits: int = 4) -> None:
        self.n, self.k, self.group, self.symmetric, self.device, self.bits = n, k, group, symmetric, device, bits
        gen = torch.Generator(device=device).manual_seed(n * 7 + k)
        self.codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device=device, generator=gen)
        scale = torch.rand((n, k // group), device=device, generator=gen) * 0.010 + 0.005
        self.scale = scale.to(torch.bfloat16).float()
        self.zero = torch.full((n, k // group), 2 ** (bits - 1), dtype=torch.uint8, device=device)
        if not symmetric:
            self.zero.random_(0, 2**bits, generator=gen)

    def _row_blocks(self) -> list[slice]:
        """Rows of W that are dequantized in float64 at a time: 0.5 GB at most."""
        rows = max(1, _BLOCK_ELEMENTS // self.k)
        return [slice(at, min(at + rows, self.n)) for at in range(0, self.n, rows)]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W [N, K], computed in float64 and rounded once."""
        out = torch.empty(self.n, self.k, dtype=dtype, device=self.device)
        for rows in self._row_blocks():
            out[rows] = dequantize_weight(self.codes[rows], self.scale[rows], self.zero[rows], torch.float64).to(dtype)
        return out

    def x(self, m: int, draw: int = 0) -> Tensor:
        """float32 [m, K] whose values are exact in bfloat16 and in float16; another `draw`, other values."""
        gen = torch.Generator(device=self.device).manual_seed(m + 7919 * draw)
        x = torch.randn((m, self.k), device=self.device, generator=gen)
        return x.to(torch.bfloat16).to(torch.float16).float()

    def reference(self, x: Tensor) -> Tensor:
        """x W^T in float64 [M, N]."""
        out = torch.empty(x.shape[0], self.n, dtype=torch.float64, device=self.device)
        x64 = x.double()
        for rows in self._row_blocks():
            w = dequantize_weight(self.codes[rows], self.scale[rows], self.zero[rows], torch.float64)
            out[:, rows] = x64 @ w.t()
        return out


def guarded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [M, K] in `dtype` with rows of NaN before and after it in memory: what reads beyond it shows."""
    m, k = x.shape
    buffer = torch.full((m + 2 * GUARD_ROWS, k), float("nan"), dtype=dtype, device=x.device)
    inner = buffer[GUARD_ROWS : GUARD_ROWS + m]
    return inner.copy_(x)
