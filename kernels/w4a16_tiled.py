"""W4A16 with warpgroup MMAs on Hopper, from M = 9 to prefill: the dequantized weight never leaves the registers.

The same layout as `w4a16`. A program computes a tile of y^T, BLOCK_N rows of W (64 or 128 a warpgroup) by BLOCK_M
tokens, a power of two or any multiple of 8 (`part_mma`), or 192 rows, 64 of which are both of two warpgroups'
(`tile_product`). With BITS = 8 the layout is that of `wna16_layout`: [BLOCK_N, 64] words, a byte of each half of a tile
of K; 8 bits are computed here from M = 1 on.

    words [BLOCK_N, 32] --bulk copy--> shared --ldmatrix--> registers --lop3, add, mul--> left operand  \\
                                                                                           wgmma += [BLOCK_N, BLOCK_M]
    x [BLOCK_M, 2 x 64] --bulk copy--> shared (128-byte swizzle) ------------------------> right operand /

A tile of K is several groups of MMAs, of nibbles 0, 1 and of 2, 3, 64 inputs each. While one runs, the operand of the
next is dequantized; two groups are in flight (`tile_product`):

    MMA            | low t        | high t       | low t+1      | ...
    dequantize     | high t       | low t+1      | high t+1     |

Weights are scaled in x's dtype before the MMA: (code - zero) is exact there, its product with the scale rounded once.
That is the rounding of a dense weight in that dtype; a second float32 accumulator for each group would cost half of the
registers. Symmetric weights in float16 take one fused multiply-add on the bare code, a subnormal number
(`gluon_parts.scaled_slice`), in units of the power of two that the layout keeps of each row. y leaves through shared
memory as whole lines.

Tiles that fill whole waves of the machine are computed by one program each. With split_k > 1 the rest, all of them
where there are few, are computed by split_k programs each, which share out K and leave float32 sums in a workspace.
`cluster` of them run side by side on neighbouring multiprocessors and add up through each other's shared memory
(`cluster_sums`). A cluster needs room for all of its programs at once, which costs more where each runs long; what
several clusters or programs leave of a tile, a second kernel adds up. Both add in order: the same bits every run.

Copies of x for two neighbouring tiles of N may be one (`TiledConfig.sharers`): it pays where many tokens are copied.

Where tiles of few tokens are too few for the machine, a program is best as large as a multiprocessor: its warpgroups
share out K tile by tile (`TiledConfig.slices`) and add up through its own shared memory, before the cluster does. Small
programs, of which two or three fit, are not dealt out evenly. Where tiles of many tokens do not fill whole waves,
persistent programs (`w4a16_producer`) take smaller ones, and share out those of a last round that they would not fill
(`streamed_sums`).

Where whole waves come first, the split tiles are a launch of their own that fills the machine as those drain.

Twin: `compress.kernels.reference.w4a16_linear`. Needs compute capability 9.0, K and N multiples of 8.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache

import torch
import triton
import triton.experimental.gluon.language as gl
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compress.kernels.batch_rule import MOST_TOKENS, batch_tokens, power_of_tokens, tokens_of_tile
from compress.kernels.common import n_sms, shared_bytes, tile_of_program
from compress.kernels.dispatch import MANY_TOKENS
from compress.kernels.gluon_parts import cluster_bases, fetch_first_descriptor, pdl_wait
from compress.kernels.tile_leave import leave
from compress.kernels.tile_parts import (
    copy_stage,
    first_columns,
    open_memory,
    share_of_tile,
    tile_origin,
    wait_for_previous,
)
from compress.kernels.tile_product import multiply_tiles
from compress.kernels.tile_rule import many_tokens
from compress.kernels.tile_shape import GROUP_N, Tile, TiledConfig
from compress.kernels.w4a16 import KernelWeight
from compress.kernels.w4a16_producer import launch_producer, places, rounds
from compress.kernels.wna16_layout import PackedWeight


@gluon.jit(do_not_specialize=["M", "tiles", "first_tile", "per_split"])
def _tiled_kernel(  # type: ignore[no-untyped-def]
    x_desc, x_piece_desc, words_desc, out_desc, out_ptr, scale_ptr, zero_ptr, bias_ptr, workspace_ptr,
    M, N, K, tiles, first_tile, per_split, T: gl.constexpr,
):  # fmt: skip
    """One [BLOCK_N, BLOCK_M] tile of y^T, or one split of it; see the module docstring."""
    STAGES: gl.constexpr = T.stages
    fetch_first_descriptor("_tiled_kernel")  # of x
    tile, rank, first, last = share_of_tile(first_tile, tiles, per_split, T)
    n0, m0 = tile_origin(tile, M, N, T)
    words_smem, x_smem, barriers, out_smem = open_memory(words_desc, x_desc, T)
    for i in gl.static_range(STAGES):
        copy_stage(words_desc, x_desc, x_piece_desc, barriers, words_smem, x_smem, first + i, n0, m0, M, N, i,
                   first + i < last, True, False, True, T)  # fmt: skip
    part_of_unit, columns = first_columns(scale_ptr, zero_ptr, first, n0, N, K, tiles, T)
    wait_for_previous(T)
    for i in gl.static_range(STAGES):
        copy_stage(words_desc, x_desc, x_piece_desc, barriers, words_smem, x_smem, first + i, n0, m0, M, N, i,
                   first + i < last, False, True, True, T)  # fmt: skip

    stage = 0
    phase = 0
    again = False
    accs, stage, phase = multiply_tiles(
        words_desc, x_desc, x_piece_desc, scale_ptr, zero_ptr, words_smem, x_smem, barriers, columns, part_of_unit,
        first, last, n0, m0, M, N, K, tiles, stage, phase, again, True, T,
    )  # fmt: skip
    if T.is_tail and T.pdl:
        pdl_wait()  # whoever waits for this launch means the one before it, too
    leave(accs, out_desc, out_ptr, bias_ptr, workspace_ptr, out_smem, rank, n0, m0, M, N, T)


@triton.jit(do_not_specialize=["M", "first_tile"])
def _sum_kernel(  # type: ignore[no-untyped-def]
    sums_ptr, bias_ptr, out_ptr, M, N, first_tile,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, GROUP_N: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of y from sums [SPLIT, BLOCK_M, BLOCK_N] of programs or clusters; ROWS tokens of it a program."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile, part = tl.program_id(0), tl.program_id(1)
    tile_n, tile_m = tile_of_program(tile + first_tile, M, N, BLOCK_M, BLOCK_N, GROUP_N)
    rows, columns = part * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_N)
    rm, rn = tile_m * BLOCK_M + rows, tile_n * BLOCK_N + columns
    at = sums_ptr + tile.to(tl.int64) * (SPLIT * BLOCK_M * BLOCK_N) + rows[:, None] * BLOCK_N + columns[None, :]
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for s in tl.static_range(SPLIT):
        total += tl.load(at + s * (BLOCK_M * BLOCK_N), mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + rm.to(tl.int64)[:, None] * N + rn[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


def slots(config: TiledConfig, n_sms: int, shared_bytes: int, bits: int = 4) -> int:
    """Programs that run at once, each of a whole tile, which needs no mail: one or two a multiprocessor, by shared
    memory and registers."""
    used = replace(config, split_k=1).program_bytes(bits)
    return n_sms * max(1, min(shared_bytes // used, 2 if config.warps <= 4 else 1))


_MOST_MISSING = 1 / 16  # of the tokens


def suits(config: TiledConfig, m: int) -> bool:
    """Whether a configuration, of another M maybe, is for this one: where there are many tokens, it is too dear to
    compute many that M does not have."""
    return m <= MANY_TOKENS or -m % config.block_m <= m * _MOST_MISSING


@lru_cache(maxsize=4096)
def choose_config(
    m: int, n: int, k: int, n_sms: int, shared_bytes: int, bits: int = 4, fields: int = 1
) -> TiledConfig:  # fmt: skip
    """Tiles without a table, where a row of W and a tile of K have so many scales and zeros; pure. Up to 128 tokens by
    `batch_rule`, above by `tile_rule`. Measured on an H100 (NOTES.md)."""
    tiles = -(-k // 128)
    if m <= MOST_TOKENS:
        found = batch_tokens(m, n, tiles, n_sms, shared_bytes, bits)
        return found or _split_where_idle(m, n, tiles, n_sms, shared_bytes, bits)
    found = many_tokens(m, n, tiles, n_sms, shared_bytes, fields, bits)
    return found or TiledConfig(128, 128, 1, 8, 3, producer=True)


def _split_where_idle(m: int, n: int, tiles: int, n_sms: int, shared_bytes: int, bits: int) -> TiledConfig:
    """Up to 128 tokens, where `batch_rule` has nothing better: K split over what would stay idle, in clusters where
    these leave a fifth of the places free. A cluster of more than two waits for them side by side."""
    block_n = 64 if n <= 8192 else 128
    block_m = tokens_of_tile(m) if block_n == 64 and bits == 4 else power_of_tokens(m)
    config = TiledConfig(block_m, block_n, 1, 4, 4 if block_m <= 32 and bits == 4 else 3, producer=True)
    at_once, programs = slots(config, n_sms, shared_bytes, bits), -(-n // block_n)
    rest = programs % at_once
    split = min(8 if m <= 64 else 2, at_once // rest, tiles // 4) if rest else 1
    split = 1 << (max(split, 1).bit_length() - 1)
    config = replace(config, split_k=split, cluster=split)
    fits = split == 2 or rest * split <= 0.8 * places(config, n_sms, shared_bytes, bits)
    return config if fits else replace(config, cluster=1)


def launch(
    x: Tensor, weight: KernelWeight | PackedWeight, bias: Tensor | None, config: TiledConfig, pdl: bool = True
) -> Tensor:
    """y [M, N] = x [M, K] W^T + bias in x's dtype, M >= 1. Arguments are checked by the caller."""
    m, n, split = x.shape[0], weight.n, config.split_k
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if config.sharers > 1 and (-(-n // config.block_n) % config.sharers or m % config.block_m):
        config = replace(config, sharers=1)  # the last tile of N has no neighbour, or x is copied in pieces
    tiles = weight.words.shape[0]
    config = config.within(tiles, weight.bits)
    programs = -(-n // config.block_n) * -(-m // config.block_m)
    if config.persistent:
        config = rounds(config, programs, tiles, n_sms(x.device), shared_bytes(x.device), weight.bits).config
    if split == 1 or config.persistent:
        _launch_tiles(x, weight, bias, y, config, 0, programs, pdl)
        return y
    at_once = slots(config, n_sms(x.device), shared_bytes(x.device), weight.bits) // config.sharers * config.sharers
    whole = programs // at_once * at_once
    if whole:
        _launch_tiles(x, weight, bias, y, replace(config, split_k=1), 0, whole, pdl, before_tail=whole < programs)
    if whole < programs:
        _launch_tiles(x, weight, bias, y, config, whole, programs - whole, pdl, is_tail=whole > 0)
    return y


@cache
def _copy_layout(ctas: int) -> gl.NVMMASharedLayout:
    """Of copies in swizzled rows of 128 bytes, by each program of a cluster for itself."""
    return gl.NVMMASharedLayout(128, 16, 2, cga_layout=cluster_bases(ctas, 2))


def _launch_tiles(
    x: Tensor, weight: KernelWeight | PackedWeight, bias: Tensor | None, y: Tensor, config: TiledConfig,
    first_tile: int, n_tiles: int, pdl: bool, before_tail: bool = False, is_tail: bool = False,
) -> None:  # fmt: skip
    m, k, n, split = x.shape[0], weight.k, weight.n, 1 if config.persistent else config.split_k
    tiles, workspace, bits = weight.words.shape[0], None, weight.bits
    ctas, adders = config.ctas, config.adders
    if split > adders:
        workspace = torch.empty(
            n_tiles * split // adders * config.block_m * config.block_n, dtype=torch.float32, device=x.device
        )
    wide = _copy_layout(ctas)
    first, last = config.tokens_copied()
    x_desc = TensorDescriptor(x, [m, k], [k, 1], [first, 64], wide)
    x_piece_desc = TensorDescriptor(x, [m, k], [k, 1], [last, 64], wide)
    rows = tiles * n * bits // 8  # of 128 bytes
    words_desc = TensorDescriptor(weight.words, [rows, 64], [64, 1], [config.box_rows() * bits // 8, 64], wide)
    tile = Tile.of(
        config, bits=bits, dtype=gl.float16 if x.dtype is torch.float16 else gl.bfloat16, group=weight.group_size,
        has_zero=weight.zero is not None, has_bias=bias is not None, even_n=n % config.block_n == 0, pdl=pdl,
        before_tail=before_tail, is_tail=is_tail,
    )  # fmt: skip
    out_desc = TensorDescriptor(y, [m, n], [n, 1], [config.leaving_tokens(bits), config.box_rows()], wide)
    if config.producer:
        launch_producer(
            x_desc, x_piece_desc, words_desc, out_desc, y, weight, bias, workspace, m, first_tile, n_tiles, config, tile
        )
    else:
        _tiled_kernel[(n_tiles * split // ctas,)](
            x_desc, x_piece_desc, words_desc, out_desc, y, weight.scale, weight.zero, bias, workspace, m, n, k, tiles,
            first_tile, -(-tiles // (config.slices * split)), T=tile, num_warps=config.warps, num_ctas=ctas,
            launch_pdl=pdl,
        )  # fmt: skip
    if split > adders:
        tokens = 512 // config.block_n  # small programs: this kernel is short, and all of the machine should take part
        _sum_kernel[(n_tiles, config.block_m // tokens)](
            workspace, bias, y, m, n, first_tile, HAS_BIAS=bias is not None, BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, SPLIT=split // adders, GROUP_N=GROUP_N, ROWS=tokens, PDL=pdl, num_warps=4,
            launch_pdl=pdl,
        )  # fmt: skip
