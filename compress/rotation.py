"""Hadamard rotations folded into a loaded model: what turns with what, found from the model itself.

Nothing is rewritten on disk or in memory at once: `LoadedModel.tensor` gives rotated tensors from then on, computed
from the mapped originals when asked for, so the engine and the artifact see a model that was always so. What turns is
found by running blocks on a few tokens, not from a table of architectures:

  * a reader is a linear whose input is the output of a norm; the norm itself is measured (its gain taken out, does
    it commute with a rotation?), which tells RMSNorm from LayerNorm and a gain g from one stored as 1 + g;
  * a writer is a linear whose output, moved by a vector, moves what the next norm or the next block reads by a
    multiple of that vector;
  * the linear that feeds another linear channel by channel (v feeds o) is found by `groups`; when all channels of v
    are made equal, those channels of o's input that are equal belong to one head.

Then the rotated model is run, in float32 and before anything is rounded, and must compute the same hidden states and
logits. `compress.methods.hadamard` has the mathematics and the papers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from compress.config_quant import HadamardConfig
from compress.errors import UnsupportedModel
from compress.groups import Fold, RunBlock, find_scale_groups
from compress.methods.hadamard import Turn, random_turn
from compress.models import Block, LoadedModel, is_linear, linear_weight, untie
from compress.plan import Plan
from compress.rotated import Rotation
from compress.streams import HiddenStream, open_stream, tail_logits

# ||difference|| / ||value|| of a token's hidden state or logits, in float32. Rounding stays far below, and a part of
# the model that does not turn with the rest is an error of order 1.
_MAX_DIFFERENCE = 2e-3
_PROBE = (2, 32)  # sequences and tokens that the search and the check run on
_NO_RESIDUAL = "use quant.hadamard.residual=false with value=true (inside attention alone), or quant.transform=none"
_NO_VALUE = "use quant.hadamard.value=false with residual=true (the residual stream alone), or quant.transform=none"


def attach_rotation(loaded: LoadedModel, plan: Plan, config: HadamardConfig, device: torch.device) -> list[str]:
    """Find what turns, check that the model's function stays as it is, and make `loaded` give rotated tensors.

    An embedding that is also the head needs two tensors once the last norm's gain is folded into the head: the tie is
    broken, here and in what `save_artifact` writes.

    Args:
        plan: says which linears stay unquantized and so are rounded to the checkpoint's dtype.

    Returns:
        What a user should know, a sentence each.

    Raises:
        UnsupportedModel: something in the model does not turn (a LayerNorm, a norm after attention or MLP, position
            embeddings); it is named, with the setting that leaves it alone.
    """
    finder = _Finder(loaded, config, device)
    expected, logits = finder.search()
    notes = [
        f"the rotation unties {name} from {holder} (the last norm's gain goes into the head): "
        f"{loaded.model.get_parameter(holder).numel():,} more weights are stored; quant.hadamard.residual=false keeps "
        "the tie"
        for name, holder in (untie(loaded) if config.residual else {}).items()
    ]
    loaded.rotation = finder.rotation
    _check(loaded, finder, expected, logits)
    quantized = [*plan.linears, *([plan.head] if plan.head is not None else [])]
    masters = {f"{p.name}.weight" for p in quantized if p.scheme is not None}
    finder.rotation.rounded = set(finder.rotation.changes) - masters
    return notes


class _Finder:
    """One pass through the unrotated model that fills a Rotation and keeps what the rotated one must compute."""

    def __init__(self, loaded: LoadedModel, config: HadamardConfig, device: torch.device) -> None:
        self.loaded, self.config, self.device = loaded, config, device
        self.rotation = Rotation(device)
        vocabulary = int(loaded.model.config.get_text_config().vocab_size)  # type: ignore[operator,union-attr]
        context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator,union-attr]
        n_tokens = min(_PROBE[1], context) if isinstance(context, int) and context > 0 else _PROBE[1]
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, vocabulary, (_PROBE[0], n_tokens), generator=generator)
        self.residual: Turn | None = None

    def open(self) -> HiddenStream:
        return open_stream(self.loaded, self.ids, len(self.ids), self.device, self.device, torch.float32)

    def search(self) -> tuple[list[Tensor], Tensor]:
        """Fill the rotation. Returns the hidden states [B, T, H] before each block and after the last, and logits."""
        loaded = self.loaded
        stream = self.open()
        if self.config.residual:
            self.residual = random_turn(stream.hidden[0].shape[-1], self.config.seed)
        hidden = [stream.hidden[0]]
        with torch.no_grad():
            for index, block in enumerate(loaded.blocks):
                loaded.materialize(block.name, self.device, torch.float32)
                self._block(stream, block, index)
                stream.advance(block, index)
                hidden.append(stream.hidden[0])
                loaded.release(block.name)
            logits = self._ends(stream) if self.residual else tail_logits(loaded, stream, torch.float32)
        return hidden, logits

    def _block(self, stream: HiddenStream, block: Block, index: int) -> None:
        def run(module: nn.Module) -> Tensor:
            return stream.forward(module, index, 0)

        if self.residual is not None:
            self._turn_residual(block, run, self.residual)
        if self.config.value:
            before = stream.hidden[0]
            self._turn_values(block, lambda module: run(module) - before, index)

    def _turn_residual(self, block: Block, run: RunBlock, turn: Turn) -> None:
        seen = _observe(block, run)
        norms = {
            name: module
            for name, module in block.module.named_modules()
            if name in seen.outputs and _is_norm(module, turn.signs.numel())
        }
        readers = {
            linear: norm
            for linear in block.linears
            if linear in seen.inputs
            for norm in norms
            if _same(seen.inputs[linear], seen.outputs[norm])
        }
        if not readers:
            raise UnsupportedModel(
                f"no linear of {block.name} reads the output of a norm with a gain of the residual stream's width "
                f"{turn.signs.numel()}, so the stream cannot be rotated; {_NO_RESIDUAL}"
            )
        for norm in norms:
            writer = next((n for n in block.linears if _same(seen.outputs.get(n), seen.inputs[norm])), None)
            if norm not in readers.values() and writer is not None and writer not in readers:
                raise UnsupportedModel(
                    f"{block.name}.{norm} normalizes the output of {writer} before it is added to the residual stream, "
                    f"and its gain does not turn with the stream; {_NO_RESIDUAL}"
                )
        for norm in dict.fromkeys(readers.values()):
            offset = _gain_offset(f"{block.name}.{norm}", norms[norm], turn)
            self.rotation.change(f"{block.name}.{norm}.weight").constant = 1.0 - offset
            for linear in (n for n, m in readers.items() if m == norm):
                change = self.rotation.change(f"{block.name}.{linear}.weight")
                change.gain, change.columns = (f"{block.name}.{norm}.weight", offset), turn
        writers = [
            name
            for name, module in block.linears.items()
            if name not in readers
            and linear_weight(module).shape[0] == turn.signs.numel()
            and _moves_stream(block, run, name, seen, [n for n in seen.outputs if n in readers.values()])
        ]
        if not writers:
            raise UnsupportedModel(
                f"no linear of {block.name} adds its output to the residual stream as it is; {_NO_RESIDUAL}"
            )
        for name in writers:
            self._turn_rows(block, name, turn)

    def _turn_rows(self, block: Block, name: str, turn: Turn) -> None:
        self.rotation.change(f"{block.name}.{name}.weight").rows = turn
        if getattr(block.linears[name], "bias", None) is not None:
            self.rotation.change(f"{block.name}.{name}.bias").rows = turn

    def _turn_values(self, block: Block, run: RunBlock, index: int) -> None:
        found = False
        for group in find_scale_groups(block, run, list(block.linears)):
            if group.producer is None or group.fold is not Fold.LINEAR:
                continue
            assert group.channel_map is not None
            size = _head_size(block, run, group.producer, group.linears[0])
            if size is None or not _whole_heads(group.channel_map, size):
                continue  # up feeds down too, but every channel of it has a gate of its own
            n = linear_weight(block.linears[group.producer]).shape[0]
            turn = random_turn(n, (self.config.seed + 1) * 1_000_003 + index, size)
            columns = Turn(turn.signs[group.channel_map], turn.size)
            if not _passes_turn(block, run, group.producer, turn, group.linears[0], columns):
                continue  # a ReLU passes positive factors, which is all that the search for producers tried
            self._turn_rows(block, group.producer, turn)
            for name in group.linears:
                self.rotation.change(f"{block.name}.{name}.weight").columns = columns
            found = True
        if not found:
            raise UnsupportedModel(
                f"{block.name} has no linear that goes to attention's output head by head as values alone (a fused "
                f"q/k/v does not show which of its rows are values); {_NO_VALUE}"
            )

    def _ends(self, stream: HiddenStream) -> Tensor:
        """Embedding, last norm and head; returns the logits of the stream that has passed every block."""
        loaded, turn = self.loaded, self.residual
        assert turn is not None
        kind, width = type(loaded.model).__name__, turn.signs.numel()
        embedding = loaded.model.get_input_embeddings()  # type: ignore[operator]
        head = loaded.model.get_output_embeddings()  # type: ignore[operator]
        names = {id(module): name for name, module in loaded.model.named_modules()}
        inside = tuple(block.name + "." for block in loaded.blocks)
        norms = {
            name: module
            for name, module in loaded.model.named_modules()
            if not name.startswith(inside) and _is_norm(module, width)
        }
        if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
            raise UnsupportedModel(f"{kind} has no embedding and linear head that a rotation can turn; {_NO_RESIDUAL}")
        outputs: dict[str, Tensor] = {}
        inputs: list[Tensor] = []
        with ExitStack() as stack:
            for name, module in norms.items():
                stack.callback(module.register_forward_hook(_keep_output(outputs, name)).remove)
            stack.callback(head.register_forward_pre_hook(lambda _, args: inputs.append(args[0])).remove)
            logits = tail_logits(loaded, stream, torch.float32)
        last = next((n for n, value in outputs.items() if inputs and _same(value, inputs[-1])), None)
        if last is None or embedding.weight.shape[1] != width:
            raise UnsupportedModel(
                f"the head of {kind} does not read the last norm, or its embedding is not as wide as the residual "
                f"stream ({width}); {_NO_RESIDUAL}"
            )
        loaded.materialize(last, self.device, torch.float32)
        offset = _gain_offset(last, norms[last], turn)
        loaded.release(last)
        self.rotation.change(f"{last}.weight").constant = 1.0 - offset
        self.rotation.change(f"{names[id(embedding)]}.weight").columns = turn
        change = self.rotation.change(f"{names[id(head)]}.weight")
        change.gain, change.columns = (f"{last}.weight", offset), turn
        return logits


def _check(loaded: LoadedModel, finder: _Finder, expected: list[Tensor], logits: Tensor) -> None:
    """The rotated model, before anything is rounded, must compute what the original one did."""
    turn = finder.residual
    remedy = _NO_VALUE if turn is None else _NO_RESIDUAL

    def compare(what: str, found: Tensor, before: Tensor) -> None:
        wanted = before.double() if turn is None else turn.apply(before)
        _compare(loaded, what, found, wanted, remedy)

    stream = finder.open()
    compare("the input of the first block", stream.hidden[0], expected[0])
    with torch.no_grad():
        for index, block in enumerate(loaded.blocks):
            loaded.materialize(block.name, finder.device, torch.float32)
            stream.advance(block, index)
            loaded.release(block.name)
            compare(f"the output of {block.name}", stream.hidden[0], expected[index + 1])
        _compare(loaded, "the logits", tail_logits(loaded, stream, torch.float32), logits.double(), remedy)


def _compare(loaded: LoadedModel, what: str, found: Tensor, wanted: Tensor, remedy: str) -> None:
    difference = (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-30)
    worst = float(difference.max())
    if not worst <= _MAX_DIFFERENCE:  # NaN fails too
        raise UnsupportedModel(
            f"{what} of {type(loaded.model).__name__} changes by {worst:.1e} of its size under a Hadamard rotation "
            f"(limit {_MAX_DIFFERENCE:g}): something there does not turn with the rest, such as position embeddings or "
            f"a gain for each channel; {remedy}"
        )


@dataclass
class _Seen:
    """Inputs and outputs of the leaves of a block by name, in execution order, and the block's own output."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    result: Tensor


