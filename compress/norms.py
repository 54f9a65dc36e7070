"""A model's RMS norms in training, each in one kernel a pass instead of some twenty over the residual stream.

Paper: arXiv 1910.07467. Modules are told by what they compute, not by their names: an architecture whose norm is
another function keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

_EPSILONS = ("variance_epsilon", "eps", "epsilon")


class _RmsNorm(torch.autograd.Function):
    """x [..., H] and gain [H] of any float dtypes -> [..., H] in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.eps = eps
        from compress.kernels import training

        return training.rms_norm(x, gain, eps, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        from compress.kernels import training

        x, gain = ctx.saved_tensors
        grad_x, grad_gain = training.rms_norm_gradients(grads[0], x, gain, ctx.eps)
        return grad_x, grad_gain.to(gain.dtype), None, None


def _norm(module: nn.Module, eps: float, x: Tensor) -> Tensor:
    """x [..., H] -> the same, under autocast in its dtype, which the products behind the norm would cast it to."""
    gain: Tensor = module.weight  # type: ignore[assignment]
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else torch.promote_types(x.dtype, gain.dtype)
    y: Tensor = _RmsNorm.apply(x, gain, eps, dtype)
    return y


@torch.no_grad()
def rms_epsilon(module: nn.Module) -> float | None:
    """The epsilon of a module that computes x / sqrt(mean(x^2) + epsilon) * weight [H] for x [..., H]; None of any
    other. Whatever has one weight and one argument is tried on two rows."""
    if [name for name, _ in module.named_parameters()] != ["weight"] or next(module.buffers(), None) is not None:
        return None
    gain: Tensor = module.weight  # type: ignore[assignment]
    eps = next((e for name in _EPSILONS if isinstance(e := getattr(module, name, None), float)), None)
    one_argument = len(signature(module.forward).parameters) == 1
    if gain.ndim != 1 or gain.device.type == "meta" or eps is None or not one_argument or not gain.any():
        return None
    # small values, so that the epsilon counts; two rows of different size
    x = torch.linspace(-2, 3, 2 * gain.numel(), device=gain.device).view(2, -1) * eps**0.5
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.float()
    close = torch.allclose(module(x).float(), expected, rtol=1e-2, atol=1e-3 * float(gain.abs().max()))
    return eps if close else None


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[int]:
    """Inside, RMS norms of a model, which must be where Triton's kernels run, are computed by
    `compress.kernels.training`. Gives how many."""
    replaced: list[nn.Module] = []
    try:
        for module in model.modules():
            if "forward" not in vars(module) and (eps := rms_epsilon(module)) is not None:
                module.forward = partial(_norm, module, eps)  # type: ignore[method-assign]
                replaced.append(module)
        yield len(replaced)
    finally:
        for module in replaced:
            del module.forward
