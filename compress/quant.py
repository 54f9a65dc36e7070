"""What a quantized weight is, and how real numbers become integer codes and back.

Shapes are declared here once, for the whole project:
    weight [N, K]   N outputs, K inputs          x [M, K]   M tokens
    G groups of K/G consecutive inputs           codes [N, K] uint8 in 0 .. 2^bits - 1
    scale [N', G], zero [N', G]                  N' = 1 per tensor, N otherwise; G = 1 unless per group

    W[n, k] = (codes[n, k] - zero[n, g]) * scale[n, g]        with g = k // (K / G)

Symmetric schemes fix zero = 2^(bits-1). Their absmax scale is absmax / ((2^bits - 1) / 2), 7.5 steps at
4 bits: the range -8 .. 7 is used to the full on the negative side and the largest positive weight
rounds down half a step, which costs less than widening every step (it is also what the
compressed-tensors observers do, so artifacts compare like with like).

Scales are rounded to the dtype they will be stored in *before* codes are chosen, so the codes are
optimal for the scale that a reader will actually multiply by.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from compress.errors import ConfigError, NumericalError


class Granularity(Enum):
    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"


class Observer(Enum):
    """How the range of a group is chosen.

    ABSMAX covers every weight. MSE shrinks the range on a grid for the least squared error, weighted by
    `importance` where the caller has one (mean squared activation of each input).
    """

    ABSMAX = "absmax"
    MSE = "mse"


@dataclass(frozen=True)
class QuantScheme:
    """How one weight matrix is quantized.

    >>> QuantScheme(bits=4, group_size=128).n_groups(512)
    4
    >>> QuantScheme(bits=8, granularity=Granularity.CHANNEL).n_groups(512)
    1

    Raises:
        ConfigError: bits outside 2, 3, 4, 8, or a group size that is not positive.
    """

    bits: int = 4
    granularity: Granularity = Granularity.GROUP
    group_size: int = 128
    symmetric: bool = True
    observer: Observer = Observer.ABSMAX

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ConfigError(f"bits={self.bits} is not supported; use 2, 3, 4 or 8")
        if self.granularity is Granularity.GROUP and self.group_size < 1:
            raise ConfigError(f"group_size={self.group_size} must be at least 1; use granularity=channel for one group")

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def mid_code(self) -> int:
        """The zero point of a symmetric scheme."""
        return 2 ** (self.bits - 1)

    def n_groups(self, k: int) -> int:
        """Groups along K.

        Raises:
            ConfigError: the group size does not divide k.
        """
        if self.granularity is not Granularity.GROUP:
            return 1
        if k % self.group_size:
            divisors = [g for g in (32, 64, 128, 256) if k % g == 0]
            hint = f"use one of {divisors}" if divisors else "use granularity=channel"
            raise ConfigError(f"group_size={self.group_size} does not divide K={k}; {hint}")
        return k // self.group_size

    def bits_per_weight(self, n: int, k: int, scale_bits: int = 16) -> float:
        """Stored bits for each weight of an [n, k] matrix, scales and zeros counted."""
        rows = 1 if self.granularity is Granularity.TENSOR else n
        per_group = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + rows * self.n_groups(k) * per_group / (n * k)

    def label(self) -> str:
        """Short name for tables: `w4g128 sym`, `w8 channel asym`."""
        where = f"g{self.group_size}" if self.granularity is Granularity.GROUP else f" {self.granularity.value}"
        return f"w{self.bits}{where} {'sym' if self.symmetric else 'asym'}"


@dataclass
class QuantizedWeight:
    """Integer codes with their scales and zero points; see the module docstring for the formula.

    codes: uint8 [N, K]; scale: float32/bfloat16/float16 [N', G]; zero: uint8 [N', G].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    scheme: QuantScheme

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] in `dtype`; computed in float32, where the product of code and scale is exact."""
        return dequantize(self).to(dtype)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        return QuantizedWeight(self.codes.to(device), self.scale.to(device), self.zero.to(device), self.scheme)


def group_view(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """[N, K] seen as [N', G, elements of one group], without a copy for contiguous input."""
    n, k = weight.shape
    if scheme.granularity is Granularity.TENSOR:
        return weight.reshape(1, 1, n * k)
    return weight.reshape(n, scheme.n_groups(k), -1)


def choose_qparams(
    weight: Tensor,
    scheme: QuantScheme,
    importance: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
    n_grid: int = 80,
    max_shrink: float = 0.8,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every group.

    Args:
        weight: [N, K], any float dtype; computed in float32.
        importance: [K] non-negative weight of each input's squared error (only with Observer.MSE).
        scale_dtype: dtype the scale is stored in; the returned scale is already rounded to it.
        n_grid, max_shrink: the MSE search tries ranges from 1 down to 1 - max_shrink of absmax in n_grid steps.

    Returns:
        scale [N', G] in scale_dtype (never 0), zero uint8 [N', G].

    Raises:
        NumericalError: the weight holds NaN or Inf, or its range does not fit scale_dtype.
    """
    groups = group_view(weight.float(), scheme)
    low, high = groups.amin(-1), groups.amax(-1)  # NaN and Inf show in the extremes
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise NumericalError("weight holds NaN or Inf; the source checkpoint is broken, quantizing it would hide that")
    scale, zero = _range_to_qparams(low, high, scheme, scale_dtype)
    if scheme.observer is Observer.ABSMAX:
        return scale, zero

    cost_weight = None
    if importance is not None:
        cost_weight = group_view(importance.float().expand(weight.shape), scheme)
    best = _group_error(groups, scale, zero, scheme, cost_weight)
    for step in range(1, n_grid):
        shrink = 1.0 - max_shrink * step / n_grid
        s, z = _range_to_qparams(low * shrink, high * shrink, scheme, scale_dtype)
        error = _group_error(groups, s, z, scheme, cost_weight)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def _range_to_qparams(
    low: Tensor, high: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if scheme.symmetric:
        step = torch.maximum(-low, high) / (scheme.max_code / 2)
    else:
        # zero must be representable: it is where exact zeros (padding, pruned weights) live
        low, high = low.clamp(max=0), high.clamp(min=0)
        step = (high - low) / scheme.max_code
    # A group of zeros, or of values whose step underflows, needs a scale that can be divided by. float16 is a normal
    # number only from 6e-5 on, which real weights reach: there the floor is its smallest subnormal.
    floor = 2.0**-24 if scale_dtype is torch.float16 else torch.finfo(scale_dtype).tiny
    scale = step.to(scale_dtype).clamp(min=floor)
    if not torch.isfinite(scale).all():
        raise NumericalError(
            f"a scale of {step.max().item():.3e} does not fit {scale_dtype}, the dtype of the checkpoint; "
            "such weights are damaged, or must be saved in bfloat16 or float32 first"
        )
    if scheme.symmetric:
        return scale, torch.full_like(scale, scheme.mid_code, dtype=torch.uint8)
    zero = torch.round(-low / scale.float()).clamp(0, scheme.max_code)
    return scale, zero.to(torch.uint8)


def _codes(groups: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme) -> Tensor:
    """Real-valued groups [N', G, E] -> float codes, rounded and clamped."""
    q = torch.round(groups / scale.float().unsqueeze(-1)) + zero.float().unsqueeze(-1)
    return q.clamp_(0, scheme.max_code)


def _group_error(
    groups: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme, cost_weight: Tensor | None
) -> Tensor:
    error = _codes(groups, scale, zero, scheme)
    error -= zero.float().unsqueeze(-1)
    error *= scale.float().unsqueeze(-1)
    error -= groups
    error.square_()
    if cost_weight is not None:
        error *= cost_weight
    return error.sum(-1)


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Round to nearest with given scales: [N, K] -> QuantizedWeight."""
    groups = group_view(weight.float(), scheme)
    codes = _codes(groups, scale, zero, scheme).to(torch.uint8).reshape(weight.shape)
    return QuantizedWeight(codes, scale, zero, scheme)


def dequantize(q: QuantizedWeight) -> Tensor:
    """QuantizedWeight -> float32 [N, K]."""
    groups = group_view(q.codes.float(), q.scheme)
    w = (groups - q.zero.float().unsqueeze(-1)) * q.scale.float().unsqueeze(-1)
    return w.reshape(q.codes.shape)


def fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor, scheme: QuantScheme) -> Tensor:
    """quantize then dequantize without the uint8 stop: float32 [N, K]."""
    groups = group_view(weight.float(), scheme)
    w = _codes(groups, scale, zero, scheme)
    w -= zero.float().unsqueeze(-1)
    w *= scale.float().unsqueeze(-1)
    return w.reshape(weight.shape)
