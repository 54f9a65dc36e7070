"""Which linears read the same tensor, and which module before them can absorb a per-channel scale.

Both are found by running one block, not from a table of architectures:

  * linears whose input is the same tensor object form a group (q/k/v; gate/up);
  * a producer is found by experiment. Multiply a norm's gain, or the output rows of a linear, by factors of
    1 and 2: if every input channel of a group answers with exactly 1x or 2x, the producer feeds it linearly. One
    experiment for each bit of the channel number then reads off which producer channel feeds which input
    (grouped-query attention repeats the channels of v), and a last one folds random scales in and checks that
    the block still computes the same function.

So v -> o and up -> down are found where they hold, and a gate, a softmax or a GELU in between rules them out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UnsupportedModel
from compress.models import Block, is_linear, linear_weight, set_linear_weight


class Fold(Enum):
    """How a producer absorbs 1/s: its output rows, its gain g, or a gain stored as 1 + g (Gemma)."""

    LINEAR = "linear"
    GAIN = "gain"
    GAIN_PLUS_ONE = "gain_plus_one"


@dataclass
class ScaleGroup:
    """Linears that share one input tensor, in the order the block runs them.

    scope: the smallest module that holds all of them ("" is the block): its output is the group's real output.
    producer: module that can absorb a scale of the shared input, or None. channel_map [K]: input channel ->
    producer channel. Names are relative to the block.
    """

    linears: list[str]
    scope: str
    producer: str | None = None
    fold: Fold | None = None
    channel_map: Tensor | None = field(default=None, repr=False)


RunBlock = Callable[[nn.Module], Tensor]


def find_scale_groups(block: Block, run: RunBlock, candidates: list[str] | None = None) -> list[ScaleGroup]:
    """Groups of a materialized block, in execution order.

    Args:
        run: runs the block on a few tokens and returns its output [B, T, H].
        candidates: modules tried as producers; default every norm and linear.
    """
    groups = shared_input_groups(block, run)
    if candidates is None:
        candidates = [n for n, m in block.module.named_modules() if n and (_is_gain(m) or is_linear(m))]
    for name in candidates:
        module = block.module.get_submodule(name)
        for fold in [Fold.LINEAR] if is_linear(module) else [Fold.GAIN, Fold.GAIN_PLUS_ONE]:
            found = _fed_group(block, run, groups, name, fold)
            if found is not None:
                break
    return groups


def shared_input_groups(block: Block, run: RunBlock) -> list[ScaleGroup]:
    """Linears grouped by the tensor they read, in execution order, without looking for producers.

    Raises:
        UnsupportedModel: a linear that the block never calls.
    """
    inputs, _ = _linear_inputs(block, run)
    silent = [name for name in block.linears if name not in inputs]
    if silent:
        raise UnsupportedModel(f"{block.name} never calls its linear {silent[0]}; it cannot be calibrated")
    by_tensor: dict[int, list[str]] = {}
    for name, value in inputs.items():
        by_tensor.setdefault(id(value), []).append(name)
    return [ScaleGroup(names, common_scope(names)) for names in by_tensor.values()]


def common_scope(names: list[str]) -> str:
    """Name of the smallest module that holds all the named ones; a single linear is its own scope."""
    if len(names) == 1:
        return names[0]
    parts = [n.split(".")[:-1] for n in names]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _fed_group(block: Block, run: RunBlock, groups: list[ScaleGroup], name: str, fold: Fold) -> ScaleGroup | None:
    """The group that `name` feeds linearly, completed with producer, fold and channel map; None if there is none."""
    module = block.module.get_submodule(name)
    n = _channels(module)
    device = next(module.parameters()).device
    before, output = _linear_inputs(block, run)

    def answer(factors: Tensor) -> dict[str, Tensor]:
        with _Scaled(module, fold, factors):
            after, _ = _linear_inputs(block, run)
        ratios = {}
        for group in groups:
            key = group.linears[0]
            ratio = _channel_ratio(before[key], after[key])
            if ratio is not None:
                ratios[key] = ratio
        return ratios

    generator = torch.Generator().manual_seed(0)
    screen = torch.randint(0, 2, (n,), generator=generator).float() + 1
    fed = answer(screen.to(device))
    for group in groups:
        key = group.linears[0]
        if group.producer is not None or key not in fed or name in group.linears:
            continue
        index = torch.zeros(fed[key].numel(), dtype=torch.int64, device=device)
        numbers = torch.arange(n, device=device)
        linear = True
        for bit in range(max(n - 1, 1).bit_length()):
            ratio = answer(1.0 + ((numbers >> bit) & 1)).get(key)
            if ratio is None:
                linear = False
                break
            index |= (ratio > 1.5).long() << bit
        if not linear or int(index.max()) >= n or not torch.equal(screen.to(device)[index], fed[key]):
            continue
        group.producer, group.fold, group.channel_map = name, fold, index.cpu()
        if _fold_is_exact(block, run, group, output):
            return group
        group.producer = group.fold = group.channel_map = None
    return None


def _fold_is_exact(block: Block, run: RunBlock, group: ScaleGroup, output: Tensor) -> bool:
    """Fold random scales into the block, compare its output, and put everything back."""
    assert group.producer is not None and group.fold is not None and group.channel_map is not None
    producer = block.module.get_submodule(group.producer)
    generator = torch.Generator().manual_seed(1)
    # powers of two, so that bfloat16 weights take them without rounding and only a wrong fold shows
    scales = 2.0 ** torch.randint(-1, 2, (_channels(producer),), generator=generator).to(output.device)
    saved = {n: linear_weight(block.linears[n]).clone() for n in group.linears}
    with _Scaled(producer, group.fold, 1 / scales):
        for n in group.linears:
            set_linear_weight(block.linears[n], saved[n] * scales[group.channel_map.to(output.device)])
        folded = run(block.module)
    for n in group.linears:
        set_linear_weight(block.linears[n], saved[n])
    # Relative to what the block adds to the stream is stricter than relative to the stream itself. A gain stored as
    # 1 + g is rounded in g's dtype; a wrong fold is an error of order 1.
    rounding = torch.finfo(linear_weight(block.linears[group.linears[0]]).dtype).eps
    limit = max(1e-4, 4 * rounding) if group.fold is Fold.GAIN_PLUS_ONE else 1e-4
    difference = folded.float() - output.float()
    return float(difference.norm() / output.float().norm().clamp(min=1e-30)) < limit


def scale_producer(module: nn.Module, fold: Fold, factors: Tensor) -> None:
    """Multiply the output channels of a producer by factors [N], in place."""
    with torch.no_grad():
        bias = getattr(module, "bias", None)
        if fold is Fold.LINEAR:
            set_linear_weight(module, linear_weight(module) * factors.to(linear_weight(module).dtype).unsqueeze(1))
        elif fold is Fold.GAIN:
            module.weight.mul_(factors)  # type: ignore[operator,union-attr]
        else:
            module.weight.add_(1).mul_(factors).sub_(1)  # type: ignore[operator,union-attr]
        if isinstance(bias, Tensor):
            bias.mul_(factors)


class _Scaled:
    """Context: a producer's outputs multiplied by factors, then exactly restored."""

    def __init__(self, module: nn.Module, fold: Fold, factors: Tensor) -> None:
        self.module, self.fold, self.factors = module, fold, factors

    def __enter__(self) -> None:
        self.saved = {n: p.detach().clone() for n, p in self.module.named_parameters(recurse=False)}
        scale_producer(self.module, self.fold, self.factors)

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for name, value in self.saved.items():
                self.module.get_parameter(name).copy_(value)


