"""The block-by-block engine: stream weights in, quantize, checkpoint, pass quantized activations on.

Device memory holds one block, the statistics of one group of linears and a batch of activations; quantized
blocks go to disk as they are finished. Weights change here and in `awq_pass` and `learn_pass`, which this module calls;
before it in `rotation`, on their way from the source, and after it in `tune`.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.awq_pass import AwqJob, AwqNote, apply_awq
from compress.checkpoint import BlockState, load_block, load_head, save_block, save_head
from compress.config_quant import QuantConfig, Rounding, Transform
from compress.errors import NumericalError
from compress.forecast import TUNING_BATCHES
from compress.groups import ScaleGroup, find_scale_groups, shared_input_groups
from compress.head import quantize_head
from compress.learn_pass import LearnJob, learn_block
from compress.methods.gptq import gptq_quantize_shared
from compress.methods.hqq import hqq_quantize
from compress.methods.rtn import rtn_quantize
from compress.methods.signround import cell_offsets, pack_offsets
from compress.methods.stats import CrossStats, InputStats, relative_output_error
from compress.models import Block, LoadedModel, is_transposed, linear_weight, set_linear_weight
from compress.plan import LinearPlan, Plan, check_fused
from compress.quant import Observer, QuantizedWeight, QuantScheme, quantize
from compress.streams import HiddenStream, open_stream, tail_logits


@dataclass
class LayerReport:
    """What happened to one linear. Errors are ||Wq x - W x||^2 / ||W x||^2 on the calibration tokens, or of the
    weights themselves (`error_of` says which). seconds is left out of the manifest, so that artifacts repeat."""

    name: str
    status: str  # quantized | kept
    shape: tuple[int, int]
    scheme: str | None = None
    n_tokens: int = 0
    error_of: str = "weights"
    error: float | None = None
    error_rtn: float | None = None
    damping: float | None = None
    damping_steps: int | None = None
    n_dead: int | None = None
    # GPTAQ: how far the weight moved towards the original's outputs before it was rounded, ||W* - W|| / ||W||
    moved: float | None = None
    awq: dict[str, Any] | None = None
    # what learned rounding did to the block of this linear; the errors above are those of the rounding it began with
    learned: dict[str, Any] | None = None
    fallback: str | None = None
    seconds: float = field(default=0.0)

    def __post_init__(self) -> None:
        self.shape = (self.shape[0], self.shape[1])  # a list when it comes from a checkpoint

    def without_time(self) -> dict[str, Any]:
        values = asdict(self)
        del values["seconds"]
        return values


@dataclass
class EngineInputs:
    """Everything `compress_blocks` works from. calibration_ids int64 [S, T] or None; verify_ids int64 [V, T];
    tuning_ids int64 [R, T]: sequences that end-to-end tuning alone reads, besides those to calibrate on."""

    loaded: LoadedModel
    plan: Plan
    calibration_ids: Tensor | None
    verify_ids: Tensor
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    checkpoints: Path
    tuning_ids: Tensor | None = None


@dataclass
class EngineResult:
    """Reports of every linear, float32 logits [V, T, vocab] of the in-memory quantized model, blocks resumed, and the
    original model's last hidden states where the recipe learns from them: on the calibration tokens and on those for
    tuning alone."""

    layers: list[LayerReport]
    verify_logits: Tensor
    n_resumed: int
    teacher: HiddenStream | None = None
    tuning: HiddenStream | None = None


@dataclass
class _Streams:
    """Hidden states before one block: of the calibration tokens and the verify tokens in the quantized model, of the
    calibration tokens in the original one, and what the original block makes of those once it has run."""

    calibration: HiddenStream | None
    verify: HiddenStream
    teacher: HiddenStream | None
    targets: list[Tensor] = field(default_factory=list)


def compress_blocks(inputs: EngineInputs, on_block: Callable[[int, int], None]) -> EngineResult:
    """Quantize every block, or take it from its checkpoint, and run the verify tokens through the result.

    Raises:
        NumericalError: activations, Hessians or outputs that are not finite; damping exhausted.
        ConfigError: members of a fused group with different schemes.
    """
    loaded, device, dtype = inputs.loaded, inputs.device, inputs.dtype
    verify = open_stream(loaded, inputs.verify_ids, len(inputs.verify_ids), device, device, dtype)
    calibration = teacher = tuning = None
    if inputs.calibration_ids is not None:
        store = _activation_store(inputs, inputs.calibration_ids)
        calibration = open_stream(loaded, inputs.calibration_ids, inputs.batch_size, device, store, dtype)
        if inputs.plan.config.needs_teacher:
            teacher = open_stream(loaded, inputs.calibration_ids, inputs.batch_size, device, store, dtype)
    if inputs.tuning_ids is not None:
        store = _activation_store(inputs, inputs.tuning_ids)
        tuning = open_stream(loaded, inputs.tuning_ids, TUNING_BATCHES * inputs.batch_size, device, store, dtype)
    layers: list[LayerReport] = []
    n_resumed = 0
    with torch.no_grad():
        for index, block in enumerate(loaded.blocks):
            loaded.materialize(block.name, device, dtype)
            if tuning is not None:  # through the original blocks alone
                tuning.advance(block, index)
            streams = _Streams(calibration, verify, teacher)
            reports, resumed = _finish_block(inputs, block, index, streams)
            layers += reports
            n_resumed += resumed
            if teacher is not None:
                teacher.hidden = streams.targets
            # The last block's calibration outputs feed nothing.
            if calibration is not None and index + 1 < len(loaded.blocks):
                calibration.advance(block, index)
            verify.advance(block, index)
            loaded.release(block.name)
            _return_freed_memory()
            on_block(index + 1, len(loaded.blocks))
    head = None
    if inputs.plan.head is not None:
        state = _finish_head(inputs, inputs.plan.head)
        layers += [LayerReport(**report) for report in state.reports]
        head = state.quantized[inputs.plan.head.name].dequantize()
    return EngineResult(layers, tail_logits(loaded, verify, dtype, head), n_resumed, teacher, tuning)


def _finish_head(inputs: EngineInputs, plan: LinearPlan) -> BlockState:
    """Quantize the output head or take it from its checkpoint."""
    state = load_head(inputs.checkpoints)
    if state is None:
        assert plan.scheme is not None
        started = time.perf_counter()
        loaded = inputs.loaded
        weight = loaded.tensor(f"{plan.name}.weight")
        quantized, error, error_rtn = quantize_head(weight, plan.scheme, loaded.dtype, inputs.device)
        report = LayerReport(plan.name, "quantized", (plan.n, plan.k), plan.scheme.label())
        report.error, report.error_rtn, report.seconds = error, error_rtn, time.perf_counter() - started
        state = BlockState({plan.name: quantized}, {}, [asdict(report)])
        save_head(inputs.checkpoints, state)
    return state


def _return_freed_memory() -> None:
    """glibc keeps freed blocks in fragmented heaps, so resident memory would creep up by part of each block."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def _finish_block(inputs: EngineInputs, block: Block, index: int, streams: _Streams) -> tuple[list[LayerReport], bool]:
    """Quantize a materialized block or take it from its checkpoint; its reports, and whether it was there.

    A function of its own, so that the masters and codes of one block are gone before the next one comes.
    """
    state = load_block(inputs.checkpoints, index)
    if state is not None and inputs.plan.config.tune.trains_codes and state.offsets.keys() != state.quantized.keys():
        state = None  # made for a recipe whose codes stay
    resumed = state is not None
    if state is None:
        state = _BlockQuantizer(inputs, block, index, streams).run()
        save_block(inputs.checkpoints, index, state)
    elif streams.teacher is not None:
        streams.targets = streams.teacher.outputs(block, index)
    apply_state(block, state)
    return [LayerReport(**report) for report in state.reports], resumed


