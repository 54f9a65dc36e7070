"""AWQ on a live block: run the groups, fold the scales it finds into the block, choose clipped ranges."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.checkpoint import BlockState
from compress.config_quant import AwqConfig
from compress.groups import Fold, ScaleGroup
from compress.methods.awq import AwqScales, clip_ranges, scaled_fake_quantize, search_scales
from compress.methods.stats import InputStats, output_error
from compress.models import Block, linear_weight, set_linear_weight
from compress.plan import LinearPlan
from compress.quant import fake_quantize
from compress.streams import HiddenStream


@dataclass
class AwqJob:
    """One block to transform. weights are float32 masters [N, K] by linear, changed in place; stats are those of
    each group's input by its first linear, rescaled in place; changed tensors land in state."""

    block: Block
    index: int
    groups: list[ScaleGroup]
    stream: HiddenStream
    weights: dict[str, Tensor]
    plans: dict[str, LinearPlan]
    stats: dict[str, InputStats]
    state: BlockState
    config: AwqConfig
    source_dtype: torch.dtype
    clip: bool


@dataclass
class AwqNote:
    """What AWQ did for one linear. input_scales float32 [K] multiply its columns; ranges are (scale, zero)."""

    input_scales: Tensor
    producer: str | None
    label: str
    loss_ratio: float
    ranges: tuple[Tensor, Tensor] | None = None
    clipped: bool = False

    def summary(self) -> dict[str, Any]:
        return {
            "producer": self.producer,
            "scales": self.label,
            "loss_ratio": self.loss_ratio,  # group output error with scales / without
            "clipped": self.clipped,
        }


def apply_awq(job: AwqJob) -> dict[str, AwqNote]:
    """Transform the block; the unquantized function stays the same up to rounding of stored biases.

    Scales of every group come first and clipped ranges after: folding a later group's scales into an earlier
    linear (o's into v) changes that linear's rows, and its ranges must be those of the final weights.

    Raises:
        NumericalError: a group's quantized output is not finite even unscaled.
    """
    notes: dict[str, AwqNote] = {}
    # a group with a kept linear is left alone: that linear would have to absorb the scales in its stored dtype
    groups = [g for g in job.groups if all(job.plans[n].scheme is not None for n in g.linears)]
    for group in groups:
        weight = job.weights[group.linears[0]]
        input_scales = torch.ones(weight.shape[1], device=weight.device)
        label, ratio = "no producer", 1.0
        if group.producer is not None and _can_absorb(job, group.producer):
            found = _search(job, group, _GroupLoss(job, group))
            input_scales = _fold(job, group, found.scales)
            label = found.label
            ratio = found.loss / found.identity_loss if found.identity_loss > 0 else 1.0
        for name in group.linears:
            notes[name] = AwqNote(input_scales, group.producer, label, ratio)
    if job.clip and job.config.clip:
        for group in groups:
            _clip(job, group, _GroupLoss(job, group), notes)
    return notes


def _can_absorb(job: AwqJob, producer: str) -> bool:
    """A norm can; a linear only if it is quantized itself (a kept one would be rounded to its stored dtype)."""
    return producer not in job.plans or job.plans[producer].scheme is not None


def _search(job: AwqJob, group: ScaleGroup, evaluate: _GroupLoss) -> AwqScales:
    assert group.channel_map is not None
    weights = [job.weights[n] for n in group.linears]
    channel_map = group.channel_map.to(weights[0].device)
    scheme = job.plans[group.linears[0]].scheme
    assert scheme is not None

    def loss_of(scales: Tensor) -> float:
        inputs = scales[channel_map]
        return evaluate(
            {
                n: scaled_fake_quantize(job.weights[n], inputs, s)
                for n in group.linears
                if (s := job.plans[n].scheme) is not None
            }
        )

    absmean = job.stats[group.linears[0]].absmean
    return search_scales(weights, absmean, channel_map, scheme, job.config, loss_of)


