"""Packed weights of 8, 4, 3 and 2 bits for `wna16`: codes as fields of int16 words, one field a contiguous slice of K.

K is cut into tiles, a tile into F = 16 / b slices of S inputs, b being the bits of a field. A tile of a row is S words,
and field p of word j holds the code of k = tile * F * S + p * S + j (zero codes beyond K):

    8 bits, F = 2, S = 64 (32 if the group is no multiple of 64): tiles of 128 (64) inputs
        word j:  | code[S + j]          | code[j]              |
        bit       15                   8 7                    0
    4 bits, F = 4, S = 32: tiles of 128 inputs, the layout of `w4a16`
        word j:  | code[96 + j] | code[64 + j] | code[32 + j] | code[j] |
    2 bits, F = 8, S = 32: tiles of 256 inputs
        word j:  | code[224 + j] | ... | code[64 + j] | code[32 + j] | code[j] |
        bit       15 14                 5          4   3          2   1    0
    3 bits, F = 8, S = 32: the two low bits of every code as 2 bits, then 32 bytes whose bit p of byte j is the high
        bit of code[32 p + j]:   | 32 words of low bits | 16 words = 32 bytes of high bits |

    words [T, N, R] int16, R = S, or S + S / 2 for 3 bits: one program's rows of one tile are contiguous
    scale [G, N] float16/bfloat16/float32      zero [G, N] uint8, or None for a symmetric grid (zero = 2^(bits - 1))

Of 8 bits scale has a row more: the power of two at or above each row's scales, a unit for `w4a16_tiled`.

Why fields and slices: see `w4a16`. The 3-bit planes keep 3 bits a weight; fields of 3 bits in a word would waste one in
sixteen or straddle words. Group sizes are multiples of 32, or one group a row, which may have any K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from compress.errors import ConfigError
from compress.kernels.common import field_to_float, row_units, settle

FIELD_BITS = {8: 8, 4: 4, 3: 2, 2: 2}
ROWS_BEHIND_SCALES = {8: 1, 4: 0, 3: 0, 2: 0}  # the unit of each row, for `w4a16_tiled`
_HIGH_FIELDS = 8  # high bits of a 3-bit code in one byte


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the layout above. group_size counts inputs; for one group a row it is K padded to whole tiles."""

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    n: int
    k: int
    group_size: int

    @property
    def tile(self) -> int:
        return tile_k(self.words, self.bits)


def slice_k(words: Tensor, bits: int) -> int:
    """S: inputs in one field of the words of a tile."""
    return words.shape[2] * 2 // 3 if bits == 3 else words.shape[2]


