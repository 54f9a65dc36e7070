"""Packed words, against their definition and the library whose format they are."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import ArtifactError
from compress.packing import pack_rows, packed_words, unpack_rows

BITS = (2, 3, 4, 8)
bits_and_shape = st.tuples(st.sampled_from(BITS), st.integers(1, 9), st.integers(1, 133), st.integers(0, 2**31))


def random_codes(bits: int, rows: int, cols: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, cols), generator=generator).to(torch.uint8)


@settings(max_examples=100, deadline=None)
@given(bits_and_shape)
def test_unpack_inverts_pack(case: tuple[int, int, int, int]) -> None:
    """Oracle: the identity."""
    bits, rows, cols, seed = case
    codes = random_codes(bits, rows, cols, seed)
    packed = pack_rows(codes, bits)
    assert packed.dtype is torch.int32 and packed.shape == (rows, packed_words(cols, bits))
    assert torch.equal(unpack_rows(packed, bits, cols), codes)


@settings(max_examples=60, deadline=None)
@given(bits_and_shape)
def test_same_words_as_compressed_tensors(case: tuple[int, int, int, int]) -> None:
    """Oracle: the installed compressed-tensors, in both directions and along both dimensions."""
    bits, rows, cols, seed = case
    codes = random_codes(bits, rows, cols, seed)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    packed = pack_rows(codes, bits)
    assert torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size((rows, cols))), signed)
    along_rows = pack_to_int32(signed, bits, packed_dim=0)
    assert torch.equal(pack_rows(codes.t().contiguous(), bits).t(), along_rows)
    assert torch.equal(unpack_rows(along_rows.t().contiguous(), bits, rows).t(), codes)


@pytest.mark.parametrize("bits", BITS)
def test_bit_string_of_a_row(bits: int) -> None:
    """Oracle: the drawing in the module's docstring, in Python integers: a row is sum(q_i << (i * bits)), cut into
    32-bit words from the low end."""
    codes = random_codes(bits, 1, 50, 1)
    row = sum(int(q) << (i * bits) for i, q in enumerate(codes[0].tolist()))
    words = [(row >> (32 * j)) & 0xFFFFFFFF for j in range(packed_words(50, bits))]
    assert [w & 0xFFFFFFFF for w in pack_rows(codes, bits)[0].tolist()] == words


@pytest.mark.parametrize("bits", BITS)
def test_extreme_codes_and_non_contiguous_input(bits: int) -> None:
    """Oracle: the identity, for all ones (every sign bit set), all zeros and a transposed view."""
    for value in (0, 2**bits - 1):
        codes = torch.full((3, 37), value, dtype=torch.uint8)
        assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, 37), codes)
    view = random_codes(bits, 37, 3, 2).t()
    assert torch.equal(unpack_rows(pack_rows(view, bits), bits, 37), view)


def test_wrong_input_is_refused() -> None:
    """Oracle: the documented errors: a code that would spill into its neighbour, another dtype, another width."""
    with pytest.raises(ValueError, match="code 8 does not fit 3 bits"):
        pack_rows(torch.tensor([[1, 8]], dtype=torch.uint8), 3)
    with pytest.raises(TypeError, match="uint8"):
        pack_rows(torch.zeros(1, 4, dtype=torch.int8), 4)
    packed = pack_rows(torch.zeros(2, 9, dtype=torch.uint8), 4)
    with pytest.raises(ArtifactError, match="need int32 with 3"):
        unpack_rows(packed, 4, 17)
    with pytest.raises(ArtifactError, match="int64"):
        unpack_rows(packed.long(), 4, 9)
