"""W4A16 for few tokens on Hopper (M <= 16): every warp of a program takes its own part of K.

The same layout as `w4a16`; the difference is who reads what. A program owns BLOCK_N rows of W for all of K. Its warps
split K, tile by tile, so that small weights fill the machine without a second kernel or a workspace:

                    K, tiles of 128                  warp 0   warp 1  ...  warp 7
          +----+----+----+----+----+----+----+----+
    W     |  0 |  1 |  2 |  3 |  4 |  5 |  6 |  7 |  8 ...       stage = WARPS tiles
          +----+----+----+----+----+----+----+----+
    acc   [WARPS, BLOCK_N, BLOCK_M] float32, summed over WARPS at the end in shared memory, in a fixed order

Words arrive by bulk tensor copies, WORDS stages ahead, in rows of 128 bytes (two rows of W), which each warp makes for
itself (`warp_copies`): until the sums at the end warps never wait for each other. x comes by 16-byte loads into
registers, STAGES ahead. Codes go into the MMA as they are, and scales and zero points into float32 sums of them and of
x, so that one instruction makes two operands (`gluon_parts.bare_codes`): few tokens are bound by instructions wherever
the words are there before x is. A thread's 8 neighbouring words are the left operand of `mma.sync` for k_width = 8, and
8 neighbouring inputs of x the right one, so nothing is shuffled. The weight's copies are started before the wait for
the previous kernel (programmatic dependent launch): weights do not depend on it, and as many stages as there are arrive
while that still computes.

A whole decode step (`compress.decoder`) is a chain of such products with little between them, and a launch costs as
much as what lies between. `decode_reference.Around` therefore lets a product do its neighbours' work:

    residual    h = y + residual leaves as the new residual stream, h * norm as the input of the next product, and the
                sums of squares of h, one a program, from which that product takes the mean
    squares     x is such an h * norm: y is divided by the root of the mean square, which is all that RMSNorm has left
    silu        rows 0 .. 7 of every 16 are gate, 8 .. 15 up (`interleave`): silu(gate) * up leaves

Twin: `compress.kernels.reference.w4a16_linear`, and `decode_reference.linear_around` with what is around it. Needs
compute capability 9.0, K a multiple of 128 and N of 8 (16 for silu).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mma_v2
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from compress.errors import ConfigError
from compress.kernels import common
from compress.kernels.choose import hopper_kernels, hopper_takes
from compress.kernels.decode_reference import Around, Stream
from compress.kernels.gluon_parts import (
    bare_codes,
    codes_unit,
    fields_of,
    parts_of,
    pdl_launch_next,
    pdl_wait,
    scale_group,
    without_zero,
)
from compress.kernels.w4a16 import KernelWeight
from compress.kernels.warp_copies import copy_piece, done_with_piece, open_slots, piece_units, wait_piece

RULE_MAX_TOKENS = 8
_WORDS_LAYOUT = gl.NVMMASharedLayout(128, 16, 3)


@dataclass(frozen=True)
class DecodeConfig:
    """Tile sizes of one launch. warps is the split of K; stages of `warps` tiles of x are in flight, and `words` times
    as many of words: those are there before the kernel before this one is done, as far as there is room. registers: of
    a thread at most; few let more programs in, many let ptxas place loads earlier."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    words: int = 1
    registers: int = 128


