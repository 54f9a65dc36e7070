"""Adam over groups of tensors, each group with a rate of its own.

Paper: arXiv 1412.6980, algorithm 1, with beta2 = 0.95: the spread of the gradients that a rate is divided by is that of
the last twenty steps. Tensors are worked on many at a time: there are hundreds of small ones, and on a GPU a launch for
each would take longer than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

_BETA1, _BETA2, _EPSILON = 0.9, 0.95, 1e-12
_ELEMENTS_AT_ONCE = 2**26  # two copies of as many are made on the way


class Adam:
    """groups: parameters and the largest change of a value in one step."""

    def __init__(self, groups: list[tuple[list[nn.Parameter], float]]) -> None:
        self.groups = groups
        self.parameters = [p for parameters, _ in groups for p in parameters]
        self.moments: dict[nn.Parameter, tuple[Tensor, Tensor]] = {
            p: (torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters
        }
        self.n_steps = 0

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One step at `share` of the rates; the gradients are used up. Parameters without one stay."""
        self.n_steps += 1
        for parameters, rate in self.groups:
            for some in _portions([p for p in parameters if p.grad is not None]):
                self._move(some, rate * share)

    def _move(self, parameters: list[nn.Parameter], rate: float) -> None:
        values: list[Tensor] = list(parameters)
        grads = [p.grad for p in parameters if p.grad is not None]
        means = [self.moments[p][0] for p in parameters]
        squares = [self.moments[p][1] for p in parameters]
        torch._foreach_mul_(means, _BETA1)
        torch._foreach_add_(means, grads, alpha=1 - _BETA1)
        torch._foreach_mul_(squares, _BETA2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - _BETA2)
        unbiased = torch._foreach_div(means, 1 - _BETA1**self.n_steps)
        spread = torch._foreach_div(squares, 1 - _BETA2**self.n_steps)
        torch._foreach_sqrt_(spread)
        torch._foreach_add_(spread, _EPSILON)
        torch._foreach_addcdiv_(values, unbiased, spread, value=-rate)
        for p in parameters:
            p.grad = None


def _portions(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of about _ELEMENTS_AT_ONCE elements together."""
    some: list[nn.Parameter] = []
    for p in parameters:
        if some and sum(q.numel() for q in some) + p.numel() > _ELEMENTS_AT_ONCE:
            yield some
            some = []
        some.append(p)
    if some:
        yield some
