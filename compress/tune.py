"""End-to-end tuning: the finished blocks put together, their scales and norms trained on the original's logits, and
their codes where the recipe has a rate for them.

The original is present as its last hidden states, which the engine kept, so that only one model is on the device. What
was tuned goes to a folder of checkpoints beside the blocks' own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compress import replay
from compress.blocks import EngineInputs
from compress.checkpoint import BlockState, load_block, load_head, load_tuned, save_block, save_head, save_tuned
from compress.config_quant import TuneConfig
from compress.errors import ArtifactError, NumericalError
from compress.forecast import free_bytes, tuning_logit_bytes, tuning_state_bytes
from compress.learn_pass import repeatable, split_batches, training_precision
from compress.methods.adam import Adam
from compress.methods.distill import TunedLinear, kl_to_teacher
from compress.methods.signround import stored, unpack_offsets
from compress.models import LoadedModel, retie
from compress.norms import fused_norms
from compress.streams import (
    HiddenStream,
    captured_as_called,
    logits_of,
    materialize_outside,
    release_outside,
    replaced_forwards,
)

FOLDER = "tuned"
_EVALUATIONS_PER_EPOCH = 2
# With codes in training, the KL of a state tells little before the rate has fallen.
_EVALUATIONS_WITH_CODES = 8
# Adam's first steps are of full length whatever the gradient: codes would turn by chance.
_WARMUP_STEPS = 20
_STEPS_BETWEEN_CHECKS = 32


@dataclass
class TuneNote:
    """KL to the original on the held-out calibration sequences, in nats a token, before and after; steps made of
    those planned; how many values were trained, `n_embedding` those of embedding and head; the share of the codes that
    changed. `kl_after` is never above `kl_before`: the best state seen is kept."""

    kl_before: float
    kl_after: float
    steps: int
    steps_planned: int
    n_scales: int
    n_norms: int
    n_embedding: int
    n_codes: int
    changed: float


def tune_model(
    inputs: EngineInputs,
    teacher: HiddenStream,
    on_step: Callable[[int, int], None],
    tuning: HiddenStream | None = None,
) -> tuple[TuneNote, Tensor]:
    """Tune what the checkpoints of `inputs` hold and write the result to their folder FOLDER, or find it there.

    Args:
        teacher: the original's hidden states after its last block, on all calibration tokens.
        tuning: the same on sequences that are only learned from here.

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
        tuner = _Tuner(inputs, _Lessons(teacher, tuning, inputs.device), linears)
        free = free_bytes(inputs.device)
        recompute = free is not None and tuner.tokens_at_once * _bytes_per_token(inputs) > free // 4
        # A graph keeps for itself what a step has at its peak, and evaluation needs that again: activations of a
        # quarter of the free memory at most leave room for both. Where they are more, launches are not what takes long.
        captured = inputs.plan.config.tune.graphs and replay.can_capture(inputs.device) and not recompute
        forwards = captured_as_called(loaded) if captured else _recomputed(loaded) if recompute else nullcontext()
        try:
            on_gpu = inputs.device.type == "cuda"
            with repeatable(inputs.device), forwards, fused_norms(loaded.model) if on_gpu else nullcontext():
                note = tuner.run(on_step, captured)
            verify_logits = tuner.verify_logits()
        finally:
            _put_back(loaded.model, tuner.with_ties(tuner.fixed) | tuner.original_head)
            retie(loaded.model, loaded.tied)
        changed = tuner.changed()
    n_changed = 0
    for index, (block, state) in enumerate(zip(loaded.blocks, states, strict=True)):
        prefix = f"{block.name}."
        quantized = {name: linears[prefix + name].learned.quantized().to("cpu") for name in state.quantized}
        n_changed += sum(int((q.codes != state.quantized[name].codes).sum()) for name, q in quantized.items())
        own = {n.removeprefix(prefix): v for n, v in changed.items() if n.startswith(prefix)}
        save_block(out, index, BlockState(quantized, state.changed | own, state.reports))
    head = load_head(inputs.checkpoints)
    if head is not None:  # as it is: the folder holds all that the artifact is made of
        save_head(out, head)
    note.changed = n_changed / max(note.n_codes, 1)
    outside = set(loaded.outside_blocks())
    save_tuned(out, {n: v for n, v in changed.items() if n in outside}, verify_logits, asdict(note))
    return note, verify_logits


