"""Attention of one new token a sequence over a static KV cache, in Triton: one kernel from q, k, v rows to the output.

    qkv [B, (H + 2 KV) D]  ->  RMSNorm of each head of q and k (Qwen3) -> rotary embedding -> k, v into the cache
                           ->  softmax(q K^T scale) V over the cache and the new token  ->  [B, H D]

Work split (flash-decoding, Dao et al. 2023). Program (KV head, split, sequence) takes *all* G = H / KV query heads of
its KV head, so each key and value is read once; G is padded to 16 rows, an MMA's least. The cached tokens are cut into
blocks of BLOCK_T, and those dealt to at most SPLITS programs in whole blocks:

    positions = 150, BLOCK_T = 64, SPLITS = 2      | block 0 | block 1 | block 2 (22) | new |
                                                   |---- split 0 ------|-- split 1, owner --|

Lengths are read from a device tensor, so one recorded launch serves every position: programs whose share is empty
leave at once, and the last one with a share (the owner) also takes the new token, whose key and value it makes, uses
from registers and writes to the cache. Each split leaves its unnormalized output, maximum and sum in a float32
workspace; the last to arrive at a counter combines them in the order of the splits (the same bits every run) and
resets the counter. Scores are kept in base 2.

`pdl`: see `compress.kernels.pdl`; cached tokens are asked for before the wait, the kernel before does not write them.
The interpreter has no inline PTX and no bfloat16 arithmetic: there nothing is prefetched, and products are float32.

Twin: `compress.kernels.decode_reference.attention`. Runs under TRITON_INTERPRET=1 on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compress.errors import ConfigError
from compress.kernels import pdl as pdl_launch
from compress.kernels.common import INTERPRETED
from compress.kernels.decode_ops import check_operands
from compress.kernels.decode_reference import HeadShape

_MIN_ROWS = 16  # of an MMA's left operand
_COMBINE_FLOATS = 8192  # partial outputs that one program holds in registers at a time


@dataclass(frozen=True)
class AttentionConfig:
    """Blocking of one launch: tokens a block, programs a (sequence, KV head), warps, stages of the K/V pipeline."""

    block_t: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class AttentionWorkspace:
    """What splits leave for each other. partial: float32 [B, KV, SPLITS, G, D]; stats: float32 [B, KV, SPLITS, 2, G],
    maximum and sum; arrived: int32 [B, KV], zero between launches. Launches that follow each other may share it."""

    partial: Tensor
    stats: Tensor
    arrived: Tensor


@triton.jit
def _rotated_heads(ptr, heads, live, norm_ptr, cos, sin, eps, D: tl.constexpr, HAS_NORM: tl.constexpr):
    """Rows `heads` [R] of [*, D] as float32 [R, D], normed and rotated. sin [D] is negative in the lower half."""
    d = tl.arange(0, D)
    partner = (d + D // 2) % D
    rows = heads[:, None] * D
    x = tl.load(ptr + rows + d[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    y = tl.load(ptr + rows + partner[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        x = x * scale * tl.load(norm_ptr + d).to(tl.float32)[None, :]
        y = y * scale * tl.load(norm_ptr + partner).to(tl.float32)[None, :]
    return x * cos[None, :] + y * sin[None, :]


@triton.jit
def _fetch_to_l2(ptr, first, last, D: tl.constexpr, BLOCK_T: tl.constexpr):
    """Asks for the first block of rows [first, last) of [*, D]; 64 elements of two bytes are a line."""
    rt = tl.arange(0, BLOCK_T)
    rl = tl.arange(0, (D + 63) // 64)
    row = tl.minimum(first + rt, tl.maximum(last - 1, first))
    lines = ptr + row[:, None] * D + rl[None, :] * 64
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _combine_splits(
    partial_ptr, stats_ptr, out_ptr, active,
    GROUP: tl.constexpr, PAD: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out [G, D] from `active` partial outputs [G, D], their maxima and sums [2, G], CHUNK at a time in order."""
    rg = tl.arange(0, PAD)
    group = tl.minimum(rg, GROUP - 1)  # padding repeats the last head
    d = tl.arange(0, D)
    top = tl.full((PAD,), float("-inf"), tl.float32)
    total = tl.zeros((PAD,), tl.float32)
    acc = tl.zeros((PAD, D), tl.float32)
    for start in range(0, active, CHUNK):
        rs = start + tl.arange(0, CHUNK)
        live = rs < active
        stat = stats_ptr + rs[:, None] * 2 * GROUP + group[None, :]
        # .cg: another multiprocessor wrote them, so not from this one's L1
        m = tl.load(stat, mask=live[:, None], other=float("-inf"), cache_modifier=".cg")
        n = tl.load(stat + GROUP, mask=live[:, None], other=0.0, cache_modifier=".cg")
        at = rs[:, None, None] * (GROUP * D) + group[None, :, None] * D + d[None, None, :]
        part = tl.load(partial_ptr + at, mask=live[:, None, None], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(m, axis=0))
        weight = tl.exp2(m - new_top[None, :])
        keep = tl.exp2(top - new_top)
        acc = acc * keep[:, None] + tl.sum(part * weight[:, :, None], axis=0)
        total = total * keep + tl.sum(n * weight, axis=0)
        top = new_top
    out = acc / total[:, None]
    tl.store(out_ptr + rg[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=(rg < GROUP)[:, None])


@triton.jit(do_not_specialize=["capacity"])
def _attention_kernel(
    qkv_ptr, cos_ptr, sin_ptr, positions_ptr, keys_ptr, values_ptr, q_norm_ptr, k_norm_ptr, out_ptr, partial_ptr,
    stats_ptr, arrived_ptr, scale_log2, eps, capacity,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PAD: tl.constexpr,
    BLOCK_T: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, HAS_NORM: tl.constexpr, INTERPRET: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split of one KV head of one sequence; see the module docstring."""
    kv, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pair = b.to(tl.int64) * KV_HEADS + kv
    if PDL:
        gdc_launch_dependents()
    # the last kernel of the step before advanced the positions: nothing to wait for
    position = tl.load(positions_ptr + b)
    share = tl.cdiv(tl.cdiv(position, BLOCK_T), SPLITS) * BLOCK_T
    active = tl.maximum(tl.cdiv(position, tl.maximum(share, 1)), 1)
    if split >= active:
        return
    first = split * share
    last = tl.minimum(first + share, position)
    keys = keys_ptr + pair * capacity * D
    values = values_ptr + pair * capacity * D
    d = tl.arange(0, D)
    cos = tl.load(cos_ptr + position * (D // 2) + d % (D // 2))
    sin = tl.load(sin_ptr + position * (D // 2) + d % (D // 2))
    sin = tl.where(d < D // 2, -sin, sin)
    if not INTERPRET:  # inline PTX; the first block is under way while q is made
        _fetch_to_l2(keys, first, last, D, BLOCK_T)
        _fetch_to_l2(values, first, last, D, BLOCK_T)
    if PDL:
        gdc_wait()

    dtype: tl.constexpr = keys_ptr.dtype.element_ty
    dot_dtype: tl.constexpr = tl.float32 if INTERPRET else dtype
    row = qkv_ptr + b.to(tl.int64) * ((GROUP + 2) * KV_HEADS * D)
    rg = tl.arange(0, ROWS)
    q = _rotated_heads(row, kv * GROUP + rg, rg < GROUP, q_norm_ptr, cos, sin, eps, D, HAS_NORM).to(dtype)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    if split == active - 1:  # the owner of the new token
        one = tl.zeros((1,), tl.int32)
        k_row = GROUP * KV_HEADS + kv
        k_new = _rotated_heads(row, k_row + one, one == 0, k_norm_ptr, cos, sin, eps, D, HAS_NORM).to(dtype)
        v_new = tl.load(row + (k_row + KV_HEADS) * D + d[None, :])
        at = position.to(tl.int64) * D + d[None, :]
        tl.store(keys + at, k_new)
        tl.store(values + at, v_new)
        top = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=1) * scale_log2
        total = tl.full((ROWS,), 1.0, tl.float32)
        acc = acc + v_new.to(tl.float32)

    for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        rt = start + tl.arange(0, BLOCK_T)
        live = rt < last
        at = rt.to(tl.int64)[:, None] * D + d[None, :]
        k = tl.load(keys + at, mask=live[:, None], other=0.0)
        scores = tl.dot(q.to(dot_dtype), tl.trans(k.to(dot_dtype))) * scale_log2  # [ROWS, BLOCK_T]
        scores = tl.where(live[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_top[:, None])
        keep = tl.exp2(top - new_top)
        v = tl.load(values + at, mask=live[:, None], other=0.0)
        acc = tl.dot(p.to(dot_dtype), v.to(dot_dtype), acc * keep[:, None])
        total = total * keep + tl.sum(p, axis=1)
        top = new_top

    out = out_ptr + pair * (GROUP * D)
    if SPLITS == 1:
        rows_mask = (rg < GROUP)[:, None]
        tl.store(out + rg[:, None] * D + d[None, :], (acc / total[:, None]).to(dtype), mask=rows_mask)
    else:
        partial = partial_ptr + pair * SPLITS * (GROUP * D)
        stats = stats_ptr + pair * SPLITS * (2 * GROUP)
        mine = split * GROUP * D + rg[:, None] * D + d[None, :]
        tl.store(partial + mine, acc, mask=(rg < GROUP)[:, None])
        tl.store(stats + split * 2 * GROUP + rg, top, mask=rg < GROUP)
        tl.store(stats + split * 2 * GROUP + GROUP + rg, total, mask=rg < GROUP)
        tl.debug_barrier()  # all of this program's stores before its arrival
        before = tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel", scope="gpu")
        if before == active - 1:
            tl.store(arrived_ptr + pair, 0)
            _combine_splits(partial, stats, out, active, GROUP, PAD, D, CHUNK)


def choose_attention(batch: int, n_kv_heads: int, head_dim: int, capacity: int, n_sms: int) -> AttentionConfig:
    """Blocks of 64 tokens, and about two programs a multiprocessor as long as each has a block; pure."""
    block_t = 64 if head_dim <= 128 else 32
    splits = 2 * n_sms // (batch * n_kv_heads)
    return AttentionConfig(block_t, max(1, min(splits, -(-capacity // block_t))), num_warps=2)


def make_workspace(batch: int, shape: HeadShape, splits: int, device: torch.device) -> AttentionWorkspace:
    """For `attention` of `batch` sequences with a config of `splits`."""
    group = shape.n_heads // shape.n_kv_heads
    lead = (batch, shape.n_kv_heads, splits if splits > 1 else 0)
    return AttentionWorkspace(
        torch.empty(*lead, group, shape.head_dim, dtype=torch.float32, device=device),
        torch.empty(*lead, 2, group, dtype=torch.float32, device=device),
        torch.zeros(batch, shape.n_kv_heads, dtype=torch.int32, device=device),
    )


def attention(
    qkv: Tensor,
    rope: tuple[Tensor, Tensor],
    positions: Tensor,
    cache: tuple[Tensor, Tensor],
    shape: HeadShape,
    norms: tuple[Tensor, Tensor] | None = None,
    config: AttentionConfig = AttentionConfig(64, 1),
    workspace: AttentionWorkspace | None = None,
    pdl: bool = False,
) -> Tensor:
    """Attention of one new token a sequence. Arguments and twin: `decode_reference.attention`.

    Args:
        qkv: float16 or bfloat16. Positions must be below the cache's capacity C: they are on the device and unchecked.
        workspace: from `make_workspace` for this config; needed beyond one split.

    Raises:
        ConfigError: a dtype, shape, stride or device that does not fit.
        EnvironmentProblem: the device cannot run the kernel.
    """
    keys, values = cache
    group = check_attention(qkv, rope, positions, cache, shape, norms)
    batch, d = qkv.shape[0], shape.head_dim
    workspace = workspace or make_workspace(batch, shape, config.splits, qkv.device)
    if config.splits > 1 and workspace.partial.shape[:3] != (batch, shape.n_kv_heads, config.splits):
        raise ConfigError(
            f"the workspace is for {tuple(workspace.partial.shape[:3])} (sequences, KV heads, splits), "
            f"expected {(batch, shape.n_kv_heads, config.splits)}; call make_workspace"
        )
    out = torch.empty(batch, shape.n_heads * d, dtype=qkv.dtype, device=qkv.device)
    q_norm, k_norm = norms or (None, None)
    pad = triton.next_power_of_2(group)
    chunk = min(max(1, _COMBINE_FLOATS // (pad * d)), triton.next_power_of_2(config.splits))
    _attention_kernel[(shape.n_kv_heads, config.splits, batch)](
        qkv, *rope, positions, keys, values, q_norm, k_norm, out, workspace.partial, workspace.stats,
        workspace.arrived, shape.scale * math.log2(math.e), shape.eps, keys.shape[2], KV_HEADS=shape.n_kv_heads,
        GROUP=group, D=d, ROWS=max(_MIN_ROWS, pad), PAD=pad, BLOCK_T=config.block_t, SPLITS=config.splits, CHUNK=chunk,
        HAS_NORM=norms is not None, INTERPRET=INTERPRETED, STAGES=config.num_stages, num_warps=config.num_warps,
        num_stages=config.num_stages, **pdl_launch.options(pdl, qkv.device),
    )  # fmt: skip
    return out


def check_attention(
    qkv: Tensor,
    rope: tuple[Tensor, Tensor],
    positions: Tensor,
    cache: tuple[Tensor, Tensor],
    shape: HeadShape,
    norms: tuple[Tensor, Tensor] | None,
) -> int:
    """Query heads a KV head, after checking all operands of `attention`; raises ConfigError or EnvironmentProblem."""
    batch, d, kv = qkv.shape[0], shape.head_dim, shape.n_kv_heads
    if d < 16 or d & (d - 1):
        raise ConfigError(f"head_dim={d}: the attention kernel takes powers of two from 16 on")
    if shape.n_heads % kv:
        raise ConfigError(f"{shape.n_heads} heads do not divide among {kv} KV heads")
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(f"qkv is {qkv.dtype}; the attention kernel takes float16 or bfloat16")
    capacity = cache[0].shape[2]
    check_operands(
        qkv,
        {
            "x": (qkv, (batch, (shape.n_heads + 2 * kv) * d)),
            "cos": (rope[0], (rope[0].shape[0], d // 2)),
            "sin": (rope[1], (rope[0].shape[0], d // 2)),
            "positions": (positions, (batch,)),
            "keys": (cache[0], (batch, kv, capacity, d)),
            "values": (cache[1], (batch, kv, capacity, d)),
            "q_norm": (norms[0] if norms else None, (d,)),
            "k_norm": (norms[1] if norms else None, (d,)),
        },
    )
    dtypes = {"cos": (rope[0], torch.float32), "sin": (rope[1], torch.float32), "positions": (positions, torch.int32)}
    for name, (t, dtype) in (
        dtypes | {n: (t, qkv.dtype) for n, t in zip(("keys", "values"), cache, strict=True)}
    ).items():
        if t.dtype is not dtype:
            raise ConfigError(f"{name} is {t.dtype}, expected {dtype} beside qkv {qkv.dtype}")
    if rope[0].shape[0] < capacity:
        raise ConfigError(f"cos has {rope[0].shape[0]} positions and the cache {capacity}; make the table as long")
    return shape.n_heads // kv