def _linear_inputs(block: Block, run: RunBlock) -> tuple[dict[str, Tensor], Tensor]:
    """Input tensor of each linear (the object itself, in execution order) and the block's output."""
    inputs: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[name] = args[0]

        return hook

    with ExitStack() as stack:
        for name, module in block.linears.items():
            handle = module.register_forward_pre_hook(hook_for(name))
            stack.callback(handle.remove)
        output = run(block.module)
    return inputs, output


def _channel_ratio(before: Tensor, after: Tensor) -> Tensor | None:
    """after / before for each channel when it is 1 or 2 for all of them and not 1 for all; otherwise None."""
    a, b = before.reshape(-1, before.shape[-1]).float(), after.reshape(-1, after.shape[-1]).float()
    energy = (a * a).sum(0)
    if bool((energy == 0).any()):
        return None  # a dead channel answers nothing: its origin cannot be known
    ratio = (a * b).sum(0) / energy
    rounded = ratio.round()
    residual = (b - a * rounded).norm(dim=0) / energy.sqrt()
    tolerance = max(1e-2, 4 * torch.finfo(before.dtype).eps)  # inputs are rounded, and a gain stored as 1 + g
    if (
        bool((residual > tolerance).any())
        or not bool(((rounded == 1) | (rounded == 2)).all())
        or bool((rounded == 1).all())
    ):
        return None
    return rounded


def _is_gain(module: nn.Module) -> bool:
    """A norm: a module with a 1-D weight and nothing below it."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and not any(True for _ in module.children())


def _channels(module: nn.Module) -> int:
    if is_linear(module):
        return linear_weight(module).shape[0]
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]
