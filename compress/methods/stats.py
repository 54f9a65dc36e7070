"""What a method may know about the inputs of a linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class CrossStats:
    """How the inputs of one linear drifted from those of the original model, accumulated over calibration tokens.

    cross: float32 [K, K], the running mean of (x_original - x) x^T, x the quantized model's input of the same token.
    n_tokens: rows seen.
    """

    cross: Tensor
    n_tokens: int = 0

    @classmethod
    def empty(cls, k: int, device: torch.device) -> CrossStats:
        return cls(torch.zeros(k, k, dtype=torch.float32, device=device))

    def update(self, original: Tensor, x: Tensor) -> None:
        """Add inputs [..., K] of any float dtype, row for row of the same token.

        The difference is summed, not the two products: it is small, and would drown in the rounding of theirs.
        """
        rows = x.reshape(-1, x.shape[-1]).float()
        drift = original.reshape(-1, original.shape[-1]).float() - rows
        total = self.n_tokens + rows.shape[0]
        self.cross.addmm_(drift.t(), rows, beta=self.n_tokens / total, alpha=1.0 / total)
        self.n_tokens = total


@dataclass
class InputStats:
    """Second moments of the inputs of one linear, accumulated over calibration tokens.

    hessian: float32 [K, K], the running mean of x x^T (the Hessian of the layer's squared output error is
    twice this). abs_sum: float64 [K], sum of |x|. n_tokens: rows seen. drift: of the same tokens, where it is wanted.
    """

    hessian: Tensor
    abs_sum: Tensor
    n_tokens: int = 0
    drift: CrossStats | None = None

    @classmethod
    def empty(cls, k: int, device: torch.device) -> InputStats:
        return cls(
            torch.zeros(k, k, dtype=torch.float32, device=device),
            torch.zeros(k, dtype=torch.float64, device=device),
        )

    def update(self, x: Tensor) -> None:
        """Add inputs [..., K] of any float dtype. The product is taken in float32."""
        rows = x.reshape(-1, x.shape[-1]).float()
        total = self.n_tokens + rows.shape[0]
        # A running mean keeps float32 sums near the size of their terms however many tokens come.
        self.hessian.addmm_(rows.t(), rows, beta=self.n_tokens / total, alpha=1.0 / total)
        self.abs_sum += rows.abs().sum(0, dtype=torch.float64)
        self.n_tokens = total

    def clone(self) -> InputStats:
        drift = CrossStats(self.drift.cross.clone(), self.drift.n_tokens) if self.drift is not None else None
        return InputStats(self.hessian.clone(), self.abs_sum.clone(), self.n_tokens, drift)

    @property
    def absmean(self) -> Tensor:
        """Mean absolute input of each channel, float32 [K]."""
        return (self.abs_sum / max(self.n_tokens, 1)).float()

    @property
    def importance(self) -> Tensor:
        """Mean squared input of each channel, float32 [K]: the diagonal of the Hessian."""
        return self.hessian.diagonal()


def output_error(delta: Tensor, hessian: Tensor) -> float:
    """Mean over tokens of ||delta x||^2, for a weight difference delta [N, K]: trace(delta H delta^T)."""
    delta = delta.float()
    return float(((delta @ hessian) * delta).sum(dtype=torch.float64).clamp(min=0))


def relative_output_error(quantized: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """||Q x - W x||^2 / ||W x||^2 over the calibration tokens; 0 when the output itself is 0."""
    reference = output_error(weight, hessian)
    return output_error(quantized.float() - weight.float(), hessian) / reference if reference > 0 else 0.0