@gluon.constexpr_function
def _words_layout(warps, rows):  # type: ignore[no-untyped-def]
    """[warps, rows / 2, 64] int16, two rows of W side by side: lane 4 r + q has words 8 q .. + 7 of rows r, r + 8."""
    reg = [[0, 0, 1], [0, 0, 2], [0, 0, 4]]
    row = 8
    while row < rows:
        reg.append([0, row // 2, 0])
        row *= 2
    lane = [[0, 0, 8], [0, 0, 16], [0, 0, 32], [0, 1, 0], [0, 2, 0]]
    return gl.DistributedLinearLayout(reg, lane, _warp_bases(warps, 3), [], [warps, rows // 2, 64])


@gluon.constexpr_function
def _x_layout(warps, tokens):  # type: ignore[no-untyped-def]
    """[warps, 4, tokens, 16] pairs of inputs: lane 4 r + q holds inputs 8 q .. 8 q + 7 of the four slices, tokens r and
    r + 8."""
    reg = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 1, 0, 0], [0, 2, 0, 0]]
    row = 8
    while row < tokens:
        reg.append([0, 0, row, 0])
        row *= 2
    lane = [[0, 0, 0, 4], [0, 0, 0, 8], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]]
    return gl.DistributedLinearLayout(reg, lane, _warp_bases(warps, 4), [], [warps, 4, tokens, 16])


@gluon.constexpr_function
def _warp_bases(warps, rank):  # type: ignore[no-untyped-def]
    bases = []
    w = 1
    while w < warps:
        bases.append([w] + [0] * (rank - 1))
        w *= 2
    return bases


@gluon.jit
def _split_slices(x, WARPS: gl.constexpr, BLOCK_M: gl.constexpr, DTYPE: gl.constexpr):  # type: ignore[no-untyped-def]
    """Pairs int32 [WARPS, 4, BLOCK_M, 16] -> four of [WARPS, BLOCK_M, 32] in DTYPE; only renames registers."""
    unpack: gl.constexpr = "mov.b32 {$0, $1}, $2;"
    if gl.float16 == DTYPE:
        even, odd = gl.inline_asm_elementwise(
            unpack, "=h,=h,r", [x], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
        )
    else:
        even, odd = gl.inline_asm_elementwise(
            unpack, "=h,=h,r", [x], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1
        )
    x = gl.join(even, odd).reshape([WARPS, 4, BLOCK_M, 32])
    pairs = x.reshape([WARPS, 2, 2, BLOCK_M, 32]).permute(0, 2, 3, 4, 1)
    low, high = gl.split(pairs)  # slices 0, 1 and 2, 3
    x0, x1 = gl.split(low.permute(0, 2, 3, 1))
    x2, x3 = gl.split(high.permute(0, 2, 3, 1))
    return x0, x1, x2, x3


@gluon.jit
def _load_x(x_at, x_tile, t, tiles):  # type: ignore[no-untyped-def]
    """x of tiles t + warp in pairs, clamped to the last tile: beyond it scales are zero."""
    return gl.load(x_at + gl.minimum(x_tile + t, tiles - 1) * 64, eviction_policy="evict_last")


@gluon.jit
def _load_columns(scale_ptr, zero_ptr, s_tile, s_n, t, N, K, tiles, GROUP: gl.constexpr, PARTS: gl.constexpr,
                  HAS_ZERO: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Scales [WARPS, BLOCK_N] of the parts of tiles t + warp, then zeros; zero beyond the last tile or row. They are
    fewer than 2^31 (`hopper_takes`)."""
    live = (t + s_tile < tiles) & (s_n < N)
    scales = ()
    zeros = ()
    for s in gl.static_range(PARTS):
        at = scale_group(t + s_tile, s, tiles, K, GROUP) * N + s_n
        scales = scales + (gl.load(scale_ptr + at, mask=live, other=0, eviction_policy="evict_last"),)
        if HAS_ZERO:
            zeros = zeros + (gl.load(zero_ptr + at, mask=live, other=0, eviction_policy="evict_last"),)
    return scales + zeros


@gluon.jit
def _for_all_rows(sums, ROWS: gl.constexpr, MMA: gl.constexpr):  # type: ignore[no-untyped-def]
    """[WARPS, 16, tokens] equal in all rows -> [WARPS, ROWS, tokens]: the same registers."""
    for _ in gl.static_range(3):
        if sums.shape[1] < ROWS:
            twice = gl.join(sums, sums).permute(0, 3, 1, 2)
            sums = gl.convert_layout(
                twice.reshape([sums.shape[0], 2 * sums.shape[1], sums.shape[2]]), MMA, assert_trivial=True
            )
    return sums


@gluon.jit(do_not_specialize=["M", "tiles", "n_squares", "eps"])
def _decode_kernel(  # type: ignore[no-untyped-def]
    words_desc, x_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, squares_ptr, residual_ptr, norm_ptr, normed_ptr,
    sums_ptr, n_squares, eps, M, N, K, tiles,
    GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, SQUARES: gl.constexpr,
    RESIDUAL: gl.constexpr, SILU: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    WORDS: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """y[:, n0 : n0 + BLOCK_N]; see the module docstring."""
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    PAIRS: gl.constexpr = _words_layout(WARPS, BLOCK_N)
    X: gl.constexpr = _x_layout(WARPS, BLOCK_M)
    PARTS: gl.constexpr = parts_of(GROUP)
    SLICES: gl.constexpr = 4 // PARTS
    FIELDS: gl.constexpr = fields_of(GROUP, HAS_ZERO)
    BYTES: gl.constexpr = BLOCK_N * 64
    KERNEL: gl.constexpr = "_decode_kernel"

    n0 = gl.program_id(0) * BLOCK_N
    memory = gl.allocate_shared_memory(
        gl.int8, [piece_units(WORDS, WARPS, BYTES), 1024], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    words_smem = memory.index(0)._reinterpret(gl.int16, [WORDS, WARPS, BLOCK_N // 2, 64], words_desc.layout)
    warp = open_slots(WORDS, WARPS, BYTES)
    steps = (tiles + WARPS - 1) // WARPS
    for i in gl.static_range(WORDS):
        copy_piece(KERNEL, warp, i, i * WARPS + warp, n0 // 2, i < steps, WORDS, WARPS, BYTES)

    # scales and zeros [WARPS, BLOCK_N], in the accumulator's rows
    S_ROWS: gl.constexpr = gl.SliceLayout(2, MMA)
    s_tile = gl.expand_dims(gl.arange(0, WARPS, gl.SliceLayout(1, S_ROWS)), 1)
    s_n = gl.expand_dims(n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_ROWS)), 0)
    columns = ()
    for i in gl.static_range(STAGES):
        columns = columns + _load_columns(
            scale_ptr, zero_ptr, s_tile, s_n, i * WARPS, N, K, tiles, GROUP, PARTS, HAS_ZERO
        )

    # tokens beyond M repeat the last one: their columns of y are not stored
    X3: gl.constexpr = gl.SliceLayout(3, X)
    x_tile = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, X3)))
    x_tile = gl.expand_dims(gl.expand_dims(gl.expand_dims(x_tile, 1), 2), 3)
    x_slice = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, X3)))
    x_slice = gl.expand_dims(gl.expand_dims(gl.expand_dims(x_slice, 0), 2), 3)
    x_m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(1, X3)))
    x_m = gl.expand_dims(gl.expand_dims(gl.expand_dims(x_m, 0), 1), 3)
    x_k = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, X))))
    x_k = gl.expand_dims(gl.expand_dims(gl.expand_dims(x_k, 0), 1), 2)
    # in pairs, because a loop carries elements of 16 bits in a register each
    x_pairs = x_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    x_at = x_pairs + gl.minimum(x_m, M - 1) * (K // 2) + (x_slice * 16 + x_k)

    OUT: gl.constexpr = gl.SliceLayout(0, MMA)
    rn = n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(1, OUT))
    rm = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT)), 0)
    at = rm * N + gl.expand_dims(rn, 1)
    mask = (rm < M) & gl.expand_dims(rn < N, 1)
    if RESIDUAL:
        norm = gl.load(norm_ptr + rn, mask=rn < N, other=0).to(gl.float32)
    if PDL:
        pdl_launch_next()
        pdl_wait()
    if SQUARES > 0:
        PARTIAL: gl.constexpr = gl.BlockedLayout([1, BLOCK_M], [32, 1], [WARPS, 1], [1, 0])
        sq_p = gl.expand_dims(gl.arange(0, SQUARES, gl.SliceLayout(1, PARTIAL)), 1)
        sq_m = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, PARTIAL)), 0)
        squares = gl.load(squares_ptr + sq_p * M + sq_m, mask=(sq_p < n_squares) & (sq_m < M), other=0.0)
    if RESIDUAL:
        residual = gl.load(residual_ptr + at, mask=mask, other=0.0).to(gl.float32)
    xs = ()
    for i in gl.static_range(STAGES):
        xs = xs + (_load_x(x_at, x_tile, i * WARPS, tiles),)

    acc = gl.zeros((WARPS, BLOCK_N, BLOCK_M), gl.float32, MMA)
    first_slot = 0
    phase = 0
    for step in range(0, steps, STAGES):
        next_xs = ()
        next_columns = ()
        for i in gl.static_range(STAGES):
            t = (step + i) * WARPS
            ahead = t + STAGES * WARPS
            slot = first_slot + i
            # beyond the last step scales are zero, and whatever the stage holds counts for nothing
            wait_piece(warp, slot, phase, step + i < steps, WORDS, WARPS, BYTES)
            words = words_smem.index(slot).load(PAIRS).reshape([WARPS, BLOCK_N // 2, 2, 32])
            words = gl.convert_layout(words.reshape([WARPS, BLOCK_N, 32]), A, assert_trivial=True)
            x = _split_slices(xs[i], WARPS, BLOCK_M, dtype)
            for s in gl.static_range(PARTS):
                even = gl.zeros((WARPS, BLOCK_N, BLOCK_M), gl.float32, MMA)
                odd = even
                x_sums = gl.zeros((WARPS, 16, BLOCK_M), gl.float32, MMA)  # of inputs, the same in every row
                for p in gl.static_range(s * SLICES, s * SLICES + SLICES):
                    x_p = gl.convert_layout(x[p].permute(0, 2, 1), B, assert_trivial=True)
                    x_sums = mma_v2(gl.full((WARPS, 16, 32), 1.0, dtype, A), x_p, x_sums)
                    if p % 2 and dtype == gl.float16:  # in units of their own
                        odd = mma_v2(bare_codes(words, p, dtype), x_p, odd)
                    else:
                        even = mma_v2(bare_codes(words, p, dtype), x_p, even)
                zero = 8.0
                if HAS_ZERO:
                    zero = gl.expand_dims(columns[i * FIELDS + PARTS + s].to(gl.float32), 2)
                part = without_zero(even, odd, _for_all_rows(x_sums, BLOCK_N, MMA), zero, dtype)
                acc += part * gl.expand_dims(columns[i * FIELDS + s].to(gl.float32), 2)
            # the same slots for STAGES steps on: asked for here, in flight until their turn
            next_xs = next_xs + (_load_x(x_at, x_tile, ahead, tiles),)
            next_columns = next_columns + _load_columns(
                scale_ptr, zero_ptr, s_tile, s_n, ahead, N, K, tiles, GROUP, PARTS, HAS_ZERO
            )
            if step + i + WORDS < steps:
                done_with_piece()
                copy_piece(KERNEL, warp, slot, t + WORDS * WARPS + warp, n0 // 2, True, WORDS, WARPS, BYTES)
        xs = next_xs
        columns = next_columns
        if WORDS == STAGES:
            phase = phase ^ 1
        else:
            first_slot += STAGES
            if first_slot == WORDS:
                first_slot = 0
                phase = phase ^ 1

    y = gl.sum(acc, axis=0) * codes_unit(dtype)
    if SQUARES > 0:
        mean = gl.convert_layout(gl.sum(squares, axis=0), gl.SliceLayout(0, OUT)) / K
        y = y * gl.expand_dims(gl.rsqrt(mean + eps), 0)
    if HAS_BIAS:
        y += gl.expand_dims(gl.load(bias_ptr + rn, mask=rn < N, other=0).to(gl.float32), 1)
    if RESIDUAL:
        h = (y.to(dtype).to(gl.float32) + residual).to(dtype)
        gl.store(out_ptr + at, h, mask=mask)
        h = gl.where(mask, h.to(gl.float32), 0.0)
        gl.store(normed_ptr + at, (h * gl.expand_dims(norm, 1)).to(dtype), mask=mask)
        sums = gl.sum(h * h, axis=0)
        sum_m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
        gl.store(sums_ptr + gl.program_id(0) * M + sum_m, sums, mask=sum_m < M)
    elif SILU:
        ROWS: gl.constexpr = BLOCK_N // 2
        HALF: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [WARPS, 1], [0, 1])
        pairs = y.to(dtype).to(gl.float32).reshape([BLOCK_N // 16, 2, 8, BLOCK_M]).permute(0, 2, 3, 1)
        gate, up = gl.split(pairs)
        active = (gate / (1.0 + gl.exp(-gate)) * up).to(dtype).reshape([ROWS, BLOCK_M])
        half_n = gl.expand_dims(n0 // 2 + gl.arange(0, ROWS, gl.SliceLayout(1, HALF)), 1)
        half_m = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(0, HALF)), 0)
        half_mask = (half_m < M) & (half_n < N // 2)
        gl.store(out_ptr + half_m * (N // 2) + half_n, gl.convert_layout(active, HALF), mask=half_mask)
    else:
        gl.store(out_ptr + at, y.to(dtype), mask=mask)


# by how many rows of W a multiprocessor has places for, few first
_ONE_WAVE = (
    DecodeConfig(8, 16, 8, 3, registers=168),
    DecodeConfig(8, 16, 8, 2),
    DecodeConfig(8, 16, 4, 4, registers=136),
    DecodeConfig(8, 16, 4, 2),
    DecodeConfig(8, 16, 4, 2, registers=96),
    DecodeConfig(8, 16, 4, 2, registers=80),
    DecodeConfig(8, 32, 4, 2),
    DecodeConfig(8, 32, 4, 1, 2, 96),
    DecodeConfig(8, 32, 4, 1, 2, 80),
)
_SEVERAL_WAVES = (DecodeConfig(8, 32, 4, 2), DecodeConfig(8, 32, 4, 1, 2, 96))
_SHORT_K, _FOR_SHORT_K = 2048, DecodeConfig(8, 16, 4, 4, registers=168)
_HARDLY_MORE_THAN_ONE = 4 / 3  # programs a multiprocessor, which then take words further ahead


def waves(config: DecodeConfig, n: int, n_sms: int) -> float:
    """How many times the programs of N rows fill all places of the machine, which registers leave."""
    return -(-n // config.block_n) / (n_sms * (65536 // (32 * config.warps * config.registers)))


@lru_cache(maxsize=4096)
def choose_config(m: int, n: int, k: int, n_sms: int) -> DecodeConfig:
    """Tiles without a table, up to 16 tokens; pure. All programs at once, by as few and as large ones as that takes:
    one wave of places of which a third is empty is a third slower. Where no configuration has so many places, the one
    whose last wave is the fullest. Measured on an H100 at 30 shapes (NOTES.md), where K made no difference as long as
    it has stages for all warps."""
    if m > 8:
        return DecodeConfig(16, 32, 4, 3, registers=255)
    if k <= _SHORT_K and waves(_FOR_SHORT_K, n, n_sms) <= 1:
        return _FOR_SHORT_K
    for config in _ONE_WAVE:
        if waves(config, n, n_sms) <= 1:
            far = config == _ONE_WAVE[1] and -(-n // config.block_n) <= _HARDLY_MORE_THAN_ONE * n_sms
            return replace(config, words=2) if far else config
    return max(_SEVERAL_WAVES, key=lambda c: waves(c, n, n_sms) / math.ceil(waves(c, n, n_sms)))


def launch(x: Tensor, weight: KernelWeight, bias: Tensor | None, config: DecodeConfig, pdl: bool = True) -> Tensor:
    """y [M, N] = x [M, K] W^T + bias in x's dtype, M >= 1. Other arguments are checked by the caller.

    Raises:
        ConfigError: more tokens than config.block_m.
    """
    if x.shape[0] > config.block_m:
        raise ConfigError(f"x has {x.shape[0]} rows, and this configuration takes {config.block_m} at most")
    y = torch.empty(x.shape[0], weight.n, dtype=x.dtype, device=x.device)
    _run(x, weight, bias, config, pdl, Around(), y, None, None)
    return y


def linear_around(
    x: Tensor, weight: KernelWeight, bias: Tensor | None, around: Around, pdl: bool = False,
    configs: Mapping[tuple[int, int], DecodeConfig] | None = None,
) -> Tensor | Stream:  # fmt: skip
    """The product and what is around it: a Stream with `residual`, [M, N / 2] with `silu`, [M, N] otherwise.

    Twin: `decode_reference.linear_around`. x: [M, K], M up to RULE_MAX_TOKENS; `takes` says which weights. configs: by
    N, K; for others `config_between_others`.
    """
    m, n = x.shape[0], weight.n
    config = (configs or {}).get((n, weight.k)) or config_between_others(n, weight.k, common.n_sms(x.device))
    y = torch.empty(m, n // 2 if around.silu else n, dtype=x.dtype, device=x.device)
    if around.residual is None:
        _run(x, weight, bias, config, pdl, around, y, None, None)
        return y
    normed = torch.empty_like(y)
    sums = torch.empty(-(-n // config.block_n), m, dtype=torch.float32, device=x.device)
    _run(x, weight, bias, config, pdl, around, y, normed, sums)
    return Stream(y, normed, sums)


def config_between_others(n: int, k: int, n_sms: int) -> DecodeConfig:
    """What a product among others takes, up to RULE_MAX_TOKENS tokens, where tables say what is fastest behind itself;
    pure. Measured on an H100 within a decode step (NOTES.md): few and large programs leave room for those of the next
    product, whose words then come early. So where these have places for all of them at once."""
    if n >= 8192:
        return DecodeConfig(8, 32, 4, 2)
    if k > 8192:
        found = DecodeConfig(8, 32, 8, 2, registers=168)
    else:
        found = DecodeConfig(8, 16, 8, 2) if n <= 4096 else DecodeConfig(8, 16, 4, 4, registers=168)
    return found if waves(found, n, n_sms) <= 1 else choose_config(1, n, k, n_sms)


def takes(weight: KernelWeight) -> bool:
    """Whether `linear_around` takes a weight on this machine."""
    if not hopper_kernels(weight.words.device):
        return False
    return weight.k % 128 == 0 and weight.n % 16 == 0 and hopper_takes(weight.n, weight.k, weight.group_size)


def _run(
    x: Tensor, weight: KernelWeight, bias: Tensor | None, config: DecodeConfig, pdl: bool, around: Around,
    out: Tensor, normed: Tensor | None, sums: Tensor | None,
) -> None:  # fmt: skip
    m, k, n = x.shape[0], weight.k, weight.n
    tiles = weight.words.shape[0]
    words_desc = TensorDescriptor(
        weight.words, [tiles, n // 2, 64], [32 * n, 64, 1], [1, config.block_n // 2, 64], _WORDS_LAYOUT,
    )  # fmt: skip
    n_squares = 0 if around.squares is None else around.squares.shape[0]
    _decode_kernel[(-(-n // config.block_n),)](
        words_desc, x, weight.scale, weight.zero, bias, out, around.squares, around.residual, around.norm, normed, sums,
        n_squares, around.eps, m, n, k, tiles,
        GROUP=weight.group_size, HAS_ZERO=weight.zero is not None, HAS_BIAS=bias is not None,
        SQUARES=triton.next_power_of_2(n_squares) if n_squares else 0,
        RESIDUAL=around.residual is not None, SILU=around.silu, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        STAGES=config.stages, WORDS=config.stages * config.words, PDL=pdl, WARPS=config.warps,
        num_warps=config.warps, maxnreg=config.registers, launch_pdl=pdl,
    )  # fmt: skip
