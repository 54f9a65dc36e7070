"""End-to-end tuning: the finished blocks put together, and their scales and norms trained on the original's logits.

Codes stay as the blocks left them. The original is present as its last hidden states, which the engine kept, so that
only one model is on the device. What was tuned goes to a folder of checkpoints beside the blocks' own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compress.blocks import EngineInputs
from compress.checkpoint import BlockState, load_block, load_head, load_tuned, save_block, save_head, save_tuned
from compress.config import TuneConfig
from compress.errors import ArtifactError, NumericalError
from compress.forecast import free_bytes
from compress.learn_pass import split_batches, training_precision
from compress.methods.distill import TunedLinear, kl_to_teacher
from compress.methods.signround import stored
from compress.models import LoadedModel
from compress.streams import HiddenStream, logits_of, materialize_outside, release_outside, replaced_forwards

FOLDER = "tuned"
_BETA1, _BETA2, _EPSILON = 0.9, 0.95, 1e-12
_EVALUATIONS_PER_EPOCH = 2


@dataclass
class TuneNote:
    """KL to the original on the held-out calibration sequences, in nats a token, before and after; steps made of
    those planned; how many values were trained. `kl_after` is never above `kl_before`: the best state seen is kept."""

    kl_before: float
    kl_after: float
    steps: int
    steps_planned: int
    n_scales: int
    n_norms: int


def tune_model(
    inputs: EngineInputs, teacher: HiddenStream, on_step: Callable[[int, int], None]
) -> tuple[TuneNote, Tensor]:
    """Tune what the checkpoints of `inputs` hold and write the result to their folder FOLDER, or find it there.

    Args:
        teacher: the original's hidden states after its last block, on all calibration tokens.

    Returns:
        What happened, and float32 logits [V, T, vocab] of the tuned model on the verify tokens.

    Raises:
        NumericalError: a loss that is not finite.
        ArtifactError: a checkpoint of a block is gone.
    """
    out = inputs.checkpoints / FOLDER
    done = load_tuned(out)
    if done is not None:
        return TuneNote(**done[2]), done[1]
    loaded = inputs.loaded
    states = []
    for index, block in enumerate(loaded.blocks):
        state = load_block(inputs.checkpoints, index)
        if state is None:
            raise ArtifactError(f"the checkpoint of {block.name} is gone from {inputs.checkpoints}; run again")
        states.append(state)
    with _assembled(inputs, states) as linears:
        tuner = _Tuner(inputs, teacher, linears)
        free = free_bytes(inputs.device)
        recompute = free is not None and _activation_bytes(inputs, teacher) > free // 4
        try:
            with _recomputed(loaded) if recompute else nullcontext():
                note = tuner.run(on_step)
            verify_logits = tuner.verify_logits()
        finally:
            _put_back(loaded.model, tuner.fixed_norms | tuner.original_head)
        norms = tuner.changed_norms()
    for index, (block, state) in enumerate(zip(loaded.blocks, states, strict=True)):
        prefix = f"{block.name}."
        quantized = {name: linears[prefix + name].quantized().to("cpu") for name in state.quantized}
        own = {n.removeprefix(prefix): v for n, v in norms.items() if n.startswith(prefix)}
        save_block(out, index, BlockState(quantized, state.changed | own, state.reports))
    head = load_head(inputs.checkpoints)
    if head is not None:  # as it is: the folder holds all that the artifact is made of
        save_head(out, head)
    outside = set(loaded.outside_blocks())
    save_tuned(out, {n: v for n, v in norms.items() if n in outside}, verify_logits, asdict(note))
    return note, verify_logits


@contextmanager
def _assembled(inputs: EngineInputs, states: list[BlockState]) -> Iterator[dict[str, TunedLinear]]:
    """The whole quantized model on the device, its linears replaced; by full name. Taken apart again after."""
    loaded, device, dtype = inputs.loaded, inputs.device, inputs.dtype
    linears: dict[str, TunedLinear] = {}
    originals: dict[str, nn.Module] = {}
    materialize_outside(loaded, device, dtype, with_head=True)
    try:
        for block, state in zip(loaded.blocks, states, strict=True):
            for name, quantized in state.quantized.items():
                module = block.linears[name]
                bias = getattr(module, "bias", None)
                full = f"{block.name}.{name}"
                if bias is not None:
                    value = state.changed.get(f"{name}.bias", loaded.tensor(f"{full}.bias"))
                    bias = nn.Parameter(value.to(device, dtype), requires_grad=False)
                linears[full] = TunedLinear(quantized.to(device), bias).to(device)
                originals[full] = module
                _replace(loaded.model, full, linears[full])
            loaded.materialize(block.name, device, dtype)
            for name, value in state.changed.items():
                if name.rpartition(".")[0] not in state.quantized:
                    with torch.no_grad():
                        block.module.get_parameter(name).copy_(value)
        yield linears
    finally:
        for full, module in originals.items():
            _replace(loaded.model, full, module)
        for block in loaded.blocks:
            loaded.release(block.name)
        release_outside(loaded)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


class _Tuner:
    """One training run over an assembled model."""

    def __init__(self, inputs: EngineInputs, teacher: HiddenStream, linears: dict[str, TunedLinear]) -> None:
        self.inputs, self.teacher, self.linears = inputs, teacher, linears
        self.config: TuneConfig = inputs.plan.config.tune
        self.model = inputs.loaded.model
        self.norm_dtype = inputs.loaded.dtype
        # gains of norms: the only one-dimensional weights a decoder has
        self.fixed_norms = {
            name: p.detach() for name, p in self.model.named_parameters() if p.ndim == 1 and name.endswith(".weight")
        }
        self.original_head, self.quantized_head = self._heads()
        self.norms = {n: nn.Parameter(p.float().clone()) for n, p in self.fixed_norms.items()}
        gains = [linear.gain for linear in linears.values()]
        self.groups = [(gains, self.config.scale_rate), (list(self.norms.values()), self.config.norm_rate)]
        self.moments: dict[nn.Parameter, tuple[Tensor, Tensor]] = {
            p: (torch.zeros_like(p), torch.zeros_like(p)) for parameters, _ in self.groups for p in parameters
        }

    def _heads(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weight of the head by its name, the original's and the quantized model's; nothing where they are the same."""
        state = load_head(self.inputs.checkpoints)
        original, quantized = {}, {}
        for name, weight in state.quantized.items() if state is not None else ():
            original[f"{name}.weight"] = self.model.get_parameter(f"{name}.weight").detach()
            quantized[f"{name}.weight"] = weight.to(self.inputs.device).dequantize(self.inputs.dtype)
        return original, quantized

    def run(self, on_step: Callable[[int, int], None]) -> TuneNote:
        config, n_batches = self.config, len(self.teacher.hidden)
        training, held_out = split_batches(n_batches, config.held_out)
        per_step = max(1, round(config.batch_sequences / self.teacher.token_batches[0].shape[0]))
        planned = max(1, round(config.epochs * len(training) / per_step))
        every = max(1, round(len(training) / per_step / _EVALUATIONS_PER_EPOCH))
        before = best = self._held_out_kl(held_out)
        best_state = self._snapshot()
        order, shuffle = list(training), random.Random(0)
        position, worse, step = len(order), 0, 0
        while step < planned and worse < config.patience:
            for _ in range(per_step):
                if position == len(order):
                    shuffle.shuffle(order)
                    position = 0
                with torch.enable_grad():
                    loss = self._loss(order[position]) / per_step
                    if not torch.isfinite(loss):
                        raise NumericalError(f"end-to-end tuning met a KL of {loss.item()}; use compute_dtype=float32")
                    loss.backward()  # type: ignore[no-untyped-call]
                position += 1
            self._step(step, 1 - step / planned)
            step += 1
            if step % every == 0 or step == planned:
                kl = self._held_out_kl(held_out)
                if kl < best:
                    best, best_state, worse = kl, self._snapshot(), 0
                else:
                    worse += 1
            on_step(step, planned)
        self._restore(best_state)
        n_scales = sum(linear.gain.numel() for linear in self.linears.values())
        return TuneNote(before, best, step, planned, n_scales, sum(p.numel() for p in self.norms.values()))

    def _loss(self, batch: int) -> Tensor:
        """KL to the original on one batch: a scalar with a gradient."""
        tokens = self.teacher.token_batches[batch].to(self.inputs.device)
        with training_precision(self.inputs.device, self.inputs.dtype):
            _place(self.model, self.fixed_norms | self.original_head)  # for the original's head
            target = logits_of(self.inputs.loaded, self.teacher, batch)
            _place(self.model, self._live_norms() | self.quantized_head)
            logits = self.model(tokens, use_cache=False).logits
        return kl_to_teacher(logits, target)

    def _live_norms(self) -> dict[str, Tensor]:
        return {n: stored(p, self.norm_dtype).to(self.inputs.dtype) for n, p in self.norms.items()}

    def _held_out_kl(self, batches: list[int]) -> float:
        with torch.no_grad():
            return sum(float(self._loss(i)) for i in batches) / len(batches)

    @torch.no_grad()
    def _step(self, step: int, left: float) -> None:
        """Adam with a falling rate; gains start at 1, so a rate is a relative change."""
        for parameters, rate in self.groups:
            for p in parameters:
                if p.grad is None:
                    continue
                mean, square = self.moments[p]
                mean.mul_(_BETA1).add_(p.grad, alpha=1 - _BETA1)
                square.mul_(_BETA2).addcmul_(p.grad, p.grad, value=1 - _BETA2)
                unbiased = mean / (1 - _BETA1 ** (step + 1))
                spread = (square / (1 - _BETA2 ** (step + 1))).sqrt_().add_(_EPSILON)
                p.addcdiv_(unbiased, spread, value=-rate * left)
                p.grad = None

    def _snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for parameters, _ in self.groups for p in parameters]

    @torch.no_grad()
    def _restore(self, values: list[Tensor]) -> None:
        for p, value in zip((p for parameters, _ in self.groups for p in parameters), values, strict=True):
            p.copy_(value)

    def changed_norms(self) -> dict[str, Tensor]:
        """Norms by name, in the checkpoint's dtype, on the CPU; those that are as they were are left out."""
        values = {n: p.detach().to(self.norm_dtype).cpu() for n, p in self.norms.items()}
        return {n: v for n, v in values.items() if not torch.equal(v, self.fixed_norms[n].to(v.dtype).cpu())}

    @torch.no_grad()
    def verify_logits(self) -> Tensor:
        """float32 [V, T, vocab] on the CPU, in the compute dtype and without autocast."""
        _place(self.model, self._live_norms() | self.quantized_head)
        logits: Tensor = self.model(self.inputs.verify_ids.to(self.inputs.device), use_cache=False).logits
        return logits.float().cpu()


def _place(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Make parameters these tensors, as attributes that gradients pass through.

    They stay until the next call: a checkpointed block reads them again in the backward pass.
    """
    for name, value in values.items():
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        module._parameters.pop(leaf, None)
        module.__dict__[leaf] = value


def _put_back(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Undo `_place`."""
    for name, value in values.items():
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        module.__dict__.pop(leaf, None)
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


def _recomputed(loaded: LoadedModel) -> AbstractContextManager[None]:
    """Blocks keep their input alone for the backward pass and compute the rest again."""

    def wrap(_: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)

        return run

    return replaced_forwards(loaded.blocks, wrap)


def _activation_bytes(inputs: EngineInputs, teacher: HiddenStream) -> int:
    """About what the backward pass of one batch keeps: inputs and outputs of every linear, twice for what lies
    between them."""
    tokens = max(batch.numel() for batch in teacher.token_batches)
    return 2 * tokens * sum(p.n + p.k for p in inputs.plan.linears) * inputs.dtype.itemsize