@contextmanager
def _assembled(inputs: EngineInputs, states: list[BlockState]) -> Iterator[dict[str, TunedLinear]]:
    """The whole quantized model on the device, its linears replaced; by full name. Taken apart again after."""
    loaded, device, dtype, config = inputs.loaded, inputs.device, inputs.dtype, inputs.plan.config.tune
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
                offsets = None
                if config.trains_codes:
                    offsets = config.pull * unpack_offsets(state.offsets[name].to(device))
                linears[full] = TunedLinear(quantized.to(device), bias, offsets)
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


Lesson = tuple[Tensor, Tensor]


class _Lessons:
    """Batches of sequences, as many in each as in calibration, with the original's last hidden states: those of the
    calibration first, then those for tuning alone."""

    def __init__(self, teacher: HiddenStream, tuning: HiddenStream | None, device: torch.device) -> None:
        streams = [teacher] if tuning is None else [teacher, tuning]
        size = teacher.token_batches[0].shape[0]
        self.tokens = [part.to(device) for s in streams for ids in s.token_batches for part in ids.split(size)]
        self.hidden = [part for s in streams for hidden in s.hidden for part in hidden.split(size)]
        self.n_calibration = len(teacher.hidden)

    def split(self, share: float) -> tuple[list[int], list[int]]:
        """Batches to learn from, and those that only judge, which are the last ones of the calibration."""
        training, held_out = split_batches(self.n_calibration, share)
        return training + list(range(self.n_calibration, len(self.tokens))), held_out

    def of(self, batches: list[int]) -> list[Lesson]:
        """Tokens [B, T], on the device, and hidden states [B, T, H], where they are kept, of each of some batches."""
        return [(self.tokens[i], self.hidden[i]) for i in batches]


@dataclass
class _Snapshot:
    """A state to go back to: of each linear, and the dense weights in order."""

    linears: list[tuple[Tensor | None, Tensor]]
    dense: list[Tensor]


