"""End-to-end tuning of a quantized model by KL to the original's logits: of its scales, and of its codes too.

Papers: EfficientQAT (arXiv 2407.11062), second phase: the codes stay, the scale of each group is trained through the
whole network. LLM-QAT (arXiv 2305.17888): all weights are trained by distillation on text that the model itself wrote,
a straight-through estimate passing the gradient through the rounding.

Differs from EfficientQAT: the loss is the distance to the original's distribution instead of the next token, which is a
lesson in every entry of the vocabulary rather than in one, and so needs little text. From LLM-QAT: it begins with the
codes of a finished post-training quantization, every weight at most half a step from where its code turns, so that some
hundred steps suffice; scales are trained with the codes and are what will be stored; only weights are quantized. Where
a weight lies in units of its step is what Adam moves, so that one rate suits all layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.methods.signround import LearnedWeight, nearest_steps
from compress.quant import QuantizedWeight

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


class _RoundedProduct(torch.autograd.Function):
    """x [..., K] times the weight of codes round(u), clamped to low .. high, and scales; the dense weight is made anew
    in the backward pass, not kept. See `LearnedWeight` for shapes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, scale: Tensor, low: Tensor, high: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, u, scale, low, high)
        ctx.shape = shape
        steps, _ = nearest_steps(u, low, high, shape)
        return F.linear(x, steps.mul_(scale.unsqueeze(-1)).view(u.shape).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None, None]:
        x, u, scale, low, high = ctx.saved_tensors
        grad = grads[0]
        steps, rounded = nearest_steps(u, low, high, ctx.shape)
        dx = grad @ (steps * scale.unsqueeze(-1)).view(u.shape).to(grad.dtype)
        dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1]).to(grad.dtype)
        dense = dense.view(steps.shape).float()
        grad_scale = (dense * steps).sum(-1)
        grad_u = None
        if ctx.needs_input_grad[1]:  # beyond the last code a move changes nothing
            grad_u = dense.mul_(scale.unsqueeze(-1)).mul_(steps == rounded).view(u.shape)
        return dx, grad_u, grad_scale, None, None, None


class TunedLinear(nn.Module):
    """A quantized linear whose scales can be trained, and its codes where `offsets` are given, as `LearnedWeight` has
    them."""

    def __init__(self, start: QuantizedWeight, bias: nn.Parameter | None, offsets: Tensor | None = None) -> None:
        super().__init__()
        self.learned, self.bias = LearnedWeight(start, offsets), bias

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        w = self.learned
        y: Tensor = _RoundedProduct.apply(x, w.u, w.scale(), w.low, w.high, w.shape)
        return y if self.bias is None else y + self.bias.to(y.dtype)
