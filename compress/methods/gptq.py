"""GPTQ: round columns one by one and let the columns not yet rounded absorb the error.

Paper: arXiv 2210.17323, Algorithm 1, with lazy batches of columns (section 3.3).
Legend: W [N, K] weight; H [K, K] = E[x x^T]; Hinv the upper Cholesky factor of H^-1; Err the scaled rounding
error of a batch of columns; C [K, K] = E[(x_original - x) x^T].

Asymmetric calibration (GPTAQ, arXiv 2504.02692): the layer reads x, its original x_original, and what should come
out is W y with y = x + a (x_original - x), a the strength.

    E||Q x - W y||^2 = tr((Q - W*) H (Q - W*)^T) + const,    W* H = W (H + a C),    W* = W + a W C H^-1

so it is GPTQ of W*, ranges included. The paper corrects inside the loop over columns, where the drift of input k can
move the columns after k only (its mask M_U); W* lets every column answer to every input, for one product with the
factor that GPTQ needs anyway. H is damped here too: W* is the ridge solution around W, and directions in which x
hardly varies leave the weight as it is.

Differs from the paper:
  * act-order with *static groups*: the scales of every group are chosen from the original weights before any
    column moves, so the order of rounding (largest diagonal of H first) leaves no trace in the format and no
    g_idx is needed.
  * ranges come from `choose_qparams`, so an MSE observer weights squared error by the diagonal of H.
  * a Hessian that is not positive definite raises the damping tenfold, a counted number of times that the
    result reports, and then stops. It never turns into RTN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.config_quant import GptqConfig
from compress.errors import NumericalError
from compress.methods.quantease import refine
from compress.quant import QuantizedWeight, QuantScheme, choose_qparams


@dataclass
class GptqResult:
    """The quantized weight and how hard it was to get: damping used, times it was raised, dead inputs; with a cross
    statistic ||W* - W|| / ||W||, how far the weight moved before it was rounded."""

    weight: QuantizedWeight
    damping: float
    damping_steps: int
    n_dead: int
    moved: float | None = None


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    scheme: QuantScheme,
    config: GptqConfig,
    scale_dtype: torch.dtype = torch.float32,
    cross: Tensor | None = None,
) -> GptqResult:
    """Quantize weight [N, K] given hessian [K, K] (any positive multiple of E[x x^T]).

    cross [K, K], the same multiple of E[(x_original - x) x^T], asks for asymmetric calibration.
    Inputs that are always zero ("dead", diagonal 0) get weight 0: they cannot be seen and would only cost range.

    Raises:
        NumericalError: weight or Hessian not finite, or no damping within config makes it positive definite.
        ConfigError: the group size does not divide K.
    """
    return gptq_quantize_shared([weight], hessian, scheme, config, scale_dtype, cross)[0]


def gptq_quantize_shared(
    weights: Sequence[Tensor],
    hessian: Tensor,
    scheme: QuantScheme,
    config: GptqConfig,
    scale_dtype: torch.dtype = torch.float32,
    cross: Tensor | None = None,
) -> list[GptqResult]:
    """Quantize weights [N_i, K] that read the same input, with one factorisation and one pass over the columns.

    Rows do not see each other, so the codes are those of separate calls. Raises as `gptq_quantize`.
    """
    for name, value in (("Hessian", hessian), ("cross statistic", cross)):
        if value is not None and not torch.isfinite(value).all():
            raise NumericalError(f"the {name} holds NaN or Inf: activations overflowed; use compute_dtype=float32")
    if bool((hessian.diagonal() < 0).any()):
        raise NumericalError("the Hessian has a negative diagonal, which no mean of x x^T has")
    H = hessian.float().clone()
    dead = H.diagonal() == 0
    # the mean of the live ones, so that dead inputs leave the damping as it is
    H.diagonal()[dead] = H.diagonal()[~dead].mean() if not dead.all() else 1.0
    importance = H.diagonal().clone()
    order = torch.argsort(importance, descending=True, stable=True) if config.act_order else None
    if order is not None:
        H = H[order][:, order]
    Hinv, damping, steps = _inverse_cholesky(H, config)
    del H
    W = torch.cat([w.float() for w in weights])
    sizes = [w.shape[0] for w in weights]
    moved: list[float | None] = [None] * len(sizes)
    if cross is not None:
        step = _drift_correction(W @ cross.float(), Hinv, order).mul_(config.gptaq_strength / float(importance.mean()))
        moved = [_ratio(s, w) for s, w in zip(step.split(sizes), W.split(sizes), strict=True)]
        W += step
    W[:, dead] = 0
    qparams = [choose_qparams(part, scheme, importance, scale_dtype) for part in W.split(sizes)]

    k = W.shape[1]
    columns = torch.arange(k, device=W.device) if order is None else order
    groups = (columns // (k // scheme.n_groups(k))).tolist()
    targets = W.split(sizes)
    if order is not None:
        W = W[:, order]
    scale_t = torch.cat([_by_row(s, n) for (s, _), n in zip(qparams, sizes, strict=True)]).float().t().contiguous()
    zero_t = torch.cat([_by_row(z, n) for (_, z), n in zip(qparams, sizes, strict=True)]).float().t().contiguous()
    Wt = W.t().contiguous()  # a copy: the loop consumes it
    del W
    codes = _round_columns(Wt, Hinv, _Grid(scale_t, zero_t, groups, scheme.max_code), config.block_size)
    if order is not None:
        codes = codes[torch.argsort(order)]
    parts = codes.t().split(sizes)
    found = [
        QuantizedWeight(part.contiguous(), scale, zero, scheme)
        for part, (scale, zero) in zip(parts, qparams, strict=True)
    ]
    if config.refine_rounds:
        H = hessian.float().clone()
        H.diagonal().copy_(importance + damping * importance.mean())  # what the columns were rounded for
        H /= importance.mean()
        found = [
            refine(target, H, q, config.refine_rounds, config.block_size)
            for target, q in zip(targets, found, strict=True)
        ]
    return [GptqResult(q, damping, steps, int(dead.sum()), m) for q, m in zip(found, moved, strict=True)]


def _drift_correction(WC: Tensor, Hinv: Tensor, order: Tensor | None) -> Tensor:
    """W C H^-1 [N, K] from W C [N, K], with H^-1 = Hinv^T Hinv in the order of rounding."""
    if order is None:
        return WC @ Hinv.t() @ Hinv
    return (WC[:, order] @ Hinv.t() @ Hinv)[:, torch.argsort(order)]


def _ratio(part: Tensor, whole: Tensor) -> float:
    norm = float(whole.norm())
    return float(part.norm()) / norm if norm > 0 else 0.0


@dataclass
class _Grid:
    """scale_t, zero_t float32 [G, N]; groups: the group of each column, in the order of rounding."""

    scale_t: Tensor
    zero_t: Tensor
    groups: list[int]
    max_code: int


def _by_row(values: Tensor, n: int) -> Tensor:
    """[N', G] -> [N, G]: a per-tensor value for every row."""
    return values.expand(n, -1)


def _round_columns(Wt: Tensor, Hinv: Tensor, grid: _Grid, block_size: int) -> Tensor:
    """The double loop of Algorithm 1 on the transpose, where a column of W is a contiguous row.

    Wt float32 [K, N], consumed -> codes uint8 [K, N].
    """
    K = Wt.shape[0]
    lowest, highest = -grid.zero_t, grid.max_code - grid.zero_t  # of code - zero
    codes = torch.empty_like(Wt, dtype=torch.uint8)
    for i1 in range(0, K, block_size):
        i2 = min(i1 + block_size, K)
        W1 = Wt[i1:i2].clone()
        Err1, Q1 = torch.empty_like(W1), torch.empty_like(W1)
        Hinv1 = Hinv[i1:i2, i1:i2]
        diagonal = Hinv1.diagonal().tolist()
        for i in range(i2 - i1):
            g = grid.groups[i1 + i]
            w, s = W1[i], grid.scale_t[g]
            q = torch.clamp(torch.div(w, s).round_(), lowest[g], highest[g], out=Q1[i])
            torch.div(w - q * s, diagonal[i], out=Err1[i])
            if i + 1 < i2 - i1:
                W1[i + 1 :].addr_(Hinv1[i, i + 1 :], Err1[i], alpha=-1)
        index = torch.tensor(grid.groups[i1:i2], device=Wt.device)
        codes[i1:i2] = Q1.add_(grid.zero_t[index]).to(torch.uint8)
        if i2 < K:
            Wt[i2:].addmm_(Hinv[i1:i2, i2:].t(), Err1, alpha=-1)
    return codes


def _inverse_cholesky(H: Tensor, config: GptqConfig) -> tuple[Tensor, float, int]:
    """Upper Cholesky factor R of (H + damping * mean(diag) I)^-1 = R^T R, the relative damping, times it was raised.

    With J the reversal of rows and columns and J H J = L L^T, U = J L J is upper triangular and H = U U^T, so
    R = U^-1: one factorisation and one triangular solve instead of two factorisations around an inverse.
    Float64, because the small eigenvalues that decide where error may go drown in a float32 Hessian's rounding.
    """
    mean = H.diagonal().double().mean()
    damping = config.damping
    for steps in range(config.max_damping_steps + 1):
        # the rounding does not depend on the size of H, the range of float32 does
        flipped = H.double().div_(mean).flip(0, 1)
        flipped.diagonal().add_(damping)
        lower, info = torch.linalg.cholesky_ex(flipped)
        del flipped
        if int(info) == 0:
            identity = torch.eye(H.shape[0], dtype=torch.float64, device=H.device)
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            if torch.isfinite(upper).all():
                return upper.float(), damping, steps
        damping *= 10
    raise NumericalError(
        f"the Hessian is not positive definite even with damping {damping / 10:g} x its mean diagonal; "
        "calibrate on more or more varied text, or raise gptq.damping"
    )