class _Tuner:
    """One training run over an assembled model."""

    def __init__(self, inputs: EngineInputs, lessons: _Lessons, linears: dict[str, TunedLinear]) -> None:
        self.inputs, self.lessons, self.linears = inputs, lessons, linears
        self.config: TuneConfig = inputs.plan.config.tune
        self.model = inputs.loaded.model
        self.stored_dtype = inputs.loaded.dtype
        self.original_head, self.quantized_head = self._heads()
        # dense weights in training, as they were; gains of norms are the only one-dimensional weights a decoder has
        norms = [n for n, p in self.model.named_parameters() if p.ndim == 1 and n.endswith(".weight")]
        tables = self._tables() if self.config.embedding_rate > 0 else []
        self.fixed = {n: self.model.get_parameter(n).detach() for n in norms + tables}
        self.dense = {n: nn.Parameter(p.float().clone()) for n, p in self.fixed.items()}
        learned = [linear.learned for linear in linears.values()]
        codes = [w.u for w in learned if isinstance(w.u, nn.Parameter)]
        self.n_codes = sum(u.numel() for u in codes)
        self.adam = Adam(
            [
                ([w.gain for w in learned], self.config.scale_rate),
                ([self.dense[n] for n in norms], self.config.norm_rate),
                *(([self.dense[n]], self.config.embedding_rate * _rms(self.fixed[n])) for n in tables),
                (codes, self.config.code_rate),
            ]
        )
        self.per_step = max(1, round(self.config.batch_sequences / lessons.tokens[0].shape[0]))
        self.at_once = min(self.per_step, _batches_at_once(inputs, lessons.tokens[0].numel()))
        self.tokens_at_once = self.at_once * lessons.tokens[0].numel()
        self.loss_sum = torch.zeros((), device=inputs.device)

    def _heads(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weight of the head by its name, the original's and the quantized model's; nothing where they are the same."""
        state = load_head(self.inputs.checkpoints)
        original, quantized = {}, {}
        for name, weight in state.quantized.items() if state is not None else ():
            original[f"{name}.weight"] = self.model.get_parameter(f"{name}.weight").detach()
            quantized[f"{name}.weight"] = weight.to(self.inputs.device).dequantize(self.inputs.dtype)
        return original, quantized

    def _tables(self) -> list[str]:
        """Embedding and head by name: once where they are tied, and without a head that is quantized."""
        loaded = self.inputs.loaded
        outside = [n for n in loaded.outside_blocks() if n not in loaded.tied and n not in self.quantized_head]
        return [n for n in outside if self.model.get_parameter(n).ndim == 2]

    def with_ties(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same, and under the names of parameters that share their storage."""
        tied = {n: holder for n, holder in self.inputs.loaded.tied.items() if holder in values}
        return values | {n: values[holder] for n, holder in tied.items()}

    def run(self, on_step: Callable[[int, int], None], captured: bool) -> TuneNote:
        """captured: on a GPU, a step's forward and backward passes are replayed from a CUDA graph."""
        config = self.config
        training, held_out = self.lessons.split(config.held_out)
        planned = max(1, round(config.epochs * len(training) / self.per_step))
        if config.trains_codes:
            every, patience = max(1, round(planned / _EVALUATIONS_WITH_CODES)), planned
        else:
            every = max(1, round(len(training) / self.per_step / _EVALUATIONS_PER_EPOCH))
            patience = config.patience
        before = best = self._held_out_kl(held_out)
        best_state = self._snapshot()
        draws = _epochs(training)
        worse = step = 0
        with replay.Replay(
            self._gradients, self.adam.parameters, self.inputs.device, captured, "quant.tune.graphs"
        ) as gradients:
            while step < planned and worse < patience:
                lessons = self.lessons.of([next(draws) for _ in range(self.per_step)])
                gradients(*(t for lesson in lessons for t in lesson))
                self.adam.step(self._rate(step, planned))
                step += 1
                judged = step % every == 0 or step == planned
                if judged or step % _STEPS_BETWEEN_CHECKS == 0:
                    self._check_losses()
                if judged:
                    kl = self._held_out_kl(held_out)
                    if kl < best:
                        best, best_state, worse = kl, self._snapshot(), 0
                    else:
                        worse += 1
                on_step(step, planned)
        self._restore(best_state)
        n_scales = sum(linear.learned.gain.numel() for linear in self.linears.values())
        n_norms, n_embedding = (sum(p.numel() for p in self.dense.values() if p.ndim == d) for d in (1, 2))
        return TuneNote(before, best, step, planned, n_scales, n_norms, n_embedding, self.n_codes, 0.0)

    def _rate(self, step: int, planned: int) -> float:
        """Share of the rates at a step: falling to 0, for codes after a short rise."""
        rise = max(1, min(_WARMUP_STEPS, planned // 4)) if self.n_codes else 1
        return (1 - step / planned) * min(1, (step + 1) / rise)

    def _gradients(self, *tensors: Tensor) -> None:
        """Give the parameters those of the mean loss of some batches: tokens and hidden states of each, in turns."""
        lessons = list(zip(tensors[::2], tensors[1::2], strict=True))
        for some in self._portions(lessons):
            with torch.enable_grad():
                loss = self._loss(some) * len(some) / len(lessons)
                loss.backward()  # type: ignore[no-untyped-call]
            self.loss_sum += loss.detach()  # looked at now and then: every look waits for the device

    def _portions(self, lessons: list[Lesson]) -> Iterator[list[Lesson]]:
        for i in range(0, len(lessons), self.at_once):
            yield lessons[i : i + self.at_once]

    def _check_losses(self) -> None:
        if not torch.isfinite(self.loss_sum):
            raise NumericalError(f"end-to-end tuning met a KL of {self.loss_sum.item()}; use compute_dtype=float32")

    def _loss(self, lessons: Sequence[Lesson]) -> Tensor:
        """KL to the original on some batches: a scalar with a gradient."""
        tokens = torch.cat([tokens for tokens, _ in lessons])
        hidden = torch.cat([hidden for _, hidden in lessons]).to(self.inputs.device)
        with training_precision(self.inputs.device, self.inputs.dtype):
            _place(self.model, self.with_ties(self.fixed) | self.original_head)  # for the original's head
            target = logits_of(self.inputs.loaded, tokens, hidden)
            _place(self.model, self._live() | self.quantized_head)
            logits = self.model(tokens, use_cache=False).logits
        return kl_to_teacher(logits, target)

    def _live(self) -> dict[str, Tensor]:
        """Dense weights in training, as they would be stored."""
        return self.with_ties({n: stored(p, self.stored_dtype).to(self.inputs.dtype) for n, p in self.dense.items()})

    @torch.no_grad()
    def _held_out_kl(self, batches: list[int]) -> float:
        portions = self._portions(self.lessons.of(batches))
        return sum(float(self._loss(some)) * len(some) for some in portions) / len(batches)

    def _snapshot(self) -> _Snapshot:
        dense = [p.detach().clone() for p in self.dense.values()]
        return _Snapshot([linear.learned.state() for linear in self.linears.values()], dense)

    @torch.no_grad()
    def _restore(self, snapshot: _Snapshot) -> None:
        for linear, state in zip(self.linears.values(), snapshot.linears, strict=True):
            linear.learned.set_state(state)
        for p, value in zip(self.dense.values(), snapshot.dense, strict=True):
            p.copy_(value)

    def changed(self) -> dict[str, Tensor]:
        """Dense weights by name, in the checkpoint's dtype, on the CPU; those that are as they were are left out."""
        values = {n: p.detach().to(self.stored_dtype).cpu() for n, p in self.dense.items()}
        return {n: v for n, v in values.items() if not torch.equal(v, self.fixed[n].to(v.dtype).cpu())}

    @torch.no_grad()
    def verify_logits(self) -> Tensor:
        """float32 [V, T, vocab] on the CPU, in the compute dtype and without autocast."""
        _place(self.model, self._live() | self.quantized_head)
        logits: Tensor = self.model(self.inputs.verify_ids.to(self.inputs.device), use_cache=False).logits
        return logits.float().cpu()


def _rms(table: Tensor) -> float:
    """Root of the mean square of an embedding's or head's entries, which differ between models by a factor of ten."""
    return float(table.float().square().mean().sqrt())


def _epochs(batches: list[int]) -> Iterator[int]:
    """The batches over and over, each time in another order."""
    order, shuffle = list(batches), random.Random(0)
    while True:
        shuffle.shuffle(order)
        yield from order


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


def _bytes_per_token(inputs: EngineInputs) -> int:
    """About what the backward pass keeps for a token: inputs and outputs of every linear, twice for what lies between
    them."""
    return 2 * sum(p.n + p.k for p in inputs.plan.linears) * inputs.dtype.itemsize


def _batches_at_once(inputs: EngineInputs, batch_tokens: int) -> int:
    """Batches that pass the model together: on a GPU as many as take a quarter of what its memory has beside the model.

    Of all its memory, not of what is free at the moment: the sums of a step, and so the result, depend on it.
    """
    if inputs.device.type != "cuda":
        return 1
    total = torch.cuda.get_device_properties(inputs.device).total_memory
    room = total - tuning_state_bytes(inputs.loaded, inputs.plan, inputs.dtype)
    one = batch_tokens * _bytes_per_token(inputs) + tuning_logit_bytes(inputs.loaded, batch_tokens)
    return max(1, room // 4 // one)
