"""CPU W4A16 through ATen's packed int4 matmul (`_weight_int4pack_mm_for_cpu`), and the inverse of its layout.

The op computes W = (code - 8) * scale + offset, so offset = (8 - zero) * scale. It multiplies scales and offsets
rounded to x's dtype and accumulates in float32: in bfloat16 the result is as far from the exact one as a dense
bfloat16 weight's. Constraints (torch 2.11 to 2.13): N a multiple of 16, groups of 32, 64, 128 or 256 inputs.
Only its bfloat16 form is vectorized; float32 and float16 run scalar code, 30 to 60 times slower (NOTES.md).

Its layout depends on the instruction set: rows in blocks of B = 64 (AVX-512) or 32, inside a block K columns
of B / 2 bytes, and which two rows share byte i differs. With AVX-512:

    byte i < 16 of a column:    | row i + 16 | row i      |          byte order of a block: [K, B / 2]
    byte i >= 16:               | row i + 32 | row i + 16 |          (rows 32 .. 63)

The op is cheap at few tokens and loses to a dense matmul at many, so large M needs the dense weight back and keeping
a second packed copy for that would double the memory. `row_order` therefore reads the order off the op itself, once
a process, by packing a block whose codes spell their own row number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from compress.errors import ConfigError, EnvironmentProblem
from compress.kernels.planar import CHUNK_ELEMENTS

GROUP_SIZES = (256, 128, 64, 32)
_PROBE_K = 32


def has_op() -> bool:
    return hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")


@cache
def row_order(rows: int) -> tuple[int, ...] | None:
    """Row held by slot s of a block of `rows` rows: slots are the low nibbles of bytes 0 .. rows/2-1, then the high.

    None when a block of that many rows is not [K, rows / 2] bytes (then it is not a block of this machine).
    """
    k = torch.arange(_PROBE_K, dtype=torch.int32).expand(rows, _PROBE_K)
    row = torch.arange(rows, dtype=torch.int32).unsqueeze(1).expand(rows, _PROBE_K)
    digits = [_slots(_pack_op(digit.contiguous()), rows) for digit in (row % 16, row // 16, k % 16, k // 16)]
    row_of, k_of = digits[0] + 16 * digits[1], digits[2] + 16 * digits[3]
    straight = torch.equal(k_of, torch.arange(_PROBE_K).unsqueeze(1).expand_as(k_of))
    if not straight or not torch.equal(row_of, row_of[:1].expand_as(row_of)):
        return None
    return tuple(row_of[0].tolist())


@cache
def block_rows() -> int | None:
    """Rows of a full block on this machine, or None for a layout that this module cannot invert."""
    return next((rows for rows in (64, 32, 16) if row_order(rows) is not None), None)


def blocks_of(n: int) -> tuple[tuple[int, int], ...] | None:
    """(first row, rows) of every run of equal blocks: the full ones, then the tail. None: unknown layout."""
    block = block_rows()
    if block is None or n % 16 or (n % block and row_order(n % block) is None):
        return None
    return tuple((at, rows) for at, rows in ((0, n - n % block), (n - n % block, n % block)) if rows)


def _pack_op(codes: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)


def _slots(packed: Tensor, rows: int) -> Tensor:
    """uint8 bytes of blocks -> int64 codes [K * blocks, rows] in slot order."""
    nibbles = packed.reshape(-1, rows // 2)
    return torch.cat([nibbles & 15, nibbles >> 4], dim=1).long()


@dataclass
class CpuInt4Weight:
    """packed: uint8 [N, K/2] in the op's own order; scale_offset: float [G, N, 2], (scale, (8 - zero) * scale)."""

    packed: Tensor
    scale_offset: Tensor
    n: int
    k: int
    group_size: int


def pack(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> CpuInt4Weight:
    """Codes uint8 [N, K] with scale, zero [N, G] on the CPU -> the op's form for activations of `dtype`.

    Raises:
        ConfigError: N, K or the group size is outside what the op takes.
        EnvironmentProblem: this CPU's layout is not one that can be inverted.
    """
    n, k = codes.shape
    group_size = k // scale.shape[1]
    if n % 16 or group_size not in GROUP_SIZES:
        raise ConfigError(
            f"N={n}, group size {group_size}: the CPU int4 matmul needs N a multiple of 16 and groups of "
            f"{sorted(GROUP_SIZES)} inputs; use backend=auto"
        )
    if blocks_of(n) is None:
        raise EnvironmentProblem("the CPU int4 matmul packs weights in an unknown order here; use backend=auto")
    packed = _pack_op(codes.to(torch.int32).contiguous())
    exact = scale.float().t()
    offset = (8.0 - zero.float()).t() * exact
    return CpuInt4Weight(packed, torch.stack([exact, offset], dim=-1).to(dtype).contiguous(), n, k, group_size)


def int4_matmul(x: Tensor, weight: CpuInt4Weight) -> Tensor:
    """x [M, K] of the weight's dtype -> [M, N]. Twin: `reference.w4a16_linear`."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.contiguous(), weight.packed, weight.group_size, weight.scale_offset
    )


def dense_blocks(weight: CpuInt4Weight, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The dense weight in runs of rows: yields (first row, dense rows [R, K] in `dtype`)."""
    block, runs = block_rows(), blocks_of(weight.n)
    assert block is not None and runs is not None  # `pack` refuses layouts that are unknown here
    for start, count in runs:
        rows = block if count % block == 0 else count
        step = rows * max(1, CHUNK_ELEMENTS["cpu"] // (rows * weight.k))
        order = torch.tensor(row_order(rows))
        for at in range(start, start + count, step):
            yield at, _dense_rows(weight, at, min(at + step, start + count), order, dtype)


def _dense_rows(weight: CpuInt4Weight, at: int, stop: int, order: Tensor, dtype: torch.dtype) -> Tensor:
    rows, k = len(order), weight.k
    # [blocks, K, slots / 2] -> slots as rows; slot s of every block is row order[s]
    slots = weight.packed[at:stop].view(-1, k, rows // 2).transpose(1, 2).contiguous()
    codes = torch.cat([slots & 15, slots >> 4], dim=1).index_select(1, order.argsort())
    scale, offset = weight.scale_offset[:, at:stop].float().unbind(-1)
    w = codes.view(stop - at, -1, weight.group_size).to(torch.float32)
    w.sub_(8.0).mul_(scale.t().unsqueeze(-1)).add_(offset.t().unsqueeze(-1))
    return w.view(stop - at, k).to(dtype)
