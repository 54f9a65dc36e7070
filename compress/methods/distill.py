"""End-to-end tuning of a quantized model by KL to the original's logits: of its scales, and of its codes too.

Papers: EfficientQAT (arXiv 2407.11062), second phase: the codes stay, the scale of each group is trained through the
whole network. LLM-QAT (arXiv 2305.17888): all weights are trained by distillation on text that the model itself wrote,
a straight-through estimate passing the gradient through the rounding.

Differs from EfficientQAT: the loss is the distance to the original's distribution instead of the next token, which is a
lesson in every entry of the vocabulary rather than in one, and so needs little text. From LLM-QAT: it begins with the
codes of a finished post-training quantization, every weight at most half a step from where its code turns, so that some
hundred steps suffice; scales are trained with the codes and are what will be stored; only weights are quantized. Where
a weight lies in units of its step is what Adam moves, so that one rate suits all layers.

On a GPU the work beside matrix products is done by `compress.kernels.training`, whose twins stand here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.methods.signround import LearnedWeight, nearest_steps
from compress.quant import QuantizedWeight

# Rows of float32 tables [rows, V] at work at a time: chunks that stay in the cache halve the time.
_CHUNK_ELEMENTS = 2**20

_Twin = TypeVar("_Twin", bound=Callable[..., Any])


def _or_kernel(twin: _Twin) -> _Twin:
    """On a GPU the function of the same name in `compress.kernels.training`."""

    @wraps(twin)
    def run(first: Tensor, *args: Any) -> Any:
        if not first.is_cuda:
            return twin(first, *args)
        from compress.kernels import training

        return getattr(training, twin.__name__)(first, *args)

    return cast("_Twin", run)


@_or_kernel
def kl_and_gradient(logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL of each row, float32 [n], of logits [n, V], and the gradient of their mean: a chunk of rows at a time."""
    n, v = logits.shape
    gradient = torch.empty_like(logits)
    kl = torch.empty(n, dtype=torch.float32, device=logits.device)
    rows = max(1, _CHUNK_ELEMENTS // v)
    for i in range(0, n, rows):
        a, b = teacher[i : i + rows].float(), logits[i : i + rows].float()
        p, q = torch.softmax(a, -1), torch.softmax(b, -1)
        kl[i : i + rows] = torch.linalg.vecdot(p, a - b) + torch.logsumexp(b, -1) - torch.logsumexp(a, -1)
        gradient[i : i + rows] = q.sub_(p).div_(n)
    return kl, gradient


class _KlToTeacher(torch.autograd.Function):
    """Gradient and value in one pass over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor) -> Tensor:
        v = logits.shape[-1]
        kl, gradient = kl_and_gradient(logits.reshape(-1, v), teacher.reshape(-1, v))
        ctx.gradient = gradient.view_as(logits)
        return kl.mean(dtype=torch.float64).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None  # as large as the logits, and needed once
        return gradient.mul_(grads[0]), None


def kl_to_teacher(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of KL(teacher || model) in nats, for logits [..., V] of any float dtype: a float32 scalar, whose
    backward pass can be made once."""
    value: Tensor = _KlToTeacher.apply(logits, teacher)
    return value


def _grouped(u: Tensor, scale: Tensor) -> tuple[int, ...]:
    """Shape [N', G, E] of u [N, K] by the groups of scale [N', G]."""
    return (*scale.shape, u.numel() // scale.numel())


@_or_kernel
def dense_weight(u: Tensor, scale: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] of codes round(u), clamped to low .. high, and scales. See `LearnedWeight` for shapes."""
    steps, _ = nearest_steps(u, low, high, _grouped(u, scale))
    return steps.mul_(scale.unsqueeze(-1)).view(u.shape).to(dtype)


@_or_kernel
def weight_gradients(
    dense: Tensor, u: Tensor, scale: Tensor, low: Tensor, high: Tensor, with_u: bool
) -> tuple[Tensor, Tensor | None]:
    """Those of scale, and of u where asked for, from that of `dense_weight`'s result."""
    steps, rounded = nearest_steps(u, low, high, _grouped(u, scale))
    dense = dense.view(steps.shape).float()
    grad_scale = (dense * steps).sum(-1)
    if not with_u:
        return grad_scale, None
    # beyond the last code a move changes nothing
    return grad_scale, dense.mul_(scale.unsqueeze(-1)).mul_(steps == rounded).view(u.shape)


class _RoundedProduct(torch.autograd.Function):
    """x [..., K] times `dense_weight`, which is made anew in the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, u, scale, low, high)
        return F.linear(x, dense_weight(u, scale, low, high, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
        x, u, scale, low, high = ctx.saved_tensors
        grad = grads[0]
        dx = grad @ dense_weight(u, scale, low, high, grad.dtype)
        dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1]).to(grad.dtype)
        grad_scale, grad_u = weight_gradients(dense, u, scale, low, high, ctx.needs_input_grad[1])
        return dx, grad_u, grad_scale, None, None


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
        y: Tensor = _RoundedProduct.apply(x, w.u, w.scale(), w.low, w.high)
        return y if self.bias is None else y + self.bias.to(y.dtype)
