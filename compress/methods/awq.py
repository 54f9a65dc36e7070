"""AWQ: scale input channels so that the weights that matter most are rounded most finely.

Paper: arXiv 2306.00978. For a group of linears that read x, y = (W diag(s)) (x / s); 1/s is folded into whatever
produced x, and s is searched so that the *quantized* group reproduces the group's real output.

Differs from the paper:
  * the grid holds the identity and both families of scales, |x|^a and |x|^a / |w|^(1-a) ("duo scaling"), so a
    search can never end worse than no scaling on the tokens it saw;
  * clipping minimises each group's exact output error over all calibration tokens, delta H_g delta^T with H_g the
    diagonal block of the Hessian, instead of a sample of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.config_quant import AwqConfig
from compress.errors import NumericalError
from compress.quant import Granularity, Observer, QuantScheme, choose_qparams, fake_quantize, group_view


@dataclass
class AwqScales:
    """scales float32 [N_producer]; loss and identity_loss are squared output errors of the group; label names the
    winning candidate for the report."""

    scales: Tensor
    loss: float
    identity_loss: float
    label: str


def search_scales(
    weights: list[Tensor],
    absmean: Tensor,
    channel_map: Tensor,
    scheme: QuantScheme,
    config: AwqConfig,
    loss_of: Callable[[Tensor], float],
) -> AwqScales:
    """Try every candidate and keep the one with the least loss.

    Args:
        weights: the group's weights, each float32 [N_i, K].
        absmean: float32 [K], mean |x| of the shared input.
        channel_map: int64 [K], the producer channel behind each input channel.
        loss_of: producer scales [N_producer] -> squared error of the quantized group's output.

    Raises:
        NumericalError: the loss of the identity is not finite, so no comparison means anything.
    """
    n_producer = int(channel_map.max()) + 1
    identity = torch.ones(n_producer, device=absmean.device)
    identity_loss = loss_of(identity)
    if not math.isfinite(identity_loss):
        raise NumericalError("the quantized group's output is not finite even unscaled; use compute_dtype=float32")
    importance = _per_producer(absmean, channel_map, n_producer)
    magnitude = _per_producer(_weight_magnitude(weights, scheme), channel_map, n_producer)
    best = AwqScales(identity, identity_loss, identity_loss, "identity")
    for family in ("x", "x/w") if config.duo_scaling else ("x",):
        best = min(best, _search_family(family, importance, magnitude, config, loss_of, identity_loss), key=_loss)
    return best


def _loss(found: AwqScales) -> float:
    return found.loss if math.isfinite(found.loss) else math.inf


def _search_family(
    family: str,
    importance: Tensor,
    magnitude: Tensor,
    config: AwqConfig,
    loss_of: Callable[[Tensor], float],
    identity_loss: float,
) -> AwqScales:
    """Best exponent a of one family on the grid 0, 1/n_grid .. 1: every fourth step first, then halving the stride
    around the best. The loss is smooth in a, so this finds what the full grid finds at a third of the cost."""
    tried: dict[int, AwqScales] = {}

    def try_step(step: int) -> None:
        if step in tried or not 0 <= step <= config.n_grid:
            return
        a = step / config.n_grid
        if family == "x":
            scales, label = importance.pow(a), f"x^{a:.2f}"
        else:
            scales, label = importance.pow(a) / (magnitude.pow(1 - a) + 1e-4), f"x^{a:.2f}/w^{1 - a:.2f}"
        scales = _normalised(scales)
        tried[step] = AwqScales(scales, loss_of(scales), identity_loss, label)

    stride = max(config.n_grid // 5, 1)
    for step in range(0, config.n_grid + 1, stride):
        if family == "x/w" or step > 0:  # x^0 is the identity
            try_step(step)
    while stride > 1:
        stride //= 2
        centre = min(tried, key=lambda step: _loss(tried[step]))
        try_step(centre - stride)
        try_step(centre + stride)
    return min(tried.values(), key=_loss)


def _normalised(scales: Tensor) -> Tensor:
    """Centred so that max * min = 1, and kept from 0 where a channel is dead."""
    scales = scales.clamp(min=1e-4)
    return scales / (scales.max() * scales.min()).sqrt()


def _weight_magnitude(weights: list[Tensor], scheme: QuantScheme) -> Tensor:
    """Mean over rows of |w| relative to the largest of its quantization group: float32 [K]."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for weight in weights:
        groups = group_view(weight.abs(), scheme)
        relative = groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)
        total += relative.reshape(weight.shape).sum(0)
    return total / sum(w.shape[0] for w in weights)


def _per_producer(values: Tensor, channel_map: Tensor, n_producer: int) -> Tensor:
    """Mean of values [K] over the inputs that each producer channel feeds: [N_producer]."""
    index = channel_map.to(values.device)
    total = torch.zeros(n_producer, device=values.device).index_add_(0, index, values)
    count = torch.zeros(n_producer, device=values.device).index_add_(0, index, torch.ones_like(values))
    return total / count.clamp(min=1)


def scaled_fake_quantize(weight: Tensor, input_scales: Tensor, scheme: QuantScheme) -> Tensor:
    """Q(W diag(s)) diag(1/s): what the group computes with scales s [K], in the unscaled input's terms. [N, K]."""
    scaled = weight * input_scales
    scale, zero = choose_qparams(scaled, replace(scheme, observer=Observer.ABSMAX))  # a range search inside a search
    return fake_quantize(scaled, scale, zero, scheme) / input_scales


def clip_ranges(
    weight: Tensor, hessian: Tensor, scheme: QuantScheme, config: AwqConfig, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale [N', G] and zero [N', G] whose clipped ranges minimise each group's output error.

    Args:
        weight: float32 [N, K]; hessian: float32 [K, K] = E[x x^T].
    """
    scheme = replace(scheme, observer=Observer.ABSMAX)  # this is the range search
    n, k = weight.shape
    n_groups = scheme.n_groups(k)
    size = k // n_groups
    diagonal_blocks = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, k, size)])  # [G, E, E]
    best_scale, best_zero = choose_qparams(weight, scheme, scale_dtype=scale_dtype)
    best = _block_error(weight, best_scale, best_zero, scheme, diagonal_blocks)
    groups = group_view(weight, scheme)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    for step in range(1, config.clip_grid + 1):
        shrink = 1.0 - config.clip_max_shrink * step / config.clip_grid
        clipped = torch.clamp(groups, low * shrink, high * shrink).reshape(n, k)
        scale, zero = choose_qparams(clipped, scheme, scale_dtype=scale_dtype)
        error = _block_error(weight, scale, zero, scheme, diagonal_blocks)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _block_error(weight: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme, blocks: Tensor) -> Tensor:
    """Output error of every group on its own, shaped like scale [N', G]."""
    n = weight.shape[0]
    delta = fake_quantize(weight, scale, zero, scheme) - weight
    grouped = delta.view(n, blocks.shape[0], -1).transpose(0, 1)  # [G, N, E]
    error = (torch.bmm(grouped, blocks) * grouped).sum(-1).t()  # [N, G]
    return error.sum().view(1, 1) if scheme.granularity is Granularity.TENSOR else error