def _observe(block: Block, run: RunBlock) -> _Seen:
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                inputs[name], outputs[name] = args[0], output

        return hook

    with ExitStack() as stack:
        for name, module in block.module.named_modules():
            if is_linear(module) or _is_norm(module):
                stack.callback(module.register_forward_hook(hook_for(name)).remove)
        return _Seen(inputs, outputs, run(block.module))


def _is_norm(module: nn.Module, width: int | None = None) -> bool:
    """A module with a 1-D weight, of this width, and nothing below it."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or any(True for _ in module.children()):
        return False
    return width is None or weight.numel() == width


def _keep_output(outputs: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        outputs[name] = output

    return hook


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """One tensor, or a view of all of it."""
    if a is None or b is None:
        return False
    return a is b or (a.shape == b.shape and a.data_ptr() == b.data_ptr())


def _gain_offset(name: str, module: nn.Module, turn: Turn) -> float:
    """0 for a norm whose output is g times the normalized input, 1 for (1 + g) times.

    Raises:
        UnsupportedModel: without its gain it does not commute with a rotation, or it is no norm with a gain.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    gain = weight.detach().clone()
    # a mean of its own in every row, so that one that is subtracted shows
    x = torch.randn(8, gain.numel(), generator=torch.Generator().manual_seed(0))
    x = (x + torch.arange(1.0, 9.0)[:, None]).to(gain)
    try:
        with torch.no_grad():
            output = module(x)
            shifted = module(x + 3)
            for offset in (0.0, 1.0):
                weight.fill_(1 - offset)
                plain = module(x)
                if _close(plain * (gain + offset), output):
                    turned = module(turn.apply(x).to(x))
                    break
                weight.copy_(gain)
            else:
                plain = turned = None
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UnsupportedModel(f"{name} ({type(module).__name__}) cannot be measured alone: {error}; "
                               f"{_NO_RESIDUAL}") from error  # fmt: skip
    finally:
        with torch.no_grad():
            weight.copy_(gain)
    kind = type(module).__name__
    if _close(shifted, output):
        raise UnsupportedModel(
            f"{name} ({kind}) subtracts the mean, as LayerNorm does, and the mean of the channels does not turn with "
            f"them; {_NO_RESIDUAL}"
        )
    if plain is None or turned is None:
        raise UnsupportedModel(f"{name} ({kind}) is not a norm times a gain of its own; {_NO_RESIDUAL}")
    if not _close(turned, turn.apply(plain)):
        raise UnsupportedModel(f"{name} ({kind}) does not turn with its input; {_NO_RESIDUAL}")
    return offset


