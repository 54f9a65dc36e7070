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
from registers and writes to the cache. Each split leaves its output and the logarithm of its sum of exponentials in a
float32 workspace; the last to arrive at a counter combines them in the order of the splits (the same bits every run)
and resets the counter. Scores and logarithms are in base 2.

A step of one sequence waits for latency, not for bytes. With `pdl` (see `compress.kernels.pdl`) the first block of a
share is loaded before the wait for the kernel before, which does not write cached tokens. After the wait all loads of
the new token are issued before anything is computed.
The interpreter has no inline PTX and no bfloat16 arithmetic: there products are float32.

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
    """What splits leave for each other. partial: float32 [B, KV, SPLITS, G, D], outputs; stats: float32 [B, KV, G,
    SPLITS], logarithms of sums; arrived: int32 [B, KV], zero between launches. Launches that follow each other may
    share it."""

    partial: Tensor
    stats: Tensor
    arrived: Tensor


@triton.jit
def _factors(cos, sin, norm_ptr, D: tl.constexpr, HAS_NORM: tl.constexpr):
    """What elements [R, D] of a head and their partners are multiplied by: the rotation, and the norm's weights."""
    if HAS_NORM:
        d = tl.arange(0, D)[None, :]
        cos *= tl.load(norm_ptr + d).to(tl.float32)
        sin *= tl.load(norm_ptr + (d + D // 2) % D).to(tl.float32)
    return cos, sin


@triton.jit
def _load_heads(ptr, heads, D: tl.constexpr):
    """Rows `heads` [R] of [*, D], and the same with their halves exchanged."""
    d = tl.arange(0, D)[None, :]
    rows = ptr + heads[:, None] * D
    return tl.load(rows + d), tl.load(rows + (d + D // 2) % D)


@triton.jit
def _rotated(x, partner, cos, sin, eps, D: tl.constexpr, HAS_NORM: tl.constexpr):
    """Heads of `_load_heads` normed and rotated with `_factors`, float32 [R, D]."""
    x = x.to(tl.float32)
    y = x * cos + partner.to(tl.float32) * sin
    if HAS_NORM:
        y *= tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
    return y


@triton.jit
def _over_and_over(x, ROWS: tl.constexpr):
    """Rows [R, D] again and again -> [ROWS, D]."""
    R: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[None, :, :], (ROWS // R, R, D)), (ROWS, D))


@triton.jit
def _load_block(keys, values, start, last, D: tl.constexpr, BLOCK_T: tl.constexpr):
    """Rows start .. start + BLOCK_T of keys and values [*, D]; zero from `last` on."""
    rt = start + tl.arange(0, BLOCK_T)
    at = rt.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    live = (rt < last)[:, None]
    return tl.load(keys + at, mask=live, other=0.0), tl.load(values + at, mask=live, other=0.0)


@triton.jit
def _not_before_here(x):
    """x, two bytes an element, as it is. Triton passes a loaded operand of `tl.dot` on to shared memory at once, and
    would wait for it there; not past this."""
    bits = x.to(tl.int16, bitcast=True)
    bits = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [bits], dtype=tl.int16, is_pure=False, pack=2)
    return bits.to(x.dtype, bitcast=True)


@triton.jit
def _scores(q, k, start, last, scale_log2, BLOCK_T: tl.constexpr, DOT: tl.constexpr):
    """[ROWS, BLOCK_T] of a block of `_load_block`, -inf from `last` on."""
    live = start + tl.arange(0, BLOCK_T) < last
    return tl.where(live[None, :], tl.dot(q.to(DOT), tl.trans(k.to(DOT))) * scale_log2, float("-inf"))


@triton.jit
def _fold(scores, v, top, total, acc, DOT: tl.constexpr):
    """Maximum [ROWS], sum [ROWS] and output [ROWS, D] so far -> the same with one block more."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    p = tl.exp2(scores - new_top[:, None])
    keep = tl.exp2(top - new_top)
    acc = tl.dot(p.to(DOT), v.to(DOT), acc * keep[:, None])
    return new_top, total * keep + tl.sum(p, axis=1), acc


@triton.jit
def _some_splits(
    partial_ptr, stats_ptr, first, active,
    GROUP: tl.constexpr, PAD: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Maximum [PAD], sum [PAD] and output [PAD, D] of splits first .. first + CHUNK, of those below `active`."""
    group = tl.minimum(tl.arange(0, PAD), GROUP - 1)  # padding repeats the last head
    d = tl.arange(0, D)
    rs = first + tl.arange(0, CHUNK)
    # Dimensions are in this order for every thread to add up splits by itself. No mask: a load takes a predicate, of
    # which there are seven, and the eighth would wait.
    at = group[:, None, None] * D + tl.minimum(rs, active - 1)[None, :, None] * (GROUP * D) + d[None, None, :]
    # .cg: another multiprocessor wrote them, so not from this one's L1
    part = tl.load(partial_ptr + at, cache_modifier=".cg")
    in_row = tl.minimum(rs, SPLITS - 1) if SPLITS % CHUNK else rs
    m = tl.load(stats_ptr + group[:, None] * SPLITS + in_row[None, :], cache_modifier=".cg")
    m = tl.where((rs < active)[None, :], m, float("-inf"))
    top = tl.max(m, axis=1)
    weight = tl.exp2(m - top[:, None])
    return top, tl.sum(weight, axis=1), tl.sum(part * weight[:, :, None], axis=1)


@triton.jit
def _combine_splits(
    partial_ptr, stats_ptr, out_ptr, active,
    GROUP: tl.constexpr, PAD: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out [G, D] from `active` outputs [G, D] and the logarithms [G] of their sums, CHUNK at a time in order."""
    top, total, acc = _some_splits(partial_ptr, stats_ptr, 0, active, GROUP, PAD, D, SPLITS, CHUNK)
    if SPLITS > CHUNK:
        for first in range(CHUNK, active, CHUNK):
            m, n, part = _some_splits(partial_ptr, stats_ptr, first, active, GROUP, PAD, D, SPLITS, CHUNK)
            new_top = tl.maximum(top, m)
            keep, add = tl.exp2(top - new_top), tl.exp2(m - new_top)
            acc = acc * keep[:, None] + part * add[:, None]
            total = total * keep + n * add
            top = new_top
    out = (acc * (1.0 / total)[:, None]).to(out_ptr.dtype.element_ty)
    rg = tl.arange(0, PAD)[:, None]
    tl.store(out_ptr + rg * D + tl.arange(0, D)[None, :], out, mask=rg < GROUP)


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
    # the last kernel of the step before advanced the positions, and the first of this one waited for it to end (`pdl`)
    position = tl.load(positions_ptr + b)
    share = tl.cdiv(tl.cdiv(position, BLOCK_T), SPLITS) * BLOCK_T
    active = tl.maximum(tl.cdiv(position, tl.maximum(share, 1)), 1)
    if split >= active:
        return
    first = split * share
    last = tl.minimum(first + share, position)
    keys = keys_ptr + pair * capacity * D
    values = values_ptr + pair * capacity * D
    k, v = _load_block(keys, values, first, last, D, BLOCK_T)
    rp = tl.arange(0, PAD)
    d = tl.arange(0, D)
    # [PAD, D] of equal rows, here and of the new key and value: they lie in threads as q does and need not be moved
    at = position * (D // 2) + d % (D // 2) + rp[:, None] * 0
    cos = tl.load(cos_ptr + at)
    sin = tl.load(sin_ptr + at)
    sin = tl.where(d < D // 2, -sin, sin)
    q_cos, q_sin = _factors(cos, sin, q_norm_ptr, D, HAS_NORM)
    k_cos, k_sin = _factors(cos, sin, k_norm_ptr, D, HAS_NORM)
    if PDL:
        gdc_wait()

    dtype: tl.constexpr = keys_ptr.dtype.element_ty
    dot_dtype: tl.constexpr = tl.float32 if INTERPRET else dtype
    row = qkv_ptr + b.to(tl.int64) * ((GROUP + 2) * KV_HEADS * D)
    k_row = GROUP * KV_HEADS + kv
    # no branch for the owner of the new token: the others would wait for it anyway
    v_new = tl.load(row + (k_row + KV_HEADS) * D + rp[:, None] * 0 + d)
    q, q_partner = _load_heads(row, kv * GROUP + tl.minimum(rp, GROUP - 1), D)
    k_new, k_partner = _load_heads(row, k_row + rp * 0, D)
    if not INTERPRET:
        k, v = _not_before_here(k), _not_before_here(v)
    q = _rotated(q, q_partner, q_cos, q_sin, eps, D, HAS_NORM).to(dtype)
    k_new = _rotated(k_new, k_partner, k_cos, k_sin, eps, D, HAS_NORM).to(dtype)
    q_rows = _over_and_over(q, ROWS)
    scores = _scores(q_rows, k, first, last, scale_log2, BLOCK_T, dot_dtype)
    owner = split == active - 1  # of the new token
    top = tl.where(owner, tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=1) * scale_log2, float("-inf"))
    top = tl.reshape(tl.broadcast_to(top[None, :], (ROWS // PAD, PAD)), (ROWS,))
    total = tl.zeros((ROWS,), tl.float32) + tl.where(owner, 1.0, 0.0)
    acc = _over_and_over(tl.where(owner, v_new, 0.0), ROWS).to(tl.float32)
    free = position.to(tl.int64) * D + d + rp[:, None] * 0
    writes = (rp == tl.where(owner, 0, PAD))[:, None]
    tl.store(keys + free, k_new, mask=writes)
    tl.store(values + free, v_new, mask=writes)
    top, total, acc = _fold(scores, v, top, total, acc, dot_dtype)
    if first + BLOCK_T < last:  # a loop that has nothing to do still works out the addresses of its first copies
        for start in tl.range(first + BLOCK_T, last, BLOCK_T, num_stages=STAGES):
            k, v = _load_block(keys, values, start, last, D, BLOCK_T)
            scores = _scores(q_rows, k, start, last, scale_log2, BLOCK_T, dot_dtype)
            top, total, acc = _fold(scores, v, top, total, acc, dot_dtype)

    rg = tl.arange(0, ROWS)
    rows_mask = (rg < GROUP)[:, None]
    heads = rg[:, None] * D + d
    out = out_ptr + pair * (GROUP * D)
    acc *= (1.0 / total)[:, None]
    if SPLITS == 1:
        tl.store(out + heads, acc.to(dtype), mask=rows_mask)
    else:
        partial = partial_ptr + pair * SPLITS * (GROUP * D)
        stats = stats_ptr + pair * SPLITS * GROUP
        tl.store(partial + split * GROUP * D + heads, acc, mask=rows_mask)
        tl.store(stats + rg * SPLITS + split, top + tl.log2(total), mask=rg < GROUP)
        tl.debug_barrier()  # all of this program's stores before its arrival
        before = tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel", scope="gpu")
        if before == active - 1:
            tl.store(arrived_ptr + pair, 0)
            _combine_splits(partial, stats, out, active, GROUP, PAD, D, SPLITS, CHUNK)


def choose_attention(
    batch: int, n_kv_heads: int, head_dim: int, capacity: int, n_sms: int, shared_bytes: int
) -> AttentionConfig:
    """About two programs a multiprocessor as long as each has a block, or one where pairs of sequence and KV head alone
    are more than half of that; pure. Measured on an H100 within a decode step (NOTES.md).

    Programs that find a multiprocessor each should not share one: there, they ask for so many stages, most of which
    they do not need, that two do not fit.
    """
    pairs, block_t = batch * n_kv_heads, 64 if head_dim <= 128 else 32
    stage_bytes = 4 * block_t * head_dim  # keys and values, two bytes an element
    splits, six_fit = 2 * n_sms // pairs, 6 * stage_bytes <= shared_bytes
    if six_fit and n_sms // 2 < pairs <= n_sms:
        block_t, splits = 2 * block_t, 1
    splits = max(1, min(splits, -(-capacity // block_t)))
    alone = six_fit and splits > 1 and splits * pairs <= n_sms
    return AttentionConfig(block_t, splits, num_warps=4, num_stages=6 if alone else 3)


def make_workspace(batch: int, shape: HeadShape, splits: int, device: torch.device) -> AttentionWorkspace:
    """For `attention` of `batch` sequences with a config of `splits`."""
    group = shape.n_heads // shape.n_kv_heads
    lead = (batch, shape.n_kv_heads, splits if splits > 1 else 0)
    return AttentionWorkspace(
        torch.empty(*lead, group, shape.head_dim, dtype=torch.float32, device=device),
        torch.empty(*lead[:2], group, lead[2], dtype=torch.float32, device=device),
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
