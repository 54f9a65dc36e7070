"""HQQ: fit the grid of every group to its weights alone, under an error that forgives outliers.

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023
(https://mobiusml.github.io/hqq_blog/). No calibration: for every group

    minimise  sum_i |w_i - s (q_i - z)|^p  over s, z,  p < 1,    q_i = clamp(round(w_i / s) + z)

with an auxiliary error e (half-quadratic splitting), alternating
    e <- shrink_p(w - s (q - z), beta)                  generalised soft threshold
    z <- mean(q - (w - e) / s)                          closed form
    s <- <q - z, w - e> / <q - z, q - z>                closed form, not in the source
while beta grows by `kappa`.

Differs from the source:
  * zero points are stored as integer codes, so z is rounded in every round and the scale takes up the rest: that is
    what the third update is for, and in a symmetric scheme it is the only one;
  * errors are taken in steps (divided by s), so beta means the same for weights of any size;
  * every group keeps the best grid it has met, absmax included: by its own objective it is never worse than round to
    nearest. It starts from absmax alone: the objective has far lower minima that cut off the largest weights, and
    models are worse for them (embedded model, p = 0.7, symmetric: 12 % less lp error, 1.7 times the KL).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compress.config_quant import HqqConfig
from compress.quant import Observer, QuantizedWeight, QuantScheme, choose_qparams, group_view, quantize


def hqq_quantize(
    weight: Tensor, scheme: QuantScheme, config: HqqConfig, scale_dtype: torch.dtype = torch.float32
) -> QuantizedWeight:
    """Quantize weight [N, K], any float dtype; computed in float32. The observer of the scheme is not asked.

    Raises:
        NumericalError: the weight is not finite, or its range does not fit scale_dtype.
        ConfigError: the group size does not divide K.
    """
    weight = weight.float()
    groups = group_view(weight, scheme)
    scale, zero = choose_qparams(weight, replace(scheme, observer=Observer.ABSMAX), scale_dtype=scale_dtype)
    best_scale, best_zero, best = scale, zero, lp_error(groups, scale, zero, scheme, config.lp_norm)
    beta = config.beta
    for _ in range(config.iterations):
        scale, zero = _half_quadratic_step(groups, scale, zero, scheme, config.lp_norm, beta)
        error = lp_error(groups, scale, zero, scheme, config.lp_norm)
        better = error < best  # false for a NaN
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        beta *= config.kappa
    return quantize(weight, best_scale, best_zero, scheme)


def lp_error(groups: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme, p: float) -> Tensor:
    """sum |w - Q(w)|^p of every group: groups [N', G, E] -> [N', G]."""
    steps = groups / scale.float().unsqueeze(-1)
    error = (steps - _levels(steps, zero, scheme)).abs_().pow_(p).sum(-1)
    return error * scale.float().pow(p)


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """The generalised soft threshold: sign(x) max(|x| - |x|^(p-1) / beta, 0), 0 at 0."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-12).pow(p - 1) / beta).clamp_(min=0)


def _levels(steps: Tensor, zero: Tensor, scheme: QuantScheme) -> Tensor:
    """q - z for weights in units of the scale."""
    z = zero.float().unsqueeze(-1)
    return torch.maximum(torch.minimum(torch.round(steps), scheme.max_code - z), -z)


def _half_quadratic_step(
    groups: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme, p: float, beta: float
) -> tuple[Tensor, Tensor]:
    """One round of the three updates: a scale (in its own dtype) and an integer zero of every group."""
    steps = groups / scale.float().unsqueeze(-1)
    levels = _levels(steps, zero, scheme)
    target = steps - shrink(steps - levels, beta, p)  # (w - e) / s
    if not scheme.symmetric:
        moved = zero.float() + (levels - target).mean(-1)
        new_zero = torch.round(moved).clamp_(0, scheme.max_code)
        levels += (zero.float() - new_zero).unsqueeze(-1)
        zero = new_zero.to(torch.uint8)
    norm = levels.square().sum(-1)
    ratio = (levels * target).sum(-1) / norm
    # a group that rounds to zeros, or would turn its sign, says nothing about its scale
    ratio = torch.where((norm > 0) & (ratio > 0) & torch.isfinite(ratio), ratio, torch.ones_like(ratio))
    moved_scale = (scale.float() * ratio).to(scale.dtype)
    usable = torch.isfinite(moved_scale) & (moved_scale > 0)
    return torch.where(usable, moved_scale, scale), zero
