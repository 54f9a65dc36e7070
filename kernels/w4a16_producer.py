"""The tiled kernel of `w4a16_tiled` with its copies in a warp of their own.

There, every warp takes part in starting a tile's copies, and Triton puts barriers around them, at which all warpgroups
are in step, so that none dequantizes while another multiplies. Here they meet at mbarriers alone (`stage_barriers`):

    producer, 1 warp     wait empty[s]; announce ready[s]; copy words, copy x (two halves)            s = tile % STAGES
    consumers            wait ready[s]; dequantize and multiply as `w4a16_tiled` does; arrive at empty[s]

With `TiledConfig.persistent` a program computes every so many-th tile, and the producer goes on to the next while the
consumers send y: no program begins or ends between two tiles of a multiprocessor. What is left for a last round may be
shared out among all programs (`streamed_sums`).

Registers move to the consumers (`setmaxnreg`): the producer needs few. They move by warpgroups, so three warps idle
beside it; with UNROLL > 1 one of them waits for ready[s] and meets the consumers at a named barrier (`_relay`), and two
mark what a program gives to others (`_attend_given`). All
consumers are the default partition: ptxas serializes the MMAs of a second one (C7512).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from compress.kernels.cluster_sums import attend_opening, attend_sums, wait_for_sharers
from compress.kernels.common import n_sms, shared_bytes
from compress.kernels.gluon_parts import cluster_rank, fetch_first_descriptor, pdl_wait
from compress.kernels.stage_barriers import pass_on, wait_empty, wait_ready
from compress.kernels.streamed_sums import (
    Shares,
    give,
    mark_given,
    shares,
    turn,
    turns_of,
    with_given,
    workspace_floats,
)
from compress.kernels.tile_leave import leave, leave_alone
from compress.kernels.tile_parts import (
    copy_stage,
    first_columns,
    next_stage,
    open_memory,
    share_of_tile,
    tile_origin,
    wait_for_previous,
)
from compress.kernels.tile_product import multiply_tiles
from compress.kernels.tile_shape import Tile, TiledConfig, ctas_of
from compress.kernels.w4a16 import KernelWeight
from compress.kernels.wna16_layout import PackedWeight

PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(24)


@gluon.jit
def _refill(words_desc, x_desc, x_piece_desc, words_smem, x_smem, barriers, first, last, n0, m0, M, N, stage, phase,
            T: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Copies of stages first .. last - 1, each as soon as one is empty; which is next, and its phase."""
    for t in range(first, last):
        wait_empty(stage, phase, T)
        copy_stage(words_desc, x_desc, x_piece_desc, barriers, words_smem, x_smem, t, n0, m0, M, N, stage, True, True,
                   True, False, T)  # fmt: skip
        stage, phase = next_stage(stage, phase, T)
    return stage, phase


