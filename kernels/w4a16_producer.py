"""The tiled kernel of `w4a16_tiled` with its copies in a warp of their own.

There, every warp takes part in starting a tile's copies, and Triton puts barriers around them, at which all warpgroups
are in step, so that none dequantizes while another multiplies. Here they meet at mbarriers alone (`stage_barriers`):

    producer, 1 warp     wait empty[s]; announce ready[s]; copy words, copy x (two halves)            s = tile % STAGES
    consumers            wait ready[s]; dequantize and multiply as `w4a16_tiled` does; arrive at empty[s]

Registers move to the consumers (`setmaxnreg`): the producer needs few. They move by warpgroups, so three warps idle
beside it. All consumers are the default partition: ptxas serializes the MMAs of a second one (C7512).
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from compress.kernels.cluster_sums import attend_opening, attend_sums, open_cluster, wait_for_sharers
from compress.kernels.gluon_parts import fetch_first_descriptor, pdl_wait
from compress.kernels.stage_barriers import open_stages, wait_empty
from compress.kernels.tile_parts import (
    GROUP_N,
    TiledConfig,
    barrier_offset,
    bytes_of_stage,
    copy_stage,
    first_columns,
    leave,
    next_stage,
    share_of_tile,
    stage_memory,
    tile_origin,
    wait_for_previous,
)
from compress.kernels.tile_product import multiply_tiles
from compress.kernels.unrolled_product import multiply_unrolled, relay
from compress.kernels.w4a16 import KernelWeight
from compress.kernels.wna16_layout import PackedWeight

PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(24)


@gluon.jit
def _produce(words_desc, x_desc, words_smem, x_smem, barriers, first, last, n0, m0, N,
             BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BITS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
             BEFORE_TAIL: gl.constexpr, IS_TAIL: gl.constexpr, CTAS: gl.constexpr, SHARERS: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Copies of tiles first .. last - 1, STAGES ahead of who reads them; words before the wait for the last kernel."""
    if CTAS > 1:
        attend_opening(CTAS // SHARERS, SHARERS)
    for i in gl.static_range(STAGES):
        copy_stage(words_desc, x_desc, barriers, words_smem, x_smem, first + i, n0, m0, N, i, first + i < last,
                   True, False, False, BLOCK_M, BLOCK_N, BITS, STAGES, CTAS, SHARERS)  # fmt: skip
    wait_for_sharers(SHARERS)
    wait_for_previous(PDL, BEFORE_TAIL, IS_TAIL)
    for i in gl.static_range(STAGES):
        copy_stage(words_desc, x_desc, barriers, words_smem, x_smem, first + i, n0, m0, N, i, first + i < last,
                   False, True, False, BLOCK_M, BLOCK_N, BITS, STAGES, CTAS, SHARERS)  # fmt: skip
    stage = 0
    phase = 0
    for t in range(first + STAGES, last):
        wait_empty(stage, phase, barrier_offset(BLOCK_M, BLOCK_N, BITS, STAGES, CTAS // SHARERS), STAGES)
        copy_stage(words_desc, x_desc, barriers, words_smem, x_smem, t, n0, m0, N, stage, True,
                   True, True, False, BLOCK_M, BLOCK_N, BITS, STAGES, CTAS, SHARERS)  # fmt: skip
        stage, phase = next_stage(stage, phase, STAGES)
    if CTAS > 1:
        attend_sums(CTAS // SHARERS, SHARERS)


@gluon.jit
def _attend(first, last, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BITS: gl.constexpr, STAGES: gl.constexpr,
            WARPS: gl.constexpr, CTAS: gl.constexpr, SHARERS: gl.constexpr, UNROLL: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """A warp without copies to make: it may `relay`."""
    if CTAS > 1:
        attend_opening(CTAS // SHARERS, SHARERS)
        wait_for_sharers(SHARERS)
    if UNROLL > 1:
        relay(first, last, BLOCK_M, BLOCK_N, BITS, STAGES, WARPS, CTAS // SHARERS)
    if CTAS > 1:
        attend_sums(CTAS // SHARERS, SHARERS)


@gluon.jit
def _consume(out_desc, out_ptr, scale_ptr, zero_ptr, bias_ptr, workspace_ptr, words_smem, x_smem, barriers,
             rank, first, last, n0, m0, M, N, K, tiles,
             GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, EVEN_N: gl.constexpr,
             BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BITS: gl.constexpr, STAGES: gl.constexpr,
             SPLIT: gl.constexpr, WARPS: gl.constexpr, CTAS: gl.constexpr, SHARERS: gl.constexpr, UNROLL: gl.constexpr,
             WAIT: gl.constexpr, DTYPE: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """The sums of a tile, with copies by another partition."""
    part_of_unit, columns = first_columns(scale_ptr, zero_ptr, first, n0, N, K, tiles, GROUP, HAS_ZERO, EVEN_N, BLOCK_M,
                                          BLOCK_N, BITS, WARPS, CTAS, DTYPE)  # fmt: skip
    if UNROLL > 1:
        acc = multiply_unrolled(scale_ptr, zero_ptr, words_smem, x_smem, columns, part_of_unit, first, last, n0, N, K,
                                tiles, GROUP, HAS_ZERO, EVEN_N, BLOCK_M, BLOCK_N, BITS, STAGES, WARPS, CTAS, SHARERS,
                                UNROLL, DTYPE)  # fmt: skip
    else:
        acc = multiply_tiles(None, None, scale_ptr, zero_ptr, words_smem, x_smem, barriers, columns, part_of_unit,
                             first, last, n0, m0, N, K, tiles, GROUP, HAS_ZERO, EVEN_N, BLOCK_M, BLOCK_N, BITS, STAGES,
                             WARPS, CTAS, SHARERS, False, DTYPE)  # fmt: skip
    if WAIT:
        pdl_wait()
    leave(acc, out_desc, out_ptr, bias_ptr, workspace_ptr, x_smem, rank, n0, m0, M, N, HAS_BIAS, BLOCK_M, BLOCK_N, BITS,
          STAGES, SPLIT, WARPS, CTAS, SHARERS)  # fmt: skip


@gluon.jit(do_not_specialize=["M", "tiles", "first_tile", "per_split"])
def _producer_kernel(  # type: ignore[no-untyped-def]
    x_desc, words_desc, out_desc, out_ptr, scale_ptr, zero_ptr, bias_ptr, workspace_ptr,
    M, N, K, tiles, first_tile, per_split,
    GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, EVEN_N: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BITS: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
    GROUP_N: gl.constexpr, PDL: gl.constexpr, BEFORE_TAIL: gl.constexpr, IS_TAIL: gl.constexpr, WARPS: gl.constexpr,
    CTAS: gl.constexpr, SHARERS: gl.constexpr, UNROLL: gl.constexpr,
):  # fmt: skip
    """One [BLOCK_N, BLOCK_M] tile of y^T, or one split of it, whose sums go to the workspace."""
    dtype: gl.constexpr = x_desc.dtype

    fetch_first_descriptor("_producer_kernel")  # of x
    tile, rank, first, last = share_of_tile(first_tile, tiles, per_split, BITS, SPLIT, CTAS, SHARERS)
    n0, m0 = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_N)

    words_smem, x_smem, barriers = stage_memory(words_desc, x_desc, BLOCK_M, BLOCK_N, BITS, STAGES, CTAS, SHARERS)
    open_stages(barrier_offset(BLOCK_M, BLOCK_N, BITS, STAGES, CTAS // SHARERS), STAGES, WARPS, SHARERS)
    if CTAS > 1:
        open_cluster(BLOCK_M, BLOCK_N, CTAS // SHARERS, SHARERS, STAGES * bytes_of_stage(BLOCK_M, BLOCK_N, BITS))
    fence_async_shared()
    gl.thread_barrier()
    # Whoever waits for a tail means the launch before it, too. And the producer alone has waited: where this program's
    # share of K is empty, its consumers have not, and who had the workspace before may still read it.
    WAIT: gl.constexpr = PDL and (IS_TAIL or SPLIT * SHARERS > CTAS)
    gl.warp_specialize(
        [
            (_consume, (out_desc, out_ptr, scale_ptr, zero_ptr, bias_ptr, workspace_ptr, words_smem, x_smem, barriers,
                        rank, first, last, n0, m0, M, N, K, tiles, GROUP, HAS_ZERO, HAS_BIAS, EVEN_N, BLOCK_M, BLOCK_N,
                        BITS, STAGES, SPLIT, WARPS, CTAS, SHARERS, UNROLL, WAIT, dtype)),
            (_produce, (words_desc, x_desc, words_smem, x_smem, barriers, first, last, n0, m0, N,
                        BLOCK_M, BLOCK_N, BITS, STAGES, PDL, BEFORE_TAIL, IS_TAIL, CTAS, SHARERS)),
            (_attend, (first, last, BLOCK_M, BLOCK_N, BITS, STAGES, WARPS, CTAS, SHARERS, UNROLL)),
            (_attend, (first, last, BLOCK_M, BLOCK_N, BITS, STAGES, WARPS, CTAS, SHARERS, 1)),
        ],
        [1, 1, 2], [PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def producers_by_registers(config: TiledConfig) -> int:
    """Programs of a multiprocessor that registers are given out for: so many small ones that the next kernel's begin to
    copy words while these still compute. One with 8 consumer warps or many tokens, whose accumulators and operands
    need more."""
    if config.warps > 4 or config.block_m > 64:
        return 1
    if config.block_n == 64:
        return 4 if config.unroll == 1 else 3  # an operand more
    return 3 if config.block_m == 16 else 2


def max_registers(config: TiledConfig) -> int:
    """Registers a thread at launch, for consumers and a warpgroup of which the producer is a part."""
    return min(232, 65536 // (32 * (config.warps + 4) * producers_by_registers(config)) // 8 * 8)


def launch_producer(
    x_desc: TensorDescriptor, words_desc: TensorDescriptor, out_desc: TensorDescriptor, y: Tensor,
    weight: KernelWeight | PackedWeight, bias: Tensor | None, workspace: Tensor | None, m: int, first_tile: int,
    n_tiles: int, config: TiledConfig, pdl: bool, before_tail: bool, is_tail: bool,
) -> None:  # fmt: skip
    """`_tiled_kernel`'s part of `w4a16_tiled._launch_tiles`; sums of a split are added up by the caller."""
    tiles, split, ctas = weight.words.shape[0], config.split_k, config.ctas
    _producer_kernel[(n_tiles * split // ctas,)](
        x_desc, words_desc, out_desc, y, weight.scale, weight.zero, bias, workspace, m, weight.n, weight.k, tiles,
        first_tile, -(-tiles // split),
        GROUP=weight.group_size, HAS_ZERO=weight.zero is not None, HAS_BIAS=bias is not None,
        EVEN_N=weight.n % config.block_n == 0, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BITS=weight.bits,
        STAGES=config.stages, SPLIT=split, GROUP_N=GROUP_N, PDL=pdl, BEFORE_TAIL=before_tail, IS_TAIL=is_tail,
        WARPS=config.warps, CTAS=ctas, SHARERS=config.shares_x, UNROLL=config.unroll, num_warps=config.warps,
        num_ctas=ctas, maxnreg=max_registers(config), launch_pdl=pdl,
    )  # fmt: skip
