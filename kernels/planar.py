"""Planar codes: the packed form that plain PyTorch can unpack at memory speed, on any device, for every bit width.

A row of K codes is cut into P = 8 / b planes of K / P consecutive codes, and byte j of the packed row holds
code j of every plane. Unpacking a plane is one shift and one mask over contiguous bytes into a contiguous slice,
which vectorizes; the on-disk order (`compress.packing`) would need strided stores.

    bits=4, K=256   byte j:  | code[128 + j] | code[j] |                                    128 bytes a row
                     bit     7             4 3         0
    bits=2, K=256   byte j:  | c[192+j] | c[128+j] | c[64+j] | c[j] |                        64 bytes a row
    bits=8          byte j:  | code[j] |                                                    256 bytes a row
    bits=3          the 2 low bits as bits=2, then the high bits as 8 planes of one bit      64 + 32 bytes a row

K is padded with zero codes to a multiple of 8; the pad is dropped on unpacking. Twin: `unpack(pack(codes)) == codes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# dense weight elements made at a time: on a CPU they stay in a core's L2 cache between the passes over them, elsewhere
# this bounds the scratch memory
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}

_PLANE_BITS = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def row_bytes(k: int, bits: int) -> int:
    """Bytes that hold one row of k codes."""
    return -(-k // 8) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [N, K] with values < 2^bits -> uint8 [N, row_bytes(K, bits)]."""
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -k % 8))
    width = padded.shape[1]
    out = torch.zeros(n, row_bytes(k, bits), dtype=torch.uint8, device=codes.device)
    at, shift = 0, 0
    for plane_bits in _PLANE_BITS[bits]:
        count = 8 // plane_bits
        step = width // count
        field = (padded >> shift) & (2**plane_bits - 1)
        for p in range(count):
            out[:, at : at + step] |= field[:, p * step : (p + 1) * step] << (plane_bits * p)
        at, shift = at + step, shift + plane_bits
    return out


def unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    """uint8 [N, row_bytes(k, bits)] -> uint8 [N, k]."""
    width = k + -k % 8
    codes = torch.empty(packed.shape[0], width, dtype=torch.uint8, device=packed.device)
    at, shift = 0, 0
    for plane_bits in _PLANE_BITS[bits]:
        count = 8 // plane_bits
        step = width // count
        source = packed[:, at : at + step]
        for p in range(count):
            field = source >> (plane_bits * p)
            if p < count - 1:
                field &= 2**plane_bits - 1
            target = codes[:, p * step : (p + 1) * step]
            if shift:
                target |= field << shift
            else:
                target.copy_(field)
        at, shift = at + step, shift + plane_bits
    return codes[:, :k]


def dequantize_rows(packed: Tensor, scale: Tensor, zero: Tensor, bits: int, k: int, dtype: torch.dtype) -> Tensor:
    """Planar rows -> dense weight rows, (code - zero) * scale in float32, rounded once to `dtype`.

    Args:
        packed: uint8 [R, row_bytes(k, bits)].
        scale, zero: float and uint8 [R or 1, G]; G divides k.

    Returns:
        [R, k] in `dtype`.
    """
    w = unpack(packed, bits, k).to(torch.float32).reshape(packed.shape[0], scale.shape[1], -1)
    w.sub_(zero.float().unsqueeze(-1)).mul_(scale.float().unsqueeze(-1))
    return w.view(packed.shape[0], k).to(dtype)


def dense_blocks(
    packed: Tensor, scale: Tensor, zero: Tensor, bits: int, k: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """`dequantize_rows` in runs of rows: yields (first row, dense rows [R, k])."""
    n, one = packed.shape[0], scale.shape[0] == 1
    step = max(1, CHUNK_ELEMENTS.get(packed.device.type, 2**26) // k)
    for at in range(0, n, step):
        rows = slice(at, at + step)
        s, z = (scale, zero) if one else (scale[rows], zero[rows])
        yield at, dequantize_rows(packed[rows], s, z, bits, k, dtype)


def linear_by_blocks(x: Tensor, n: int, blocks: Iterable[tuple[int, Tensor]], bias: Tensor | None = None) -> Tensor:
    """x [M, K] times dense blocks of rows that together make W [n, K] -> [M, n]; no dense W ever exists."""
    y = x.new_empty(x.shape[0], n)
    for at, w in blocks:
        stop = at + w.shape[0]
        part_bias = None if bias is None else bias[at:stop]
        if stop - at == n:
            return F.linear(x, w, part_bias)
        y[:, at:stop] = F.linear(x, w, part_bias)
    return y
