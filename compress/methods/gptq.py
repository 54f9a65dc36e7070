"""GPTQ: round columns one by one and let the columns not yet rounded absorb the error.

Paper: arXiv 2210.17323, Algorithm 1, with lazy batches of columns (section 3.3).
Legend: W [N, K] weight; H [K, K] = E[x x^T]; Hinv the upper Cholesky factor of H^-1; Err the scaled rounding
error of a batch of columns.

Differs from the paper:
  * act-order with *static groups*: the scales of every group are chosen from the original weights before any
    column moves, so the order of rounding (largest diagonal of H first) leaves no trace in the format and no
    g_idx is needed.
  * ranges come from `choose_qparams`, so an MSE observer weights squared error by the diagonal of H.
  * a Hessian that is not positive definite raises the damping tenfold, a counted number of times that the
    result reports, and then stops. It never turns into RTN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.config import GptqConfig
from compress.errors import NumericalError
from compress.quant import QuantizedWeight, QuantScheme, choose_qparams, group_view


@dataclass
class GptqResult:
    """The quantized weight and how hard it was to get: damping used, times it was raised, dead inputs."""

    weight: QuantizedWeight
    damping: float
    damping_steps: int
    n_dead: int


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    scheme: QuantScheme,
    config: GptqConfig,
    scale_dtype: torch.dtype = torch.float32,
) -> GptqResult:
    """Quantize weight [N, K] given hessian [K, K] (any positive multiple of E[x x^T]).

    Inputs that are always zero ("dead", diagonal 0) get weight 0: they cannot be seen and would only cost range.

    Raises:
        NumericalError: weight or Hessian not finite, or no damping within config makes it positive definite.
        ConfigError: the group size does not divide K.
    """
    if not torch.isfinite(hessian).all():
        raise NumericalError("the Hessian holds NaN or Inf: activations overflowed; use compute_dtype=float32")
    W = weight.float().clone()
    H = hessian.float().clone()
    dead = H.diagonal() == 0
    # the mean of the live ones, so that dead inputs leave the damping as it is
    H.diagonal()[dead] = H.diagonal()[~dead].mean() if not dead.all() else 1.0
    W[:, dead] = 0

    scale, zero = choose_qparams(W, scheme, importance=H.diagonal(), scale_dtype=scale_dtype)
    order = torch.argsort(H.diagonal(), descending=True, stable=True) if config.act_order else None
    if order is not None:
        W, H = W[:, order], H[order][:, order]
    Hinv, damping, steps = _inverse_cholesky(H, config)
    step, offset = _per_column(scale, zero, scheme, W.shape)
    if order is not None:
        step, offset = step[:, order], offset[:, order]

    codes = _round_columns(W, Hinv, step, offset, scheme.max_code, config.block_size)
    if order is not None:
        codes = codes[:, torch.argsort(order)]
    quantized = QuantizedWeight(codes.contiguous(), scale, zero, scheme)
    return GptqResult(quantized, damping, steps, int(dead.sum()))


def _round_columns(
    W: Tensor, Hinv: Tensor, step: Tensor, offset: Tensor, max_code: int, block_size: int
) -> Tensor:
    """The double loop of Algorithm 1. Works on transposes: a column of W is then a contiguous row.

    W, step, offset [N, K] -> codes uint8 [N, K]. W is consumed.
    """
    Wt = W.t().contiguous()  # [K, N]
    step_t, offset_t = step.t().contiguous(), offset.t().contiguous()
    codes = torch.empty_like(Wt, dtype=torch.uint8)
    K = Wt.shape[0]
    for i1 in range(0, K, block_size):
        i2 = min(i1 + block_size, K)
        W1 = Wt[i1:i2].clone()
        Err1 = torch.empty_like(W1)
        Hinv1 = Hinv[i1:i2, i1:i2]
        diagonal = Hinv1.diagonal().tolist()
        for i in range(i2 - i1):
            w, s, z = W1[i], step_t[i1 + i], offset_t[i1 + i]
            q = torch.round(w / s).add_(z).clamp_(0, max_code)
            codes[i1 + i] = q.to(torch.uint8)
            Err1[i] = (w - (q - z) * s) / diagonal[i]
            if i + 1 < i2 - i1:
                W1[i + 1 :].addr_(Hinv1[i, i + 1 :], Err1[i], alpha=-1)
        if i2 < K:
            Wt[i2:].addmm_(Hinv[i1:i2, i2:].t(), Err1, alpha=-1)
    return codes.t()


def _inverse_cholesky(H: Tensor, config: GptqConfig) -> tuple[Tensor, float, int]:
    """Upper Cholesky factor of (H + damping * mean(diag) I)^-1, the relative damping used, times it was raised.

    Float64 where it matters: inverting a float32 Hessian of condition 1e6 loses the small eigenvalues that
    decide where error may go. H100s and CPUs do this once a layer, so the cost is small.
    """
    H = H.double()
    mean = H.diagonal().mean()
    if mean > 0:
        H = H / mean  # the rounding does not depend on the size of H, the range of float32 does
    damping = config.damping
    for steps in range(config.max_damping_steps + 1):
        damped = H.clone()
        damped.diagonal().add_(damping)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            inverse = torch.cholesky_inverse(lower)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(info) == 0 and torch.isfinite(upper).all():
                return upper.float(), damping, steps
        damping *= 10
    raise NumericalError(
        f"the Hessian is not positive definite even with damping {damping / 10:g} x its mean diagonal; "
        "calibrate on more or more varied text, or raise gptq.damping"
    )


def _per_column(scale: Tensor, zero: Tensor, scheme: QuantScheme, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every element, float32 [N, K] views."""
    like = group_view(torch.empty(shape, device=scale.device), scheme)
    step = scale.float().unsqueeze(-1).expand_as(like).reshape(shape)
    offset = zero.float().unsqueeze(-1).expand_as(like).reshape(shape)
    return step, offset
