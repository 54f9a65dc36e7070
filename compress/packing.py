"""Codes <-> packed words: every on-disk integer layout, drawn once.

compressed-tensors `pack-quantized`, weight_packed int32 [N, ceil(K * bits / 32)], little end first. Element i
of a row occupies bits i*bits .. (i+1)*bits - 1 of the row seen as one long bit string:

    bits=4   word 0:  | q7 | q6 | q5 | q4 | q3 | q2 | q1 | q0 |      element i in word i//8, shift 4*(i%8)
             bit      31                                     0
    bits=3   word 0:  |q10 (2 low bits)| q9 | ... | q1 | q0 |        element 10 straddles words 0 and 1
             word 1:  | ...                  | q11 | q10 (high bit) |

The stored value is the unsigned code: signed value + 2^(bits-1), which is what `QuantizedWeight.codes` holds.
Zero points of asymmetric schemes are packed the same way along N: int32 [ceil(N * bits / 32), G].
3-bit words are dense, as current compressed-tensors writes them; older versions wasted two bits a word
under the same format name, so 3-bit artifacts need a current reader (2, 4 and 8 bits agree everywhere).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import ArtifactError

_WORD = 32


def packed_words(count: int, bits: int) -> int:
    """int32 words that hold `count` fields of `bits` bits."""
    return -(-count * bits // _WORD)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] with values < 2^bits -> int32 [R, ceil(C * bits / 32)] (layout above). Pad bits are 0."""
    rows, cols = codes.shape
    if codes.dtype is not torch.uint8:
        raise TypeError(f"codes must be uint8, not {codes.dtype}")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
    words = packed_words(cols, bits)
    if _WORD % bits == 0:  # whole fields in every word: 2, 4, 8 bits
        per_word = _WORD // bits
        padded = torch.zeros(rows, words * per_word, dtype=torch.int32, device=codes.device)
        padded[:, :cols] = codes.int()
        fields = padded.view(rows, words, per_word)
        packed = fields[:, :, 0].clone(memory_format=torch.contiguous_format)
        for i in range(1, per_word):
            packed |= fields[:, :, i] << (bits * i)
        return packed
    # fields straddle words: go through 64-bit accumulators, a period of lcm(bits, 32) bits at a time
    packed64 = torch.zeros(rows, words + 1, dtype=torch.int64, device=codes.device)
    for i in range(_WORD):  # elements i, i+32, i+64, ... sit at the same shift, `bits` words apart
        part = codes[:, i::_WORD].long()
        if part.shape[1] == 0:
            continue
        word, shift = divmod(i * bits, _WORD)
        value = part << shift
        last = word + (part.shape[1] - 1) * bits + 1
        packed64[:, word:last:bits] |= value & 0xFFFFFFFF
        packed64[:, word + 1 : last + 1 : bits] |= value >> _WORD
    return _as_int32(packed64[:, :words])


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 [R, W] -> uint8 [R, count], the inverse of `pack_rows`.

    Raises:
        ArtifactError: W is not the number of words that `count` fields need.
    """
    rows, words = packed.shape
    if packed.dtype is not torch.int32 or words != packed_words(count, bits):
        raise ArtifactError(
            f"packed tensor is {packed.dtype} with {words} words a row, but {count} values of {bits} bits "
            f"need int32 with {packed_words(count, bits)}"
        )
    codes = torch.empty(rows, count, dtype=torch.uint8, device=packed.device)
    mask = 2**bits - 1
    if _WORD % bits == 0:
        per_word = _WORD // bits
        for i in range(per_word):
            part = (packed >> (bits * i)) & mask
            codes[:, i::per_word] = part[:, : codes[:, i::per_word].shape[1]].to(torch.uint8)
        return codes
    wide = torch.zeros(rows, words + 1, dtype=torch.int64, device=packed.device)
    wide[:, :words] = packed.long() & 0xFFFFFFFF
    for i in range(_WORD):
        n_fields = codes[:, i::_WORD].shape[1]
        if n_fields == 0:
            continue
        word, shift = divmod(i * bits, _WORD)
        last = word + (n_fields - 1) * bits + 1
        both = wide[:, word:last:bits] | (wide[:, word + 1 : last + 1 : bits] << _WORD)
        codes[:, i::_WORD] = ((both >> shift) & mask).to(torch.uint8)
    return codes


def _as_int32(words: Tensor) -> Tensor:
    """int64 holding unsigned 32-bit words -> int32 with the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