def apply_state(block: Block, state: BlockState) -> None:
    """Put a finished block's values (dequantized weights, folded norms) into the live module."""
    for name, quantized in state.quantized.items():
        set_linear_weight(block.linears[name], quantized.dequantize().to(linear_weight(block.linears[name]).device))
    for name, value in state.changed.items():
        with torch.no_grad():
            block.module.get_parameter(name).copy_(value)


def _activation_store(inputs: EngineInputs, ids: Tensor) -> torch.device:
    """Keep the activations of these tokens on the GPU when they take at most a quarter of its free memory."""
    if inputs.device.type != "cuda":
        return torch.device("cpu")
    hidden_size = int(inputs.loaded.model.config.get_text_config().hidden_size)  # type: ignore[operator,union-attr]
    needed = ids.numel() * hidden_size * inputs.dtype.itemsize
    free, _ = torch.cuda.mem_get_info(inputs.device)
    return inputs.device if needed <= free // 4 else torch.device("cpu")


class _BlockQuantizer:
    """One block on its way from source weights to a BlockState."""

    def __init__(self, inputs: EngineInputs, block: Block, index: int, streams: _Streams) -> None:
        self.inputs, self.block, self.index = inputs, block, index
        self.streams, self.calibration, self.verify = streams, streams.calibration, streams.verify
        self.config: QuantConfig = inputs.plan.config
        self.plans = inputs.plan.block(index)
        self.scale_dtype = inputs.loaded.dtype
        self.state = BlockState({}, {}, [])
        # float32 masters: scaling a bfloat16 copy in place would round the weights before quantizing them
        self.weights = {name: self._source_weight(name) for name in block.linears}

    def _source_weight(self, name: str) -> Tensor:
        weight = self.inputs.loaded.tensor(f"{self.block.name}.{name}.weight").to(self.inputs.device).float()
        return weight.t().contiguous() if is_transposed(self.block.linears[name]) else weight

    def run(self) -> BlockState:
        groups = self._groups()
        for index, other in enumerate(self.inputs.loaded.blocks):
            if other.linears.keys() == self.block.linears.keys():  # blocks of one kind: say it before hours of work
                check_fused(self.inputs.plan, index, groups)
        teacher = self.streams.teacher
        originals = self._original_inputs(groups, teacher) if teacher is not None else {}
        sequential = self.config.rounding is Rounding.gptq and self.config.gptq.true_sequential
        stats: dict[str, InputStats] = {}
        if self.calibration is not None and (self.config.transform is Transform.awq or not sequential):
            stats = self._input_stats(self.calibration, groups)
        # `error_rtn` compares with plain RTN of the source weights on the inputs they were made for
        plain_stats = (
            {name: s.clone() for name, s in stats.items()} if self.config.transform is Transform.awq else stats
        )
        notes: dict[str, AwqNote] = {}
        if self.config.transform is Transform.awq:
            assert self.calibration is not None
            job = AwqJob(
                self.block, self.index, groups, self.calibration, self.weights, self.plans, stats,
                self.state, self.config.awq, self.scale_dtype, clip=self.config.rounding is Rounding.rtn,
            )  # fmt: skip
            notes = apply_awq(job)
        for group in groups:
            key = group.linears[0]
            if key in originals and key in notes:  # the other model's inputs have AWQ's folds in them
                folded = notes[key].input_scales.cpu()
                originals[key] = [(x.float() / folded).to(x.dtype) for x in originals[key]]
            if self.calibration is not None and sequential:
                stats = self._input_stats(self.calibration, [group], originals)
            self._quantize_group(group, notes, stats.get(key), plain_stats.get(key))
            originals.pop(key, None)
        if self.config.learn.enabled and self.state.quantized:
            self._learn()
        if self.config.tune.trains_codes:
            self.state.offsets = {
                name: pack_offsets(cell_offsets(weight, self.weights[name]))
                for name, weight in self.state.quantized.items()
            }
        return self.state

    def _learn(self) -> None:
        """Learned rounding of the whole block, from the codes that the group-wise methods chose."""
        assert self.calibration is not None
        started = time.perf_counter()
        job = LearnJob(
            self.block, self.index, self.calibration, self.streams.targets, self.weights, self.state.quantized,
            self.config.learn,
        )  # fmt: skip
        note = asdict(learn_block(job))
        seconds = (time.perf_counter() - started) / len(self.state.quantized)
        for name, weight in self.state.quantized.items():
            set_linear_weight(self.block.linears[name], weight.dequantize())
        for report in self.state.reports:
            if report["status"] == "quantized":
                report["learned"] = note
                report["seconds"] += seconds

    def _groups(self) -> list[ScaleGroup]:
        hidden = self.verify.hidden[0]

        def run(module: nn.Module) -> Tensor:
            # what the block adds: a fold that is wrong must not hide behind the residual stream
            return self.verify.forward(module, self.index, 0) - hidden

        find = find_scale_groups if self.config.transform is Transform.awq else shared_input_groups
        return find(self.block, run)

    def _quantize_group(
        self, group: ScaleGroup, notes: dict[str, AwqNote], stats: InputStats | None, plain: InputStats | None
    ) -> None:
        """Quantize the linears that share one input; later groups then see their quantized outputs."""
        by_scheme: dict[QuantScheme | None, list[str]] = {}
        for name in group.linears:
            by_scheme.setdefault(self.plans[name].scheme, []).append(name)
        reports: dict[str, LayerReport] = {}
        for scheme, names in by_scheme.items():
            for name in names:
                plan = self.plans[name]
                status, label = ("quantized", scheme.label()) if scheme else ("kept", None)
                reports[name] = LayerReport(plan.name, status, (plan.n, plan.k), label)
            if scheme is None:
                continue
            started = time.perf_counter()
            try:
                quantized = self._quantize(names, scheme, stats, notes, reports)
            except NumericalError as error:
                raise NumericalError(f"{self.block.name}: {', '.join(names)}: {error}") from error
            for name, weight in quantized.items():
                self._fill_errors(reports[name], weight, name, stats, plain or stats)
                reports[name].awq = notes[name].summary() if name in notes else None
                self.state.quantized[name] = weight
                set_linear_weight(self.block.linears[name], weight.dequantize())
                # linears of one group are quantized together: an equal share of the time each
                reports[name].seconds = (time.perf_counter() - started) / len(names)
        self.state.reports += [asdict(reports[name]) for name in group.linears]

    def _quantize(
        self,
        names: list[str],
        scheme: QuantScheme,
        stats: InputStats | None,
        notes: dict[str, AwqNote],
        reports: dict[str, LayerReport],
    ) -> dict[str, QuantizedWeight]:
        weights = [self.weights[name] for name in names]
        if self.config.rounding is Rounding.gptq:
            assert stats is not None
            cross = stats.drift.cross if stats.drift is not None else None
            results = gptq_quantize_shared(weights, stats.hessian, scheme, self.config.gptq, self.scale_dtype, cross)
            for name, result in zip(names, results, strict=True):
                report = reports[name]
                report.moved = result.moved
                if self.config.needs_drift and cross is None:
                    report.fallback = "plain GPTQ: GPTAQ needs an input for every token, in both models"
                report.damping, report.damping_steps = result.damping, result.damping_steps
                report.n_dead = result.n_dead
            return {name: result.weight for name, result in zip(names, results, strict=True)}
        importance = stats.importance if stats else None
        quantized = {}
        for name, weight in zip(names, weights, strict=True):
            ranges = notes[name].ranges if name in notes else None
            if ranges is not None:
                quantized[name] = quantize(weight, *ranges, scheme)
            elif self.config.rounding is Rounding.hqq:
                quantized[name] = hqq_quantize(weight, scheme, self.config.hqq, self.scale_dtype)
            else:
                quantized[name] = rtn_quantize(weight, scheme, importance, self.scale_dtype)
        return quantized

    def _fill_errors(
        self,
        report: LayerReport,
        quantized: QuantizedWeight,
        name: str,
        stats: InputStats | None,
        plain: InputStats | None,
    ) -> None:
        source = self._source_weight(name)
        plain_scheme = replace(quantized.scheme, observer=Observer.ABSMAX)
        rtn = rtn_quantize(source, plain_scheme, scale_dtype=self.scale_dtype).dequantize()
        weight = self.weights[name]
        if stats is None or plain is None:
            norm = float(source.square().sum().clamp(min=1e-30))
            report.error = float((quantized.dequantize() - weight).square().sum()) / norm
            report.error_rtn = float((rtn - source).square().sum()) / norm
            return
        report.error_of, report.n_tokens = "outputs", stats.n_tokens
        report.error = relative_output_error(quantized.dequantize(), weight, stats.hessian)
        report.error_rtn = relative_output_error(rtn, source, plain.hessian)

    def _input_stats(
        self, stream: HiddenStream, groups: list[ScaleGroup], originals: dict[str, list[Tensor]] | None = None
    ) -> dict[str, InputStats]:
        """Statistics of each group's input over all calibration tokens, by the group's first linear; with `originals`
        those of its drift from the original model's input too.

        Everything before a group computes with the weights it has now, so quantized ones count as quantized.
        """
        names = [g.linears[0] for g in groups]
        stats = {n: InputStats.empty(self.plans[n].k, self.inputs.device) for n in names}
        for name in names:
            if originals and name in originals:
                stats[name].drift = CrossStats.empty(self.plans[name].k, self.inputs.device)

        def add(name: str, batch: int, x: Tensor) -> None:
            stats[name].update(x)
            drift = stats[name].drift
            if originals and drift is not None:
                drift.update(originals[name][batch].to(x.device), x)

        self._watch_inputs(stream, names, add)
        for name, seen in stats.items():
            if not torch.isfinite(seen.hessian).all():
                raise NumericalError(
                    f"{self.block.name}.{name} reads NaN or Inf on the calibration tokens, or values whose squares "
                    "overflow; use compute_dtype=float32, or check the source weights"
                )
        return stats

    def _original_inputs(self, groups: list[ScaleGroup], teacher: HiddenStream) -> dict[str, list[Tensor]]:
        """Run the block, which must be the original one still, in the original model: its outputs become the targets.

        Returns:
            What the first linear of each group read there, batch by batch, in host memory, where the recipe asks for
            it. Linears that read anything but one row a token (routed experts: the two models may route differently)
            are left out: their inputs cannot be paired.
        """
        names = [g.linears[0] for g in groups] if self.config.needs_drift else []
        found: dict[str, list[Tensor]] = {name: [] for name in names}

        def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda _, args: found[name].append(args[0].to("cpu", copy=True))

        with ExitStack() as stack:
            for name in names:
                stack.callback(self.block.linears[name].register_forward_pre_hook(keep(name)).remove)
            self.streams.targets = teacher.outputs(self.block, self.index)
        tokens = [batch.numel() for batch in teacher.token_batches]
        return {n: inputs for n, inputs in found.items() if [x.numel() // x.shape[-1] for x in inputs] == tokens}

    def _watch_inputs(self, stream: HiddenStream, names: list[str], seen: Callable[[str, int, Tensor], None]) -> None:
        """Run the block as it is now on every batch and show `seen` what the named linears read, each time they do:
        name, number of the batch, input. The last of the names in the order of the block ends a batch."""
        batch = 0

        def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                seen(name, batch, args[0])
                if name == names[-1]:
                    raise _InputSeen

            return hook

        with ExitStack() as stack:
            for name in names:
                stack.callback(self.block.linears[name].register_forward_pre_hook(hook_for(name)).remove)
            for batch in range(len(stream.hidden)):  # read by the hooks
                with suppress(_InputSeen):
                    stream.forward(self.block.module, self.index, batch)


class _InputSeen(Exception):
    """Leaves a block's forward once the last wanted input was seen: the rest would be computed for nothing."""
