"""End-to-end tuning of what is not codes: scales, by KL to the original model's logits.

Paper: EfficientQAT (arXiv 2407.11062), second phase: the codes stay, the scale of each group is trained through the
whole network. Here against the original's distribution instead of the next token, which is a lesson in every entry of
the vocabulary rather than in one, and so needs little text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.methods.signround import stored
from compress.quant import QuantizedWeight, group_view

# Rows of float32 tables [rows, V] at work at a time on a CPU: chunks that stay in the cache halve the time.
_CPU_CHUNK_ELEMENTS = 2**20
_GPU_CHUNK_ELEMENTS = 2**26


class _KlToTeacher(torch.autograd.Function):
    """Gradient and value in one pass over the logits, a chunk of rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor) -> Tensor:
        v = logits.shape[-1]
        q_logits, p_logits = logits.reshape(-1, v), teacher.reshape(-1, v)
        n = q_logits.shape[0]
        gradient = torch.empty_like(q_logits)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        elements = _GPU_CHUNK_ELEMENTS if logits.is_cuda else _CPU_CHUNK_ELEMENTS
        rows = max(1, elements // v)
        for i in range(0, n, rows):
            a, b = p_logits[i : i + rows].float(), q_logits[i : i + rows].float()
            p, q = torch.softmax(a, -1), torch.softmax(b, -1)
            kl = torch.linalg.vecdot(p, a - b) + torch.logsumexp(b, -1) - torch.logsumexp(a, -1)
            total += kl.sum(dtype=torch.float64)
            gradient[i : i + rows] = q.sub_(p).div_(n)
        ctx.save_for_backward(gradient.view_as(logits))
        return (total / n).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None


def kl_to_teacher(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of KL(teacher || model) in nats, for logits [..., V] of any float dtype: a float32 scalar."""
    value: Tensor = _KlToTeacher.apply(logits, teacher)
    return value


class _ScaledProduct(torch.autograd.Function):
    """x [..., K] times the dequantized weight; the dense weight is made anew in the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: Tensor, scale: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, steps, scale)
        ctx.shape = shape
        return F.linear(x, _dense(steps, scale, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, None]:
        x, steps, scale = ctx.saved_tensors
        grad = grads[0]
        dx = grad @ _dense(steps, scale, ctx.shape, grad.dtype)
        dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1]).to(grad.dtype)
        grad_scale = (dense.view(steps.shape).float() * steps).sum(-1)
        return dx, None, grad_scale, None


def _dense(steps: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return (steps.float() * scale.unsqueeze(-1)).reshape(shape).to(dtype)


class TunedLinear(nn.Module):
    """A quantized linear whose scales can be trained. gain: float32 [N', G], around 1; codes are int8 steps from the
    zero point (int16 at 8 bits)."""

    steps: Tensor
    scale0: Tensor

    def __init__(self, start: QuantizedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.start, self.bias = start, bias
        zero = start.zero.to(torch.int16).unsqueeze(-1)
        steps = group_view(start.codes, start.scheme).to(torch.int16) - zero
        self.register_buffer("steps", steps.to(torch.int8) if start.scheme.bits < 8 else steps)
        self.register_buffer("scale0", start.scale.float())
        self.gain = nn.Parameter(torch.ones_like(self.scale0))

    def scale(self) -> Tensor:
        """float32 [N', G], as the stored dtype will hold it."""
        return stored(self.scale0 * self.gain, self.start.scale.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _ScaledProduct.apply(x, self.steps, self.scale(), self.start.shape)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The weight with the scales as trained."""
        return QuantizedWeight(
            self.start.codes, self.scale().to(self.start.scale.dtype), self.start.zero, self.start.scheme
        )