def tile_k(words: Tensor, bits: int) -> int:
    """Inputs in a tile."""
    return slice_k(words, bits) * (16 // FIELD_BITS[bits])


def group_size_of(words: Tensor, scale: Tensor, bits: int, k: int) -> int:
    """The `group_size` of a PackedWeight with these words and scales."""
    groups = scale.shape[0] - ROWS_BEHIND_SCALES[bits]
    return k // groups if groups > 1 else words.shape[0] * tile_k(words, bits)


def layout_problem(words: Tensor, bits: int, k: int) -> str | None:
    """Why words cannot be a [N, k] weight of `bits`, or None."""
    if bits not in FIELD_BITS:
        return f"bits={bits} is not supported; use {sorted(FIELD_BITS)}"
    rows = {8: (32, 64), 4: (32,), 3: (48,), 2: (32,)}[bits]
    if words.dtype is not torch.int16 or words.dim() != 3 or words.shape[2] not in rows:
        return (
            f"words are {words.dtype} {tuple(words.shape)}, not int16 [T, N, {rows}]; build them with wna16_layout.pack"
        )
    tile = tile_k(words, bits)
    if -(-k // tile) != words.shape[0]:
        return f"K={k} does not fit the weight, which has {words.shape[0]} tiles of {tile} inputs"
    return None


def pack(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> PackedWeight:
    """Codes uint8 [N, K], scale float [N', G], zero uint8 [N', G] or None (symmetric) -> PackedWeight, on their device.

    Raises:
        ConfigError: bits without a layout, a code of more bits, or a group size that does not divide K or is not a
            multiple of 32 (unless G = 1, where any K will do).
    """
    n, k = codes.shape
    groups = scale.shape[1]
    if bits not in FIELD_BITS:
        raise ConfigError(f"bits={bits} is not supported; use {sorted(FIELD_BITS)}")
    if codes.dtype is not torch.uint8 or (codes.numel() and int(codes.max()) >= 2**bits):
        raise ConfigError(f"codes are {codes.dtype} with values up to {int(codes.max())}; W{bits} takes uint8 below "
                          f"{2**bits}")  # fmt: skip
    if groups == 0 or k % groups or (groups > 1 and (k // groups) % 32):
        raise ConfigError(
            f"K={k} in {groups} groups: the W{bits}A16 kernel takes groups of a multiple of 32 inputs, or one group a "
            "row; use another group_size or backend=auto"
        )
    width = FIELD_BITS[bits]
    size = 64 if bits == 8 and (groups == 1 or (k // groups) % 64 == 0) else 32
    fields = 16 // width
    tiles = -(-k // (size * fields))
    padded = F.pad(codes, (0, tiles * size * fields - k))
    sliced = padded.view(n, tiles, fields, size).transpose(0, 1)  # [T, N, field, word]
    words = _or_fields(sliced & (2**width - 1), width, torch.int16)
    if bits == 3:
        high = _or_fields(sliced >> width, 1, torch.uint8)
        words = torch.cat([words, high.view(torch.int16)], dim=2)
    group_size = k // groups if groups > 1 else tiles * size * fields

    def columns(t: Tensor) -> Tensor:
        return t.expand(n, groups).t().contiguous()

    scales = columns(scale)
    if ROWS_BEHIND_SCALES[bits]:
        scales = torch.cat([scales, row_units(scale).expand(n)[None]])
    weight = PackedWeight(words, scales, None if zero is None else columns(zero), bits, n, k, group_size)
    settle(codes.device)
    return weight


def _or_fields(fields: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[T, N, F, S] values below 2^width -> [T, N, S] of `dtype`, field p at bit width * p."""
    out = torch.zeros(*fields.shape[:2], fields.shape[3], dtype=dtype, device=fields.device)
    for p in range(fields.shape[2]):
        out |= fields[:, :, p].to(dtype) << (width * p)
    return out


def unpack(weight: PackedWeight) -> Tensor:
    """The inverse: codes uint8 [N, K]."""
    width, size = FIELD_BITS[weight.bits], slice_k(weight.words, weight.bits)
    low = weight.words[:, :, :size]
    fields = torch.stack([(low >> (width * p)) & (2**width - 1) for p in range(16 // width)], dim=2)
    if weight.bits == 3:
        high = weight.words[:, :, size:].contiguous().view(torch.uint8)
        fields |= torch.stack([((high >> p) & 1).to(torch.int16) << width for p in range(_HIGH_FIELDS)], dim=2)
    return fields.to(torch.uint8).transpose(0, 1).reshape(weight.n, -1)[:, : weight.k]


@triton.jit
def decode_slice(words, high, zero, p: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Slice p of a tile, [BN, S]: codes minus zero [BN, 1] float32, exact in DTYPE. MODE: see `field_to_float`.

    words int16 [BN, S]; high int8 [BN, S], the high bits of 3-bit codes (elsewhere ignored).
    """
    if BITS == 3:
        codes = ((words >> (2 * p)) & 3) | (((high.to(tl.int16) >> p) & 1) << 2)
        w = field_to_float(codes, zero, 0, 7, DTYPE, MODE)
    elif BITS == 8 and tl.bfloat16 == DTYPE and MODE != 2:
        w = _byte_to_bfloat16(words, zero, p, MODE)
    else:
        w = field_to_float(words, zero, BITS * p, (1 << BITS) - 1, DTYPE, MODE)
    return w


@triton.jit
def _byte_to_bfloat16(words, zero, p: tl.constexpr, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Byte p of int16 words [BN, S] minus zero [BN, 1] float32, in bfloat16: |difference| <= 255 is exact there.

    A byte does not fit bfloat16's 7 mantissa bits, so it goes through those of float32: 2^23 + byte, one exact
    subtraction each, and one instruction that rounds two of them.
    """
    if MODE == 0:
        w = (((words >> (8 * p)) & 255).to(tl.float32) - zero).to(tl.bfloat16)
    else:
        # prmt puts byte p of a word below the upper three bytes of 2^23
        first: tl.constexpr = 0x7650 + p
        second: tl.constexpr = 0x7652 + p
        asm: tl.constexpr = (
            f"{{.reg .b32 a, b; prmt.b32 a, $1, 0x4b000000, {first}; prmt.b32 b, $1, 0x4b000000, {second}; "
            "add.rn.f32 a, a, $2; add.rn.f32 b, b, $3; cvt.rn.bf16x2.f32 $0, b, a;}"
        )
        minus_base = -8388608.0 - zero
        w = tl.inline_asm_elementwise(asm, "=r,r,r,r", [words, minus_base], dtype=tl.bfloat16, is_pure=True, pack=2)
    return w