def _fold(job: AwqJob, group: ScaleGroup, scales: Tensor) -> Tensor:
    """Fold 1/scales into the producer and scales into the consumers; returns the exact input scales [K].

    A norm is stored in the checkpoint's dtype, so the scales are those its *rounded* gain implies: the folded
    block then computes the original function exactly, not up to a rounded gain.
    """
    assert group.producer is not None and group.fold is not None and group.channel_map is not None
    producer = job.block.module.get_submodule(group.producer)
    channel_map = group.channel_map.to(scales.device)
    if group.fold is Fold.LINEAR:
        job.weights[group.producer] /= scales.unsqueeze(1)
        set_linear_weight(producer, job.weights[group.producer])
    else:
        offset = 1.0 if group.fold is Fold.GAIN_PLUS_ONE else 0.0
        gain = _float_weight(producer) + offset
        _store(job, group.producer, "weight", gain / scales - offset)
        stored = _float_weight(producer) + offset
        usable = (gain != 0) & (stored != 0)
        scales = torch.where(usable, gain / torch.where(usable, stored, torch.ones_like(stored)), 1.0)
    bias = getattr(producer, "bias", None)
    if isinstance(bias, Tensor):
        _store(job, group.producer, "bias", bias.float() / scales)
    inputs = scales[channel_map]
    for name in group.linears:
        job.weights[name] *= inputs
        set_linear_weight(job.block.linears[name], job.weights[name])
    shared = job.stats[group.linears[0]]
    shared.hessian /= inputs.unsqueeze(0) * inputs.unsqueeze(1)
    shared.abs_sum /= inputs.double()
    return inputs


def _float_weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.float()


def _store(job: AwqJob, module: str, leaf: str, value: Tensor) -> None:
    """Round a changed tensor to the dtype it will be saved in, and use it so."""
    rounded = value.to(job.source_dtype)
    name = f"{module}.{leaf}"
    with torch.no_grad():
        job.block.module.get_parameter(name).copy_(rounded)
    job.state.changed[name] = rounded.cpu()


def _clip(job: AwqJob, group: ScaleGroup, evaluate: _GroupLoss, notes: dict[str, AwqNote]) -> None:
    """Clipped ranges for each linear of the group, kept where the group's real output gets better.

    Asking the output settles by measurement what a rule like "never clip q and k" guesses: an error that is
    small for one linear can be large behind a softmax.
    """
    stats = job.stats[group.linears[0]]
    current: dict[str, Tensor] = {}
    clipped: dict[str, tuple[Tensor, Tensor]] = {}
    for name in group.linears:
        scheme = job.plans[name].scheme
        assert scheme is not None
        weight = job.weights[name]
        current[name] = scaled_fake_quantize(weight, torch.ones_like(weight[0]), scheme)
        clipped[name] = clip_ranges(weight, stats.hessian, scheme, job.config, job.source_dtype)
    loss = evaluate(current)
    for name in group.linears:
        scheme = job.plans[name].scheme
        assert scheme is not None
        scale, zero = clipped[name]
        trial = {**current, name: fake_quantize(job.weights[name], scale, zero, scheme)}
        trial_loss = evaluate(trial)
        if trial_loss < loss:
            loss, current = trial_loss, trial
            notes[name].ranges, notes[name].clipped = (scale, zero), True


class _GroupLoss:
    """Squared error of a group's real output for given weights.

    A group of one linear has a closed form over all calibration tokens, trace(D H D^T). For the others the inputs
    of the group's scope (attention, MLP) are recorded on a sample of the tokens, with the block as it now is, and
    the scope is run alone. Weights are given in terms of the input seen at construction: once scales are folded,
    build a new one.
    """

    def __init__(self, job: AwqJob, group: ScaleGroup) -> None:
        self.job, self.group = job, group
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.targets: list[Tensor] = []
        if len(group.linears) == 1:
            self.target_weight = job.weights[group.linears[0]].clone()
            self.hessian = job.stats[group.linears[0]].hessian.clone()
            return
        self.scope = job.block.module.get_submodule(group.scope) if group.scope else job.block.module
        seen = 0
        handle = self.scope.register_forward_hook(self._record, with_kwargs=True)
        try:
            for batch, hidden in enumerate(job.stream.hidden):
                with suppress(_ScopeSeen):
                    job.stream.forward(job.block.module, job.index, batch)
                seen += hidden.shape[0] * hidden.shape[1]
                if seen >= job.config.search_tokens:
                    break
        finally:
            handle.remove()

    def _record(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.calls.append((args, kwargs))
        self.targets.append(_first(output))
        raise _ScopeSeen

    def __call__(self, weights: dict[str, Tensor]) -> float:
        """Squared output error, on a scale that is the same for all calls of one object, with weights [N, K]."""
        if not self.calls:
            return output_error(weights[self.group.linears[0]] - self.target_weight, self.hessian)
        linears = self.job.block.linears
        saved = {n: linear_weight(linears[n]).clone() for n in weights}
        for name, value in weights.items():
            set_linear_weight(linears[name], value)
        total = torch.zeros((), dtype=torch.float64, device=self.targets[0].device)
        for (args, kwargs), target in zip(self.calls, self.targets, strict=True):
            total += (_first(self.scope(*args, **kwargs)).float() - target.float()).square().sum(dtype=torch.float64)
        for name, value in saved.items():
            set_linear_weight(linears[name], value)
        return float(total)


class _ScopeSeen(Exception):
    """Leaves a block's forward once the scope has run."""


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
