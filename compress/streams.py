"""Hidden states on their way through the decoder, one block at a time.

The model's own forward decides what each block is called with (positions, rotary tables, masks, per-layer
attention kinds). It is run once with every block replaced by a recorder that passes the hidden state through,
so the arguments of all blocks and the input of the first are known without computing a single block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.errors import NumericalError, UnsupportedModel
from compress.models import Block, LoadedModel, retie, set_linear_weight, set_parameter


class _Stop(Exception):
    """Leaves the model's forward once the last block has been recorded."""


@dataclass
class BlockCall:
    """What a block is called with besides its hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def rehearsal(self) -> BlockCall:
        """The same call with its own copy of what a block may write to, so that running it leaves no trace."""
        copied = (copy(v) if isinstance(v, (dict, list)) else v for v in (*self.args, *self.kwargs.values()))
        values = list(copied)
        n = len(self.args)
        return BlockCall(tuple(values[:n]), dict(zip(self.kwargs, values[n:], strict=True)))


@dataclass
class HiddenStream:
    """Batches of hidden states [B, T, H] before the next block, and for each batch the calls of every block.

    Batches whose calls are equal (the usual case: positions and masks depend on the shape alone) share one list.
    """

    token_batches: list[Tensor]
    hidden: list[Tensor]
    calls: list[list[BlockCall]]
    device: torch.device

    @property
    def n_tokens(self) -> int:
        return sum(batch.numel() for batch in self.token_batches)

    def forward(
        self, block: Callable[..., Any], index: int, batch: int, hidden: Tensor | None = None, for_good: bool = False
    ) -> Tensor:
        """Run block number `index` on batch number `batch`, or on other hidden states called as that: [B, T, H].

        What the block hands to later ones through a dict of its call stays there only `for_good`.
        """
        call = self.calls[batch][index]
        call = call if for_good else call.rehearsal()
        # a copy, because a block may add to its input in place and this one is needed again
        hidden = (self.hidden[batch] if hidden is None else hidden).to(self.device, copy=True)
        output = block(hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def called_as(self, batch: int) -> int:
        """The first batch whose calls are those of this one."""
        return next(i for i, calls in enumerate(self.calls) if calls is self.calls[batch])

    def advance(self, block: Block, index: int) -> None:
        """Replace every batch by the block's output.

        Raises:
            NumericalError: an output is not finite.
        """
        for i in range(len(self.hidden)):
            self.hidden[i] = self._output(block, index, i)

    def outputs(self, block: Block, index: int) -> list[Tensor]:
        """What `advance` would replace each batch by; the stream itself stays before the block. Raises as that."""
        return [self._output(block, index, i) for i in range(len(self.hidden))]

    def _output(self, block: Block, index: int, batch: int) -> Tensor:
        output = self.forward(block.module, index, batch, for_good=True)
        if not torch.isfinite(output).all():
            raise NumericalError(
                f"{block.name} gives NaN or Inf on the calibration tokens; use compute_dtype=float32, "
                "or check the source weights"
            )
        return output.to(self.hidden[batch].device)


def open_stream(loaded: LoadedModel, tokens: Tensor, batch_size: int, device: torch.device, store: torch.device,
                dtype: torch.dtype) -> HiddenStream:  # fmt: skip
    """Hidden states before the first block for tokens int64 [S, T].

    Everything outside the blocks is materialized for this and released again.
    """
    batches = list(tokens.split(batch_size))
    hidden: list[Tensor] = []
    calls: list[list[BlockCall]] = []
    materialize_outside(loaded, device, dtype, with_head=False)
    loaded.materialize(loaded.blocks[0].name, device, dtype)
    try:
        with torch.no_grad():
            for batch in batches:
                first, recorded = _record(loaded, batch.to(device))
                hidden.append(first.to(store))
                calls.append(next((c for c in calls if _same_calls(c, recorded)), recorded))
    finally:
        loaded.release(loaded.blocks[0].name)
        release_outside(loaded)
    return HiddenStream(batches, hidden, calls, device)


def tail_logits(loaded: LoadedModel, stream: HiddenStream, dtype: torch.dtype, head: Tensor | None = None) -> Tensor:
    """Logits of hidden states that have passed every block: float32 [S, T, V] on the CPU.

    head: [V, H], in place of the original's.
    """
    materialize_outside(loaded, stream.device, dtype, with_head=True)
    try:
        if head is not None:
            set_linear_weight(loaded.model.get_output_embeddings(), head)  # type: ignore[operator]
        batches = zip(stream.token_batches, stream.hidden, strict=True)
        logits = [logits_of(loaded, ids.to(stream.device), h.to(stream.device)).float().cpu() for ids, h in batches]
    finally:
        release_outside(loaded)
    return torch.cat(logits)


def logits_of(loaded: LoadedModel, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Logits [B, T, V] of hidden states [B, T, H] that have passed every block, in the dtype of the head; what lies
    outside the blocks must be materialized. tokens: int64 [B, T] that they were made from, on the same device."""
    last = len(loaded.blocks) - 1

    def stub(index: int, h: Tensor, _a: object, _k: object) -> Any:
        value = hidden if index == last else h
        return (value,) if loaded.block_returns_tuple else value

    with torch.no_grad(), _stubbed(loaded.blocks, stub):
        logits: Tensor = loaded.model(tokens, use_cache=False).logits
    return logits