@gluon.jit
def _produce(words_desc, x_desc, x_piece_desc, words_smem, x_smem, barriers, first, last, n0, m0, M, N, tiles,
             part, whole, T: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Copies of stages first .. last - 1, STAGES ahead of who reads them, of one tile or of tile after tile; the first
    words before the wait for the last kernel."""
    STAGES: gl.constexpr = T.stages
    if ctas_of(T) > 1:
        attend_opening(T)
    for i in gl.static_range(STAGES):
        copy_stage(words_desc, x_desc, x_piece_desc, barriers, words_smem, x_smem, first + i, n0, m0, M, N, i,
                   first + i < last, True, False, False, T)  # fmt: skip
    wait_for_sharers(T)
    wait_for_previous(T)
    for i in gl.static_range(STAGES):
        copy_stage(words_desc, x_desc, x_piece_desc, barriers, words_smem, x_smem, first + i, n0, m0, M, N, i,
                   first + i < last, False, True, False, T)  # fmt: skip
    stage = 0
    phase = 0
    if last - first < STAGES:  # the others have not been filled, and who waits for their other phase does not wait
        stage = last - first
        phase = 1
    stage, phase = _refill(words_desc, x_desc, x_piece_desc, words_smem, x_smem, barriers, first + STAGES, last, n0, m0,
                           M, N, stage, phase, T)  # fmt: skip
    if T.persistent:
        alone, turns = turns_of(whole, tiles, part, M, N, T)
        for i in range(1, turns):
            tile, first, last, _ = turn(i, alone, whole, tiles, part, M, N, T)
            n0, m0 = tile_origin(tile, M, N, T)
            stage, phase = _refill(words_desc, x_desc, x_piece_desc, words_smem, x_smem, barriers, first, last, n0, m0,
                                   M, N, stage, phase, T)  # fmt: skip
    _attend_leaving(whole, tiles, part, M, N, T)


@gluon.jit
def _attend_leaving(whole, tiles, part, M, N, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """The part of a warp in what its cluster does at its end, if it adds up or shares x."""
    if ctas_of(T) > 1:
        if T.persistent:
            alone, turns = turns_of(whole, tiles, part, M, N, T)
            if turns > alone:
                attend_sums(T)
        else:
            attend_sums(T)


@gluon.jit
def _relay(first, last, M, N, tiles, part, whole, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Tell the consumers of each stage whose copies are there. By one warp."""
    stages = last - first
    if T.persistent:
        alone, turns = turns_of(whole, tiles, part, M, N, T)
        stages = 0
        for i in range(turns):
            _, first, last, _ = turn(i, alone, whole, tiles, part, M, N, T)
            stages += last - first
    stage = 0
    phase = 0
    for _ in range(stages):
        wait_ready(stage, phase, T)
        pass_on(stage, T)
        stage, phase = next_stage(stage, phase, T)


@gluon.jit
def _attend(first, last, M, N, tiles, part, whole, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """A warp without copies to make: it may `_relay`."""
    if ctas_of(T) > 1:
        attend_opening(T)
        wait_for_sharers(T)
    if T.unroll > 1:
        _relay(first, last, M, N, tiles, part, whole, T)
    _attend_leaving(whole, tiles, part, M, N, T)


@gluon.jit
def _attend_given(workspace_ptr, M, N, tiles, part, whole, T: gl.constexpr):  # type: ignore[no-untyped-def]
    """Two warps without copies to make: they may mark what is given."""
    if ctas_of(T) > 1:
        attend_opening(T)
        wait_for_sharers(T)
    if T.streams and T.adders == 1:
        alone, turns = turns_of(whole, tiles, part, M, N, T)
        if turns > alone:  # where it gives any, that comes first
            _, _, last, _ = turn(alone, alone, whole, tiles, part, M, N, T)
            if last < gl.cdiv(tiles, T.slices):
                mark_given(workspace_ptr, T)
    _attend_leaving(whole, tiles, part, M, N, T)


@gluon.jit
def _consume(out_desc, out_ptr, scale_ptr, zero_ptr, bias_ptr, workspace_ptr, words_smem, x_smem, barriers, out_smem,
             rank, first, last, n0, m0, M, N, K, tiles, part, whole, T: gl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """The sums of a tile, or of tile after tile, with copies by another partition."""
    stage = 0
    phase = 0
    again = False
    part_of_unit, columns = first_columns(scale_ptr, zero_ptr, first, n0, N, K, tiles, T)
    if T.persistent:
        alone, turns = turns_of(whole, tiles, part, M, N, T)
        for i in range(turns):
            accs, stage, phase = multiply_tiles(
                None, None, None, scale_ptr, zero_ptr, words_smem, x_smem, barriers, columns, part_of_unit, first, last,
                n0, m0, M, N, K, tiles, stage, phase, again, False, T,
            )  # fmt: skip
            here_n, here_m = n0, m0
            tile, first, last, _ = turn(gl.minimum(i + 1, turns - 1), alone, whole, tiles, part, M, N, T)
            n0, m0 = tile_origin(tile, M, N, T)
            part_of_unit, columns = first_columns(scale_ptr, zero_ptr, first, n0, N, K, tiles, T)
            if T.streams and T.adders == 1:
                _, _, end, giver = turn(i, alone, whole, tiles, part, M, N, T)
                accs = with_given(accs, workspace_ptr, giver, gl.program_id(0), T)
                if end == gl.cdiv(tiles, T.slices):
                    leave(accs, out_desc, out_ptr, bias_ptr, workspace_ptr, out_smem, rank, here_n, here_m, M, N, T)
                else:
                    give(accs, workspace_ptr, T)
            elif i < alone:
                leave_alone(accs, out_desc, out_ptr, bias_ptr, workspace_ptr, out_smem, here_n, here_m, M, N, T)
            elif T.adders > 1:
                leave(accs, out_desc, out_ptr, bias_ptr, workspace_ptr, out_smem, rank, here_n, here_m, M, N, T)
            again = True
        tma.store_wait(0)
    else:
        accs, stage, phase = multiply_tiles(
            None, None, None, scale_ptr, zero_ptr, words_smem, x_smem, barriers, columns, part_of_unit, first, last,
            n0, m0, M, N, K, tiles, stage, phase, again, False, T,
        )  # fmt: skip
        # Whoever waits for a tail means the launch before it, too. And the producer alone has waited: where this
        # program's share of K is empty, its consumers have not, and who had the workspace before may still read it.
        if T.pdl and (T.is_tail or T.split > T.adders):
            pdl_wait()
        leave(accs, out_desc, out_ptr, bias_ptr, workspace_ptr, out_smem, rank, n0, m0, M, N, T)


@gluon.jit(do_not_specialize=["M", "tiles", "first_tile", "part", "whole"])
def _producer_kernel(  # type: ignore[no-untyped-def]
    x_desc, x_piece_desc, words_desc, out_desc, out_ptr, scale_ptr, zero_ptr, bias_ptr, workspace_ptr,
    M, N, K, tiles, first_tile, part, whole, T: gl.constexpr,
):  # fmt: skip
    """One [BLOCK_N, BLOCK_M] tile of y^T, or one split of it, whose sums go to the workspace; or tile after tile, the
    first `whole` alone, and `part` stages of the others."""
    fetch_first_descriptor("_producer_kernel")  # of x
    if T.persistent:
        alone, _ = turns_of(whole, tiles, part, M, N, T)
        tile, first, last, _ = turn(0, alone, whole, tiles, part, M, N, T)
        rank = 0
        if ctas_of(T) > 1:
            rank = cluster_rank()
    else:
        tile, rank, first, last = share_of_tile(first_tile, tiles, part, T)
    n0, m0 = tile_origin(tile, M, N, T)
    words_smem, x_smem, barriers, out_smem = open_memory(words_desc, x_desc, T)
    gl.warp_specialize(
        [
            (_consume, (out_desc, out_ptr, scale_ptr, zero_ptr, bias_ptr, workspace_ptr, words_smem, x_smem, barriers,
                        out_smem, rank, first, last, n0, m0, M, N, K, tiles, part, whole, T)),
            (_produce, (words_desc, x_desc, x_piece_desc, words_smem, x_smem, barriers, first, last, n0, m0, M, N,
                        tiles, part, whole, T)),
            (_attend, (first, last, M, N, tiles, part, whole, T)),
            (_attend_given, (workspace_ptr, M, N, tiles, part, whole, T)),
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
        return 4
    return 3 if config.block_m == 16 else 2


def registers_for(programs: int, warps: int) -> int:
    """Of a thread, which leave a multiprocessor room for so many programs of so many consumer warps, each with a
    warpgroup of which the producer is a part."""
    return min(232, 65536 // (32 * (warps + 4) * programs) // 8 * 8)


def max_registers(config: TiledConfig) -> int:
    """Registers a thread at launch."""
    return config.registers or registers_for(producers_by_registers(config), config.warps)


@cache
def places(config: TiledConfig, n_sms: int, shared_bytes: int, bits: int = 4) -> int:
    """Programs that run at once, by shared memory and registers."""
    # the machine keeps a kilobyte of each program's share; it has one more than it lets one have
    used = config.program_bytes(bits) + 1024
    registers = 65536 // (32 * (config.warps + 4) * max_registers(config))
    return n_sms * max(1, min((shared_bytes + 1024) // used, registers))


@dataclass(frozen=True)
class Rounds:
    """How a persistent launch goes: its configuration, with clusters where these share out tiles; how many clusters, or
    programs, there are; and what they share out."""

    config: TiledConfig
    clusters: int
    shares: Shares


@lru_cache(maxsize=4096)
def rounds(
    config: TiledConfig, n_tiles: int, tiles: int, n_sms: int, shared_bytes: int, bits: int = 4
) -> Rounds:  # fmt: skip
    """Of so many tiles of y, of so many of K each, by a persistent configuration."""
    stages, ctas = -(-tiles // config.slices), config.ctas
    at_once = places(config, n_sms, shared_bytes, bits) // ctas * ctas
    found = Shares(n_tiles, stages)
    if config.streams:
        found = shares(n_tiles, stages, at_once, config.unroll, ctas > 1)
        if ctas > 1 and not found.in_pairs:
            return rounds(replace(config, cluster=1), n_tiles, tiles, n_sms, shared_bytes, bits)
    programs = min(at_once, found.whole or -(-n_tiles * stages // found.part))
    return Rounds(config, -(-programs // ctas), found)


def launch_producer(
    x_desc: TensorDescriptor, x_piece_desc: TensorDescriptor, words_desc: TensorDescriptor, out_desc: TensorDescriptor,
    y: Tensor, weight: KernelWeight | PackedWeight, bias: Tensor | None, workspace: Tensor | None, m: int,
    first_tile: int, n_tiles: int, config: TiledConfig, tile: Tile,
) -> None:  # fmt: skip
    """`_tiled_kernel`'s part of `w4a16_tiled._launch_tiles`; sums of a split are added up by the caller."""
    tiles, split, ctas = weight.words.shape[0], config.split_k, config.ctas
    programs, whole, part = n_tiles * split // ctas, 0, -(-tiles // (config.slices * split))
    if config.persistent:
        found = rounds(config, n_tiles, tiles, n_sms(y.device), shared_bytes(y.device), weight.bits)
        programs, whole, part = found.clusters, found.shares.whole, found.shares.part
        if config.streams and ctas == 1:
            givers = programs if whole < n_tiles else 0  # without any a workspace is an argument all the same
            floats = workspace_floats(givers, config.block_m, config.slices * config.block_n, config.warps)
            workspace = torch.empty(max(floats, 4), dtype=torch.float32, device=y.device)
    _producer_kernel[(programs,)](
        x_desc, x_piece_desc, words_desc, out_desc, y, weight.scale, weight.zero, bias, workspace, m, weight.n,
        weight.k, tiles, first_tile, part, whole, T=tile, num_warps=config.warps, num_ctas=ctas,
        maxnreg=max_registers(config), launch_pdl=tile.pdl,
    )  # fmt: skip
