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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.quant import QuantizedWeight, group_view


def nearest_steps(u: Tensor, low: Tensor, high: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """u [N, K], in steps from the zero point, as the codes' own steps and before they are clamped to low .. high
    [N', G]: both float32 [N', G, E]."""
    rounded = u.float().view(shape).round()
    return torch.clamp(rounded, low.unsqueeze(-1), high.unsqueeze(-1)), rounded


class _RoundToCodes(torch.autograd.Function):
    """(u [N, K], scale [N', G], lowest and highest code - zero [N', G]) -> dense [N, K]; straight through."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, scale: Tensor, low: Tensor, high: Tensor, shape: tuple[int, ...]) -> Tensor:
        steps, _ = nearest_steps(u, low, high, shape)
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


_CELL_UNITS = 254  # of an int8 in the width of a rounding cell


def cell_offsets(start: QuantizedWeight, weight: Tensor) -> Tensor:
    """Where in its code's rounding cell each real weight [N, K] lies, or the nearest point of the cell: float32 [N, K],
    -0.5 .. 0.5 of a step from the code."""
    steps = group_view(start.codes.float(), start.scheme) - start.zero.float().unsqueeze(-1)
    real = group_view(weight.float(), start.scheme) / start.scale.float().unsqueeze(-1)
    return (real - steps).clamp(-0.5, 0.5).reshape(weight.shape)


def pack_offsets(offsets: Tensor) -> Tensor:
    """`cell_offsets` in one byte each: int8 [N, K]."""
    return (offsets * _CELL_UNITS).round().to(torch.int8)


def unpack_offsets(packed: Tensor) -> Tensor:
    """The inverse of `pack_offsets`, to half of 1/254 step: float32 [N, K]."""
    return packed.float() / _CELL_UNITS


class LearnedWeight(nn.Module):
    """A quantized weight whose scales can be learned, and its codes.

    u: [N, K], in steps from the zero point, float32 where the codes are learned, else integers; gain: float32 [N', G],
    around 1.

    Args:
        start: the codes, scales and zero points to begin with.
        offsets: [N, K], where in its rounding cell each weight begins, in steps from its code: `cell_offsets` times how
            far towards the real weight it is to lie. None: codes stay as they are.
    """

    u: Tensor

    def __init__(self, start: QuantizedWeight, offsets: Tensor | None) -> None:
        super().__init__()
        scheme, zero = start.scheme, start.zero.float()
        self.scheme, self.zero, self.scale_dtype = scheme, start.zero, start.scale.dtype
        self.scale0 = start.scale.float()
        self.low, self.high = -zero, scheme.max_code - zero
        codes = group_view(start.codes.float(), scheme)
        self.shape = tuple(codes.shape)
        self.steps_dtype = torch.int8 if scheme.bits < 8 else torch.int16
        steps = (codes - zero.unsqueeze(-1)).reshape(start.shape)
        if offsets is None:
            self.register_buffer("u", steps.to(self.steps_dtype))
        else:
            self.u = nn.Parameter(steps + offsets)
        self.gain = nn.Parameter(torch.ones_like(self.scale0))

    def scale(self) -> Tensor:
        """float32 [N', G], as the stored dtype will hold it."""
        return stored(self.scale0 * self.gain, self.scale_dtype)

    def forward(self) -> Tensor:
        """The dense weight, float32 [N, K], differentiable in u and gain."""
        dense: Tensor = _RoundToCodes.apply(self.u, self.scale(), self.low, self.high, self.shape)
        return dense

    def step(self, rate: float, gain_rate: float) -> None:
        """`signed_step` of this weight alone."""
        signed_step([self], rate, gain_rate)

    @torch.no_grad()
    def state(self) -> tuple[Tensor | None, Tensor]:
        """What is learned, on the CPU: codes in steps from the zero point [N, K] in a byte each, two at 8 bits (None
        where they stay), and gains. Where in its cell a weight lies is not kept."""
        steps = None
        if isinstance(self.u, nn.Parameter):
            steps = nearest_steps(self.u, self.low, self.high, self.shape)[0].to(self.steps_dtype).to("cpu")
            steps = steps.reshape(self.u.shape)
        return steps, self.gain.detach().to("cpu", copy=True)

    @torch.no_grad()
    def set_state(self, state: tuple[Tensor | None, Tensor]) -> None:
        """Go back to a `state`."""
        steps, gain = state
        if steps is not None:
            self.u.copy_(steps)
        self.gain.copy_(gain)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """What was learned, as codes [N, K], scales and zero points."""
        steps, _ = nearest_steps(self.u, self.low, self.high, self.shape)
        codes = (steps - self.low.unsqueeze(-1)).to(torch.uint8).reshape(self.u.shape)
        return QuantizedWeight(codes, self.scale().to(self.scale_dtype), self.zero, self.scheme)


@torch.no_grad()
def signed_step(weights: Sequence[LearnedWeight], rate: float, gain_rate: float) -> None:
    """One signed-gradient step of u and of gain; the gradients are used up. A few launches for all weights together."""
    for parameters, size in (([w.u for w in weights], rate), ([w.gain for w in weights], gain_rate)):
        moved = [p for p in parameters if p.grad is not None]
        grads = [p.grad for p in moved if p.grad is not None]
        if moved:
            torch._foreach_sign_(grads)
            torch._foreach_sub_(moved, grads, alpha=size)
        for p in moved:
            p.grad = None