def _same_calls(a: list[BlockCall], b: list[BlockCall]) -> bool:
    def flat(call: BlockCall) -> tuple[Any, ...]:
        return call.args, tuple(call.kwargs), tuple(call.kwargs.values())

    return _same(tuple(map(flat, a)), tuple(map(flat, b)))


def _same(a: Any, b: Any) -> bool:
    """Whether two recorded values can stand for each other.

    Only what cannot change counts: blocks may hand each other values through a dict (Gemma 3n and 4 share keys and
    values between blocks so), and that must stay one dict for each batch.
    """
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return (a is None or isinstance(a, (bool, int, float, str))) and a == b


def _record(loaded: LoadedModel, tokens: Tensor) -> tuple[Tensor, list[BlockCall]]:
    """Input of the first block and the calls of all blocks for one batch."""
    from transformers import Cache

    first: list[Tensor] = []
    calls: list[BlockCall] = []
    last = len(loaded.blocks) - 1
    original = loaded.blocks[0].module.forward

    def recorder(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index != len(calls) or (first and not torch.equal(hidden, first[0])):
            raise UnsupportedModel(
                f"{type(loaded.model).__name__} does more than pass the output of block {len(calls) - 1} to block "
                f"{len(calls)}; only decoders that run their blocks one after the other are supported"
            )
        if any(isinstance(v, Cache) for v in (*args, *kwargs.values())):
            raise UnsupportedModel(f"{type(loaded.model).__name__} fills a cache even with use_cache=False")
        calls.append(BlockCall(args, kwargs))
        if index == 0:
            first.append(hidden.clone())
            if loaded.block_returns_tuple is None:
                # Some architectures' blocks return a tuple, some a tensor; one real call tells.
                trial = calls[0].rehearsal()
                loaded.block_returns_tuple = isinstance(original(hidden.clone(), *trial.args, **trial.kwargs), tuple)
        if index == last:
            raise _Stop
        return (hidden,) if loaded.block_returns_tuple else hidden

    with _stubbed(loaded.blocks, recorder):
        try:
            loaded.model(tokens, use_cache=False)
        except _Stop:
            pass
        except (TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
            raise UnsupportedModel(
                f"{type(loaded.model).__name__} cannot be run block by block: {type(error).__name__}: {error}"
            ) from error
    if len(calls) != len(loaded.blocks):
        raise UnsupportedModel(
            f"{type(loaded.model).__name__} ran {len(calls)} of its {len(loaded.blocks)} blocks; "
            "only decoders that run each block once, in order, are supported"
        )
    return first[0], calls


Recorder = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def _stubbed(blocks: list[Block], recorder: Recorder) -> Iterator[None]:
    """Replace the forward of every block, keeping the modules (models read attributes of them)."""

    def stub_for(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            return recorder(index, hidden, args[1:], kwargs)

        return forward

    with replaced_forwards(blocks, lambda i, _: stub_for(i)):
        yield


@contextmanager
def replaced_forwards(
    blocks: list[Block], replacement: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Blocks run replacement(index, their forward) inside; may be nested."""
    before = [vars(block.module).get("forward") for block in blocks]
    for i, block in enumerate(blocks):
        block.module.forward = replacement(i, block.module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.module.forward
            if forward is not None:
                block.module.forward = forward  # type: ignore[method-assign]


def captured_as_called(loaded: LoadedModel) -> AbstractContextManager[None]:
    """Inside, while a CUDA graph is captured, blocks get no argument that the plain call before did not give them.

    transformers looks at the positions whether sequences are packed into one, which it cannot while a graph is
    captured; there it makes a mask that hides nothing more where it gives none otherwise, and attention takes another
    kernel for that, with other bytes.
    """
    absent: dict[int, set[int | str]] = {}

    def wrap(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if torch.cuda.is_current_stream_capturing():
                args = tuple(None if i in absent[index] else v for i, v in enumerate(args))
                kwargs = {k: None if k in absent[index] else v for k, v in kwargs.items()}
            else:
                given: dict[int | str, Any] = dict(enumerate(args)) | kwargs
                absent[index] = {k for k, v in given.items() if v is None}
            return forward(*args, **kwargs)

        return run

    return replaced_forwards(loaded.blocks, wrap)


def materialize_outside(loaded: LoadedModel, device: torch.device, dtype: torch.dtype, with_head: bool) -> None:
    head = loaded.model.get_output_embeddings()  # type: ignore[operator]
    head_parameters = {id(p) for p in head.parameters()} if head is not None else set()
    named = dict(loaded.model.named_parameters(remove_duplicate=False))
    for name in loaded.outside_blocks():
        is_head = id(named[name]) in head_parameters and name not in loaded.tied
        shared = name in loaded.tied.values()
        if name in loaded.tied or (is_head and not shared and not with_head):
            continue
        set_parameter(loaded.model, name, loaded.tensor(name).to(device, dtype, copy=True))
    retie(loaded.model, loaded.tied)
    inside = {id(m) for b in loaded.blocks for m in b.module.modules()}
    for module in loaded.model.modules():
        if id(module) not in inside:
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(device)


def release_outside(loaded: LoadedModel) -> None:
    named = dict(loaded.model.named_parameters(remove_duplicate=False))
    for name in loaded.outside_blocks():
        if name not in loaded.tied:
            set_parameter(loaded.model, name, torch.empty_like(named[name], device="meta"))
    retie(loaded.model, loaded.tied)
