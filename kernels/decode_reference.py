"""Naive PyTorch twins of the one-token kernels `decode_ops` and `decode_attention`, same names and arguments.

They compute in float32, or in float64 where the inputs are, and round once to the inputs' dtype. A decode step runs on
them wherever the Triton kernels do not run: on a CPU, in any dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from compress.kernels.w4a16 import KernelWeight


@dataclass(frozen=True)
class HeadShape:
    """Attention heads of one layer. scale multiplies q k; eps is that of the optional norms of q and k."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    eps: float = 1e-6


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, ids: Tensor | None = None, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """(RMSNorm(h) * weight, h) with h = x, x + residual, or x[ids]; the mean square is taken over the last dimension.

    Args:
        x: [M, K], or the embedding [V, K] when `ids` int64 [M] are given.
        weight: [K].
        residual: [M, K] or None. It is overwritten with h, rounded to its dtype before the norm sees it.
        ids: rows of x to gather, or None. Not together with `residual`.
        pdl: of no effect here.

    Returns:
        two [M, K] in x's dtype; h is `residual` itself where that was given.
    """
    h = x if ids is None else x[ids]
    if residual is not None:
        h = residual.copy_(_wide(residual) + _wide(x))
    return _norm(h, weight, eps).to(x.dtype), h


def silu_mul(gate_up: Tensor, interleaved: bool = False, pdl: bool = False) -> Tensor:
    """silu(gate) * up for gate_up [M, 2 F] -> [M, F]: gate in the first F columns, or in turns of 8 (`interleave`)."""
    if interleaved:
        gate, up = _wide(gate_up).reshape(gate_up.shape[0], -1, 2, 8).transpose(1, 2).flatten(2).unbind(1)
    else:
        gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


class Around(NamedTuple):
    """What a product of a decode step does for its neighbours.

    squares: float32 [P, M], parts of the sums of squares of the rows that x was before a norm's weight multiplied it;
    y is divided by the root of their mean (eps added), which completes RMSNorm. residual: [M, N], added to y, and
    norm: [N], the weight of the RMSNorm that follows; they come together. silu: rows of W are gate and up in turns of
    8.
    """

    squares: Tensor | None = None
    eps: float = 0.0
    residual: Tensor | None = None
    norm: Tensor | None = None
    silu: bool = False


class Stream(NamedTuple):
    """A residual stream: h [M, N], h * norm [M, N], and parts of the sums of squares of h, float32 [P, M]."""

    h: Tensor
    normed: Tensor
    squares: Tensor


def interleave(gate: Tensor, up: Tensor, dim: int) -> Tensor:
    """Two tensors of F slices along `dim`, F a multiple of 8, in turns of 8: 2 F slices, as `Around.silu` wants."""
    shape = list(gate.shape)
    split = [*shape[:dim], shape[dim] // 8, 8, *shape[dim + 1 :]]
    both = torch.stack([gate.reshape(split), up.reshape(split)], dim=dim + 1)
    return both.reshape([*shape[:dim], 2 * shape[dim], *shape[dim + 1 :]])


def linear_around(
    x: Tensor, weight: KernelWeight, bias: Tensor | None, around: Around, pdl: bool = False
) -> Tensor | Stream:
    """x [M, K] W^T + bias and what is around it: a Stream with `residual`, [M, N / 2] with `silu`, else [M, N]."""
    from compress.kernels.dequant import dense

    y = _wide(x) @ dense(weight, torch.float32).to(_wide(x).dtype).t()
    if around.squares is not None:
        y *= torch.rsqrt(around.squares.sum(0).to(y.dtype) / weight.k + around.eps)[:, None]
    if bias is not None:
        y += bias
    y = y.to(x.dtype)
    if around.residual is None:
        return silu_mul(y, interleaved=True) if around.silu else y
    assert around.norm is not None
    h = (_wide(y) + _wide(around.residual)).to(x.dtype)
    return Stream(h, (_wide(h) * _wide(around.norm)).to(x.dtype), _wide(h).square().sum(-1).float()[None])


def dense_behind_norm(
    x: Tensor, weight: Tensor, squares: Tensor, eps: float, position: Tensor | None = None, pdl: bool = False
) -> Tensor:
    """x [M, K] W^T divided by the root mean square that squares [P, M] are parts of: what follows a Stream's normed.
    position: int32 [1], one more after this."""
    if position is not None:
        position += 1
    y = _wide(x) @ _wide(weight).t()
    return (y * torch.rsqrt(squares.sum(0).to(y.dtype) / x.shape[1] + eps)[:, None]).to(x.dtype)


def attention(
    qkv: Tensor,
    rope: tuple[Tensor, Tensor],
    positions: Tensor,
    cache: tuple[Tensor, Tensor],
    shape: HeadShape,
    norms: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of one new token a sequence, which is appended to the cache on the way.

    Args:
        qkv: [B, (H + 2 KV) D], rows of q heads, k heads, v heads.
        rope: cos and sin, float32 [C, D / 2], by position; head halves rotate against each other (rotate_half).
        positions: int32 [B], tokens in the cache so far = the position of the new one.
        cache: keys and values [B, KV, C, D], in qkv's dtype; written at `positions`.
        norms: weights [D] of the RMSNorm of each head of q and of k before the rotation (Qwen3), or None.

    Returns:
        [B, H D] in qkv's dtype.
    """
    batch, group = qkv.shape[0], shape.n_heads // shape.n_kv_heads
    heads = qkv.view(batch, -1, shape.head_dim)
    q, k, v = heads.split([shape.n_heads, shape.n_kv_heads, shape.n_kv_heads], dim=1)
    if norms is not None:
        q, k = (_norm(t, w, shape.eps) for t, w in zip((q, k), norms, strict=True))
    cos, sin = (t[positions.long()].unsqueeze(1) for t in rope)  # [B, 1, D / 2]
    q, k = (_rotate(_wide(t), cos, sin) for t in (q, k))
    rows = torch.arange(batch, device=qkv.device)
    keys, values = cache
    keys[rows, :, positions.long()] = k.to(keys.dtype)
    values[rows, :, positions.long()] = v
    q = _wide(q.to(qkv.dtype)).view(batch, shape.n_kv_heads, group, -1)
    scores = q @ _wide(keys).transpose(2, 3) * shape.scale  # [B, KV, G, C]
    beyond = torch.arange(keys.shape[2], device=qkv.device) > positions[:, None]
    weights = scores.masked_fill(beyond[:, None, None], float("-inf")).softmax(dim=-1)
    seen = _wide(values).masked_fill(beyond[:, None, :, None], 0.0)  # what lies beyond need not be finite
    return (weights @ seen).reshape(batch, -1).to(qkv.dtype)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype is torch.float64 else t.float()


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = _wide(x)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