def _close(a: Tensor, b: Tensor) -> bool:
    return float((a.double() - b.double()).norm()) <= 1e-4 * float(b.double().norm())


def _moves_stream(block: Block, run: RunBlock, name: str, seen: _Seen, norms: list[str]) -> bool:
    """A vector added to the linear's output shows up, times a number, in the next reading of the stream: the input
    of a norm that linears read, or the block's output."""
    readings = [seen.inputs[n] for n in norms]
    size = (readings[-1] if readings else seen.result).double().square().mean().sqrt()
    width = seen.result.shape[-1]
    delta = torch.randn(width, generator=torch.Generator().manual_seed(1)).to(seen.result) * float(size)
    handle = block.linears[name].register_forward_hook(lambda _, __, output: output + delta)
    try:
        after = _observe(block, run)
    finally:
        handle.remove()
    for before, now in zip([*readings, seen.result], [*(after.inputs[n] for n in norms), after.result], strict=True):
        change = (now - before).double().reshape(-1, width)
        # the part of the stream that is much larger than delta is rounded
        if float(change.norm()) <= 1e-4 * float(delta.double().norm()):
            continue
        wanted = delta.double() * float((change @ delta.double()).mean() / delta.double().square().sum())
        return float((change - wanted).norm()) <= 1e-3 * float(change.norm())
    return False


