"""AutoRound: learn by signed gradients which way each weight is rounded, and how wide each group's range is.

Paper: arXiv 2309.05516 (SignRound). A weight is (round(u) clamped to the codes, - zero) * scale * gain; the gradient
passes the rounding as if it were the identity, and both u and gain move by a fixed step against its sign, a step
that falls linearly to 0. The loss is the caller's: the output error of a whole decoder block.

Differs from the paper:
  * it starts from any quantized weight (GPTQ's, say) instead of round-to-nearest: u begins at the given code, moved
    towards the real weight by `pull` of the way that stays inside the rounding cell, so a code that GPTQ pushed away
    from the nearest one is as hard to turn back as to push on.
  * scales are rounded to the dtype they are stored in *inside* the loop, so what is learned is what is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.quant import QuantizedWeight, group_view


class _RoundToCodes(torch.autograd.Function):
    """(u [N, K], scale [N', G], lowest and highest code - zero [N', G]) -> dense [N, K]; straight through."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, scale: Tensor, low: Tensor, high: Tensor, shape: tuple[int, ...]) -> Tensor:
        steps = u.round().view(shape)
        steps = torch.minimum(torch.maximum(steps, low.unsqueeze(-1)), high.unsqueeze(-1))
        ctx.save_for_backward(steps, scale)
        return (steps * scale.unsqueeze(-1)).view(u.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        steps, scale = ctx.saved_tensors
        grad = grads[0].float().reshape(steps.shape)
        return (grad * scale.unsqueeze(-1)).view(grads[0].shape), (grad * steps).sum(-1), None, None, None


class _Stored(torch.autograd.Function):
    """A value as another dtype will hold it; straight through."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values as `dtype` will hold them; the gradient passes unchanged."""
    result: Tensor = _Stored.apply(value, dtype)
    return result


class LearnedWeight(nn.Module):
    """A quantized weight whose codes and scales can be learned.

    u: float32 [N, K], in steps from the zero point; gain: float32 [N', G], around 1.

    Args:
        start: the codes, scales and zero points to begin with.
        weight: [N, K], the real values they stand for.
        pull: 0 begins in the middle of each rounding cell, 1 at its point nearest to the real weight.
    """

    def __init__(self, start: QuantizedWeight, weight: Tensor, pull: float) -> None:
        super().__init__()
        scheme, zero = start.scheme, start.zero.float()
        self.scheme, self.zero, self.scale_dtype = scheme, start.zero, start.scale.dtype
        self.scale0 = start.scale.float()
        self.low, self.high = -zero, scheme.max_code - zero
        codes = group_view(start.codes.float(), scheme)
        self.shape = tuple(codes.shape)
        steps = codes - zero.unsqueeze(-1)
        real = group_view(weight.float(), scheme) / self.scale0.unsqueeze(-1)
        u = steps + pull * (real - steps).clamp(-0.5, 0.5)
        self.u = nn.Parameter(u.reshape(weight.shape))
        self.gain = nn.Parameter(torch.ones_like(self.scale0))

    def scale(self) -> Tensor:
        return stored(self.scale0 * self.gain, self.scale_dtype)

    def forward(self) -> Tensor:
        """The dense weight, float32 [N, K], differentiable in u and gain."""
        dense: Tensor = _RoundToCodes.apply(self.u, self.scale(), self.low, self.high, self.shape)
        return dense

    @torch.no_grad()
    def step(self, rate: float, gain_rate: float) -> None:
        """One signed-gradient step; the gradients are used up."""
        for parameter, size in ((self.u, rate), (self.gain, gain_rate)):
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign_(), alpha=size)
                parameter.grad = None

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """What was learned, as codes [N, K], scales and zero points."""
        steps = self.u.round().view(self.shape)
        steps = torch.minimum(torch.maximum(steps, self.low.unsqueeze(-1)), self.high.unsqueeze(-1))
        codes = (steps - self.low.unsqueeze(-1)).to(torch.uint8).reshape(self.u.shape)
        return QuantizedWeight(codes, self.scale().to(self.scale_dtype), self.zero, self.scheme)