def _head_size(block: Block, run: RunBlock, producer: str, consumer: str) -> int | None:
    """Channels that attention mixes over tokens in one way: with all of the producer's channels made equal, runs of
    equal channels in the consumer's input. None where runs differ in length or are single channels."""
    handle = block.linears[producer].register_forward_hook(lambda _, __, output: output[..., :1].expand_as(output) * 1)
    try:
        mixed = _observe(block, run).inputs[consumer]
    finally:
        handle.remove()
    mixed = mixed.double().reshape(-1, mixed.shape[-1])
    step = (mixed[:, 1:] - mixed[:, :-1]).abs().amax(0) > 1e-5 * float(mixed.abs().max())
    starts = [0, *(step.nonzero().flatten() + 1).tolist(), mixed.shape[1]]
    sizes = {b - a for a, b in pairwise(starts)}
    size = sizes.pop()
    return size if not sizes and size > 1 else None


def _passes_turn(block: Block, run: RunBlock, producer: str, turn: Turn, consumer: str, columns: Turn) -> bool:
    """With the producer's output turned, the consumer's input is turned."""
    before = _observe(block, run).inputs[consumer]
    handle = block.linears[producer].register_forward_hook(lambda _, __, output: turn.apply(output).to(output))
    try:
        after = _observe(block, run).inputs[consumer]
    finally:
        handle.remove()
    return _close(after, columns.apply(before))


def _whole_heads(channel_map: Tensor, size: int) -> bool:
    """Every run of `size` input channels comes from one whole run of the producer's, in order."""
    heads = channel_map.view(-1, size)
    return bool((heads[:, 0] % size == 0).all()) and torch.equal(heads, heads[:, :1] + torch.arange(size))
